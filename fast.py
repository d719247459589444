"""The same network, faster on the machine at hand: what speed alone decides, kept out of the files of the network.

    fp32 on a CPU      products with few rows as compiled sums            FewRowsLinear, compile_blocks
    int8 on a CPU      weights and cache of one byte a number             Int8Linear, Int8Cache, round_to_int8
    a GPU              a decoding step recorded once, then replayed       Graphs

Drawing reads every weight and the whole cache once a token, so its time is that of reading: fewer bytes, less time.
`weights.py` builds models with these; model.py is right without them. Next: `weights.py`.
"""
import ctypes
import itertools
import os
import sys
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps

import torch
import torch.nn.functional as F
from torch import nn

from model import Attention, FeedForward, KVCache

# ---------------------------------------------------------------------------------------------------------------------
# fp32 on a CPU

COMPILED_ROWS, LEFT_ROWS = 8, 64   # up to so many rows a product on a CPU is faster as compiled sums, or weight first


def few_rows_product(x, weight):
    """x @ weight.T written as sums, which a compiler fuses into one loop over the weight.

    x: (n, in); weight: (out, in) -> (n, out)
    """
    if weight.size(1) <= 2048:
        return torch.stack([(weight * row).sum(dim=-1) for row in x])
    # longer rows of x leave the nearest cache between two reads, so four rows of the weight share one reading of them
    columns = []
    for row in x:
        sums = [(part * row).sum(dim=-1) for part in weight.unflatten(0, (-1, 4)).unbind(dim=1)]
        columns.append(torch.stack(sums, dim=-1).flatten())
    return torch.stack(columns)


class FewRowsLinear(nn.Linear):
    """nn.Linear without bias, for decoding on a CPU: with a few rows its time is that of reading the weight, which the
    ordinary product does at a fifth of the memory's speed, with the weight at the left at half, and compiled sums at
    nearly all of it (`python bench.py decode`)."""

    def forward(self, x):
        """(..., in) -> (..., out)"""
        n = x.numel() // x.size(-1)
        if x.device.type != "cpu" or n > LEFT_ROWS:
            return F.linear(x, self.weight)
        rows = x.reshape(n, -1)                                                           # (n, in)
        if n <= COMPILED_ROWS and torch.compiler.is_compiling():
            y = few_rows_product(rows, self.weight)                                       # (n, out)
        else:
            y = (self.weight @ rows.t()).t()                                              # (n, out)
        return y.reshape(*x.shape[:-1], -1)


def use_fast_products(decoder):
    """Gives every plain nn.Linear of the decoder the product of FewRowsLinear."""
    for module in decoder.modules():
        if type(module) is nn.Linear:
            module.__class__ = FewRowsLinear


def compile_blocks(decoder):
    """Compiles the blocks on the first call, all of them as one; falls back to eager where no compiler is found."""
    torch._dynamo.config.suppress_errors = True
    for layer in decoder.layers:
        layer.compile()


# ---------------------------------------------------------------------------------------------------------------------
# int8 on a CPU

def to_int8(x):
    """Rows as whole numbers of one byte and a scale each. (..., n) -> int8 (..., n), fp32 (...): x = numbers * scale"""
    scale = torch.maximum(x.amax(dim=-1), -x.amin(dim=-1)).clamp(min=1e-12) / 127
    return (x / scale.unsqueeze(-1)).round_().to(torch.int8), scale


# FBGEMM multiplies bytes, and adds pairs of products in 16 bits where a CPU knows nothing better: 127 x 127 x 2 is the
# most that fits. Rows of x are therefore 7 bits wide, a sign included; two of them, one for what the other leaves over,
# hold 14 bits, and four rows take no longer than two: reading the weight is what takes time.
HALF, ZERO = 63, 64                # a row's numbers lie in -63..63, stored as 1..127
fbgemm = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
packed = {}                        # by number: PyTorch's compiler cannot look into FBGEMM's form of a matrix
following = itertools.count()
torch.library.define("mentor::int8_product", "(Tensor rows, Tensor number, int out) -> Tensor")


@torch.library.impl("mentor::int8_product", "CPU")
def int8_product(rows, number, out):
    """Whole numbers in fp32, (n, in), times a packed matrix. -> (n, out) fp32"""
    return fbgemm(rows, 1.0, ZERO, packed[number.item()])


@torch.library.register_fake("mentor::int8_product")
def int8_product_shape(rows, number, out):
    """What a compiler has to know of it."""
    return rows.new_empty(rows.size(0), out)


