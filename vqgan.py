"""Pictures as tokens: the VQGAN that turns a picture into a grid of codebook indices and back.

    pixels (B, 3, H, W) in [-1, 1] --encoder--> latent --nearest code--> tokens (B, T) --codes, decoder--> pixels

This is LlamaGen's VQ-16 (its VQ-8 has one level less); the decoder of `model.py` writes exactly these tokens. Module
names are those of the public file `vq_ds16_t2i.pt`, so its tensors load without a table.

Shape letters: B batch, C channels, h x w the latent grid, T = h * w tokens, V codes, e their width. Next: `weights.py`,
or `sample.py` for whoever does not care how public files are read.
"""
import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class VQConfig:
    """The defaults are VQ-16; VQ-8 has multipliers (1, 2, 2, 4)."""
    channels: int = 128
    multipliers: tuple = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    latent: int = 256
    codes: int = 16384
    code_width: int = 8
    beta: float = 0.25          # weight of the commitment loss

    @property
    def factor(self):
        """Pixels a side of one token."""
        return 2 ** (len(self.multipliers) - 1)


def group_norm(channels):
    """32 groups, or as many as a narrow toy network allows."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each behind norm and swish; a 1x1 shortcut where the width changes."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Every position attends to every other, one head as wide as the channels."""

    def __init__(self, c):
        super().__init__()
        self.norm = group_norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)                                       # (B, 1, h*w, C)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))  # (B, C, h, w)


class Downsample(nn.Module):
    """Halves the grid; padded by one at right and bottom only, as the public weights expect."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the grid by repeating, then smooths."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, with attention behind each at the coarsest, then the change of scale."""

    def __init__(self, c_in, c_out, res_blocks, attention, rescale=None):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(res_blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) if attention else nn.Identity() for _ in range(res_blocks))
        if rescale is Downsample:
            self.downsample = Downsample(c_out)
        elif rescale is Upsample:
            self.upsample = Upsample(c_out)
        self.rescale = rescale

    def forward(self, x):
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x))
        if self.rescale is None:
            return x
        return self.downsample(x) if self.rescale is Downsample else self.upsample(x)


