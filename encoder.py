"""What the decoder is told: images and text become one sequence of rows in T5's space (paper section 2.2).

    reference images --CLIP--> patch features --connector--> rows --+
                                                                    v
    prompt ids --T5 embedding--> rows, `<image>` rows overwritten by the connector's --T5 encoder--> H (B, S, C)

CLIP ViT-L/14 (openai/clip-vit-large-patch14) gives the features of its last block but one: the last block is trained
only to serve the class token, the patches before it still tell what is where. T5 is FLAN-T5 (google/flan-t5-xl): its
encoder reads in both directions, so that words and patches see each other before the decoder, which only looks back,
reads them. T5's decoder half is needed once, to pretrain the connector by captioning.

There are two kinds of connectors: an MLP, which turns every patch into a row, and a query connector, which is told
what to look for and puts it into 32 rows, however many patches there are.

Shape letters: B batch, K reference images, P patches of an image, R rows that the connector makes of one, W words of
a subject, S prefix rows, L any length, M a memory's length, C width of the network at hand, H heads, hd channels a
head, V T5's vocabulary.
Next: `rope2d.py`, then `model.py`, which projects the rows to its prefix.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from cli import InputError


def compute_dtype(x):
    """The type that attention on x computes in: autocast's where it is on, else x's own."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def aligned(mask):
    """The same numbers in rows that begin at multiples of 8, as a GPU's attention wants them; it would copy any other
    mask in every layer. (..., L) -> (..., L)"""
    length = mask.size(-1)
    return F.pad(mask, (0, -length % 8))[..., :length] if length % 8 else mask


class Attention(nn.Module):
    """Multi-head attention over x, or from x to a memory.

    scale: factor on the scores, None = 1 / sqrt(head_dim); T5 uses 1, its initialisation makes up for it. memory_dim:
    the memory's width, None = dim.
    """

    def __init__(self, dim, heads, head_dim=None, bias=True, scale=None, dropout=0.0, memory_dim=None):
        super().__init__()
        inner = heads * (head_dim or dim // heads)
        self.heads, self.scale, self.dropout = heads, scale, dropout
        self.q = nn.Linear(dim, inner, bias=bias)
        self.k = nn.Linear(memory_dim or dim, inner, bias=bias)
        self.v = nn.Linear(memory_dim or dim, inner, bias=bias)
        self.o = nn.Linear(inner, dim, bias=bias)

    def forward(self, x, memory=None, score_bias=None, causal=False):
        """x: (B, L, C); memory: (B, M, C), None = x; score_bias: added to the scores, broadcasts to (B, H, L, M)."""
        memory = x if memory is None else memory
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)                     # (B, H, L, hd)
        k = self.k(memory).unflatten(-1, (self.heads, -1)).transpose(1, 2)                # (B, H, M, hd)
        v = self.v(memory).unflatten(-1, (self.heads, -1)).transpose(1, 2)                # (B, H, M, hd)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=score_bias, is_causal=causal, scale=self.scale,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).flatten(-2))                                      # (B, L, C)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP

@dataclass(frozen=True)
class VisionConfig:
    """CLIP's image tower; the defaults are ViT-L/14."""
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    image_size: int = 224
    patch_size: int = 14

    @property
    def grid(self):
        """Patches a side."""
        return self.image_size // self.patch_size


