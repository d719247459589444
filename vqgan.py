"""Images as tokens: the VQGAN that turns an image into a grid of codebook indices and back.

    pixels (B, 3, H, W) in [-1, 1] --encoder--> latent --nearest code--> tokens (B, T) --codes, decoder--> pixels

This is LlamaGen's VQ-16 (tokenizer/tokenizer_image/vq_model.py; its VQ-8 has one level less); the decoder of `model.py`
writes exactly these tokens. Module names are those of the public file `vq_ds16_t2i.pt`, so its tensors load without a
table. MENTOR never trains it; `world/tokenizer.py` does, for the small model.

Shape letters: B batch, C channels, h x w the latent grid, T = h * w tokens, V codes, e their width.
Next: `sample.py` (and `weights.py` for how public files are read).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class VQConfig:
    """The defaults are VQ-16; VQ-8 has multipliers (1, 2, 2, 4)."""
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
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

    def __init__(self, c_in, c_out, res_blocks, attention=False, downsample=False, upsample=False):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(res_blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) if attention else nn.Identity() for _ in range(res_blocks))
        self.downsample = Downsample(c_out) if downsample else nn.Identity()
        self.upsample = Upsample(c_out) if upsample else nn.Identity()

    def forward(self, x):
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x))
        return self.upsample(self.downsample(x))


def middle(c):
    """The stretch at the coarsest resolution that encoder and decoder share in form."""
    return nn.Sequential(ResBlock(c, c), AttnBlock(c), ResBlock(c, c))


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, latent, h, w)"""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        c, last = config.channels, len(widths) - 1
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            self.conv_blocks.append(Level(c, width, config.res_blocks, attention=i == last, downsample=i < last))
            c = width
        self.mid = middle(c)
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, config.latent, 3, padding=1)

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
        c, last = widths[0], len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent, c, 3, padding=1)
        self.mid = middle(c)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            self.conv_blocks.append(Level(c, width, config.res_blocks + 1, attention=i == 0, upsample=i < last))
            c = width
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The codebook. Latents and codes are both put on the unit sphere, so "nearest" is the largest dot product."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.codes, config.code_width)
        nn.init.uniform_(self.embedding.weight, -1.0 / config.codes, 1.0 / config.codes)

    def tokens(self, z):
        """Nearest code at every position, in raster order. z: (B, e, h, w) -> (B, T) int64"""
        z = F.normalize(z.flatten(2).transpose(1, 2).float(), dim=-1)                     # (B, T, e)
        codes = F.normalize(self.embedding.weight.float(), dim=-1)                        # (V, e)
        if z.is_cuda:
            z, codes = z.double(), codes.double()              # TF32 would mistake one code in 300 for another
        with torch.autocast(z.device.type, enabled=False):     # and bf16 one in fifteen
            # in pieces, because the (rows, V) similarities of a large batch would take gigabytes
            nearest = [(rows @ codes.T).argmax(dim=-1) for rows in z.flatten(0, 1).split(4096)]
        return torch.cat(nearest).view(z.shape[:2])                                       # (B, T)

    def lookup(self, tokens):
        """(B, h, w) tokens -> (B, e, h, w) codes on the unit sphere"""
        return F.normalize(self.embedding(tokens), dim=-1).permute(0, 3, 1, 2)            # (B, e, h, w)


class VQGAN(nn.Module):
    """The tokenizer as a whole."""

    def __init__(self, config=VQConfig()):
        super().__init__()
        self.config, self.factor = config, config.factor
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
