"""Trains every part of MENTOR, stage by stage, on one process or many.

    python train.py --stage 2 --data pairs.jsonl --init out/stage1 --out out/stage2
    torchrun --nproc_per_node=8 train.py --stage 2 --data pairs.jsonl --init out/stage1 --out out/stage2

A stage is one row of STAGES: what trains, on which tasks, how long. Every flag overrides its row. `--out` becomes a
folder that `sample.py --weights` takes, with `log.jsonl`, a loss plot and pictures drawn along the way beside it, and
checkpoints from which `--resume` goes on exactly. "Step" always means an optimizer step.

In this file: stages, command line and schedule, objectives, processes, the optimizer, memory, checkpoints, evaluation,
the loop. Next: `emoji.py`, which paints the small world that `--model tiny` is trained on.
"""
import argparse
import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import weights
from data import InputError
from model import SIZES, Mentor, Prefix, replace_folder
from rope2d import PREFIX_ROPE
from vqgan import Discriminator, Perceptual


# ---------------------------------------------------------------------------------------------------------------------
# Stages

@dataclass(frozen=True)
class Stage:
    """One row of the recipe (paper section 4.1 and appendix)."""
    trains: tuple                    # prefixes of the parameters' names
    tasks: dict                      # task -> weight in the mixture
    epochs: float
    global_batch: int
    lr: float
    prefix_tokens: int = 512
    prefix_rope: str | None = None   # None = as the weights it starts from
    adversarial: float = 0.1         # weight of the tokenizer's discriminator, 0 = none
    micro: int = 8                   # the largest micro-batch that is tried without being asked for
    muon: bool = False               # Muon moves the hidden matrices, AdamW the rest
    after: str | None = None         # the stage it starts from, where --init says nothing


ENCODER_AND_DECODER = ("encoder.connector", "encoder.t5", "projector", "decoder")
STAGES = {
    # the VQGAN, the pictures' tokenizer; after LlamaGen's recipe, with its own discriminator
    "vqgan": Stage(("vqgan",), {"picture": 1}, epochs=40, global_batch=128, lr=1e-4),
    # text to image with the corrected rotary positions, from LlamaGen's weights
    "rope": Stage(("projector", "decoder"), {"t2i": 1}, epochs=1, global_batch=256, lr=1e-4, prefix_rope="identity"),
    # captions through the frozen T5
    "connector": Stage(("encoder.connector",), {"caption": 1}, epochs=1, global_batch=256, lr=1e-3),
    # multimodal alignment; the released code trained connector + T5 + output layer here instead
    "1": Stage(("projector", "decoder"), {"t2i": 700, "reconstruct": 180, "segment": 1600}, epochs=1,
               global_batch=128, lr=5e-4),
    # instruction tuning: everything but CLIP
    "2": Stage(ENCODER_AND_DECODER, {"t2i": 600, "segment": 150, "recover": 150, "subject": 400}, epochs=2,
               global_batch=128, lr=1e-4),
    # several subjects, up to four reference pictures
    "multi": Stage(ENCODER_AND_DECODER, {"t2i": 600, "segment": 150, "recover": 150, "subject": 400, "multi": 1500},
                   epochs=1, global_batch=128, lr=1e-4, prefix_tokens=1280),
}
# The small model of the emoji world (`--model tiny`), an epoch being 100,000 samples. "pretrain" stands for what CLIP,
# FLAN-T5 and LlamaGen bring; the stages after it are the published ones, with some reconstruction kept in stage 2.
TINY = {
    "vqgan": replace(STAGES["vqgan"], epochs=0.768, global_batch=32, lr=1.5e-3, prefix_tokens=128, adversarial=0.0,
                     micro=32),
    "pretrain": Stage(("encoder", "projector", "decoder"), {"t2i": 50, "reconstruct": 25, "segment": 25}, epochs=0.48,
                      global_batch=32, lr=3e-3, prefix_tokens=128, micro=16, muon=True, after="vqgan"),
    "1": replace(STAGES["1"], tasks={"t2i": 20, "reconstruct": 40, "segment": 40}, epochs=0.112, global_batch=32,
                 lr=2e-3, prefix_tokens=128, micro=16, muon=True, after="pretrain"),
    "2": replace(STAGES["2"], tasks={"t2i": 10, "reconstruct": 15, "segment": 15, "recover": 15, "subject": 45},
                 epochs=0.64, global_batch=32, lr=2e-3, prefix_tokens=128, micro=16, muon=True, after="1"),
    "multi": replace(STAGES["multi"], tasks={"t2i": 15, "reconstruct": 10, "segment": 15, "subject": 30, "multi": 30},
                     epochs=0.5, global_batch=32, lr=1e-3, prefix_tokens=192, micro=16, muon=True, after="2"),
}
BETAS, MOMENTUM = (0.9, 0.95), 0.95      # of AdamW, of Muon
WEIGHT_DECAY, CLIP_NORM = 0.05, 1.0
WARMUP, FLOOR = 0.05, 0.1  # share of the steps in which the learning rate rises; what share of it is left in the end
UNCONDITIONAL = 0.1        # share of samples that learn the unconditional rows
UNQUANTIZED = 0.02         # share of the steps that a new tokenizer trains before its codes are placed
REVIVE_EVERY = 50          # steps between looks for codes of a new tokenizer that nothing chooses
NEARNESS = 4               # pretraining: what a code's squared distance from where it should lie weighs
SKETCH = 8                 # pretraining: pixels a side of what a caption's summary has to tell of its picture
ALIGNED = ("reconstruct", "segment")     # tasks whose target lies under the reference: pretraining names its tokens


# ---------------------------------------------------------------------------------------------------------------------
# Command line and schedule