def quick_gelu(x):
    """The sigmoid approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class VitBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, mlp, activation=quick_gelu, eps=1e-5):
        super().__init__()
        self.activation = activation
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x, causal=False):
        x = x + self.attn(self.norm1(x), causal=causal)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class ClipVision(nn.Module):
    """Vision transformer: an image cut into patches, behind one class token (transformers' modeling_clip.py)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.class_embed = nn.Parameter(torch.randn(config.width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(config.grid**2 + 1, config.width) * 0.02)
        self.norm_pre = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(VitBlock(config.width, config.heads, config.mlp) for _ in range(config.layers))
        self.norm_post = nn.LayerNorm(config.width)

    def forward_features(self, pixels, layers):
        """(K, 3, H, W) normalised pixels -> (K, 1 + P, C) after that many blocks, no final norm."""
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)                     # (K, P, C)
        x = torch.cat([self.class_embed.expand(len(pixels), 1, -1), patches], dim=1)      # (K, 1 + P, C)
        x = self.norm_pre(x + self.pos_embed)
        for block in self.blocks[:layers]:
            x = block(x)
        return x

    def forward(self, pixels):
        """What MENTOR reads: the patches after the last block but one. (K, 3, H, W) -> (K, P, C)"""
        return self.forward_features(pixels, self.config.layers - 1)[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# T5

@dataclass(frozen=True)
class T5Config:
    """The defaults are FLAN-T5-XL."""
    width: int = 2048
    layers: int = 24
    heads: int = 32
    head_dim: int = 64
    mlp: int = 5120
    vocab_size: int = 32128
    dropout: float = 0.1
    buckets: int = 32
    max_distance: int = 128


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the statistics in fp32 whatever x is, because bf16 squares lose too much. Under autocast the
    result is cast here, once for all products that read it."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + self.eps)
        return (h.type_as(x) * self.weight).to(compute_dtype(x))


def relative_buckets(length, bidirectional, buckets, max_distance, device=None):
    """T5's coarse distances: which of `buckets` rows of the bias table serves query i and key j. -> (L, L) int64

    Half of the buckets are exact distances, the others grow in log steps up to max_distance and beyond; with
    bidirectional, half of all buckets are for keys that come after the query.
    """
    i = torch.arange(length, device=device)
    offset = i[None, :] - i[:, None]                                                      # (L, L), key - query
    bucket = torch.zeros_like(offset)
    if bidirectional:
        buckets //= 2
        bucket = bucket + (offset > 0) * buckets
        distance = offset.abs()
    else:
        distance = (-offset).clamp(min=0)
    exact = buckets // 2
    log_steps = torch.log(distance.clamp(min=1).float() / exact) / torch.log(torch.tensor(max_distance / exact))
    far = (exact + (log_steps * (buckets - exact)).long()).clamp(max=buckets - 1)
    return bucket + torch.where(distance < exact, distance, far)


def t5_attention(config):
    """T5's form of attention: no biases, no scale on the scores."""
    return Attention(config.width, config.heads, config.head_dim, bias=False, scale=1.0, dropout=config.dropout)


class T5Block(nn.Module):
    """Self-attention, with `cross` also attention to a memory, and a gated feed-forward; each behind an RMSNorm."""

    def __init__(self, config, cross=False):
        super().__init__()
        self.attn, self.attn_norm = t5_attention(config), RMSNorm(config.width, eps=1e-6)
        self.cross = t5_attention(config) if cross else None
        self.cross_norm = RMSNorm(config.width, eps=1e-6) if cross else None
        self.wi_0 = nn.Linear(config.width, config.mlp, bias=False)
        self.wi_1 = nn.Linear(config.width, config.mlp, bias=False)
        self.wo = nn.Linear(config.mlp, config.width, bias=False)
        self.ffn_norm = RMSNorm(config.width, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, score_bias, memory=None, memory_bias=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), score_bias=score_bias))
        if self.cross is not None:
            x = x + self.dropout(self.cross(self.cross_norm(x), memory, score_bias=memory_bias))
        h = self.ffn_norm(x)
        h = F.gelu(self.wi_0(h), approximate="tanh") * self.wi_1(h)
        return x + self.dropout(self.wo(self.dropout(h)))


class T5Stack(nn.Module):
    """Blocks that share one table of relative position biases: the encoder, or with `decoder` the causal half."""

    def __init__(self, config, decoder=False):
        super().__init__()
        self.config, self.decoder = config, decoder
        self.relative_bias = nn.Embedding(config.buckets, config.heads)
        self.blocks = nn.ModuleList(T5Block(config, cross=decoder) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, memory=None, memory_mask=None):
        """x: (B, L, C) embeddings; masks: (B, L) and (B, M) bool, True = attend. -> (B, L, C)"""
        buckets = relative_buckets(x.size(1), not self.decoder, self.config.buckets, self.config.max_distance, x.device)
        dtype = compute_dtype(x)         # here once, or every layer would keep a converted copy for its backward pass
        hidden = torch.finfo(dtype).min
        bias = self.relative_bias(buckets).permute(2, 0, 1).unsqueeze(0).to(dtype)        # (1, H, L, L)
        if self.decoder:
            bias = bias.masked_fill(torch.ones_like(buckets, dtype=torch.bool).triu(1), hidden)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], hidden)                      # (B, H, L, L)
        memory_bias = None
        if memory_mask is not None:
            memory_bias = torch.zeros_like(memory_mask, dtype=dtype).masked_fill(~memory_mask, hidden)
            memory_bias = aligned(memory_bias[:, None, None, :])                          # (B, 1, 1, M)
        bias, x = aligned(bias), self.dropout(x)
        for block in self.blocks:
            x = block(x, bias, memory, memory_bias)
        return self.dropout(self.norm(x))


