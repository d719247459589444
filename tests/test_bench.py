"""The formulas of bench.py against what PyTorch counts, and its commands."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
from cli import InputError
from encoder import MultimodalEncoder
from model import Decoder, Mentor
from train import STAGES, TokenObjective, freeze


def counted(function):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):     # it cannot count CPU's fused one
        function()
    return counter.get_total_flops()


def test_bytes_of_a_step_are_those_of_all_matrices_and_of_the_cache():
    config = TINY.decoder
    decoder = Decoder(config, TINY.vision.grid)
    matrices = [m.weight.numel() for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    assert bench.decoder_weights(config) == sum(matrices)
    prefix = bench.random_prefix(config, 3, 16, "cpu", torch.float32)
    _, cache, _ = decoder.prefill(prefix, 4)
    assert bench.decode_bytes(config, 3, 32, 4) == 4 * (sum(matrices) + cache.kv.numel())


def test_flops_of_the_decoder_are_those_that_pytorch_counts():
    config = TINY.decoder
    decoder = Decoder(config, TINY.vision.grid).eval()
    prefix = bench.random_prefix(config, 2, 16, "cpu", torch.float32)
    assert counted(lambda: decoder.prefill(prefix, 4)) == bench.decoder_flops(config, 2, 16, 16, 1)
    _, cache, rope = decoder.prefill(prefix, 4)
    assert counted(lambda: decoder.decode_step(torch.zeros(2, dtype=torch.long), cache, rope)) == \
        bench.decoder_flops(config, 2, 1, 17, 1)


def test_flops_of_the_encoder_are_those_that_pytorch_counts():
    encoder = MultimodalEncoder(TINY.vision, TINY.t5, image_id=TINY.image_id).eval()
    ids, mask, refs = bench.random_prompts(TINY, 2, 20, "cpu").values()
    connector = 2 * 2 * 16 * sum(m.weight.numel() for m in encoder.connector if isinstance(m, torch.nn.Linear))
    assert counted(lambda: encoder.clip(refs)) == bench.clip_flops(TINY.vision, 2)
    assert counted(lambda: encoder(ids, mask, refs)) == \
        bench.clip_flops(TINY.vision, 2) + bench.t5_flops(TINY.t5, 2, 20) + connector


@pytest.mark.gradients
@pytest.mark.parametrize("stage", ["1", "2"])
def test_flops_of_training_are_nearly_those_that_pytorch_counts(stage):
    mentor = Mentor(replace(TINY, decoder=replace(TINY.decoder, width=128, layers=4)))
    objective = TokenObjective(mentor)
    freeze(objective, STAGES[stage].trains)
    batch = bench.random_prompts(TINY, 2, 40, "cpu")
    batch["tokens"] = torch.randint(64, (2, TINY.grid**2))
    flops = counted(lambda: objective(batch).sum().backward())
    assert bench.train_flops(mentor.config, 2, 40, stage) == pytest.approx(flops, rel=0.1)


@pytest.mark.gradients
@pytest.mark.parametrize("command", ["decode", "train", "encode", "prefix", "vqgan", "loader"])
def test_every_table_can_be_had_as_json(command, monkeypatch, capsys):
    def half_a_second(function, device, most=50):
        function()
        return 0.5
    monkeypatch.setattr(bench, "read_rate", lambda device: 1e10)
    monkeypatch.setattr(bench, "product_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(bench, "clock", half_a_second)
    flags = [command, "--size", "toy", "--prefix", "96", "--pixels", "64", "--batch", "2", "--samples", "8",
             "--device", "cpu", "--json"]
    bench.main(flags)
    record = json.loads(capsys.readouterr().out)
    assert record["rows"] and all(row["seconds"] > 0 for row in record["rows"])
    bench.main(flags[:-1])
    table = capsys.readouterr().out
    assert "ceilings of fp32: read 10.0 GB/s, product 100 GFLOP/s" in table and record["rows"][0]["what"] in table
    if command == "decode":
        bench.main([*flags, "--dtype", "fp32", "int8"])
        names = [row["what"].split(":")[0] for row in json.loads(capsys.readouterr().out)["rows"]]
        assert names == sorted(names) and names.count("fp32") == names.count("int8") == len(record["rows"])
    with pytest.raises(InputError, match="a reference picture alone takes"):
        bench.main([*flags, "--prefix", "8"])


@pytest.mark.parametrize("flags, said", [
    ("decode --device cuda:99", "--device cuda:99 does not work here"), ("train --device teapot", "--device teapot"),
    ("train --device meta", "--device meta does not work here"), ("vqgan --pixels 100", "give a multiple"),
    ("decode --batch 0", "argument --batch: must be a whole number from 1 to 65,536, not 0"),
    (f"decode --batch {2**53 - 1}", "argument --batch: must be"), ("train --prefix 70000", "argument --prefix: must"),
    ("encode --prefix x", "argument --prefix: must be"), ("vqgan --pixels -16", "argument --pixels: must be"),
    ("loader --samples 0", "argument --samples: must be"), ("fly", "invalid choice"), ("train --stage 3", "invalid"),
    ("train --dtype int8", "int8 is for decode")])
def test_bad_flags_are_one_sentence_before_anything_is_measured(monkeypatch, flags, said):
    monkeypatch.setattr(bench, "read_rate", lambda device: pytest.fail("measured first"))
    with pytest.raises(InputError, match=said):
        bench.main(flags.split())


def test_the_memory_of_the_full_size_is_that_of_the_readme(capsys):
    bench.main(["memory", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--dtype fp32             9.9 GiB   cards: 12 GB, 16 GB, 24 GB"
    assert lines[3] == "--dtype bf16 --offload   2.9 GiB   cards: 8 GB, 12 GB, 16 GB, 24 GB"
    assert lines[6] == "--dtype int8             2.9 GiB   CPUs: 8 GB, 12 GB, 16 GB, 24 GB"


def test_a_call_is_repeated_for_a_second_or_as_often_as_allowed():
    calls = []
    assert bench.clock(lambda: calls.append(1), torch.device("cpu"), most=3) < 0.5
    assert len(calls) == 2 + 3                                 # two to warm up
