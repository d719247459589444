"""What only a GPU can prove; each test skips, and says why, where a card is missing.

    python -m pytest -m gpu                       # about ten minutes on one card, a few more on several
    python -m pytest -m gpu -s -k bench           # prints the speeds as tutorial/measurements.md has them

All other tests run on a CPU, where nothing is replayed as a graph, rounded by autocast or sent by NCCL. Here the same
network draws and trains on the card and must do what it does there. The bounds leave room for rounding only: they are
at least twice what was measured on a CPU that rounded the same way, bf16 under its own autocast, TF32 by cutting what
enters a convolution to 10 bits.
"""
import copy
import gc
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import test_encoder
import test_model
import test_vqgan
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, Golden, command, finish, log, losses, run
from PIL import Image
from safetensors.torch import load_file
from test_memory import full_batch
from torch._dynamo.utils import counters

import bench
import cli
import data
import fast
import sample
import train
import weights
from model import SIZES, Decoder, DecoderConfig, Mentor, MentorConfig, Sampling, guide, sample_tokens

CUDA, CARDS = "cuda", torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]
two_cards = pytest.mark.skipif(CARDS < 2, reason=f"needs two CUDA devices, here are {CARDS}")

WINDOW = 256               # Graphs' stride
GREEDY, NUCLEUS, UNGUIDED = Sampling(2.0, 0.0, 64), Sampling(2.0, 1.0, 64, 0.9), Sampling(1.0, 1.0, 512)
DRAW = ["--ref", os.path.join(ROOT, "assets", "dog_face.png"), "--prompt", "a dog face on a meadow"]


@pytest.fixture(autouse=True)
def plain_fp32():
    """No TF32, an empty card, nothing compiled; what a test sets for the whole process is put back."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    cudnn, suppress = torch.backends.cuda.cudnn_sdp_enabled(), torch._dynamo.config.suppress_errors
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    counters.clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch._dynamo.config.suppress_errors = suppress


def network(dtype=torch.float32):
    """A small model that draws 20 x 20 tokens, its heads as wide as MENTOR's; on the card."""
    torch.manual_seed(0)
    decoder = DecoderConfig(layers=2, heads=4, width=256, multiple_of=32, codes=512, dropout=0.0)
    config = replace(TINY, decoder=decoder, t5=replace(TINY.t5, heads=2, head_dim=64, dropout=0.0),
                     vqgan=replace(TINY.vqgan, codes=512), prefix_tokens=256, image_size=80)
    model = Mentor(config, weights.byte_tokenizer())
    for parameter in model.decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.size(1)**-0.5)
    return weights.place(model, CUDA, dtype)


def random_prefix(valid, dtype=torch.float32):
    rows, mask, is_image = test_model.random_prefix(valid, width=256)
    return test_model.Prefix(rows.to(CUDA, dtype), mask.to(CUDA), is_image.to(CUDA))


@torch.inference_mode()
def plain_tokens(model, prefix, seeds, sampling, stride=WINDOW):
    """Mentor.generate without graphs, written out. -> (B, T)"""
    count, copies, tokens = model.config.grid**2, 1, []
    uniform = torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(CUDA)
    if sampling.cfg_scale != 1:
        prefix, copies = prefix.join(model.unconditional(prefix)), 2
    logits, cache, rope = model.decoder.prefill(prefix, model.config.grid)
    cache.stride = stride
    for k in range(count):
        tokens.append(sample_tokens(guide(logits, sampling.cfg_scale), uniform[:, k], sampling))
        logits = model.decoder.decode_step(tokens[-1].repeat(copies), cache, rope)
    return torch.stack(tokens, dim=1)


@torch.inference_mode()
def step_logits(model, prefix, tokens):
    """The logits of cached steps that are fed these tokens. -> (B, T, V)"""
    logits, cache, rope = model.decoder.prefill(prefix, model.config.grid)
    cache.stride, steps = WINDOW, [logits]
    for k in range(tokens.size(1) - 1):
        steps.append(model.decoder.decode_step(tokens[:, k], cache, rope))
    return torch.stack(steps, dim=1).float()