def parse(argv):
    """The command line -> arguments; a flag that was not given is None or its default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what")
    what.add_argument("--stage", required=True, choices=dict.fromkeys([*STAGES, *TINY]))
    what.add_argument("--init", help="where the weights come from: random, a folder, a hub repository, or one of "
                      f"{', '.join(weights.HUB)}; default: with --model tiny the stage before, else random")
    what.add_argument("--model", choices=SIZES, help="size of a random start (default toy); tiny also brings its own "
                                                     "stage table and data, the emoji world")
    what.add_argument("--prefix-rope", choices=PREFIX_ROPE, help="rotation of the prefix; default: the stage's")
    what.add_argument("--prefix-tokens", type=int, help="room for that many prefix rows, never less than the weights "
                      "have; default: the stage's")
    what.add_argument("--size", type=int, help="pixels a side of the targets; default: the weights' own")
    what.add_argument("--adversarial", type=float, metavar="WEIGHT", help="of the discriminator, in the second half "
                      "of --stage vqgan; 0 = no discriminator")
    what.add_argument("--lpips", nargs=2, metavar=("VGG", "HEADS"), help="weights of a perceptual loss for --stage "
                                                                         "vqgan: vgg16-397923af.pth and vgg.pth")
    source = parser.add_argument_group("data")
    source.add_argument("--data", action="append", metavar="JSONL", help="repeat for several")
    source.add_argument("--val", action="append", metavar="JSONL", help="for validation losses and pictures")
    source.add_argument("--backgrounds", action="append", metavar="JSONL", help="pictures for the recovery task")
    source.add_argument("--codes", metavar="FOLDER", help="what `data.py encode` made of --data")
    source.add_argument("--without", action="append", default=[], metavar="TASK", help="leave a task out; repeat")
    source.add_argument("--workers", type=int, default=2, help="processes that load pictures, per rank")
    how = parser.add_argument_group("how long and how fast")
    how.add_argument("--steps", type=int, help="optimizer steps; default: from --epochs")
    how.add_argument("--epochs", type=float)
    how.add_argument("--global-batch", type=int)
    how.add_argument("--micro-batch", type=int, help="samples a process computes at once; default: the most that "
                     "divide its share, up to the stage's limit (8; tiny 16, its vqgan 32)")
    how.add_argument("--lr", type=float)
    how.add_argument("--seed", type=int, default=0)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="default: cuda, else cpu")
    machine.add_argument("--fsdp", action=argparse.BooleanOptionalAction, default=False, help="spread parameters, "
                         "gradients and optimizer over the ranks (FSDP2) instead of copying them (DDP)")
    machine.add_argument("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False,
                         help="compute activations twice instead of keeping them")
    machine.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FOLDER", help="default: out/MODEL/STAGE")
    output.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False,
                        help="go on from the newest checkpoint in --out")
    output.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    output.add_argument("--sample-every", type=int, default=500, help="steps between validations and sheets of "
                        "pictures")
    output.add_argument("--keep", type=int, default=2, help="checkpoints to keep")
    return fill_from_table(parser.parse_args(argv))


def fill_from_table(args):
    """Arguments -> the same with what was not given taken from the stage's row; raises InputError for what clashes."""
    data.check_numbers(args)
    table = TINY if args.model == "tiny" else STAGES
    if args.stage not in table:
        raise InputError(f"--model tiny has no stage {args.stage}; its stages are {', '.join(TINY)}" if table is TINY
                         else f"stage {args.stage} is for --model tiny; add that, or take one of {', '.join(STAGES)}")
    stage = table[args.stage]
    args.out = args.out or os.path.join("out", args.model or "mentor", args.stage)
    args.init = args.init or (os.path.join("out", args.model, stage.after) if stage.after else "random")
    if not args.data and args.model != "tiny":
        raise InputError("there is nothing to learn from; add --data JSONL (python data.py makes one of pictures)")
    for name in ("epochs", "global_batch", "lr", "prefix_tokens", "prefix_rope", "adversarial"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(stage, name))
    if unknown := set(args.without) - set(stage.tasks):
        raise InputError(f"--without {' '.join(unknown)}: stage {args.stage} has no such task; its tasks are "
                         f"{', '.join(stage.tasks)}")
    args.tasks = {task: weight for task, weight in stage.tasks.items() if task not in args.without}
    args.trains, args.largest_micro, args.muon = stage.trains, stage.micro, stage.muon
    if not args.tasks:
        raise InputError(f"--without leaves stage {args.stage} no task; remove one of them")
    if args.model not in (None, "tiny") and args.init != "random":
        raise InputError("--model is for --init random; other weights bring their own size")
    if args.fsdp and args.stage == "vqgan":
        raise InputError("--fsdp is for the large parts; the tokenizer trains without it")
    return args


