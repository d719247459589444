"""MENTOR: reference pictures and a prompt in, a new picture out, one token at a time (arXiv 2507.09574).

    prompt ids, reference pictures --encoder.py--> H (B, S, C) --left-pad, projector--> prefix (B, S, D)
    prefix, image tokens so far --decoder with 2D RoPE--> logits of the next token --guidance, draw--> token
    T tokens --vqgan.py--> picture

The decoder is LlamaGen's, which is Llama's with rows and columns in place of positions (`rope2d.py`). This file holds
the sizes, the decoder and its cache, the drawing of tokens, and the whole model.

Shape letters: B batch, S prefix rows, T image tokens (grid * grid), L = S + T, C T5's width, D the decoder's width,
H heads, hd channels a head, V codes, t tokens so far. Next: `vqgan.py`, which makes pictures of tokens.
"""
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import data
from data import InputError
from encoder import MultimodalEncoder, RMSNorm, T5Config, VisionConfig
from rope2d import apply_rope, prefix_and_image_table
from vqgan import VQGAN, VQConfig

SIZES = {           # layers, heads, width of the decoder; parameters with 16,384 codes
    "toy": (2, 4, 64),         # random weights that run anywhere in a second
    "tiny": (4, 6, 192),       # 2.0 M with its 512 codes, trained from nothing on the emoji world (emoji.py)
    "B": (12, 12, 768),        # 111 M
    "L": (24, 16, 1024),       # 343 M
    "XL": (36, 20, 1280),      # 775 M, MENTOR's
    "XXL": (48, 24, 1536),     # 1.4 B
    "3B": (24, 32, 3200),      # 3.1 B
}

STRIDE = 256       # positions by which the part of the cache that is read grows on a GPU
FEW, SOME = 8, 64  # rows up to which a product on a CPU is better done as compiled sums, or with the weight at the left


# ---------------------------------------------------------------------------------------------------------------------
# Configuration