class T5(nn.Module):
    """FLAN-T5 (arXiv 2210.11416): the encoder, and with `decoder` also the captioning half."""

    def __init__(self, config=T5Config(), decoder=False):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.encoder = T5Stack(config)
        if decoder:
            self.decoder = T5Stack(config, decoder=True)
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.initialise()

    def initialise(self):
        """The published start (transformers' modeling_t5.py), in which small queries make up for the missing
        1 / sqrt(head_dim) of the scores."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if isinstance(module, T5Stack):
                nn.init.normal_(module.relative_bias.weight, std=self.config.width**-0.5)
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.q.weight, std=(self.config.width * self.config.head_dim)**-0.5)

    def encode(self, rows, mask):
        """rows: (B, L, C) embeddings; mask: (B, L) bool. -> (B, L, C), padded rows zero"""
        return self.encoder(rows, mask) * mask.unsqueeze(-1)

    def caption_logits(self, memory, memory_mask, labels):
        """Teacher-forced logits of the decoder half: position k sees labels before k. labels: (B, L). -> (B, L, V)

        Labels of -100 are padding: they are fed as 0 and left out of the loss.
        """
        shifted = F.pad(labels.clamp(min=0), (1, 0))[:, :-1]                              # (B, L), 0 starts the text
        return self.lm_head(self.decoder(self.embed(shifted), memory=memory, memory_mask=memory_mask))

    def caption_losses(self, memory, memory_mask, labels):
        """Cross entropy of every label, 0 where it is -100. -> (B, L)"""
        logits = self.caption_logits(memory, memory_mask, labels)
        return F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")


# ---------------------------------------------------------------------------------------------------------------------
# Connectors: images into T5's space

MLPS = {  # form: (hidden width in units of T5's, activation)
    "released": (1, nn.GELU),
    "paper": (2, nn.SiLU),
}
CONNECTORS = (*MLPS, "query")


class Connector(nn.Sequential):
    """Two-layer MLP from CLIP's space to T5's, patch by patch. (K, P, C of CLIP) -> (K, P, C of T5)"""

    def __init__(self, vision_width, t5_width, form="released"):
        factor, activation = MLPS[form]
        super().__init__(nn.Linear(vision_width, factor * t5_width), activation(),
                         nn.Linear(factor * t5_width, t5_width))

    def forward(self, patches, words=None):
        return super().forward(patches)                        # an MLP reads no words


@dataclass(frozen=True)
class QueryConfig:
    """The query connector's size; the defaults are InstructBLIP's, which are BERT-base's."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    vocab_size: int = 30523          # BERT's word pieces and one more
    positions: int = 512             # words of a subject at most
    queries: int = 32                # rows that an image becomes
    cross_every: int = 2             # every second layer reads the image
    dropout: float = 0.1


class QueryBlock(nn.Module):
    """A block of BERT, in which a norm follows each part. Learned queries and a subject's words attend to each other,
    with `cross` the queries then to the image; each of the two kinds has a feed-forward of its own."""

    def __init__(self, config, vision_width, cross):
        super().__init__()
        width, mlp = config.width, config.mlp
        self.queries, self.dropout = config.queries, nn.Dropout(config.dropout)
        self.attn, self.attn_norm = Attention(width, config.heads, dropout=config.dropout), nn.LayerNorm(width, 1e-12)
        self.cross = Attention(width, config.heads, dropout=config.dropout, memory_dim=vision_width) if cross else None
        self.cross_norm = nn.LayerNorm(width, 1e-12) if cross else None
        self.query_fc1, self.query_fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.query_norm, self.norm = nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)

    def forward(self, x, patches, score_bias):
        """x: (K, R + W, C); patches: (K, P, C of CLIP); score_bias: hides padded words. -> x's shape"""
        x = self.attn_norm(x + self.dropout(self.attn(x, score_bias=score_bias)))
        queries, words = x[:, :self.queries], x[:, self.queries:]
        if self.cross is not None:
            queries = self.cross_norm(queries + self.dropout(self.cross(queries, patches)))
        queries = self.query_norm(queries + self.dropout(self.query_fc2(F.gelu(self.query_fc1(queries)))))
        words = self.norm(words + self.dropout(self.fc2(F.gelu(self.fc1(words)))))
        return torch.cat([queries, words], dim=1)                                         # (K, R + W, C)