def lr_at(step, steps, peak):
    """Learning rate of a step (from 0): linear warm-up over 5 % of the steps, then a cosine down to a tenth."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


# ---------------------------------------------------------------------------------------------------------------------
# Objectives: batch -> losses (B,), each the sum over a sample's elements, so that any split of a batch adds up

class TokenObjective(nn.Module):
    """Next-token cross entropy: stages rope, 1, 2 and multi."""

    def __init__(self, mentor, args):
        super().__init__()
        self.mentor = mentor

    def elements(self, batch):
        """How many terms the losses of this batch are sums of."""
        return len(batch["ids"]) * self.mentor.config.grid**2

    def tokens(self, batch):
        """What is to be written: read from the batch, or encoded now. -> (B, T)"""
        if "tokens" in batch:
            return batch["tokens"]
        with torch.autocast(batch["ids"].device.type, enabled=False):
            return self.mentor.vqgan.encode(batch["target"])

    def forward(self, batch, progress=0.0):
        prefix = self.mentor.prefix(batch["ids"], batch["mask"], batch["refs"], batch.get("drop"))
        losses, _ = self.mentor.losses(prefix, self.tokens(batch))                        # (B, T)
        # a batch of text alone must not leave these without gradients, for the ranks' averages wait for every one
        seeing = [p for part in (self.mentor.encoder.clip, self.mentor.encoder.connector) for p in part.parameters()]
        return losses.sum(dim=1) + 0 * sum(p.sum() for p in seeing if p.requires_grad)    # (B,)


class PretrainObjective(TokenObjective):
    """Stage pretrain: what CLIP, T5 and LlamaGen bring to the published recipe, learnt from nothing.

    The encoders learn to see and to read, through two linear heads that are thrown away afterwards: one names the
    tokens under each patch of a reference, in the tasks whose target lies under it; the other sketches the picture in
    a few pixels from a caption's last row. The decoder learns to write from captions, at times with what it wrote
    before blanked, so from the caption alone.
    """

    def __init__(self, mentor, args):
        super().__init__(mentor, args)
        config = mentor.config
        if config.grid % config.vision.grid:
            raise InputError(f"--size {config.image_size} gives {config.grid} tokens a side for {config.vision.grid} "
                             f"patches; take a multiple of {config.vision.grid * config.vqgan.factor}")
        self.side = config.grid // config.vision.grid          # tokens a side of one patch
        self.head = nn.Linear(config.decoder.width, self.side**2 * config.vqgan.code_width)
        self.sharpness = nn.Parameter(torch.tensor(20.0))
        self.sketch = nn.Linear(config.decoder.width, 3 * SKETCH**2)
        self.blank = nn.Parameter(0.02 * torch.randn(config.decoder.width))

    def forward(self, batch, progress=0.0):
        """-> (B,)"""
        tokens = self.tokens(batch)
        aligned = torch.tensor([task in ALIGNED for task in batch["tasks"]], device=tokens.device)
        drop = batch["drop"] & ~aligned if "drop" in batch else torch.zeros_like(aligned)
        picture = batch["target"] if "target" in batch else self.mentor.vqgan.decode(tokens)
        prefix = self.mentor.prefix(batch["ids"], batch["mask"], batch["refs"], drop)
        losses = tokens.new_zeros(len(tokens), dtype=torch.float32)
        for chosen, cost, wanted in ((aligned, self.naming, tokens), (~aligned, self.writing, tokens),
                                     (~aligned & ~drop, self.sketching, picture)):
            if chosen.any():
                part = Prefix(*(rows[chosen][:, prefix.valid[chosen].any(dim=0)] for rows in prefix))  # least padding
                losses = losses.index_add(0, chosen.nonzero()[:, 0], cost(part, wanted[chosen]))
        return losses + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)        # as above

    def writing(self, prefix, tokens):
        """Cross entropy of all tokens. Neighbouring tokens tell so much about each other that the little a caption
        adds would go unnoticed for long; so in half of the samples some or all of what was written is blanked. -> (n,)
        """
        x = self.mentor.decoder.tok_embeddings(tokens[:, :-1])                            # (n, T - 1, D)
        if self.training:
            x = torch.where(self.hidden(tokens)[..., None], self.blank, x)
        logits = self.mentor.decoder.read(prefix, x, self.mentor.config.grid)             # (n, T, V)
        return F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none").sum(dim=1)

    @staticmethod
    def hidden(tokens):
        """What is blanked: a function of the sample alone, on whichever rank it is. -> (n, T - 1) bool"""
        hidden = torch.zeros(tokens[:, 1:].shape, dtype=torch.bool)
        for row, sample in zip(hidden, tokens.cpu()):
            generator = torch.Generator().manual_seed(int(sample.sum()))
            blanked, share = torch.rand(2, generator=generator)
            row |= (torch.rand(row.shape, generator=generator) < 1.2 * share) & (blanked < 0.5)
        return hidden.to(tokens.device)

    def naming(self, prefix, tokens):
        """Cross entropy of the tokens under every patch. The head says where their codes lie on the sphere: that codes
        which look alike are neighbours need not be learnt then, and a near miss is told from a bad one. -> (n,)"""
        patches, codebook = self.mentor.config.vision.grid, self.mentor.vqgan.quantize.embedding.weight
        codes = F.normalize(codebook, dim=-1)                                             # (V, e)
        wanted = tokens.view(-1, patches, self.side, patches, self.side).transpose(2, 3).flatten()
        named = self.head(prefix.rows[prefix.is_image]).unflatten(-1, (self.side**2, -1)).flatten(0, 1)   # (n * T, e)
        losses = F.cross_entropy(self.sharpness * (named @ codes.T).float(), wanted, reduction="none")
        losses = losses + NEARNESS * (named - codes[wanted]).square().sum(dim=-1)
        return losses.view(len(tokens), -1).sum(dim=1)                                    # (n,)

    def sketching(self, prefix, pictures):
        """Squared error of the sketch, scaled to about the size of the other losses. -> (n,)"""
        small = F.adaptive_avg_pool2d(pictures, SKETCH).flatten(1)                        # (n, 3 * SKETCH**2)
        error = (self.sketch(prefix.rows[:, -1]).float() - small).square().mean(dim=1)
        return 5 * self.mentor.config.grid**2 * error


class CaptionObjective(nn.Module):
    """Captions through T5's frozen decoder half: stage connector."""

    def __init__(self, mentor, args):
        super().__init__()
        self.mentor = mentor

    def elements(self, batch):
        return int((batch["labels"] != -100).sum())

    def forward(self, batch, progress=0.0):
        h = self.mentor.encoder(batch["ids"], batch["mask"], batch["refs"])
        return self.mentor.encoder.t5.caption_losses(h, batch["mask"], batch["labels"]).sum(dim=1)