@dataclass(frozen=True)
class DecoderConfig:
    """The decoder's form; the defaults are LlamaGen-XL's."""
    layers: int = 36
    heads: int = 20
    width: int = 1280
    multiple_of: int = 256           # the feed-forward's hidden width is rounded up to this
    codes: int = 16384
    dropout: float = 0.1
    prefix_rope: str = "identity"    # how the prefix is rotated: rope2d.PREFIX_ROPE
    rope_base: float = 10000.0

    @property
    def head_dim(self):
        """Channels a head."""
        return self.width // self.heads

    @property
    def hidden(self):
        """Width inside the feed-forward."""
        return -(-int(8 / 3 * self.width) // self.multiple_of) * self.multiple_of


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the values a folder carries are its defaults."""
    cfg_scale: float = 7.5           # classifier-free guidance, 1 = none
    temperature: float = 1.0         # 0 = always the likeliest token
    top_k: int = 1000
    top_p: float = 1.0

    def check(self, codes):
        """Raises InputError unless every value makes sense for a vocabulary of that many codes."""
        if not 1 <= self.top_k <= codes:
            raise InputError(f"top-k is {self.top_k} but must lie between 1 and the vocabulary's {codes}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p} but must lie above 0 and up to 1")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"the temperature is {self.temperature} but must be 0 (greedy) or above")
        if not math.isfinite(self.cfg_scale):
            raise InputError(f"the guidance scale is {self.cfg_scale} but must be a finite number; 1 turns it off")


@dataclass(frozen=True)
class MentorConfig:
    """The whole network; the defaults are MENTOR's published one."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    t5: T5Config = field(default_factory=T5Config)
    connector: str = "released"      # or "paper": encoder.CONNECTORS
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    vqgan: VQConfig = field(default_factory=VQConfig)
    prefix_tokens: int = 512         # the longest prefix S
    image_size: int = 512            # the largest picture, pixels a side
    image_id: int = 32100            # T5's id of `<image>`
    untrained: tuple = ()            # parts that no file held and no stage has trained, as train.PARTS names them
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def grid(self):
        """Image tokens a side at `image_size`."""
        return self.image_size // self.vqgan.factor

    def override(self, prefix_rope=None, prefix_tokens=None):
        """The same network with another rotation of the prefix, or with room for a longer one."""
        decoder = replace(self.decoder, prefix_rope=prefix_rope or self.decoder.prefix_rope)
        return replace(self, decoder=decoder, prefix_tokens=max(self.prefix_tokens, prefix_tokens or 0))


def size_config(size):
    """A row of SIZES as a MentorConfig; all but "toy" and "tiny" have the published encoders."""
    layers, heads, width = SIZES[size]
    decoder = DecoderConfig(layers, heads, width)
    if size == "toy":
        return MentorConfig(
            vision=VisionConfig(width=64, layers=3, heads=4, mlp=256, patch_size=28),
            t5=T5Config(width=64, layers=2, heads=4, head_dim=16, mlp=128, vocab_size=260),
            decoder=replace(decoder, codes=1024), vqgan=VQConfig(channels=16, res_blocks=1, latent=32, codes=1024),
            image_size=256, sampling=Sampling(cfg_scale=3.0))
    if size == "tiny":
        return MentorConfig(
            vision=VisionConfig(width=192, layers=4, heads=6, mlp=576, image_size=64, patch_size=8),
            t5=T5Config(width=192, layers=3, heads=6, head_dim=32, mlp=512, vocab_size=1540, dropout=0.0),
            decoder=replace(decoder, multiple_of=64, codes=512, dropout=0.0, prefix_rope="grid", rope_base=100.0),
            vqgan=VQConfig(channels=16, multipliers=(1, 2, 4), res_blocks=1, latent=64, codes=512),
            prefix_tokens=128, image_size=64,
            sampling=Sampling(cfg_scale=2.0, temperature=0.9, top_k=512, top_p=0.8))
    return MentorConfig(decoder=decoder)


# ---------------------------------------------------------------------------------------------------------------------
# The prefix

class Prefix(NamedTuple):
    """What stands before the image tokens, padded at the left so that token 0 follows the last row directly."""
    rows: torch.Tensor         # (B, S, D)
    valid: torch.Tensor        # (B, S) bool, False = padding
    is_image: torch.Tensor     # (B, S) bool, True = a reference picture's row

    def repeat(self, n):
        """The same prefix for n pictures. B = 1 -> B = n"""
        return Prefix(*(part.expand(n, *part.shape[1:]) for part in self))


def left_pad(rows, mask):
    """Moves every sample's valid rows to the end, zeros before. rows: (B, S, ...), mask: (B, S) bool -> rows' shape"""
    length = mask.size(1)
    shift = length - mask.sum(dim=1, keepdim=True)                                        # (B, 1)
    source = torch.arange(length, device=mask.device) - shift                             # (B, S), negative = padding
    picked = rows[torch.arange(len(rows), device=mask.device)[:, None], source.clamp(min=0)]
    return picked * (source >= 0).view(source.shape + (1,) * (rows.dim() - 2)).type_as(rows)


class Projector(nn.Module):
    """From T5's space to the decoder's, with the learned rows that stand for "no condition" (guidance)."""

    def __init__(self, t5_width, width, prefix_tokens):
        super().__init__()
        self.fc1 = nn.Linear(t5_width, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.uncond = nn.Parameter(torch.randn(prefix_tokens, t5_width) / t5_width**0.5)

    def forward(self, h):
        """(..., C) -> (..., D)"""
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


# ---------------------------------------------------------------------------------------------------------------------
# The decoder

def additive(attend, dtype):
    """A mask to be added to scores: 0 where True, -inf where False."""
    return torch.zeros_like(attend, dtype=dtype).masked_fill(~attend, -math.inf)


def make_mask(valid, dtype=torch.float32):
    """Causal, padded keys hidden, the diagonal always open so that no row is empty.

    valid: (B, L) bool -> (B, 1, L, L), 0 = attend, -inf = hidden; in the type attention computes in, so that no layer
    has to convert it again
    """
    length = valid.size(1)
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    diagonal = torch.eye(length, dtype=torch.bool, device=valid.device)
    return additive((causal & valid[:, None, :]) | diagonal, dtype).unsqueeze(1)          # (B, 1, L, L)


class KVCache:
    """Keys and values of all positions of one batch, allocated once: the final length is known.

    A step writes at the position `at` and reads up to `reach`. Nothing in it depends on a number that Python holds but
    `reach`, so that on a GPU one captured graph serves all steps of the same reach, which there grows in strides; the
    mask hides what is not written yet.
    """

    def __init__(self, config, prefix, grid):
        batch, rows = prefix.valid.shape
        self.length, self.total = 0, rows + grid * grid        # positions filled so far, and in the end
        self.kv = prefix.rows.new_zeros(config.layers, 2, batch, config.heads, self.total, config.head_dim)
        attend = F.pad(prefix.valid, (0, grid * grid), value=False)
        self.mask = additive(attend, prefix.rows.dtype)[:, None, None]                    # (B, 1, 1, S + T)
        self.at = torch.full((1,), rows, device=prefix.rows.device)

    @property
    def reach(self):
        """How many positions the next step reads."""
        stride = STRIDE if self.kv.is_cuda else 1
        return min(-(-(self.length + 1) // stride) * stride, self.total)


def few_rows(x, weight):
    """x @ weight.T as sums that a compiler turns into one loop over the weight. (n, in), (out, in) -> (n, out)"""
    if weight.size(1) <= 2048:
        return torch.stack([(weight * row).sum(dim=-1) for row in x])
    # rows of x so long do not stay in the nearest cache, so four rows of the weight share one reading of them
    quads = weight.unflatten(0, (-1, 4)).unbind(dim=1)
    return torch.stack([torch.stack([(quad * row).sum(dim=-1) for quad in quads], dim=-1).flatten() for row in x])


class Linear(nn.Linear):
    """A product without bias. With a few rows its time is that of reading the weight, which on a CPU the ordinary
    product does at a fifth of the memory's speed, with the weight at the left at half, and compiled sums at most."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, bias=False)

    def forward(self, x):
        """(..., in) -> (..., out)"""
        n = x.numel() // x.size(-1)
        if x.device.type != "cpu" or n > SOME:
            return F.linear(x, self.weight)
        flat = x.reshape(n, -1)                                                           # (n, in)
        if n <= FEW and torch.compiler.is_compiling():
            y = few_rows(flat, self.weight)                                               # (n, out)
        else:
            y = (self.weight @ flat.t()).t()
        return y.reshape(*x.shape[:-1], -1)


class Attention(nn.Module):
    """Self-attention with rotated queries and keys; q, k and v come from one product."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.wqkv = Linear(config.width, 3 * config.width)
        self.wo = Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, mask, kv=None, at=None):
        """x: (B, L, D); rope: the table of these positions; mask: (B, 1, L, keys), added to scores. -> (B, L, D)

        kv: (2, B, H, keys, hd), the layer's cache, written at the positions `at` (L,), then read.
        """
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, L, hd)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if kv is not None:
            k, v = kv.index_copy_(3, at, torch.stack([k, v]))                             # each (B, H, keys, hd)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                       # (B, H, L, hd)
        return self.dropout(self.wo(y.transpose(1, 2).flatten(-2)))                       # (B, L, D)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.w1 = Linear(config.width, config.hidden)
        self.w3 = Linear(config.width, config.hidden)
        self.w2 = Linear(config.hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Attention and feed-forward, each behind an RMSNorm and beside a shortcut."""

    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = RMSNorm(config.width, eps=1e-5), RMSNorm(config.width, eps=1e-5)

    def forward(self, x, rope, mask, kv=None, at=None):
        x = x + self.attention(self.attention_norm(x), rope, mask, kv, at)
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(nn.Module):
    """Llama-style decoder over [prefix, image tokens] (paper section 3.1; LlamaGen's gpt.py)."""

    def __init__(self, config, patch_grid=16):
        super().__init__()
        self.config, self.patch_grid = config, patch_grid
        self.tok_embeddings = nn.Embedding(config.codes, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, eps=1e-5)
        self.output = Linear(config.width, config.codes)

    def compile_blocks(self):
        """Has the blocks compiled when they are first called, all of them as one; where that fails, for want of a
        compiler, it goes on without and says so."""
        torch._dynamo.config.suppress_errors = True
        for layer in self.layers:
            layer.compile()

    def rope(self, prefix, grid):
        """The rotary table of the whole sequence. -> (1 or B, S + T, head_dim / 2, 2)"""
        return prefix_and_image_table(self.config.prefix_rope, prefix.is_image, self.patch_grid, grid,
                                      self.config.head_dim, self.config.rope_base)

    def forward(self, prefix, tokens, grid):
        """Teacher forcing. tokens: (B, t) the first t of grid * grid image tokens.

        -> logits (B, t + 1, V); logits[:, k] has seen the prefix and tokens[:, :k], so it predicts token k: the last
        prefix position predicts token 0, and the position of token k predicts token k + 1.
        """
        return self.read(prefix, self.tok_embeddings(tokens), grid)

    def read(self, prefix, x, grid):
        """The same from the tokens' embeddings, x (B, t, D)."""
        prefix_rows, mask = prefix.rows.size(1), F.pad(prefix.valid, (0, x.size(1)), value=True)
        x = torch.cat([prefix.rows, x], dim=1)                                            # (B, S + t, D)
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        mask = make_mask(mask, dtype)                                                     # (B, 1, S + t, S + t)
        rope = self.rope(prefix, grid)[:, :x.size(1)]
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, rope, mask)
        return self.output(self.norm(x[:, prefix_rows - 1:]))                             # (B, t + 1, V)

    def prefill(self, prefix, grid):
        """Reads the prefix into a new cache. -> logits of token 0 (B, V), cache, rotary table"""
        cache, rope, x = KVCache(self.config, prefix, grid), self.rope(prefix, grid), prefix.rows
        rows, mask = x.size(1), make_mask(prefix.valid, x.dtype)
        at = torch.arange(rows, device=x.device)
        with torch.compiler.set_stance("force_eager"):         # it is done once, so compiling would not pay
            for layer, kv in zip(self.layers, cache.kv):
                x = layer(x, rope[:, :rows], mask, kv[..., :rows, :], at)
        cache.length = rows
        return self.output(self.norm(x[:, -1])), cache, rope                              # (B, V)

    def decode_step(self, token, cache, rope):
        """Feeds one token per sample, (B,). -> logits of the next (B, V)"""
        x = self.tok_embeddings(token).unsqueeze(1)                                       # (B, 1, D)
        rope, reach = rope.index_select(1, cache.at), cache.reach
        mask = cache.mask.index_fill_(3, cache.at, 0)[..., :reach]                        # opens this position
        for layer, kv in zip(self.layers, cache.kv):
            x = layer(x, rope, mask, kv[..., :reach, :], cache.at)
        cache.at += 1
        cache.length += 1
        return self.output(self.norm(x[:, -1]))                                           # (B, V)


class Graphs:
    """Repeats a step as CUDA graphs, one for each reach of the cache, so that Python and launches cost nothing.

    The first step of a reach runs as it is, which also warms up; the second is recorded; all further ones are replays.
    """

    def __init__(self, step, cache):
        self.step, self.cache, self.graphs = step, cache, {}

    def __call__(self):
        reach = self.cache.reach
        if reach not in self.graphs:
            self.graphs[reach] = None
            self.step()
        elif self.graphs[reach] is None:
            self.graphs[reach] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[reach]):
                self.step()                                    # records, and counts, but computes nothing
            self.graphs[reach].replay()
        else:
            self.graphs[reach].replay()
            self.cache.length += 1


def draw_tokens(logits, uniform, sampling):
    """One token per row: temperature, then top-k, then top-p, then the inverse of the cumulative distribution.

    logits: (B, V); uniform: (B,) numbers in [0, 1), one per row, so that a row's draw depends on nothing else.
    -> (B,) int64
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    top, index = (logits.float() / sampling.temperature).topk(sampling.top_k, dim=-1)     # (B, k), falling
    p = top.softmax(dim=-1)
    p = p * (p.cumsum(dim=-1) - p < sampling.top_p)        # keep a token while those before it fall short of top_p
    total = p.cumsum(dim=-1)
    chosen = (total < uniform[:, None] * total[:, -1:]).sum(dim=-1, keepdim=True)         # (B, 1)
    return index.gather(-1, chosen).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# The whole model

class Mentor(nn.Module):
    """CLIP, connector, T5, projector, decoder and VQGAN in one, with the tokenizer that goes with them."""

    def __init__(self, config, tokenizer=None, t5_decoder=False):
        super().__init__()
        self.config = config
        self.encoder = MultimodalEncoder(config.vision, config.t5, config.connector, config.image_id, t5_decoder)
        self.projector = Projector(config.t5.width, config.decoder.width, config.prefix_tokens)
        self.decoder = Decoder(config.decoder, config.vision.grid)
        self.vqgan = VQGAN(config.vqgan)
        self.prompter = tokenizer and data.Prompter(tokenizer, config.vision.grid**2, config.prefix_tokens)
        if tokenizer and self.prompter.image_id != config.image_id:
            raise InputError(f"the tokenizer gives {data.IMAGE} the id {self.prompter.image_id} but the weights expect "
                             f"{config.image_id}; use the tokenizer.json that belongs to them")
        for part in (self.projector, self.decoder):
            for module in part.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.decoder.output.weight)

    @property
    def device(self):
        """Where prompts are read and pictures are drawn."""
        return self.projector.uncond.device

    @property
    def dtype(self):
        """What the decoder computes in."""
        return self.decoder.output.weight.dtype

    def project(self, h, valid, is_image):
        """Left-padded T5 rows -> Prefix."""
        return Prefix(self.projector(h.to(self.projector.fc1.weight.dtype)), valid, is_image)

    def prefix(self, ids, mask, refs=None, drop=None):
        """Prompt and reference pictures -> Prefix.

        ids, mask: (B, S) padded at the right; refs: (K, 3, c, c) CLIP pixels of all samples in order; drop: (B,) bool,
        True = this sample learns the unconditional rows in place of its own (training, p = 0.1).
        """
        h = left_pad(self.encoder(ids, mask, refs), mask)                                 # (B, S, C)
        if drop is not None:
            h = torch.where(drop[:, None, None], self.projector.uncond[-h.size(1):].type_as(h), h)
        return self.project(h, left_pad(mask, mask), left_pad(ids == self.config.image_id, mask))

    def unconditional(self, prefix):
        """The learned rows in place of the prompt, under the same mask and at the same length. -> Prefix"""
        rows = self.projector.uncond[-prefix.rows.size(1):].expand(len(prefix.rows), -1, -1)
        return self.project(rows, prefix.valid, prefix.is_image)

    def forward(self, ids, mask, refs, tokens, drop=None):
        """Cross entropy of every image token. tokens: (B, T); the rest as in `prefix`. -> losses (B, T), logits"""
        return self.losses(self.prefix(ids, mask, refs, drop), tokens)

    def losses(self, prefix, tokens):
        """Cross entropy of every image token behind a prefix. -> losses (B, T), logits (B, T, V)"""
        logits = self.decoder(prefix, tokens[:, :-1], math.isqrt(tokens.size(1)))
        return F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none"), logits

    @torch.inference_mode()
    def generate(self, prefix, seeds, sampling=None, grid=None, count=None, progress=False):
        """Draws the image tokens behind a prefix, row i with seeds[i] and so whatever its batch.

        Guidance runs condition and unconditional rows as one batch: logits = u + cfg_scale * (c - u).
        grid: tokens a side, default the config's; count: how many to draw, default all grid * grid.
        -> (B, count) int64
        """
        sampling, grid = sampling or self.config.sampling, grid or self.config.grid
        sampling.check(self.config.decoder.codes)
        batch, count = len(prefix.rows), count or grid * grid
        guided = sampling.cfg_scale != 1
        if guided:
            prefix = Prefix(*map(torch.cat, zip(prefix, self.unconditional(prefix))))     # (2B, S, D)
        # drawn ahead on the CPU: the same picture on every device, and no waiting for the device in the loop
        uniform = torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(s)) for s in seeds])
        uniform = uniform.to(self.device)                                                 # (B, T)
        out = torch.empty(batch, count, dtype=torch.long, device=self.device)
        token = out.new_zeros(len(prefix.rows))                # what the next step is fed
        place = out.new_zeros(1)                               # of the token that is drawn next
        logits, cache, rope = self.decoder.prefill(prefix, grid)

        def draw(logits):
            """Draws the tokens at `place` and hands them to the next step. logits: (B or 2B, V)"""
            logits = logits.float()
            if guided:
                cond, uncond = logits.chunk(2)
                logits = uncond + sampling.cfg_scale * (cond - uncond)                    # (B, V)
            drawn = draw_tokens(logits, uniform.index_select(1, place).squeeze(1), sampling)
            out.index_copy_(1, place, drawn[:, None])
            token.copy_(drawn.repeat(len(token) // batch))
            place.add_(1)

        def step():
            draw(self.decoder.decode_step(token, cache, rope))

        draw(logits)
        step = Graphs(step, cache) if out.is_cuda else step
        for _ in tqdm(range(1, count), desc="drawing", unit="token", disable=not progress, leave=False):
            step()
        return out

    @torch.inference_mode()
    def draw(self, prompt, refs=(), seed=0, n=1, size=None, progress=False, offload=False, **sampling):
        """Pictures of a prompt and reference pictures: the model in one call.

        prompt: as it stands where it contains `<image>`, once per reference, or where there are no references; else
        "The {file's name} in <image>." is put before it for each. refs: paths or PIL pictures. size: pixels a side.
        offload: CLIP and T5 give their memory back once they have read the prompt, so this is the model's last picture
        unless they are loaded again. sampling: fields of Sampling that differ from the weights' defaults.
        -> list of n PIL pictures
        """
        size = self.check_size(size or self.config.image_size)
        if refs and "encoder.connector" in self.config.untrained:
            raise InputError("these weights hold no trained connector, so they cannot see reference pictures; "
                             "leave out the references or use MENTOR's weights")
        if refs and data.IMAGE not in prompt:
            prompt = data.subject_prompt([data.subject_of(ref) if isinstance(ref, (str, os.PathLike)) else "subject"
                                          for ref in refs], prompt)
        pictures = [data.open_image(ref) if isinstance(ref, (str, os.PathLike)) else ref for ref in refs]
        ids, mask = self.prompter(prompt, len(pictures))
        ids, mask = ids[None, mask].to(self.device), mask[None, mask].to(self.device)     # without padding
        pixels = [data.clip_pixels(picture, self.config.vision.image_size) for picture in pictures]
        pixels = torch.stack(pixels).to(self.device) if pixels else None                  # (K, 3, c, c)
        prefix = self.prefix(ids, mask, pixels)
        if offload:
            self.encoder.to("meta")
            self.to_drawing(self.device)
        tokens = self.generate(prefix.repeat(n), range(seed, seed + n), replace(self.config.sampling, **sampling),
                               size // self.config.vqgan.factor, progress=progress)
        return [data.to_image(self.vqgan.decode(row[None])[0]) for row in tokens]

    def check_size(self, size):
        """Returns the size if these weights can draw it, else raises InputError."""
        factor, largest = self.config.vqgan.factor, self.config.image_size
        if size % factor or not 0 < size <= largest:
            raise InputError(f"these weights draw pictures of up to {largest} pixels a side, in steps of {factor}, "
                             f"not {size}")
        return size

    def cast(self, device, dtype, offload=False):
        """Moves the model for drawing. fp16 leaves the encoder in fp32, T5 overflows; the VQGAN is always fp32.

        offload: what draws stays behind until `draw` has the prefix and the encoder's room is free.
        """
        self.encoder.to(device, torch.float32 if dtype == torch.float16 else dtype)
        self.projector.to(device, dtype)
        self.decoder.to(dtype)
        return self if offload else self.to_drawing(device)

    def to_drawing(self, device):
        """Moves what draws."""
        self.decoder.to(device)
        self.vqgan.to(device)
        return self

    @classmethod
    def random(cls, size="toy", seed=0, t5_decoder=False, prefix_rope=None, prefix_tokens=None):
        """Seeded weights of a row of SIZES, ready to be trained, with a tokenizer that needs no file."""
        tokenizer = data.byte_tokenizer()
        if size == "tiny":
            from emoji import captions         # the world this size is trained on
            tokenizer = data.train_tokenizer(captions(20_000, seed=0), 1536)
        config = size_config(size).override(prefix_rope, prefix_tokens)
        config = replace(config, image_id=tokenizer.get_vocab_size())
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return cls(config, tokenizer, t5_decoder).eval()

    @classmethod
    def from_pretrained(cls, weights, **options):
        """Reads weights: "tiny", "mentor", a folder, a hub repository, "random-XL", ...; see `weights.load`."""
        from weights import load               # it imports this file
        return load(weights, **options)

    def save_pretrained(self, folder, state=None):
        """Writes model.safetensors, config.json and tokenizer.json; the folder appears complete or not at all.

        state: tensors to write in place of the model's own, for a model whose parameters are spread over processes.
        """
        part = f"{folder}.part"
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        state = {name: tensor.contiguous() for name, tensor in (state or self.state_dict()).items()}
        save_file(state, os.path.join(part, "model.safetensors"))
        with open(os.path.join(part, "config.json"), "w") as file:
            json.dump(asdict(self.config), file, indent=1)
        if self.prompter:
            self.prompter.tokenizer.save(os.path.join(part, "tokenizer.json"))
        replace_folder(part, folder)


def replace_folder(part, folder):
    """Gives a finished folder its name, in place of an older one if there is one."""
    old = f"{folder}.old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(part, folder)
    shutil.rmtree(old, ignore_errors=True)
