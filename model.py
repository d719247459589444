"""MENTOR: reference images and a prompt in, a new image out, one token at a time (arXiv 2507.09574).

    prompt ids, reference images --encoder.py--> H (B, S, C) --left-pad, projector--> prefix (B, S, D)
    prefix, image tokens so far --decoder with 2D RoPE--> logits of the next token --guidance, sampling--> token
    T tokens --vqgan.py--> image

The decoder is LlamaGen's (autoregressive/models/gpt.py), which is Llama's with rows and columns in place of positions
(`rope2d.py`). Every attention, mask and loop is written for the reader; what only speed decided (CUDA graphs, other
products) is put around them by `weights.place`.

Shape letters: B batch, K reference images, S prefix rows, T image tokens (grid * grid), L = S + T, C T5's width,
D the decoder's width, H heads, hd channels a head, V codes. Next: `vqgan.py`, which makes images of tokens.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cli import InputError, bar
from data import IMAGE, Processor
from encoder import MultimodalEncoder, QueryConfig, RMSNorm, T5Config, VisionConfig, aligned, compute_dtype
from rope2d import apply_rope, prefix_and_image_table
from vqgan import VQGAN, VQConfig


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
    """How tokens are sampled; the values that a model's folder carries are its defaults."""
    cfg_scale: float = 7.5           # classifier-free guidance, 1 = none; these three are LlamaGen's sample_t2i.py
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


PARTS = ("encoder.clip", "encoder.connector", "encoder.t5", "projector", "decoder", "vqgan")      # of a model