class PixelObjective(nn.Module):
    """Reconstruction, codebook, perceptual and adversarial terms: stage vqgan."""

    def __init__(self, mentor, args):
        super().__init__()
        self.mentor, self.adversarial = mentor, args.adversarial
        self.unquantized = UNQUANTIZED if args.init == "random" else 0.0
        self.register_buffer("used", torch.zeros(mentor.config.vqgan.codes, dtype=torch.bool))   # since the last look
        self.discriminator = Discriminator() if args.adversarial else None
        self.perceptual = None
        if args.lpips:
            try:
                self.perceptual = Perceptual().load(*map(weights.read_tensors, args.lpips)).requires_grad_(False)
            except (KeyError, RuntimeError):   # missing or mis-shaped tensors
                raise InputError(f"--lpips {' '.join(args.lpips)}: do not hold VGG-16 and LPIPS' heads; give "
                                 f"torchvision's vgg16-397923af.pth and LPIPS' vgg.pth, in this order") from None

    def elements(self, batch):
        return len(batch["target"])

    def forward(self, batch, progress=1.0):
        """progress: share of the steps done, for what switches on later. -> losses (B,)"""
        real = batch["target"]
        fake, codebook_loss, tokens = self.mentor.vqgan(real, quantized=progress >= self.unquantized)
        if self.training and tokens is not None:
            self.used[tokens.flatten()] = True
        codebook_loss = codebook_loss + 0 * self.mentor.vqgan.quantize.embedding.weight.sum()   # else DDP would miss it
        error = fake - real
        loss = error.abs().mean((1, 2, 3)) + error.square().mean((1, 2, 3)) + codebook_loss
        # edges: neighbours must differ as they do in the picture
        loss = loss + 0.25 * (error.diff(dim=2).abs().mean((1, 2, 3)) + error.diff(dim=3).abs().mean((1, 2, 3)))
        if self.perceptual is not None:
            loss = loss + self.perceptual(fake, real)
        if self.discriminator is not None:
            loss = loss + self.critic_losses(real, fake, listen=progress >= 0.5)
        return loss                                                                       # (B,)

    def critic_losses(self, real, fake, listen):
        """The discriminator learns (hinge loss) from the first step; the tokenizer listens to it later, through a copy
        of its weights that takes no gradient, so that one backward pass serves both. -> (B,)"""
        loss = F.relu(1 - self.discriminator(real)).mean((1, 2, 3))
        loss = loss + F.relu(1 + self.discriminator(fake.detach())).mean((1, 2, 3))
        if listen:
            frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            opinion = torch.func.functional_call(self.discriminator, frozen, (fake,))
            loss = loss - self.adversarial * opinion.mean((1, 2, 3))
        return loss


OBJECTIVES = {"vqgan": PixelObjective, "connector": CaptionObjective, "pretrain": PretrainObjective}   # else tokens
PARTS = ("encoder.clip", "encoder.connector", "encoder.t5", "projector", "decoder", "vqgan")


def freeze(objective, trains):
    """Only the named parts of the model train; the others stay in eval mode, so without dropout."""
    objective.train()
    for name, parameter in objective.mentor.named_parameters():
        parameter.requires_grad_(name.startswith(trains))
    for name in PARTS:
        if not name.startswith(trains):
            objective.mentor.get_submodule(name).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Processes

@dataclass
class Ranks:
    """Where this process stands among all; a single process is rank 0 of 1."""
    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device):
        """Joins what torchrun started, if it did."""
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"--device {name}: there is no CUDA here; use --device cpu")
        if "RANK" not in os.environ:
            return cls(0, 1, torch.device(name))
        if name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if name.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), torch.device(name))

    def sum(self, values):
        """Sums a list of numbers over all ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, thing):
        """Every rank's small Python object, in order of ranks."""
        things = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(things, thing)
        return things

    def barrier(self):
        if self.world > 1:
            dist.barrier()


def wrap(objective, args, ranks):
    """The objective as all ranks train it together; the blocks compiled and checkpointed as asked for."""
    mentor = objective.mentor
    blocks = [*mentor.decoder.layers, *mentor.encoder.t5.encoder.blocks]
    for block in blocks:
        if args.checkpoint_activations:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if args.compile:
            block.compile()
    if ranks.world == 1:
        return objective
    if not args.fsdp:
        return DistributedDataParallel(objective, gradient_as_bucket_view=True, broadcast_buffers=False)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(objective, mesh=mesh)