def has_int8_products():
    """Whether PyTorch brings FBGEMM, as it does on x86."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def has_bf16_products():
    """Whether this CPU multiplies bf16 numbers, nearly three times as fast as fp32; others do it by detours."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def slowdown(dtype):
    """How many times longer than in fp32 a small product takes this CPU in another type: below one, or hundreds."""
    def seconds(dtype):
        x, times = torch.ones(192, 192, dtype=dtype), []
        for _ in range(4):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        return min(times)
    return seconds(dtype) / seconds(torch.float32)


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8, a scale for each of its rows; for inference on a CPU.

    y = x W^T with W rounded to 8 bits. Packed, for a decoder's few rows, x is rounded too, to 14 bits a row, and sums
    are whole numbers; otherwise, for an encoder's many rows, W becomes a float again for the moment, of 16 bits on CPUs
    that are fast at it. A row's result does not depend on the other rows.
    """

    def __init__(self, numbers, scale, bias=None):
        super().__init__()
        self.out_features, self.in_features = numbers.shape
        self.bias = bias
        self.register_buffer("weight", numbers)                                           # (out, in)
        self.register_buffer("scale", scale)                                              # (out,)

    def pack(self):
        """Lets FBGEMM order the weight as it reads it, and frees the original."""
        if not has_int8_products():
            return
        number, zeros = next(following), torch.zeros(self.out_features, dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                    # quantized tensors are to go in some later PyTorch
            weight = torch._make_per_channel_quantized_tensor(self.weight, self.scale.double(), zeros, axis=0)
            packed[number] = torch.ops.quantized.linear_prepack(weight, None)
        weakref.finalize(self, packed.pop, number, None)
        del self.weight, self.scale
        self.register_buffer("number", torch.tensor(number), persistent=False)

    def product(self, x):
        """(n, in) -> (n, out)"""
        if not hasattr(self, "number"):
            if len(x) <= COMPILED_ROWS and torch.compiler.is_compiling():
                return few_rows_product(x, self.weight.to(x.dtype)) * self.scale
            dtype = torch.bfloat16 if has_bf16_products() else x.dtype           # holds whole numbers up to 256
            return F.linear(x.to(dtype), self.weight.to(dtype)).to(x.dtype) * self.scale
        scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / HALF                # (n, 1)
        x = x / scale
        rest = (x - x.round()) * (2 * HALF)
        y = torch.ops.mentor.int8_product(torch.cat([x, rest]), self.number, self.out_features)
        return (y[:len(x)] + y[len(x):] / (2 * HALF)) * scale

    def forward(self, x):
        """(..., in) -> (..., out)"""
        y = self.product(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def pack(numbers):
    """Four in an int32: channels c, c + n / 4, c + n / 2 and c + 3 n / 4. (..., n) int8 -> (..., n / 4) int32"""
    a, b, c, d = numbers.to(torch.int32).chunk(4, dim=-1)
    return a & 255 | (b & 255) << 8 | (c & 255) << 16 | d << 24


def unpack(numbers):
    """The four quarters of the channels, by shifts: without AVX-512 a compiler makes loops of these two to three times
    as fast as of single bytes. (..., n / 4) int32 -> 4 times (..., n / 4) fp32"""
    return [((numbers << (24 - 8 * i)) >> 24).float() for i in range(4)]


class Int8Cache(KVCache):
    """Keys and values as int8, packed, with a scale for each head's row of each position: a quarter of the bytes."""

    def allocate(self, shape, like):
        *rows, channels = shape
        self.kv, self.scales = like.new_empty((*rows, channels // 4), dtype=torch.int32), like.new_zeros(rows)
        use_huge_pages(self.kv.data_ptr(), self.kv.data_ptr() + self.kv.nbytes)
        self.kv.zero_()

    def views(self, count):
        """Each layer's first `count` positions. -> list of (2, B, H, count, hd / 4) int32, scales (2, B, H, count)"""
        return [(kv[..., :count, :], scales[..., :count]) for kv, scales in zip(self.kv, self.scales)]


class Int8Attention(Attention):
    """Attention over an Int8Cache."""

    def attend(self, q, k, v, mask, kv, at):
        """The prefix's positions see each other unrounded; a later one reads the cache, and itself there."""
        if kv is None:
            return super().attend(q, k, v, mask, kv, at)
        kv, scales = kv
        new, new_scales = to_int8(torch.stack([k, v]))
        kv.index_copy_(3, at, pack(new))
        scales.index_copy_(3, at, new_scales)
        if q.size(2) > 1:
            return super().attend(q, k, v, mask, None, at)
        (k, v), (k_scale, v_scale) = kv, scales
        products = sum(query * key for query, key in zip(q.chunk(4, dim=-1), unpack(k)))
        scores = products.sum(dim=-1) * (k_scale * q.size(-1)**-0.5) + mask.squeeze(2)                    # (B, H, keys)
        weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()                      # softmax, but for its divisor
        scaled = (weights * v_scale).unsqueeze(-1)                                        # (B, H, keys, 1)
        y = torch.cat([(scaled * value).sum(dim=-2) for value in unpack(v)], dim=-1)                      # (B, H, hd)
        return (y / weights.sum(dim=-1, keepdim=True)).unsqueeze(2)                       # (B, H, 1, hd)


class Int8FeedForward(FeedForward):
    """SwiGLU whose first two products are one."""

    def join(self):
        """Puts w1 and w3 together."""
        self.w13 = Int8Linear(*(torch.cat([getattr(part, name) for part in (self.w1, self.w3)])
                                for name in ("weight", "scale")))
        del self.w1, self.w3

    def forward(self, x):
        """(B, L, D) -> (B, L, D)"""
        gate, value = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * value)


def int8_linears(network):
    """{name: module} of all layers that int8 is for: every linear one."""
    return {name: module for name, module in network.named_modules() if isinstance(module, (nn.Linear, Int8Linear))}


def exchange(network, name, module):
    """Puts a module in the place of another."""
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)


