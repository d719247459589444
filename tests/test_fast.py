"""What only speed decides gives the numbers of the plain network; int8 those of a plain network that rounds alike."""
import contextlib
import copy
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, close, command
from test_model import prompts, random_prefix, tiny
from torch import nn

import data
import fast
import train
import weights
from cli import InputError
from model import Attention, KVCache, Sampling

# ---------------------------------------------------------------------------------------------------------------------
# Products and graphs

@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_fast_products_and_a_large_window_sample_the_tokens_of_the_plain_loop(monkeypatch, batch):
    model = tiny()
    fast.use_fast_products(model.decoder)
    prefix, tokens = random_prefix([20, 9, 20, 14, 11][:batch]), []
    for rows, stride in ((0, 1), (fast.LEFT_ROWS, 1), (fast.LEFT_ROWS, 16)):
        monkeypatch.setattr(fast, "LEFT_ROWS", rows)        # 0: the ordinary product everywhere
        monkeypatch.setattr(KVCache, "stride", stride)
        for sampling in (Sampling(3.0, 0, 64), Sampling(1.0, 1.0, 20, 0.9)):
            tokens.append(model.generate(prefix, range(batch), sampling))
    assert torch.equal(tokens[0], tokens[2]) and torch.equal(tokens[0], tokens[4])
    assert torch.equal(tokens[1], tokens[3]) and torch.equal(tokens[1], tokens[5])
    assert tokens[0].unique().numel() > 3


@pytest.mark.full
def test_compiled_blocks_sample_the_tokens_of_the_plain_loop():
    if not shutil.which("c++") and not shutil.which("g++"):
        pytest.skip("there is no C++ compiler; install g++ to compile blocks on a CPU")
    model = tiny(multiple_of=2112)                             # so that both ways of summing are met
    prefix, sampling = random_prefix([20, 9]), Sampling(3.0, 0, 64)
    plain = model.generate(prefix, [0, 1], sampling)
    fast.use_fast_products(model.decoder)
    fast.compile_blocks(model.decoder)
    assert torch.equal(model.generate(prefix, [0, 1], sampling), plain)


class Graph:
    """What a Device has recorded."""

    def __init__(self, device):
        self.device = device

    def replay(self):
        self.device.replay(self)


class Device:
    """Stands in for CUDA: recording a step computes nothing, a replay computes it without Python's counting."""

    def __init__(self, model, prefix):
        self.decoder, self.graph, self.counts = model.decoder, None, {"plain": 0, "recorded": 0, "replayed": 0}
        self.logits, self.cache, self.rope = model.decoder.prefill(prefix, 6)

    def step(self, token, uniform):
        """What is to be recorded: logits plus the second input, so that both inputs matter."""
        output = self.decoder.decode_step(token, self.cache, self.rope) + uniform[:, None]
        if self.graph:
            self.graph.inputs, self.graph.output, self.graph.window = (token, uniform), output, self.window
        else:
            self.counts["plain"] += 1
        return output

    def replay(self, graph):
        length, self.counts["replayed"] = self.cache.length, self.counts["replayed"] + 1
        assert self.cache.window == graph.window               # of what was recorded nothing can change
        token, uniform = graph.inputs
        graph.output.copy_(self.decoder.decode_step(token, self.cache, self.rope) + uniform[:, None])
        self.cache.length = length

    @contextlib.contextmanager
    def record(self, graph, **options):
        memory = [self.cache.kv, self.cache.mask, self.cache.at]
        before, self.graph, self.window = [tensor.clone() for tensor in memory], graph, self.cache.window
        yield
        for tensor, old in zip(memory, before):
            tensor.copy_(old)
        self.graph.output.fill_(float("nan"))                  # there is no result before a replay
        self.graph, self.counts["recorded"] = None, self.counts["recorded"] + 1


def test_steps_recorded_as_graphs_do_what_steps_do(monkeypatch):
    model = tiny()
    prefix, tokens, uniform = random_prefix([20, 9]), torch.randint(64, (2, 36)), torch.rand(2, 36)

    def outputs_of(step):
        return torch.stack([step(tokens[:, k], uniform[:, k]) for k in range(36)])

    plain = Device(model, prefix)
    expected = outputs_of(plain.step)

    device, before = Device(model, prefix), (tokens.clone(), uniform.clone())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(device))
    monkeypatch.setattr(torch.cuda, "graph", device.record)
    step = fast.Graphs(device.step, device.cache)
    device.cache.stride = 16                                   # small, so that several windows are met
    close(outputs_of(step), expected, 1e-5)
    assert device.counts == {"plain": 3, "recorded": 3, "replayed": 33}    # three windows, each begun with a plain step
    assert device.cache.length == plain.cache.length == 56 and device.cache.at == plain.cache.at
    assert torch.equal(tokens, before[0]) and torch.equal(uniform, before[1])