def accumulating(model, last):
    """Context of one micro-batch: gradients travel between ranks only with the last one of a step."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer

class Muon(torch.optim.AdamW):
    """AdamW, but the matrices of groups with `muon` go by their momentum made orthogonal: every direction moves alike,
    and the small model needs a third of the samples (Jordan et al. 2024, github.com/KellerJordan/Muon; the
    step's length as Liu et al., arXiv 2502.16982, have it, so that both share one learning rate).
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One step; matrices that took theirs are left without gradient, so that AdamW passes them over."""
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is None:
                    continue
                if not self.state[p]:          # "step": AdamW asks every state for it when it reads a checkpoint
                    self.state[p] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                update = orthogonal(p.grad.lerp(momentum, MOMENTUM))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])
                p.grad = None
        return super().step(closure)


def orthogonal(matrix):
    """All singular values brought near 1, by five steps of a Newton-Schulz iteration. (m, n) -> (m, n)"""
    x = matrix.T if len(matrix) > matrix.size(1) else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x.T if len(matrix) > matrix.size(1) else x


def make_optimizer(objective, lr, muon=False):
    """AdamW, with `muon` Muon for the linear layers before the last; weight decay on matrices only."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    hidden = set()
    if muon:
        hidden = {module.weight for module in objective.mentor.modules() if isinstance(module, nn.Linear)}
        hidden -= {objective.mentor.decoder.output.weight}
    groups = [{"params": [p for p in trained if p in hidden], "weight_decay": WEIGHT_DECAY, "muon": True},
              {"params": [p for p in trained if p.dim() >= 2 and p not in hidden], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    groups = [{"muon": False} | group for group in groups if group["params"]]
    return (Muon if muon else torch.optim.AdamW)(groups, lr=lr, betas=BETAS, fused=trained[0].is_cuda)


# ---------------------------------------------------------------------------------------------------------------------
# What it will cost

def activation_elements(config, prefix_rows, image_tokens, trains):
    """Numbers kept for the backward pass by one sample of a token stage, counted layer by layer.

    -> (kept in fp32 whatever autocast does, kept in the compute type); attention is taken to be fused, so that no
    scores are kept. A sample passes T5 (if it or what lies before it trains), then the decoder.
    """
    d, t5 = config.decoder, config.t5
    length = prefix_rows + image_tokens - 1
    full = d.layers * length * 4 * d.width                     # two residual streams and two normed products
    half = d.layers * length * (9 * d.width + 4 * d.hidden)    # norms' outputs; q, k, v and their turns; feed-forward
    full += image_tokens * config.decoder.codes                # log-probabilities
    if any(part.startswith("encoder") for part in trains):
        inner = t5.heads * t5.head_dim
        full += t5.layers * prefix_rows * 4 * t5.width
        half += t5.layers * prefix_rows * (2 * t5.width + 5 * inner + 5 * t5.mlp)
    return full, half


def memory(mentor, args, ranks, micro):
    """GiB a rank needs, by formula: {what: GiB}. Activations are known for the token stages only."""
    share = ranks.world if args.fsdp else 1
    total = sum(p.numel() for p in mentor.parameters())
    trained = sum(p.numel() for p in mentor.parameters() if p.requires_grad)
    low = 2 if ranks.device.type == "cuda" else 4              # bytes of the compute type
    rows = {"parameters (fp32)": 4 * total / share, "gradients (fp32)": 4 * trained / share,
            "optimizer (fp32)": 8 * trained / share}           # AdamW's two moments; of Muon's matrices, one
    if low == 2:
        rows["bf16 copies"] = 2 * trained
    if args.stage not in ("vqgan", "connector"):
        full, half = activation_elements(mentor.config, args.prefix_tokens, mentor.config.grid**2, args.trains)
        sample = 4 * full + low * half
        if args.checkpoint_activations:        # the input of every block, one block in full, and the log-probabilities
            d, t5, tokens = mentor.config.decoder, mentor.config.t5, mentor.config.grid**2
            t5_layers = t5.layers * any(part.startswith("encoder") for part in args.trains)
            inputs = d.layers * (args.prefix_tokens + tokens) * d.width + t5_layers * args.prefix_tokens * t5.width
            sample = 4 * inputs + sample / (d.layers + t5_layers) + 4 * tokens * d.codes
        rows[f"activations ({micro} samples)"] = micro * sample
    return {what: count / 2**30 for what, count in rows.items()}


@dataclass
class Run:
    """Everything a run needs, made once by `prepare`."""
    args: argparse.Namespace
    ranks: Ranks
    mentor: Mentor
    objective: nn.Module             # around the mentor
    model: nn.Module                 # the objective, wrapped for all ranks
    optimizer: torch.optim.Optimizer
    train: torch.utils.data.Dataset
    val: torch.utils.data.Dataset    # --val, or the emoji world's held-out subjects; else the training data, to look at
    accum: int                       # micro-batches a rank computes in a step
    first: int                       # steps done before
    log: object                      # takes a line; silent but on rank 0

    def autocast(self):
        """bf16 products over fp32 weights on a GPU, plain fp32 elsewhere."""
        device = self.ranks.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    @contextmanager
    def evaluating(self):
        """Without dropout and gradients, and with FSDP's shards gathered for what is not called through `model`."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        sharded = hasattr(self.model, "unshard")
        if sharded:
            self.model.unshard()
        with torch.no_grad():
            yield
        if sharded:
            self.model.reshard()
        for module in training:
            module.training = True


def report(run):
    """Prints what will happen: parts, batch arithmetic, memory and length."""
    args, ranks = run.args, run.ranks
    settings = ("tasks", "epochs", "lr", "muon", "prefix_tokens", "prefix_rope", "seed")
    print(f"stage {args.stage}: " + ", ".join(f"{name} {getattr(args, name)}" for name in settings))
    for name in PARTS:
        parameters = list(run.mentor.get_submodule(name).parameters())
        millions = sum(p.numel() for p in parameters) / 1e6
        print(f"  {name:18} {millions:9.2f} M  {'trains' if parameters[0].requires_grad else 'frozen'}")
    print(f"batch: {args.micro_batch} samples x {ranks.world} ranks x {run.accum} micro-batches = {args.global_batch}")
    print(f"steps: {args.steps} of {args.global_batch} samples, {len(run.train)} samples an epoch")
    rows = memory(run.mentor, args, ranks, args.micro_batch)
    print("memory per rank, estimated: " + ", ".join(f"{what} {gib:.2f} GiB" for what, gib in rows.items())
          + f"; together {sum(rows.values()):.2f} GiB")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: out/step-00000500/ is a model folder plus training.safetensors and training.json; the newest model's
# files are linked into out/ itself, so that `sample.py --weights out` always works

STEP = re.compile(r"step-(\d{8})$")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
OURS = "mentor."           # names of the model's tensors in an objective; all others belong to the training alone


def save_checkpoint(run, step, name=None):
    """Writes the state after `step` optimizer steps; it appears complete or not at all. -> its folder"""
    out, state = run.args.out, get_model_state_dict(run.model, options=FULL)   # on rank 0: everything, gathered
    folder = os.path.join(out, name or f"step-{step:08}")
    moments = get_optimizer_state_dict(run.model, run.optimizer, options=FULL)
    if run.ranks.rank == 0:
        part = f"{folder}.part"
        run.mentor.save_pretrained(part, {key.removeprefix(OURS): tensor for key, tensor in state.items()
                                          if key.startswith(OURS)})
        tensors = {key: tensor for key, tensor in state.items() if not key.startswith(OURS)}
        for parameter, values in moments["state"].items():
            tensors |= {f"{key}:{parameter}": tensor for key, tensor in values.items()}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()},
                  os.path.join(part, "training.safetensors"))
        with open(os.path.join(part, "training.json"), "w") as file:
            json.dump({"step": step, "args": vars(run.args)}, file, indent=1)
        replace_folder(part, folder)
        if name is None:
            publish(folder, out)
            for old in checkpoints(out)[run.args.keep:]:
                shutil.rmtree(old)
    run.ranks.barrier()
    return folder


def publish(folder, out):
    """Links the model's files of a checkpoint into out/, each in place of the one before."""
    for name in weights.OWN_FILES:
        link = os.path.join(out, f"{name}.part")
        if os.path.exists(link):
            os.remove(link)
        try:
            os.link(os.path.join(folder, name), link)
        except OSError:                        # a file system without links
            shutil.copyfile(os.path.join(folder, name), link)
        os.replace(link, os.path.join(out, name))


def checkpoints(out):
    """All complete checkpoints of a run, newest first."""
    names = sorted((name for name in os.listdir(out) if STEP.match(name)), reverse=True) if os.path.isdir(out) else []
    return [os.path.join(out, name) for name in names]


def newest_checkpoint(out, t5_decoder, log):
    """The newest checkpoint that can be read, else the one before, and so on.

    -> model, tensors of the training state, {"step", "args"}
    """
    for folder in checkpoints(out):
        try:
            with open(os.path.join(folder, "training.json")) as file:
                settings = json.load(file)
            tensors = load_file(os.path.join(folder, "training.safetensors"))
            return weights.load(folder, t5_decoder=t5_decoder), tensors, settings
        except Exception as error:             # truncated files fail in many ways
            log(f"{folder}: is damaged ({error}); falling back to the checkpoint before it")
    raise InputError(f"{out}: holds no checkpoint to resume from; leave out --resume to start anew")


def restore(model, optimizer, tensors):
    """Puts the optimizer's moments back."""
    moments = {}
    for name, tensor in tensors.items():
        if ":" in name:
            key, parameter = name.split(":", 1)
            moments.setdefault(parameter, {})[key] = tensor
    state = {"state": moments, "param_groups": get_optimizer_state_dict(model, optimizer)["param_groups"]}
    set_optimizer_state_dict(model, optimizer, state, options=FULL)


# ---------------------------------------------------------------------------------------------------------------------
# Watching it: validation losses, pictures, the log and its plot

VAL_SAMPLES, SHEET_ROWS = 128, 4


def to_device(batch, device, drop=None):
    """A batch's tensors on the device, its prompts cut to the longest; what is behind is padding."""
    longest = int(batch["mask"].sum(dim=1).max())
    batch = {**batch, "ids": batch["ids"][:, :longest], "mask": batch["mask"][:, :longest]}
    if drop is not None:
        batch["drop"] = drop
    return {key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()}


def validate(run):
    """Mean loss an element for every task of the validation data, the batches shared among the ranks."""
    micro, count, val = run.args.micro_batch, min(len(run.val), VAL_SAMPLES), run.val
    starts = range(0, count, micro)
    sums, counts = dict.fromkeys(val.tasks, 0.0), dict.fromkeys(val.tasks, 0)
    for turn in range(0, len(starts), run.ranks.world):
        # where a rank has no batch left it repeats one without counting it: FSDP needs all ranks in every forward
        mine = turn + run.ranks.rank
        start = starts[min(mine, len(starts) - 1)]
        samples = [val[k] for k in range(start, min(start + micro, count))]
        with run.evaluating(), run.autocast():
            losses = run.model(to_device(data.collate(samples), run.ranks.device))
        if mine < len(starts):
            for sample, loss in zip(samples, losses.tolist()):
                sums[sample["task"]] += loss
                counts[sample["task"]] += run.objective.elements(data.collate([sample]))
    totals = run.ranks.sum([*sums.values(), *counts.values()])
    return {task: total / n for task, total, n in zip(val.tasks, totals, totals[len(sums):]) if n}


def draw_rows(run):
    """reference | sample | target over the prompt, for fixed validation samples, each drawn by one rank. -> a sheet

    For the tokenizer the sample is the reconstruction; the connector alone draws nothing. None on ranks but 0.
    """
    mentor, val, ranks, tiles = run.mentor, run.val, run.ranks, []
    if run.args.stage == "connector":
        return None
    samples = [val[int(k)] for k in np.linspace(0, len(val) - 1, min(SHEET_ROWS, len(val)))]
    places = 2 + max(len(sample["refs"]) for sample in samples)
    for turn in range(0, len(samples), ranks.world):
        shown = data.collate([samples[min(turn + ranks.rank, len(samples) - 1)]])
        batch = to_device(shown, ranks.device)
        with run.evaluating():
            with run.autocast():
                if run.args.stage == "vqgan":
                    tokens = mentor.vqgan.encode(batch["target"])
                else:
                    tokens = mentor.generate(mentor.prefix(batch["ids"], batch["mask"], batch["refs"]), [run.args.seed])
            drawn = mentor.vqgan.decode(tokens)[0].cpu()
        tiles.append(data.tile(shown, places, drawn))
    tiles = [tile for turn in zip(*ranks.gather(tiles)) for tile in turn][:len(samples)]
    return data.contact_sheet(tiles, columns=1) if ranks.rank == 0 else None


def used_memory(device):
    """GiB: on a GPU the most it held, else the most this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def trim_log(path, steps):
    """Removes what an interrupted run logged behind its last checkpoint, so that no step stands there twice."""
    if os.path.exists(path):
        with open(path) as file:
            kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= steps]
        with open(f"{path}.part", "w") as file:
            file.writelines(kept)
        os.replace(f"{path}.part", path)


def plot(log_path, out):
    """Draws the losses of log.jsonl against the steps: training grey, validation in colours."""
    curves = {}
    with open(log_path) as file:
        for record in map(json.loads, file):
            curves.setdefault("train", []).append((record["step"], record["loss"]))
            for task, loss in record.get("val", {}).items():
                curves.setdefault(f"val {task}", []).append((record["step"], loss))
    width, height, margin = 800, 450, 50
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*sum(curves.values(), [])))
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((margin, margin, width - margin, height - margin), outline="black")
    for text, spot in ((f"{high:.3g}", (4, margin)), (f"{low:.3g}", (4, height - margin - 10)),
                       (f"{left}", (margin, height - margin + 4)),
                       (f"step {right}", (width - 110, height - margin + 4))):
        pen.text(spot, text, fill="black")
    colours = ["grey", "red", "blue", "green", "orange", "purple", "brown", "teal", "magenta"]
    for i, (name, curve) in enumerate(curves.items()):
        colour = colours[i % len(colours)]
        points = [(margin + (width - 2 * margin) * (step - left) / max(right - left, 1),
                   height - margin - (height - 2 * margin) * (loss - low) / max(high - low, 1e-9))
                  for step, loss in curve]
        pen.line(points * (2 if len(points) == 1 else 1), fill=colour, width=2)
        pen.text((margin + 10 + 90 * i, margin - 16), name, fill=colour)
    image.save(out)


# ---------------------------------------------------------------------------------------------------------------------
# The run

class Stop:
    """Remembers SIGTERM and Ctrl-C until the step is done; a second Ctrl-C ends at once."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        """The signals' handler."""
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def start_model(args, log):
    """Weights to start from, or to resume. -> model, tensors of the training state or None, steps done"""
    captions = args.stage == "connector"
    if args.resume:
        mentor, tensors, saved = newest_checkpoint(args.out, captions, log)
        args.steps = args.steps or saved["args"]["steps"]
        given = [name for name in ("prefix_rope", "size") if getattr(args, name) is not None]
        for name in ("stage", "init", "seed", "global_batch", "tasks", "data", "backgrounds", "lr", "steps",
                     "adversarial", "lpips", *given):
            if saved["args"][name] != getattr(args, name):
                raise InputError(f"--resume: the run was started with {name} {saved['args'][name]}, not "
                                 f"{getattr(args, name)}; give the same, or start a new run in another --out")
        return mentor, tensors, saved["step"]
    if args.init == "random":
        mentor = Mentor.random(args.model or "toy", args.seed, captions, args.prefix_rope, args.prefix_tokens)
    else:
        mentor = weights.load(args.init, prefix_rope=args.prefix_rope, prefix_tokens=args.prefix_tokens,
                              t5_decoder=captions, log=log)
    return mentor, None, 0


def start_data(args, mentor, log):
    """-> training data, data to validate on and to draw from."""
    config = mentor.config
    options = dict(prompter=mentor.prompter, image_size=config.image_size, clip_size=config.vision.image_size)
    if not args.data:
        from emoji import EmojiData            # paints its pictures; needs no files but the atlas
        return (EmojiData(weights=args.tasks, seed=args.seed, **options),
                EmojiData(weights=args.tasks, seed=args.seed + 1, held_out=True, **options))
    options |= dict(seed=args.seed, backgrounds=args.backgrounds or ())
    train = data.TaskData(args.data, weights=args.tasks, codes=args.codes, **options)
    if train.codes and train.codes.vqgan != mentor.vqgan.fingerprint():
        raise InputError(f"{train.codes.path}: made with another VQGAN than this model's; encode again")
    for problem in train.problems:
        log(f"skipped {problem}")
    if not args.val:
        return train, data.TaskData(args.data, weights=args.tasks, **options)      # with pixels, to look at
    present = {"picture", "caption"} | set(data.TaskData(args.val, **options).tasks)
    tasks = {task: None for task in args.tasks if task in present}
    if not tasks:
        raise InputError(f"--val {' '.join(args.val)}: holds no row of this stage's tasks, {', '.join(args.tasks)}; "
                         f"give another file or none")
    return train, data.TaskData(args.val, weights=tasks, **options)


def batch_arithmetic(args, ranks, samples):
    """-> micro-batches a rank computes in a step; fills in args.micro_batch and args.steps."""
    share = args.global_batch / ranks.world
    if args.micro_batch is None:
        args.micro_batch = max((m for m in range(1, args.largest_micro + 1) if share % m == 0), default=1)
    accum = args.global_batch // (args.micro_batch * ranks.world)
    if accum * args.micro_batch * ranks.world != args.global_batch:
        raise InputError(f"--global-batch {args.global_batch} is no multiple of --micro-batch {args.micro_batch} x "
                         f"{ranks.world} ranks; change one of them")
    args.steps = args.steps or max(1, round(args.epochs * samples / args.global_batch))
    return accum


def prepare(args):
    """Command line -> Run: processes, model, data, objective, optimizer."""
    ranks = Ranks.join(args.device)
    log = tqdm.write if ranks.rank == 0 else lambda line: None
    if ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    mentor, saved, first = start_model(args, log)
    args.prefix_tokens, args.prefix_rope = mentor.config.prefix_tokens, mentor.config.decoder.prefix_rope
    args.size = mentor.check_size(args.size or mentor.config.image_size)
    untrained = tuple(part for part in mentor.config.untrained if not part.startswith(args.trains))
    mentor.config = replace(mentor.config, image_size=args.size, untrained=untrained)
    train, val = start_data(args, mentor, log)
    accum = batch_arithmetic(args, ranks, len(train))
    torch.manual_seed(args.seed)               # the discriminator starts the same on every rank
    objective = OBJECTIVES.get(args.stage, TokenObjective)(mentor, args)
    freeze(objective, args.trains)
    if saved:
        objective.load_state_dict({name: t for name, t in saved.items() if ":" not in name}, strict=False)
    model = wrap(objective.to(ranks.device), args, ranks)
    optimizer = make_optimizer(objective, args.lr, args.muon)
    if saved:
        restore(model, optimizer, saved)
    return Run(args, ranks, mentor, objective, model, optimizer, train, val, accum, first, log)


def read_micros(run, loader, problems, step):
    """This rank's micro-batches of a step, each with the samples that learn the unconditional rows."""
    args, micros = run.args, []
    for i in range(run.accum):
        batch = next(loader)
        problems.add(batch["problems"], len(batch["names"]))
        position = step * args.global_batch + (i * run.ranks.world + run.ranks.rank) * args.micro_batch
        draws = [np.random.default_rng((args.seed, 1, position + k)).random() for k in range(len(batch["names"]))]
        micros.append((batch, torch.tensor(draws) < UNCONDITIONAL))    # a function of (seed, sample)
    return micros


def place_codes(run, micros, step):
    """A new tokenizer's codes: placed on latents when quantization begins, later moved there where nothing chose them.

    Rank 0 decides, with latents of its own samples.
    """
    start = math.ceil(UNQUANTIZED * run.args.steps)
    if run.args.stage != "vqgan" or run.args.init != "random" or step < start or (step - start) % REVIVE_EVERY:
        return
    used = torch.tensor(run.ranks.sum(run.objective.used.tolist())) > 0
    quantize = run.mentor.vqgan.quantize
    with run.evaluating():
        z = run.mentor.vqgan.latent(micros[0][0]["target"].to(run.ranks.device))
        quantize.revive(~used.to(run.ranks.device), z)
    if run.ranks.world > 1:
        dist.broadcast(quantize.embedding.weight.data, src=0)
    run.objective.used.zero_()


def train_step(run, micros, step):
    """One optimizer step. -> {"loss", "losses" per task, "grad_norm"}; raises InputError where they are not finite."""
    sums, counts = dict.fromkeys(run.args.tasks, 0.0), dict.fromkeys(run.args.tasks, 0.0)
    total = run.ranks.sum([sum(run.objective.elements(batch) for batch, _ in micros)])[0]
    for i, (batch, drop) in enumerate(micros):
        with accumulating(run.model, last=i == len(micros) - 1):
            with run.autocast():               # losses (B,), each a sum over the sample's elements
                losses = run.model(to_device(batch, run.ranks.device, drop), progress=step / run.args.steps)
            # divided by all elements of the global batch; times world, because the ranks' gradients are averaged
            (losses.sum() * (run.ranks.world / total)).backward()
        for task, loss in zip(batch["tasks"], losses.tolist()):
            sums[task] += loss
            counts[task] += 1
    totals = run.ranks.sum([*sums.values(), *counts.values()])
    norm = nn.utils.clip_grad_norm_([p for p in run.model.parameters() if p.requires_grad], CLIP_NORM)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    losses, counts = totals[:len(sums)], totals[len(sums):]
    loss = sum(losses) / total
    if not (math.isfinite(loss) and math.isfinite(norm)):
        names = run.ranks.gather([name for batch, _ in micros for name in batch["names"]])
        folder = save_checkpoint(run, step, f"nonfinite-step-{step}")
        raise InputError(f"step {step}: the loss is {loss} and the gradient {norm}; the state before it is in "
                         f"{folder}, its samples are {', '.join(sum(names, []))}; look at them or lower --lr")
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    share = total / sum(counts)                # elements a sample, on average
    return {"loss": loss, "losses": {task: a / n / share for task, a, n in zip(sums, losses, counts) if n},
            "grad_norm": norm}


def loop(run):
    """All steps: learning rate, batches, step, log, validation, checkpoint."""
    args, ranks = run.args, run.ranks
    log_path, stop, problems = os.path.join(args.out, "log.jsonl"), Stop(), data.Problems(tqdm.write)
    if ranks.rank == 0:
        trim_log(log_path, run.first)
    loader = data.batches(run.train, run.first * args.global_batch, args.steps * args.global_batch, args.micro_batch,
                          ranks.rank, ranks.world, args.workers)
    bar = tqdm(range(run.first, args.steps), initial=run.first, total=args.steps, unit="step", disable=ranks.rank > 0)
    for step in bar:
        begun, done = time.perf_counter(), step + 1
        torch.manual_seed((args.seed * 1_000_003 + step) * 4_001 + ranks.rank)     # dropout: by seed, step and rank
        for group in run.optimizer.param_groups:
            group["lr"] = lr_at(step, args.steps, args.lr)
        micros = read_micros(run, loader, problems, step)
        place_codes(run, micros, step)
        record = train_step(run, micros, step)
        record |= {"step": done, "lr": run.optimizer.param_groups[0]["lr"], "memory_gib": used_memory(ranks.device),
                   "samples_per_s": args.global_batch / (time.perf_counter() - begun)}
        bar.set_postfix_str(f"loss {record['loss']:.4f}, lr {record['lr']:.1e}, {record['samples_per_s']:.1f} "
                            f"samples/s, {record['memory_gib']:.1f} GiB")
        if done % args.sample_every == 0 or done == args.steps:
            if args.val or not args.data:
                record["val"] = validate(run)
            if sheet := draw_rows(run):
                sheet.save(os.path.join(args.out, f"samples-{done:08}.png"))
        if ranks.rank == 0:
            with open(log_path, "a") as file:
                file.write(json.dumps(record) + "\n")
        leave = ranks.sum([stop.asked])[0] > 0
        if done % args.save_every == 0 or done == args.steps or leave:
            save_checkpoint(run, done)
        if leave and done < args.steps:
            run.log(f"stopped after step {done} of {args.steps}; --resume goes on from there")
            break
    if ranks.rank == 0 and run.first < args.steps:
        plot(log_path, os.path.join(args.out, "loss.png"))


def main(argv=None):
    """The command line."""
    run = prepare(parse(argv))
    if run.ranks.rank == 0:
        report(run)
        os.makedirs(run.args.out, exist_ok=True)
    loop(run)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run(main)