def assert_near(actual, expected, error, agreeing):
    """Logits: the RMS of the difference, in units of the logits' spread, and how often the likeliest token agrees."""
    spread = (expected - expected.mean(dim=-1, keepdim=True)).square().mean()
    measured = ((actual - expected).square().mean() / spread).sqrt().item()
    share = (actual.argmax(-1) == expected.argmax(-1)).float().mean().item()
    print(f"error {measured:.1e}, allowed {error:.0e}; agreeing {share:.2%}, at least {agreeing:.1%}")
    assert measured <= error and share >= agreeing


# ---------------------------------------------------------------------------------------------------------------------
# Agreement with independent implementations

@pytest.mark.parametrize("test, name, arguments", [
    (test_encoder.test_clips_vision_tower_agrees_with_the_golden_outputs, "clip-small", (1, 1e-4)),
    (test_encoder.test_clips_vision_tower_agrees_with_the_golden_outputs, "clip-vit-l14", (8, 1e-3)),
    (test_encoder.test_t5_agrees_with_the_golden_outputs, "t5-small", (1, 4, 1e-4)),
    (test_encoder.test_t5_agrees_with_the_golden_outputs, "t5-long", (4, 16, 1e-4)),
    (test_encoder.test_t5_agrees_with_the_golden_outputs, "flan-t5-xl-encoder", (16, None, 1e-3)),
    (test_model.test_the_decoder_agrees_with_the_golden_outputs, "decoder-small", (1, 1e-4)),
    (test_model.test_the_decoder_agrees_with_the_golden_outputs, "decoder-xl", (64, 1e-3)),
    (test_model.test_the_whole_network_agrees_with_the_golden_outputs, None, ()),
    (test_vqgan.test_vq16_agrees_with_the_golden_outputs, "vq16-64px", (1e-4,)),
    (test_vqgan.test_vq16_agrees_with_the_golden_outputs, "vq16-256px", (1e-3,))],
    ids=lambda value: value if isinstance(value, str) else "")
def test_on_the_card_the_golden_outputs_come_out_too(monkeypatch, test, name, arguments):
    noise, fill = Golden.noise, Golden.fill
    monkeypatch.setattr(Golden, "__getitem__", lambda self, key: self.tensors[key].to(CUDA))
    monkeypatch.setattr(Golden, "noise", lambda self, name, shape: noise(self, name, shape).to(CUDA))
    monkeypatch.setattr(Golden, "fill", lambda self, module, names: fill(self, module, names).to(CUDA))
    monkeypatch.setattr(torch, "arange", partial(torch.arange, device=CUDA))       # the decoder's test makes a mask
    test(*filter(None, [name]), *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

@pytest.mark.parametrize("sampling", [GREEDY, NUCLEUS, UNGUIDED], ids=["greedy", "nucleus", "unguided"])
@pytest.mark.parametrize("dtype, stride", [(torch.float32, 1), (torch.float32, WINDOW), (torch.bfloat16, WINDOW)])
def test_steps_replayed_as_graphs_draw_the_tokens_of_plain_steps(monkeypatch, dtype, stride, sampling):
    model, prefix = network(dtype), random_prefix([203, 90], dtype).repeat(3)
    plain = plain_tokens(model, prefix, range(6), sampling, stride)
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(id(graph)), replay(graph)))
    tokens = model.generate(prefix, range(6), sampling)
    assert torch.equal(tokens, plain)
    assert tokens.unique().numel() > 30
    # positions 203 to 601 are steps: windows of 256, 512 and 603, each of which begins with a plain step
    assert len(replays) == 399 - 3 and len(set(replays)) == 3