@torch.no_grad()
def round_to_int8(network):
    """Rounds the weights of all linear layers, one after the other."""
    for name, module in int8_linears(network).items():
        if isinstance(module, nn.Linear):
            exchange(network, name, Int8Linear(*to_int8(module.weight.float()), module.bias))


def expect_int8(network, names):
    """Makes a network on the meta device ready for int8 weights. names: of the tensors to come"""
    for name, module in int8_linears(network).items():
        if f"{name}.scale" in names:
            weight = torch.empty(module.weight.shape, dtype=torch.int8, device="meta")
            exchange(network, name, Int8Linear(weight, torch.empty(len(weight), device="meta"), module.bias))


def is_int8(network):
    """Whether any layer's weights are int8."""
    return any(isinstance(module, Int8Linear) for module in network.modules())


def decode_in_int8(decoder):
    """Makes a decoder's products and cache those of int8; rounds what is not rounded yet."""
    round_to_int8(decoder)
    for layer in decoder.layers:
        layer.attention.__class__, layer.feed_forward.__class__ = Int8Attention, Int8FeedForward
        layer.feed_forward.join()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(Int8Linear.pack, int8_linears(decoder).values()))
        list(pool.map(lambda addresses: use_huge_pages(*addresses, MADV_COLLAPSE), own_memory()))
    decoder.cache = Int8Cache


def in_bf16(function):
    """The function, its products and convolutions in bf16 where this CPU is fast at it. -> what it returns, in fp32"""
    @wraps(function)
    def call(*args):
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_products()):
            return function(*args).float()
    return call


# What is read from end to end for every token is read half as fast again from pages of 2 MiB: there are fewer addresses
# to look up. Linux has to be asked.
HUGE, MADV_HUGEPAGE, MADV_COLLAPSE = 2 << 20, 14, 25           # the last since Linux 6.1


def use_huge_pages(start, end, advice=MADV_HUGEPAGE):
    """Asks Linux for huge pages in a range of addresses, which it may grant. advice: MADV_HUGEPAGE where nothing was
    written yet, MADV_COLLAPSE to move what was."""
    start, end = -(-start // HUGE) * HUGE, end // HUGE * HUGE
    if sys.platform == "linux" and start < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def own_memory(piece=64 << 20):
    """All that this process has allocated, because FBGEMM does not tell where its matrices lie. -> [(start, end)]"""
    if not os.path.exists("/proc/self/maps"):
        return []
    with open("/proc/self/maps", encoding="utf-8") as file:
        regions = [line.split() for line in file]
    ranges = [map(partial(int, base=16), addresses.split("-")) for addresses, access, _, _, _, *name in regions
              if access == "rw-p" and name in ([], ["[heap]"])]
    return [(at, min(at + piece, end)) for start, end in ranges for at in range(start, end, piece)]


# ---------------------------------------------------------------------------------------------------------------------
# A GPU

class Graphs:
    """Replays a decoding step as CUDA graphs, one for each window of the cache: no time for Python and launches.

    The first step of a window runs as it is, which also warms up; the second is captured; all further ones are replays.
    step: takes and returns tensors of the device. Not yet run on a GPU.
    """

    def __init__(self, step, cache):
        cache.stride = 256
        self.step, self.cache = step, cache
        self.inputs, self.captured = None, {}                  # window -> None after its first step, (graph, output)

    def __call__(self, *inputs):
        window = self.cache.window
        if window not in self.captured:
            self.captured[window] = None
            return self.step(*inputs)
        if self.inputs is None:
            self.inputs = [tensor.clone() for tensor in inputs]            # a graph reads the same memory every time
        if self.captured[window] is None:
            graph, length = torch.cuda.CUDAGraph(), self.cache.length
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):     # a loader's thread may allocate
                output = self.step(*self.inputs)               # records what the device is to do, and does nothing
            self.captured[window], self.cache.length = (graph, output), length
        graph, output = self.captured[window]
        for memory, tensor in zip(self.inputs, inputs):
            memory.copy_(tensor)
        graph.replay()
        self.cache.length += 1                                 # Python's count; the device's is part of the graph
        return output.clone()
