"""Trains a VQGAN tokenizer from nothing: what `vqgan.py` leaves out, because MENTOR never trains its own.

The loss pulls a reconstruction towards its image (absolute and squared error, edges, and if wanted LPIPS and a patch
discriminator) and the codes and latents towards each other. Two things keep the codebook alive: the first steps do not
quantize, so that codes can be placed on latents that mean something already, and dead codes, which nothing chooses, are
moved onto latents from time to time.

    python -m world.train --stage vqgan                             # on the emoji world
    python -m world.train --stage vqgan --data my_photos/data.jsonl --size 64 --out out/my_vqgan

Shape letters: B batch, C channels, h x w the latent grid, T = h * w tokens, V codes, e their width.
Next: `world/train.py`, whose stage `vqgan` this is.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import weights
from cli import InputError
from vqgan import group_norm

UNQUANTIZED = 0.02         # share of the steps that a new tokenizer trains before its codes are placed
RESTART_EVERY = 50         # steps between looks for dead codes of a new tokenizer


def quantize(quantizer, z, beta=0.25):
    """Latents to codes, with gradients straight through (VQ-VAE, arXiv 1711.00937).

    z: (B, e, h, w) -> (codes (B, e, h, w), loss, tokens (B, T)). The loss pulls the codes to the latents and, with
    weight beta, the latents to their codes.
    """
    tokens = quantizer.tokens(z)                                                          # (B, T)
    z = F.normalize(z, dim=1)
    codes = quantizer.lookup(tokens.unflatten(1, z.shape[2:]))                            # (B, e, h, w)
    loss = F.mse_loss(codes, z.detach()) + beta * F.mse_loss(z, codes.detach())
    return z + (codes - z).detach(), loss, tokens


def reconstruct(vqgan, pixels, quantized=True):
    """-> (reconstruction (B, 3, H, W), codebook and commitment loss, tokens); unquantized: loss 0, no tokens."""
    z = vqgan.latent(pixels)                                                              # (B, e, h, w)
    codes, loss, tokens = F.normalize(z, dim=1), 0.0, None
    if quantized:
        codes, loss, tokens = quantize(vqgan.quantize, z, vqgan.config.beta)
    return vqgan.decoder(vqgan.post_quant_conv(codes)), loss, tokens


@torch.no_grad()
def restart_dead_codes(quantizer, dead, z):
    """Puts codes that nothing chooses onto latents drawn at random. dead: (V,) bool; z: (B, e, h, w)"""
    latents = F.normalize(z.flatten(2).transpose(1, 2).flatten(0, 1).float(), dim=-1)     # (B * T, e)
    chosen = torch.randint(len(latents), (int(dead.sum()),), device=z.device)
    quantizer.embedding.weight[dead] = latents[chosen].type_as(quantizer.embedding.weight)


class Discriminator(nn.Sequential):
    """Says patch by patch whether an image is real (pix2pix's PatchGAN, arXiv 1611.07004). (B, 3, H, W) -> (B, 1, h, w)

    Group norm in place of batch norm, so that an image's score does not depend on its batch or on how the batch is
    spread over processes.
    """

    def __init__(self, channels=64):
        super().__init__(
            nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1), group_norm(2 * channels), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 4 * channels, 4, padding=1), group_norm(4 * channels), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * channels, 1, 4, padding=1))


class Perceptual(nn.Module):
    """LPIPS: how far two images lie apart in the features of a VGG-16 (Zhang et al., arXiv 1801.03924).

    Its weights are public: torchvision's `vgg16-397923af.pth` (names `features.N.*`) and LPIPS' linear heads `vgg.pth`
    (names `lin0.model.1.weight` to `lin4`).
    """
    WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
    ENDS = (3, 8, 15, 22, 29)      # indices of the ReLUs that are compared
    MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

    def __init__(self):
        super().__init__()
        layers, c = [], 3
        for width in self.WIDTHS:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
                c = width
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(torch.ones(1, self.features[end - 1].out_channels, 1, 1) for end in self.ENDS)

    def load(self, vgg, heads):
        """Takes the tensors of the two public files, by their names."""
        self.features.load_state_dict({name.removeprefix("features."): tensor for name, tensor in vgg.items()
                                       if name.startswith("features.")})
        self.heads.load_state_dict({str(i): heads[f"lin{i}.model.1.weight"] for i in range(len(self.ENDS))})
        return self

    def forward(self, a, b):
        """(B, 3, H, W) twice, in [-1, 1] -> distance (B,)"""
        mean, std = a.new_tensor(self.MEAN).view(1, 3, 1, 1), a.new_tensor(self.STD).view(1, 3, 1, 1)
        x, y, distance = (a - mean) / std, (b - mean) / std, 0
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if i in self.ENDS:
                difference = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()     # (B, C, h, w)
                distance = distance + (difference * self.heads[self.ENDS.index(i)]).sum(1).mean((1, 2))
        return distance


def load_perceptual(paths):
    """LPIPS from its two files."""
    vgg, heads = (weights.read_tensors(path) for path in paths)
    try:
        return Perceptual().load(vgg, heads).requires_grad_(False)
    except (KeyError, RuntimeError):           # missing or mis-shaped tensors
        raise InputError(f"--lpips {' '.join(paths)}: do not hold VGG-16 and LPIPS' heads; give torchvision's "
                         f"vgg16-397923af.pth and LPIPS' vgg.pth, in this order") from None


class PixelObjective(nn.Module):
    """The tokenizer's objective, as train.fit takes it: stage vqgan."""

    def __init__(self, mentor, adversarial=0.0, lpips=None, fresh=True):
        """adversarial: weight of the discriminator, 0 = none; lpips: paths of its files; fresh: new codes."""
        super().__init__()
        self.mentor, self.adversarial, self.fresh = mentor, adversarial, fresh
        self.progress = 1.0                    # share of the steps done: see before_step
        used = torch.zeros(mentor.config.vqgan.codes, dtype=torch.bool)
        self.used = nn.Parameter(used, requires_grad=False)    # since the last look; DDP would overwrite a buffer
        self.discriminator = Discriminator() if adversarial else None
        self.perceptual = load_perceptual(lpips) if lpips else None

    def elements(self, batch):
        """One term a sample. -> (B,)"""
        return torch.ones(len(batch["target"]))

    def forward(self, batch):
        """-> losses (B,); the discriminator's terms in training only, for they say nothing of a tokenizer's quality"""
        real = batch["target"]                                                            # (B, 3, H, W)
        quantized = not self.fresh or self.progress >= UNQUANTIZED
        fake, codebook_loss, tokens = reconstruct(self.mentor.vqgan, real, quantized)
        if self.training and tokens is not None:
            self.used[tokens.flatten()] = True
        error = fake - real
        loss = error.abs().mean((1, 2, 3)) + error.square().mean((1, 2, 3)) + codebook_loss
        loss = loss + 0 * self.mentor.vqgan.quantize.embedding.weight.sum()      # DDP expects its gradient every time
        # edges: neighbours must differ as they do in the image
        loss = loss + 0.25 * (error.diff(dim=2).abs().mean((1, 2, 3)) + error.diff(dim=3).abs().mean((1, 2, 3)))
        if self.perceptual is not None:
            loss = loss + self.perceptual(fake, real)
        if self.discriminator is not None and self.training:
            loss = loss + self.adversarial_losses(real, fake)
        return loss                                                                       # (B,)

    def adversarial_losses(self, real, fake):
        """The discriminator learns (hinge loss) from the first step; in the second half the tokenizer listens to it,
        through a copy of its weights that takes no gradient, so that one backward pass serves both. -> (B,)"""
        loss = F.relu(1 - self.discriminator(real)).mean((1, 2, 3))
        loss = loss + F.relu(1 + self.discriminator(fake.detach())).mean((1, 2, 3))
        if self.progress >= 0.5:
            frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            score = torch.func.functional_call(self.discriminator, frozen, (fake,))       # (B, 1, h, w)
            loss = loss - self.adversarial * score.mean((1, 2, 3))
        return loss


def before_step(run, micro_batches, step):
    """A new tokenizer's codes: placed on latents when quantization begins, later moved there where nothing chose them.

    Rank 0 decides, with latents of its own samples.
    """
    objective, start = run.objective, math.ceil(UNQUANTIZED * run.steps)
    objective.progress = step / run.steps
    if not objective.fresh or step < start or (step - start) % RESTART_EVERY:
        return
    used = torch.tensor(run.ranks.sum(objective.used.tolist())) > 0                       # (V,)
    quantizer = run.mentor.vqgan.quantize
    with run.evaluating():
        z = run.mentor.vqgan.latent(micro_batches[0]["target"].to(run.ranks.device))             # (B, e, h, w)
        restart_dead_codes(quantizer, ~used.to(run.ranks.device), z)
    if run.ranks.world > 1:
        dist.broadcast(quantizer.embedding.weight.data, src=0)
    objective.used.zero_()