@pytest.mark.parametrize("dtype, error, agreeing", [(torch.float32, 1e-4, 0.999), (torch.bfloat16, 0.03, 0.95)])
def test_compiled_blocks_give_the_logits_of_plain_ones_and_as_graphs_the_same_tokens(dtype, error, agreeing):
    model, prefix = network(dtype), random_prefix([203, 90], dtype)
    tokens = model.generate(prefix, [0, 1], UNGUIDED)
    plain = step_logits(model, prefix, tokens)
    fast.compile_blocks(model.decoder)
    torch._dynamo.config.suppress_errors = False               # what does not compile is to be seen here
    assert_near(step_logits(model, prefix, tokens), plain, error, agreeing)        # at a near tie rounding decides
    assert counters["stats"]["unique_graphs"] > 0
    plain_tokens(model, prefix, [0, 1], GREEDY)                # until all shapes are met, code is compiled anew
    for sampling in (GREEDY, NUCLEUS):
        assert torch.equal(model.generate(prefix, [0, 1], sampling), plain_tokens(model, prefix, [0, 1], sampling))


def test_bf16_stays_near_fp32_with_trained_weights():
    outputs = []
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        mentor = weights.load("tiny", CUDA, dtype)
        prompt = data.prompt_for("subject", ["dog face"], DRAW[3])
        batch = data.collate([mentor.processor(prompt, [data.open_image(DRAW[1])])])
        with torch.autocast(CUDA, torch.bfloat16, enabled=autocast):
            prefix = mentor.prefix(*(batch[key].to(CUDA) for key in ("ids", "mask", "refs"))).repeat(8)
            if not outputs:
                tokens = mentor.generate(prefix, range(8))
            outputs.append(mentor.decoder(prefix, tokens[:, :-1], mentor.config.grid).float())
    for logits in outputs[1:]:
        assert_near(logits, outputs[0], 0.03, 0.95)
        loss, expected = (F.cross_entropy(each.transpose(1, 2), tokens) for each in (logits, outputs[0]))
        assert loss == pytest.approx(expected.item(), rel=2e-3)


def test_bf16_stays_near_fp32_at_full_size():
    config = SIZES["XL"].decoder
    torch.manual_seed(0)
    decoder = bench.build(lambda: Decoder(config), CUDA, torch.float32)
    prefix = bench.random_prefix(config, 2, 100, CUDA, torch.float32)
    tokens = torch.randint(config.codes, (2, 255), device=CUDA)
    expected = decoder(prefix, tokens, 16)
    half = copy.deepcopy(decoder).to(torch.bfloat16)
    assert_near(half(prefix._replace(rows=prefix.rows.bfloat16()), tokens, 16).float(), expected, 0.05, 0.8)


# ---------------------------------------------------------------------------------------------------------------------
# sample.py

def draw(out, *flags):
    """-> the picture's values (H, W, 3)"""
    sample.main([*DRAW, *map(str, flags), "--out", str(out)])
    return np.asarray(Image.open(out).convert("RGB"), dtype=int)


def differing(a, b, levels=0):
    """Share of the pixels of two pictures that differ by more than so many levels."""
    assert a.shape == b.shape
    return (np.abs(a - b).max(axis=-1) > levels).mean()


def test_the_small_model_draws_the_pictures_of_the_cpu(tmp_path):
    cpu = draw(tmp_path / "cpu.png", "--device", "cpu", "--n", 2)
    cuda = draw(tmp_path / "cuda.png", "--device", CUDA, "--dtype", "fp32", "--n", 2)
    assert differing(cpu, cuda, levels=2) < 0.01               # one other token changes more than that


def test_offloading_draws_the_same_picture_without_room_for_encoder_and_decoder_at_once(tmp_path):
    flags, pictures, peaks = ["--weights", "random-B", "--size", 64, "--device", CUDA], [], []
    for name, more in (("plain", []), ("offload", ["--offload"])):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        pictures.append(draw(tmp_path / f"{name}.png", *flags, *more))
        peaks.append(torch.cuda.max_memory_allocated())
    with torch.device("meta"):
        mentor = Mentor(SIZES["B"])
    decoder, vqgan = (sum(p.numel() for p in part.parameters()) for part in (mentor.decoder, mentor.vqgan))
    assert differing(*pictures) == 0
    assert peaks[1] < peaks[0] - 0.8 * (2 * decoder + 4 * vqgan)           # bytes: bf16, and fp32 always