# ---------------------------------------------------------------------------------------------------------------------
# int8

needs_fbgemm = pytest.mark.skipif(not fast.has_int8_products(), reason="PyTorch has no FBGEMM on this machine")


class Rounding(nn.Linear):
    """A plain product that rounds as int8 does: each weight's row to 8 bits, each row of x to 7 bits twice."""

    def forward(self, x):
        weight, scale = self.weight.double(), self.weight.double().abs().amax(-1, keepdim=True) / 127
        x, largest = x.double(), x.double().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 63
        first = (x / largest).round()
        rest = ((x / largest - first) * 126).round() / 126
        return (((first + rest) * largest) @ ((weight / scale).round() * scale).T).float()


class RoundingAttention(Attention):
    """Puts what int8 keeps of keys and values into an fp32 cache."""

    def attend(self, q, k, v, mask, kv, at):
        new = torch.stack([k, v])
        scale = new.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        kv.index_copy_(3, at, (new / scale).round() * scale)
        k, v = (k, v) if q.size(2) > 1 else kv
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def rounded(decoder):
    """A copy that rounds as int8 does, by plain products."""
    decoder = copy.deepcopy(decoder)
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Rounding
    for layer in decoder.layers:
        layer.attention.__class__ = RoundingAttention
    return decoder


def logits_of(decoder, prefix, tokens):
    """All logits, by the cache."""
    logits, cache, rope = decoder.prefill(prefix, 6)
    found = [logits]
    for token in tokens.T:
        found.append(decoder.decode_step(token, cache, rope))
    return torch.stack(found, dim=1)


@needs_fbgemm
def test_int8_gives_the_logits_of_a_plain_network_that_rounds_alike():
    model, prefix, tokens = tiny(), random_prefix([20, 9]), torch.randint(64, (2, 36))
    expected, exact = logits_of(rounded(model.decoder), prefix, tokens), logits_of(model.decoder, prefix, tokens)
    fast.decode_in_int8(model.decoder)
    found = logits_of(model.decoder, prefix, tokens)
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-3
    assert 3 * error < (expected - exact).norm() / exact.norm() < 0.1      # rounding is what makes the difference
    assert model.decoder.prefill(prefix, 6)[1].kv.nbytes * 4 == tiny().decoder.prefill(prefix, 6)[1].kv.nbytes


@needs_fbgemm
def test_the_largest_numbers_do_not_overflow_in_int8():
    signs = torch.ones(8, 4096)
    signs[1::2, ::2] = -1
    weight, x = 0.5 * signs, 3 * torch.cat([signs, torch.linspace(-1, 1, 4096)[None]])
    layer = fast.Int8Linear(*fast.to_int8(weight))
    layer.pack()
    close(layer(x) / 4096, x @ weight.T / 4096, 1e-3)


@pytest.mark.parametrize("fbgemm", [pytest.param(True, marks=needs_fbgemm), False])
def test_a_picture_in_int8_is_the_same_in_every_batch(monkeypatch, fbgemm):
    monkeypatch.setattr(fast, "has_int8_products", lambda: fbgemm)
    model, sampling = tiny(), Sampling(3.0, 1.0, 20, 0.9)
    fast.decode_in_int8(model.decoder)
    assert (len(list(model.decoder.buffers())) > 0) and all(
        hasattr(module, "number") == fbgemm for module in fast.int8_linears(model.decoder).values())
    prefix = random_prefix([20, 20, 20])
    together = model.generate(prefix, [3, 4, 5], sampling)
    for i, seed in enumerate((3, 4, 5)):
        alone = type(prefix)(*(part[i:i + 1] for part in prefix))
        assert torch.equal(model.generate(alone, [seed], sampling)[0], together[i])