def middle(c):
    """The stretch at the coarsest resolution that encoder and decoder share in form."""
    return nn.Sequential(ResBlock(c, c), AttnBlock(c), ResBlock(c, c))


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, latent, h, w)"""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(([config.channels] + widths)[i], c, config.res_blocks, attention=i == last,
                  rescale=Downsample if i < last else None)
            for i, c in enumerate(widths))
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, latent, h, w) -> (B, 3, H, W); one residual block more a level than the encoder."""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], c, config.res_blocks + 1, attention=i == 0,
                  rescale=Upsample if i < last else None)
            for i, c in enumerate(widths))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The codebook. Latents and codes are both put on the unit sphere, so "nearest" is the largest dot product."""

    def __init__(self, config):
        super().__init__()
        self.beta = config.beta
        self.embedding = nn.Embedding(config.codes, config.code_width)
        nn.init.uniform_(self.embedding.weight, -1.0 / config.codes, 1.0 / config.codes)

    def tokens(self, z):
        """Nearest code at every position, in raster order. z: (B, e, h, w) -> (B, T) int64"""
        z = F.normalize(z.flatten(2).transpose(1, 2).float(), dim=-1)                     # (B, T, e)
        codes = F.normalize(self.embedding.weight.float(), dim=-1)                        # (V, e)
        with torch.autocast(z.device.type, enabled=False):     # bf16 would mistake one code in fifteen for another
            # in pieces, for the (rows, V) similarities of a large batch would take gigabytes
            nearest = [(rows @ codes.T).argmax(dim=-1) for rows in z.flatten(0, 1).split(4096)]
        return torch.cat(nearest).view(z.shape[:2])                                       # (B, T)

    def lookup(self, tokens):
        """(B, h, w) tokens -> (B, e, h, w) codes on the unit sphere"""
        return F.normalize(self.embedding(tokens), dim=-1).permute(0, 3, 1, 2)            # (B, e, h, w)

    @torch.no_grad()
    def revive(self, unused, z):
        """Puts codes that nothing chooses onto latents drawn at random. unused: (V,) bool; z: (B, e, h, w)"""
        latents = F.normalize(z.flatten(2).transpose(1, 2).flatten(0, 1).float(), dim=-1)  # (B * T, e)
        drawn = torch.randint(len(latents), (int(unused.sum()),), device=z.device)
        self.embedding.weight[unused] = latents[drawn].type_as(self.embedding.weight)

    def forward(self, z):
        """Training: z (B, e, h, w) -> (codes with straight-through gradients, loss, tokens (B, T)).

        The loss pulls the codes to the latents and, with weight beta, the latents to their codes (VQ-VAE).
        """
        tokens = self.tokens(z)
        z = F.normalize(z, dim=1)
        codes = self.lookup(tokens.unflatten(1, z.shape[2:]))
        loss = F.mse_loss(codes, z.detach()) + self.beta * F.mse_loss(z, codes.detach())
        return z + (codes - z).detach(), loss, tokens


class VQGAN(nn.Module):
    """The tokenizer as a whole."""

    def __init__(self, config=VQConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.latent, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent, 1)

    def latent(self, pixels):
        """What the quantizer sees. (B, 3, H, W) in [-1, 1] -> (B, e, h, w), not normalised"""
        return self.quant_conv(self.encoder(pixels))

    @torch.no_grad()
    def encode(self, pixels):
        """(B, 3, H, W) in [-1, 1], sides multiples of `config.factor` -> (B, T) tokens in raster order"""
        return self.quantize.tokens(self.latent(pixels))

    def decode(self, tokens):
        """(B, T) tokens of a square grid -> (B, 3, H, W), about [-1, 1]"""
        grid = round(tokens.size(1) ** 0.5)
        return self.decoder(self.post_quant_conv(self.quantize.lookup(tokens.unflatten(1, (grid, grid)))))

    def fingerprint(self):
        """Tells this VQGAN's codes from another's. -> str"""
        codes = self.quantize.embedding.weight.detach().cpu().numpy()
        return hashlib.blake2b(codes.tobytes(), digest_size=8).hexdigest()

    def forward(self, pixels, quantized=True):
        """Training: -> (reconstruction, codebook and commitment loss, tokens); unquantized: loss 0, no tokens."""
        z = self.latent(pixels)
        codes, loss, tokens = self.quantize(z) if quantized else (F.normalize(z, dim=1), 0.0, None)
        return self.decoder(self.post_quant_conv(codes)), loss, tokens


# ---------------------------------------------------------------------------------------------------------------------
# For training only: two critics of a reconstruction

class Discriminator(nn.Sequential):
    """Says patch by patch whether a picture is real (pix2pix's PatchGAN, with group norm). (B, 3, H, W) -> (B, 1, h, w)

    Group norm in place of batch norm, so that a picture's score does not depend on its batch or on how the batch is
    spread over processes.
    """

    def __init__(self, channels=64):
        super().__init__(
            nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1), group_norm(2 * channels), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 4 * channels, 4, padding=1), group_norm(4 * channels), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * channels, 1, 4, padding=1))


class Perceptual(nn.Module):
    """LPIPS: how far two pictures lie apart in the features of a VGG-16 (Zhang et al. 2018).

    Its weights are public: torchvision's `vgg16-397923af.pth` (names `features.N.*`) and LPIPS' linear heads `vgg.pth`
    (names `lin0.model.1.weight` to `lin4`).
    """
    WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
    ENDS = (3, 8, 15, 22, 29)      # indices of the ReLUs that are compared

    def __init__(self):
        super().__init__()
        layers, c = [], 3
        for width in self.WIDTHS:
            layers += [nn.MaxPool2d(2)] if width == "M" else [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
            c = c if width == "M" else width
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
        mean, std = (a.new_tensor(v).view(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        x, y, distance = (a - mean) / std, (b - mean) / std, 0
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if i in self.ENDS:
                apart = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()          # (B, C, h, w)
                distance = distance + (apart * self.heads[self.ENDS.index(i)]).sum(1).mean((1, 2))
        return distance