@two_cards
def test_the_second_card_draws_the_picture_of_the_first_and_takes_none_of_its_memory(tmp_path):
    code = "import sys, sample, torch; sample.main(sys.argv[1:]); print('first', torch.cuda.max_memory_allocated(0))"
    pictures = []
    for device in ("cuda:0", "cuda:1"):
        out = tmp_path / f"{device[-1]}.png"
        result = subprocess.run([sys.executable, "-c", code, *DRAW, "--device", device, "--out", out], cwd=ROOT,
                                capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        pictures.append(np.asarray(Image.open(out).convert("RGB"), dtype=int))
        assert (int(result.stdout.split("first ")[1]) == 0) == (device == "cuda:1")
    assert differing(*pictures) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Tokens of pictures

@pytest.mark.parametrize("tf32, share", [(False, 1e-4), (True, 3e-3)])
def test_pictures_become_the_tokens_of_the_cpu_but_for_ties(tf32, share):
    sheet, mentor = data.open_image(os.path.join(ROOT, "assets", "world.webp")), weights.load("tiny")
    corners = [(x, y) for y in range(0, sheet.height - 63, 32) for x in range(0, sheet.width - 63, 32)]
    crops = [data.target_pixels(sheet.crop((x, y, x + 64, y + 64)), 64) for x, y in corners[::len(corners) // 256]]
    pixels = torch.stack(crops)                                                           # (B, 3, 64, 64)
    expected = mentor.vqgan.encode(pixels)                                                # (B, T)
    if tf32:                                                   # as train.fit and PyTorch's own setting have it
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    mentor.vqgan.to(CUDA)
    tokens = mentor.vqgan.encode(pixels.to(CUDA))
    assert (tokens.cpu() != expected).float().mean() < share
    with torch.autocast(CUDA, torch.bfloat16):
        assert torch.equal(mentor.target_tokens({"ids": tokens, "target": pixels.to(CUDA)}), tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Training on one card

def on_card(toy, out, *flags, **options):
    return command(toy, out, "--device", CUDA, *flags, **options)


def assert_same_run(a, b, loss, norm):
    """Every step's loss and gradient within these relative bounds."""
    a, b = ({name: np.array([record[name] for record in log(out)]) for name in ("loss", "grad_norm")} for out in (a, b))
    for name, bound in (("loss", loss), ("grad_norm", norm)):
        error = np.abs(a[name] / b[name] - 1).max()
        print(f"{name}: largest relative error {error:.1e}, allowed {bound:.0e}")
        assert error <= bound


@pytest.mark.gradients
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 63, 64, 65, 127, 129, 200, 255, 256])
def test_gradients_behind_padding_are_finite_and_near_those_of_the_cpu(length):
    torch.set_float32_matmul_precision("high")                 # these two as train.fit has them
    torch.backends.cuda.enable_cudnn_sdp(False)
    model, batch = network().requires_grad_(True), test_model.text_batch((length, (length + 1) // 2, 0))
    model.encoder.clip.requires_grad_(False)
    norms = []
    for device in ("cpu", CUDA):
        model.to(device).zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == CUDA):
            loss = model(cli.Ranks(0, 1, device).move(batch)).mean()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


@pytest.mark.gradients
@pytest.mark.parametrize("stage", train.STAGES)
def test_each_stage_in_bf16_loses_what_it_loses_on_the_cpu_in_fp32(toy, tmp_path, stage):
    train.main(command(toy, tmp_path / "cpu", stage=stage))
    train.main(on_card(toy, tmp_path / "cuda", stage=stage))
    assert_same_run(tmp_path / "cuda", tmp_path / "cpu", loss=2e-3, norm=0.03)
    assert (tmp_path / "cuda" / "samples-00000003.png").exists() == (stage != "connector")


@pytest.mark.gradients
def test_sheets_are_drawn_by_graphs_while_workers_load_and_pin(toy, tmp_path):
    train.main(on_card(toy, tmp_path / "plain", steps=6))
    train.main(on_card(toy, tmp_path / "sheets", "--workers", 2, "--sample-every", 1, "--val", toy[1], steps=6))
    assert_same_run(tmp_path / "sheets", tmp_path / "plain", loss=1e-3, norm=0.02)
    assert len(list((tmp_path / "sheets").glob("samples-*.png"))) == 6


@pytest.mark.gradients
@pytest.mark.parametrize("flags, loss, norm, other_pixels", [
    (["--checkpoint-activations"], 1e-4, 1e-3, 0.05),          # a token that rounding decides anew, here and there
    (["--compile"], 5e-4, 0.01, 0.34),                         # other roundings, so other tokens: a third of the sheet
    (["--compile", "--checkpoint-activations"], 5e-4, 0.01, 0.34)], ids=["checkpointed", "compiled", "both"])
def test_what_saves_memory_or_time_loses_the_same_and_draws_sheets(toy, tmp_path, flags, loss, norm, other_pixels):
    train.main(on_card(toy, tmp_path / "plain", "--sample-every", 2))
    train.main(on_card(toy, tmp_path / "other", "--sample-every", 2, *flags))
    assert_same_run(tmp_path / "other", tmp_path / "plain", loss, norm)
    assert (counters["stats"]["unique_graphs"] > 0) == ("--compile" in flags)
    plain, other = (np.asarray(Image.open(tmp_path / run / "samples-00000002.png"), dtype=int)
                    for run in ("plain", "other"))
    assert differing(plain, other, levels=8) < other_pixels


# ---------------------------------------------------------------------------------------------------------------------
# Processes

MANY = max(2, CARDS)       # processes, one a card
ways = pytest.mark.parametrize("processes, fsdp", [
    pytest.param(1, "--no-fsdp", id="one"),
    pytest.param(MANY, "--no-fsdp", id="ddp", marks=two_cards),
    pytest.param(MANY, "--fsdp", id="fsdp", marks=two_cards)])


def decoder_weights(out):
    """All of a folder's decoder as one vector."""
    tensors = load_file(os.path.join(out, "model.safetensors"))
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if name.startswith("decoder.")])


def wait_for_checkpoints(process, out, count):
    while len(cli.checkpoints(out)) < count:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()[0][-3000:]


@pytest.mark.gradients
@pytest.mark.parametrize("fsdp", ["--no-fsdp", "--fsdp"])
@two_cards
def test_many_processes_equal_one_on_the_same_global_batch(toy, tmp_path, fsdp):
    flags, size = ["--micro-batch", 1, "--val", toy[1], "--sample-every", 2], {"batch": 2 * MANY}
    finish(run(on_card(toy, tmp_path / "many", *flags, fsdp, **size), MANY))
    train.main(on_card(toy, tmp_path / "one", *flags, **size))
    assert_same_run(tmp_path / "many", tmp_path / "one", loss=1e-3, norm=0.01)
    validation = [log(tmp_path / name)[1]["val"] for name in ("many", "one")]
    assert validation[0] == pytest.approx(validation[1], rel=1e-3)
    start, many, one = map(decoder_weights, (toy[0], tmp_path / "many", tmp_path / "one"))
    assert 0 < (many - start).norm() and (many - one).norm() < 0.02 * (one - start).norm()
    sheets = [np.asarray(Image.open(tmp_path / name / "samples-00000002.png"), dtype=int) for name in ("many", "one")]
    assert differing(*sheets, levels=8) < 0.05


@ways
def test_a_run_killed_in_the_middle_resumes_with_the_same_losses(toy, tmp_path, processes, fsdp):
    def arguments(out, *more):
        return on_card(toy, out, "--micro-batch", 1, "--save-every", 4, fsdp, *more, stage="1", steps=40,
                       batch=2 * processes)
    finish(run(arguments(tmp_path / "whole"), processes))
    process = run(arguments(tmp_path / "cut"), processes)
    wait_for_checkpoints(process, tmp_path / "cut", 1)
    subprocess.run(["pkill", "-9", "-P", str(process.pid)])    # the workers first
    process.kill()
    process.communicate()
    assert len(losses(tmp_path / "cut")) < 40
    finish(run(arguments(tmp_path / "cut", "--resume"), processes))
    assert_same_run(tmp_path / "cut", tmp_path / "whole", loss=2e-4, norm=0.01)    # sums of atomics differ a little


@ways
def test_sigterm_saves_before_leaving(toy, tmp_path, processes, fsdp):
    process = run(on_card(toy, tmp_path, "--micro-batch", 1, "--save-every", 2, fsdp, steps=4000, batch=2 * processes),
                  processes)
    wait_for_checkpoints(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    last = int(cli.checkpoints(tmp_path)[0][-8:])
    assert last == log(tmp_path)[-1]["step"] < 4000 and f"stopped after step {last} of 4000" in output
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


# ---------------------------------------------------------------------------------------------------------------------
# Speed

@pytest.mark.gradients
@pytest.mark.parametrize("flags", [
    ["decode"], ["decode", "--no-compile"], ["train", "--size", "XL", "--stage", "2", "--batch", "2", "--compile"],
    ["encode"], ["vqgan"]], ids=" ".join)
def test_the_table_of_bench_can_be_made_and_stays_below_its_ceilings(monkeypatch, flags):
    if "train" in flags and torch.cuda.get_device_properties(0).total_memory < 48e9:
        pytest.skip("stage 2 at full size needs a card of 48 GB")
    rows, add_shares = [], bench.add_shares

    def keep(row, ceilings):
        add_shares(row, ceilings)
        rows.append(row)
    monkeypatch.setattr(bench, "add_shares", keep)
    print()
    bench.main([*flags, "--device", CUDA])
    assert rows and all(row["share"] or flags == ["vqgan"] or row["what"].startswith("sampling") for row in rows)
    assert all(0 < share < 1.2 for row in rows for share in row["share"].values())


# ---------------------------------------------------------------------------------------------------------------------
# Memory

@pytest.mark.gradients
@pytest.mark.parametrize("stage", ["1", "2"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("micro", [1, 4])
def test_the_memory_formula_is_within_10_percent_of_what_the_card_held(stage, recomputed, micro):
    row, device, way = train.STAGES[stage], torch.device(CUDA), weights.Way(False, recomputed, micro)
    with torch.device("meta"):
        mentor = Mentor(MentorConfig())
    needed = sum(weights.training_memory(mentor, row.trains, 1, way).values())
    if needed + weights.SPARE > cli.card_memory(device):
        pytest.skip(f"takes {needed:.0f} GiB and 8 GB to spare")
    objective = train.TokenObjective(mentor.to_empty(device=device))
    for parameter in mentor.parameters():
        parameter.data.normal_(std=0.02)
    train.freeze(objective, row.trains)
    flags = ["--checkpoint-activations"] * recomputed
    train.wrap(objective, train.make_parser(train.STAGES, "").parse_args(["--stage", stage, *flags]),
               cli.Ranks(0, 1, device))
    optimizer, = train.make_optimizers(objective, row)
    batch = cli.Ranks(0, 1, device).move(full_batch(mentor.config, micro, captions=False))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast(CUDA, torch.bfloat16, cache_enabled=False):
            losses_of_samples = objective(batch)
        losses_of_samples.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    held = torch.cuda.max_memory_allocated() / 2**30
    print(f"held {held:.2f} GiB, formula {needed:.2f}")
    assert held == pytest.approx(needed, rel=0.1)