@needs_fbgemm
def test_without_fbgemm_int8_differs_by_the_rounding_of_activations_alone(monkeypatch):
    prefix, tokens, found = random_prefix([20, 9]), torch.randint(64, (2, 36)), []
    for there in (True, False):
        monkeypatch.setattr(fast, "has_int8_products", lambda: there)
        monkeypatch.setattr(fast, "has_bf16_products", lambda: False)
        model = tiny()
        fast.decode_in_int8(model.decoder)
        found.append(logits_of(model.decoder, prefix, tokens))
    assert (found[0] - found[1]).norm() < 5e-3 * found[1].norm()


@pytest.mark.full
@pytest.mark.parametrize("fbgemm", [pytest.param(True, marks=needs_fbgemm), False])
def test_compiled_blocks_in_int8_give_the_logits_of_the_plain_loop(monkeypatch, fbgemm):
    if not shutil.which("c++") and not shutil.which("g++"):
        pytest.skip("there is no C++ compiler; install g++ to compile blocks on a CPU")
    monkeypatch.setattr(fast, "has_int8_products", lambda: fbgemm)
    monkeypatch.setattr(fast, "has_bf16_products", lambda: False)
    torch._dynamo.reset()
    model, prefix, tokens = tiny(), random_prefix([20, 9]), torch.randint(64, (2, 36))
    fast.decode_in_int8(model.decoder)
    plain = logits_of(model.decoder, prefix, tokens)
    fast.compile_blocks(model.decoder)
    with torch.inference_mode():
        found = logits_of(model.decoder, prefix, tokens)
    assert (found - plain).norm() < 5e-3 * plain.norm()        # the last digits decide how a few numbers are rounded


@needs_fbgemm
def test_a_folder_of_int8_weights_draws_what_rounding_at_load_time_draws(tmp_path):
    weights.save(tiny(), str(tmp_path / "fp32"))
    weights.main(["convert", str(tmp_path / "fp32"), str(tmp_path / "int8"), "--int8"])
    pictures, batch = [], None
    for name in ("fp32", "int8"):
        model = weights.load(tmp_path / name, dtype=torch.int8)
        batch = batch or prompts(model, ("a dog", []), ("The dog in <image>.\na dog", [data.open_image(
            ROOT / "assets/dog.jpg")]))
        pictures.append(model.sample(batch, [0, 1]))
    assert torch.equal(*pictures) and pictures[0].isfinite().all()
    converted = weights.read_tensors(tmp_path / "int8" / "model.safetensors")
    for name in ("decoder.output", "decoder.layers.0.feed_forward.w3", "encoder.t5.encoder.blocks.0.wo"):
        assert converted[f"{name}.weight"].dtype == torch.int8 and converted[f"{name}.scale"].dtype == torch.float32


def test_int8_weights_serve_for_nothing_but_drawing(tmp_path, toy):
    weights.main(["convert", "tiny", str(tmp_path / "int8"), "--int8"])
    sizes = [os.path.getsize(os.path.join(folder, "model.safetensors"))
             for folder in (tmp_path / "int8", weights.BUNDLED["tiny"])]
    assert sizes[0] < sizes[1]                                 # those are fp16, which is already half
    with pytest.raises(InputError, match="int8, which serve for drawing .* --dtype int8"):
        weights.load(tmp_path / "int8")
    with pytest.raises(InputError, match="int8, which serve for drawing"):
        train.main([*command(toy, tmp_path / "out"), "--init", str(tmp_path / "int8")])
    tensors = weights.read_tensors(tmp_path / "int8/model.safetensors")
    os.remove(tmp_path / "int8/model.safetensors")             # it is mapped, and so must not be written over
    tensors["decoder.output.weight"] = tensors["decoder.output.weight"].short()
    weights.write_tensors(tensors, str(tmp_path / "int8/model.safetensors"))
    with pytest.raises(InputError, match="decoder.output.weight holds torch.int16 but should hold torch.int8"):
        weights.load(tmp_path / "int8", dtype=torch.int8)


def test_the_whole_model_in_int8_stays_near_fp32():
    exact, model = weights.load("tiny"), weights.load("tiny", dtype=torch.int8)
    image = data.open_image(ROOT / "assets/dog_face.png")
    batch = data.collate([exact.processor("The dog face in <image>.\na dog face in the snow", [image])])
    rows = [one.prefix(batch["ids"], batch["mask"], batch["refs"]).rows for one in (exact, model)]
    assert (rows[1] - rows[0]).norm() < 0.02 * rows[0].norm()