@dataclass(frozen=True)
class MentorConfig:
    """The whole network; the defaults are MENTOR's published one."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    t5: T5Config = field(default_factory=T5Config)
    connector: str = "released"      # or "paper" or "query": encoder.CONNECTORS
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    vqgan: VQConfig = field(default_factory=VQConfig)
    prefix_tokens: int = 512         # the longest prefix S
    image_size: int = 512            # the largest image, pixels a side
    image_id: int = 32100            # T5's id of `<image>`
    untrained: tuple[str, ...] = ()  # parts that no file held and no stage has trained, as PARTS names them
    sampling: Sampling = field(default_factory=Sampling)
    query: QueryConfig = field(default_factory=QueryConfig)    # the query connector's size

    @property
    def grid(self):
        """Image tokens a side at `image_size`."""
        return self.image_size // self.vqgan.factor


SIZES = {   # of the decoder: layers, heads, width (parameters with 16,384 codes); all but "toy" have published encoders
    "toy": MentorConfig(         # random weights that run anywhere in a second
        vision=VisionConfig(width=64, layers=3, heads=4, mlp=256, patch_size=28),
        t5=T5Config(width=64, layers=2, heads=4, head_dim=16, mlp=128, vocab_size=260),
        decoder=DecoderConfig(2, 4, 64, codes=1024),
        vqgan=VQConfig(channels=16, res_blocks=1, latent=32, codes=1024),
        query=QueryConfig(64, 2, 4, 128, vocab_size=260, positions=64, queries=8),
        image_size=256, sampling=Sampling(cfg_scale=3.0)),
    "B": MentorConfig(decoder=DecoderConfig(12, 12, 768)),          # 111 M
    "L": MentorConfig(decoder=DecoderConfig(24, 16, 1024)),         # 343 M
    "XL": MentorConfig(decoder=DecoderConfig(36, 20, 1280)),        # 775 M, MENTOR's
    "XXL": MentorConfig(decoder=DecoderConfig(48, 24, 1536)),       # 1.4 B
    "3B": MentorConfig(decoder=DecoderConfig(24, 32, 3200)),        # 3.1 B
}


# ---------------------------------------------------------------------------------------------------------------------
# The prefix

class Prefix(NamedTuple):
    """What stands before the image tokens, padded at the left so that token 0 follows the last row directly."""
    rows: torch.Tensor         # (B, S, D)
    valid: torch.Tensor        # (B, S) bool, False = padding
    is_image: torch.Tensor     # (B, S) bool, True = a reference image's row

    def repeat(self, n):
        """Every sample n times in a row. (B, ...) -> (n B, ...)"""
        return Prefix(*(part.repeat_interleave(n, dim=0) for part in self))

    def join(self, other):
        """This batch, then the other."""
        return Prefix(*(torch.cat(pair) for pair in zip(self, other)))


def left_pad(rows, mask):
    """Moves every sample's valid rows to the end, zeros before. rows: (B, S, ...), mask: (B, S) bool -> rows' shape

    So the last prefix row is the end of every sample's prompt, and token 0 is predicted from there at one position.
    """
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
    return aligned(torch.zeros_like(attend, dtype=dtype).masked_fill(~attend, -math.inf))


def make_mask(valid, dtype=torch.float32):
    """Causal, padded keys hidden. valid: (B, L) bool -> (B, 1, L, L), 0 = attend, -inf = hidden

    The diagonal is always open: a padding row sees nothing else, and a softmax over nothing is NaN, which no later
    mask could remove. dtype: what attention computes in, so that no layer has to convert the mask again.
    """
    length = valid.size(1)
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    diagonal = torch.eye(length, dtype=torch.bool, device=valid.device)
    return additive((causal & valid[:, None, :]) | diagonal, dtype).unsqueeze(1)          # (B, 1, L, L)


class KVCache:
    """Keys and values of all positions of one batch, allocated once: the final length is known.

    For MENTOR with guidance on one image: 36 layers x keys and values x 2 sequences x 20 heads x 1,536 positions x 64
    channels, 283 M numbers. A step writes the position `at`, then reads the first `window` ones; the mask hides what
    is not written yet.
    """
    stride = 1                       # the window grows in steps of this many positions (Graphs takes larger ones)

    def __init__(self, config, prefix, grid):
        batch, rows = prefix.valid.shape
        self.length, self.total = rows, rows + grid * grid     # positions filled so far, and in the end
        self.allocate((config.layers, 2, batch, config.heads, self.total, config.head_dim), prefix.rows)
        attend = F.pad(prefix.valid, (0, grid * grid), value=False)                       # (B, L)
        self.mask = additive(attend[:, None, None], prefix.rows.dtype)                    # (B, 1, 1, L)
        self.at = torch.full((1,), rows, device=prefix.rows.device)                       # length, where steps read it

    def allocate(self, shape, like):
        """Room for all positions, of the type that `like` has."""
        self.kv = like.new_zeros(shape)

    def views(self, count):
        """Each layer's first `count` positions. -> list of (2, B, H, count, hd)"""
        return [kv[..., :count, :] for kv in self.kv]

    @property
    def window(self):
        """How many positions the next step reads."""
        return min(-(-(self.length + 1) // self.stride) * self.stride, self.total)


class Attention(nn.Module):
    """Self-attention with rotated queries and keys; q, k and v come from one product."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, mask, kv=None, at=None):
        """x: (B, L, D); rope: the table of these positions; mask: (B, 1, L, keys), added to scores. -> (B, L, D)

        kv: (2, B, H, keys, hd), the layer's cache, written at the positions `at` (L,), then read.
        """
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, L, hd)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        y = self.attend(q, k, v, mask, kv, at)                                            # (B, H, L, hd)
        return self.dropout(self.wo(y.transpose(1, 2).flatten(-2)))                       # (B, L, D)

    def attend(self, q, k, v, mask, kv, at):
        """Softmax attention over the new keys and values, or over the cache once they are in it."""
        if kv is not None:
            k, v = kv.index_copy_(3, at, torch.stack([k, v]))                             # each (B, H, keys, hd)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.width, config.hidden, bias=False)
        self.w3 = nn.Linear(config.width, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.width, bias=False)
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
    """Llama-style decoder over [prefix, image tokens] (paper section 2.2; LlamaGen's gpt.py)."""
    cache = KVCache                  # what decoding remembers keys and values in

    def __init__(self, config, patch_grid=16):
        super().__init__()
        self.config, self.patch_grid = config, patch_grid
        self.tok_embeddings = nn.Embedding(config.codes, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, eps=1e-5)
        self.output = nn.Linear(config.width, config.codes, bias=False)

    def rope(self, prefix, grid):
        """The rotary table of the whole sequence. -> (1 or B, L, hd / 2, 2)"""
        return prefix_and_image_table(self.config.prefix_rope, prefix.is_image, self.patch_grid, grid,
                                      self.config.head_dim, self.config.rope_base)

    def forward(self, prefix, tokens, grid):
        """Teacher forcing. tokens: (B, t) the first t of grid * grid image tokens.

        -> logits (B, t + 1, V); logits[:, k] has seen the prefix and tokens[:, :k], so it predicts token k: the last
        prefix position predicts token 0, and the position of token k predicts token k + 1.
        """
        prefix_rows, count = prefix.rows.size(1), tokens.size(1)
        valid = F.pad(prefix.valid, (0, count), value=True)                               # (B, S + t)
        x = torch.cat([prefix.rows, self.tok_embeddings(tokens)], dim=1)                  # (B, S + t, D)
        mask = make_mask(valid, compute_dtype(x))                                         # (B, 1, S + t, S + t)
        rope = self.rope(prefix, grid)[:, :x.size(1)]
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, rope, mask)
        return self.output(self.norm(x[:, prefix_rows - 1:]))                             # (B, t + 1, V)

    def prefill(self, prefix, grid):
        """Reads the prefix into a new cache. -> logits of token 0 (B, V), cache, rotary table"""
        cache, rope, x = self.cache(self.config, prefix, grid), self.rope(prefix, grid), prefix.rows
        rows, mask = x.size(1), make_mask(prefix.valid, x.dtype)
        at = torch.arange(rows, device=x.device)
        with torch.compiler.set_stance("force_eager"):         # once only: compiling for this length would not pay
            for layer, kv in zip(self.layers, cache.views(rows)):
                x = layer(x, rope[:, :rows], mask, kv, at)
        return self.output(self.norm(x[:, -1])), cache, rope                              # (B, V)

    def decode_step(self, token, cache, rope):
        """Feeds one token per sample, (B,). -> logits of the next (B, V)"""
        x = self.tok_embeddings(token).unsqueeze(1)                                       # (B, 1, D)
        rope, window = rope.index_select(1, cache.at), cache.window
        mask = cache.mask.index_fill_(3, cache.at, 0)[..., :window]                       # opens this position
        for layer, kv in zip(self.layers, cache.views(window)):
            x = layer(x, rope, mask, kv, cache.at)
        cache.at += 1
        cache.length += 1
        return self.output(self.norm(x[:, -1]))                                           # (B, V)


# ---------------------------------------------------------------------------------------------------------------------
# From logits to a token

def guide(logits, cfg_scale):
    """Classifier-free guidance: away from what the model says without the prompt, towards what it says with it.

    logits: (2B, V), first with the condition c, then unconditional u. -> u + cfg_scale * (c - u), (B, V); with a scale
    of 1, which is c, there are no unconditional rows, and (B, V) comes back as it is.
    """
    if cfg_scale == 1:
        return logits
    cond, uncond = logits.float().chunk(2)
    return uncond + cfg_scale * (cond - uncond)


def sample_tokens(logits, uniform, sampling):
    """One token per row: temperature, then top-k, then top-p, then the inverse of the cumulative distribution.

    logits: (B, V); uniform: (B,) numbers in [0, 1), one per row, so that a row's token depends on nothing else.
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
    """CLIP, connector, T5, projector, decoder and VQGAN in one, with the processor that prepares their input.

    A batch is a dict as `data.collate` makes it: ids, mask (B, S), padded at the right; refs (K, 3, c, c), the CLIP
    pixels of all samples in order; words (K, W) where the connector reads them; for training also tokens (B, T) or
    target (B, 3, H, W), and drop (B,) bool. words: the tokenizer of a query connector, None = the prompt's.
    """

    def __init__(self, config, tokenizer=None, t5_decoder=False, words=None):
        super().__init__()
        if config.connector == "query" and config.decoder.prefix_rope == "grid":
            raise InputError("the prefix rotation grid turns image rows by the place of their patch, but the query "
                             "connector's rows have none; take identity or zero")
        self.config, self.processor = config, None
        self.replay = None                     # takes a decoding step and its cache, gives a faster step
        self.adapter = None                    # weights.Adapter, if low-rank updates are trained in place of the model
        self.encoder = MultimodalEncoder(config.vision, config.t5, config.connector, config.image_id, t5_decoder,
                                         config.query)
        self.projector = Projector(config.t5.width, config.decoder.width, config.prefix_tokens)
        self.decoder = Decoder(config.decoder, config.vision.grid)
        self.vqgan = VQGAN(config.vqgan)
        if tokenizer:
            words = words or (tokenizer if config.connector == "query" else None)
            self.processor = Processor(tokenizer, self.encoder.image_tokens, config.prefix_tokens,
                                       config.vision.image_size, words)
            if self.processor.image_id != config.image_id:
                raise InputError(f"the tokenizer gives {IMAGE} the id {self.processor.image_id} but the weights expect "
                                 f"{config.image_id}; use the tokenizer.json that belongs to them")
            if words and words.get_vocab_size() > config.query.vocab_size:
                raise InputError(f"the tokenizer of the query connector has {words.get_vocab_size()} words but its "
                                 f"table {config.query.vocab_size}; use the one that belongs to these weights")
        for part in (self.projector, self.decoder):
            for module in part.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.decoder.output.weight)

    @property
    def device(self):
        """Where prompts are read and images are sampled."""
        return self.projector.uncond.device

    def project(self, h, valid, is_image):
        """Left-padded T5 rows -> Prefix."""
        return Prefix(self.projector(h.to(self.projector.uncond.dtype)), valid, is_image)

    def prefix(self, ids, mask, refs=None, drop=None, words=None):
        """Prompts and reference images -> Prefix. drop: True = this sample learns the unconditional rows in place of
        its own (training, p = 0.1)."""
        h = left_pad(self.encoder(ids, mask, refs, words), mask)                          # (B, S, C)
        if drop is not None:
            h = torch.where(drop[:, None, None], self.projector.uncond[-h.size(1):].type_as(h), h)
        return self.project(h, left_pad(mask, mask), left_pad(ids == self.config.image_id, mask))

    def unconditional(self, prefix):
        """The learned rows in place of the prompt. They share its length and mask, so that all that guidance compares
        is what the rows say. -> Prefix"""
        rows = self.projector.uncond[-prefix.rows.size(1):].expand(len(prefix.rows), -1, -1)
        return self.project(rows, prefix.valid, prefix.is_image)

    def target_tokens(self, batch):
        """The tokens that a batch is to teach: its own, or those of its target pixels. -> (B, T)"""
        if "tokens" in batch:
            return batch["tokens"]
        with torch.autocast(batch["ids"].device.type, enabled=False):      # bf16 would choose other codes
            return torch.cat([self.vqgan.encode(image[None]) for image in batch["target"]])      # it spares memory

    def forward(self, batch):
        """The training loss: cross entropy of every image token, nothing on the prefix (paper section 2.3). -> (B, T)

        A batch with labels (B, L), stage connector, has T5's own decoder half caption its images. -> (B, L)
        """
        if "labels" in batch:
            h = self.encoder(batch["ids"], batch["mask"], batch["refs"], batch.get("words"))            # (B, S, C)
            return self.encoder.t5.caption_losses(h, batch["mask"], batch["labels"])
        tokens = self.target_tokens(batch)                                                # (B, T)
        prefix = self.prefix(batch["ids"], batch["mask"], batch["refs"], batch.get("drop"), batch.get("words"))
        logits = self.decoder(prefix, tokens[:, :-1], math.isqrt(tokens.size(1)))         # (B, T, V)
        return F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")  # (B, T)

    @torch.inference_mode()
    def generate(self, prefix, seeds, sampling=None, grid=None, count=None, progress=False):
        """Samples the image tokens behind a prefix, row i with seeds[i] and so whatever its batch.

        grid: tokens a side, default the config's; count: how many tokens, default all grid * grid; progress: True shows
        a bar, a function is called after every token but the first with all so far, [(B,), ...]. -> (B, count) int64
        """
        sampling, grid = sampling or self.config.sampling, grid or self.config.grid
        sampling.check(self.config.decoder.codes)
        count = count or grid * grid
        # on the CPU and ahead: the same image on every device, and no waiting for the device in the loop
        uniform = torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(s)) for s in seeds])
        uniform = uniform.to(prefix.rows.device)                                          # (B, count)
        copies = 1
        if sampling.cfg_scale != 1:                            # both halves of guidance run as one batch
            prefix, copies = prefix.join(self.unconditional(prefix)), 2                   # (2B, S, D)
        logits, cache, rope = self.decoder.prefill(prefix, grid)                          # (B or 2B, V)
        if not logits.isfinite().all():
            raise InputError("the logits are not finite: a number is too large for this type; use --dtype bf16 or fp32")

        def step(token, uniform):
            logits = self.decoder.decode_step(token.repeat(copies), cache, rope)          # (B or 2B, V)
            return sample_tokens(guide(logits, sampling.cfg_scale), uniform, sampling)    # (B,)

        if logits.is_cuda and self.replay:
            step = self.replay(step, cache)
        tokens = [sample_tokens(guide(logits, sampling.cfg_scale), uniform[:, 0], sampling)]
        for k in bar(range(1, count), desc="sampling", unit="token", disable=not progress, leave=False):
            tokens.append(step(tokens[-1], uniform[:, k]))
            if callable(progress):
                progress(tokens)
        return torch.stack(tokens, dim=1)                                                 # (B, count)

    @torch.inference_mode()
    def sample(self, batch, seeds, sampling=None, size=None, progress=False, offload=False):
        """Images of a batch of prompts and reference images, `data.collate([mentor.processor(prompt, images), ...])`.

        seeds: one for each image; where there are n times as many as prompts, each prompt is sampled n times in a row.
        sampling: default the weights' own. size: pixels a side, default the weights' own. offload: the encoder gives
        its memory back once it has read the prompts, so these are the model's last images (see weights.place).
        -> (len(seeds), 3, size, size) in about [-1, 1]
        """
        size = self.check_size(size or self.config.image_size)
        if len(batch["refs"]) and "encoder.connector" in self.config.untrained:
            raise InputError("these weights hold no trained connector, so they cannot see reference pictures; "
                             "leave out the references or use MENTOR's weights")
        batch = {key: batch[key].to(self.device) for key in ("ids", "mask", "refs", "words") if key in batch}
        prompts = len(batch["ids"])
        if not seeds or len(seeds) % prompts or not 0 <= min(seeds) <= max(seeds) < 2**63:
            raise ValueError(f"{len(seeds)} seeds for {prompts} prompts; give as many, or a multiple, all 0 or above")
        prefix = self.prefix(**batch).repeat(len(seeds) // prompts)
        if offload:
            self.encoder.to("meta")
            self.decoder.to(self.device)
            self.vqgan.to(self.device)
        tokens = self.generate(prefix, seeds, sampling, size // self.vqgan.factor, progress=progress)
        return torch.cat([self.vqgan.decode(row[None]) for row in tokens])                # one by one: it spares memory

    def check_size(self, size):
        """Returns the size if these weights can draw it, else raises InputError."""
        factor, largest = self.vqgan.factor, self.config.image_size
        if size % factor or not 0 < size <= largest:
            raise InputError(f"these weights draw pictures of up to {largest} pixels a side, in steps of {factor}, "
                             f"not {size}")
        return size