class QueryConnector(nn.Module):
    """From CLIP's space to T5's by the Q-Former of BLIP-2 (arXiv 2301.12597) in the form that reads what to look for
    (InstructBLIP, arXiv 2305.06500): every image becomes R rows."""

    def __init__(self, config, vision_width, t5_width):
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.randn(1, config.queries, config.width) * 0.02)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.positions, config.width)
        self.norm, self.dropout = nn.LayerNorm(config.width, 1e-12), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(QueryBlock(config, vision_width, cross=i % config.cross_every == 0)
                                    for i in range(config.layers))
        self.out = nn.Linear(config.width, t5_width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)       # BERT's start

    def forward(self, patches, words):
        """patches: (K, P, C of CLIP); words: (K, W) ids of what each image's subject is called, 0 = padding.
        -> (K, R, C of T5)"""
        if words is None or len(words) != len(patches):
            raise InputError("the query connector reads what each reference picture shows; give words for each")
        named = self.embed(words) + self.position.weight[:words.size(1)]                  # (K, W, C)
        queries = self.queries.expand(len(words), -1, -1).type_as(named)                  # (K, R, C)
        x = self.dropout(self.norm(torch.cat([queries, named], dim=1)))                   # (K, R + W, C)
        seen = F.pad(words != 0, (self.config.queries, 0), value=True)[:, None, None]     # (K, 1, 1, R + W)
        dtype = compute_dtype(x)
        score_bias = aligned(torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min))
        for block in self.blocks:
            x = block(x, patches, score_bias)
        return self.out(x[:, :self.config.queries])                                       # (K, R, C of T5)


def make_connector(vision_width, t5_width, form, query):
    """A new connector. form: one of CONNECTORS; query: the QueryConfig of a query connector"""
    if form == "query":
        return QueryConnector(query, vision_width, t5_width)
    return Connector(vision_width, t5_width, form)


# ---------------------------------------------------------------------------------------------------------------------
# Images into text

class MultimodalEncoder(nn.Module):
    """Prompt with reference images -> H, one row for each token (paper section 2.2).

    "The dog in <image>.", two patches for short, becomes the rows  The | dog | in | p0 | p1 | . | </s>, where p0 and p1
    are what the connector makes of the patches; from there on T5 treats all rows alike.
    """

    def __init__(self, vision, t5, connector="released", image_id=32100, t5_decoder=False, query=QueryConfig()):
        super().__init__()
        self.image_id = image_id
        self.image_tokens = query.queries if connector == "query" else vision.grid**2      # R
        self.clip = ClipVision(vision)
        self.connector = make_connector(vision.width, t5.width, connector, query)
        self.t5 = T5(t5, decoder=t5_decoder)

    def forward(self, ids, mask, refs=None, words=None):
        """ids, mask: (B, S), padded at the right; refs: (K, 3, c, c) CLIP pixels of all samples, in order of samples;
        words: (K, W) what they show, for the query connector.

        Each image fills the next R `<image>` rows. -> H (B, S, C), padded rows zero; InputError where they do not fit.
        """
        rows = self.t5.embed(ids)                                                         # (B, S, C)
        is_image = ids == self.image_id                                                   # (B, S)
        if refs is None:
            refs = rows.new_empty(0, 3, self.clip.config.image_size, self.clip.config.image_size)
            words = ids.new_zeros(0, 1)
        needed = len(refs) * self.image_tokens
        if not ids.is_meta and is_image.sum() != needed:       # on the meta device there are no values
            raise InputError(f"the prompts have {is_image.sum()} <image> tokens but {len(refs)} reference pictures "
                             f"become {needed} rows; write {self.image_tokens} <image> tokens for each picture")
        # also where there are no images: a connector that trains then has gradients (0) on every rank
        features = self.connector(self.clip(refs.type_as(rows)), words)                   # (K, R, C)
        rows = rows.masked_scatter(is_image.unsqueeze(-1), features.type_as(rows))        # in order, as images come
        return self.t5.encode(rows, mask)                                                 # (B, S, C)
