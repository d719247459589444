"""LoRA: fine-tuning a large model by small updates (arXiv 2106.09685).

    y = W x + (16 / rank) B A x        W stays as it is; A (rank, in) starts random, B (out, rank) at zero, both learn

The update of a matrix is a product of two narrow ones, so that gradients, AdamW's moments and the file that is saved
are about a hundredth of the model's, and one card of 24 GB is enough. `train.py --lora 16` adds such updates to the
linear layers in the blocks of T5 and decoder that its stage trains, and trains nothing else; the file that comes out,
adapter.safetensors, holds A and B alone. To draw, they are added into W (`merge`), which costs nothing per token.

Next: `weights.py`, which reads and writes the files.
"""
import torch
import torch.nn.functional as F
from torch import nn

from cli import InputError

ALPHA = 16                 # fixed, so that another rank needs no other learning rate (section 4.1 there)
BLOCKS = ("encoder.t5.encoder.blocks", "decoder.layers")       # whose linear layers can be adapted


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank update beside its weight."""

    def adapt(self, a, b):
        """Gives it A (rank, in) and B (out, rank)."""
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x):
        """(..., in) -> (..., out)"""
        update = F.linear(F.linear(x, self.lora_a), self.lora_b)                          # (..., out)
        return F.linear(x, self.weight, self.bias) + ALPHA / len(self.lora_a) * update


def linears(mentor, trains=BLOCKS):
    """{name: linear layer} of the blocks that can be adapted, as far as a stage trains them; trains: name prefixes."""
    return {name: module for name, module in mentor.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(BLOCKS) and name.startswith(trains)}


def adapted(mentor):
    """{name: LoraLinear} of all that have an update; empty for a model without LoRA."""
    return {name: module for name, module in mentor.named_modules() if isinstance(module, LoraLinear)}


def add(mentor, rank, trains):
    """Adds updates that change nothing yet, the same on every process. trains: name prefixes, as a stage has them."""
    chosen = linears(mentor, tuple(trains))
    if not chosen:
        raise InputError("--lora adapts the blocks of T5 and decoder, but this stage trains none of them, only "
                         f"{', '.join(trains)}; leave it out")
    generator = torch.Generator().manual_seed(0)
    for module in chosen.values():
        if not rank < min(module.weight.shape):
            raise InputError(f"--lora {rank}: is no smaller than a matrix of {list(module.weight.shape)}; give a lower "
                             f"rank")
        a = torch.randn(rank, module.in_features, generator=generator, device="cpu") / module.in_features**0.5
        device = module.weight.device
        module.__class__ = LoraLinear
        module.adapt(a.to(device), torch.zeros(module.out_features, rank, device=device))


def tensors_of(mentor):
    """{name: tensor} of all updates."""
    return {name: tensor for name, tensor in mentor.state_dict().items() if ".lora_" in name}


def put(mentor, tensors, path):
    """Gives a model the updates that a file holds; InputError names what does not belong to it. path: for messages"""
    layers, parts = linears(mentor), {}
    for name, tensor in tensors.items():
        layer, _, which = name.rpartition(".lora_")
        if layer not in layers or which not in ("a", "b"):
            raise InputError(f"{path}: {name} is an update of nothing that this model has; name the weights that it "
                             f"was trained from")
        parts.setdefault(layer, {})[which] = tensor
    for layer, pair in parts.items():
        module = layers[layer]
        a, b = (pair.get(which, torch.empty(0)) for which in "ab")
        if b.shape[1:] != a.shape[:1] or (b.shape[:1], a.shape[1:]) != ((module.out_features,), (module.in_features,)):
            raise InputError(f"{path}: {layer}.lora_a is {list(a.shape)} and lora_b {list(b.shape)}, which do not fit "
                             f"the layer's {list(module.weight.shape)}; name the weights that it was trained from")
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise InputError(f"{path}: {layer} holds values that are not finite; take an earlier checkpoint")
        module.__class__ = LoraLinear
        module.adapt(a.float(), b.float())


@torch.no_grad()
def merge(mentor):
    """Adds every update into its weight, in fp32, and removes it."""
    for module in adapted(mentor).values():
        update = ALPHA / len(module.lora_a) * (module.lora_b.float() @ module.lora_a.float())
        module.weight = nn.Parameter((module.weight.float() + update).to(module.weight.dtype))
        del module.lora_a, module.lora_b
        module.__class__ = nn.Linear
