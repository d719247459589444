import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
from data import InputError
from encoder import MultimodalEncoder
from model import Decoder, Mentor
from train import STAGES, TokenObjective, freeze


def counted(function):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):     # it does not know CPU's fused one
        function()
    return counter.get_total_flops()


def test_bytes_of_a_step_are_those_of_all_matrices_and_of_the_cache():
    config = TINY.decoder
    decoder = Decoder(config, TINY.vision.grid)
    matrices = [m.weight.numel() for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    assert bench.decoder_weights(config) == sum(matrices)
    prefix = bench.some_prefix(config, 3, 16, "cpu", torch.float32)
    _, cache, _ = decoder.prefill(prefix, 4)
    assert bench.decode_bytes(config, 3, 32, 4) == 4 * (sum(matrices) + cache.kv.numel())


def test_operations_agree_with_those_that_pytorch_counts():
    config = TINY
    decoder = Decoder(config.decoder, config.vision.grid).eval()
    prefix = bench.some_prefix(config.decoder, 2, 16, "cpu", torch.float32)
    assert counted(lambda: decoder.prefill(prefix, 4)) == bench.decoder_operations(config.decoder, 2, 16, 16, 1)
    _, cache, rope = decoder.prefill(prefix, 4)
    assert counted(lambda: decoder.decode_step(torch.zeros(2, dtype=torch.long), cache, rope)) == \
        bench.decoder_operations(config.decoder, 2, 1, 17, 1)
    encoder = MultimodalEncoder(config.vision, config.t5, image_id=config.image_id).eval()
    ids = torch.full((2, 20), 5)
    ids[:, :16] = config.image_id
    refs = torch.randn(2, 3, 56, 56)
    connector = 2 * 2 * 16 * sum(m.weight.numel() for m in encoder.connector if isinstance(m, torch.nn.Linear))
    assert counted(lambda: encoder.clip(refs)) == bench.clip_operations(config.vision, 2)
    assert counted(lambda: encoder(ids, ids > 0, refs)) == \
        bench.clip_operations(config.vision, 2) + bench.t5_operations(config.t5, 2, 20) + connector


@pytest.mark.gradients
@pytest.mark.parametrize("stage", ["1", "2"])
def test_operations_of_training_are_nearly_those_that_pytorch_counts(stage):
    mentor = Mentor(replace(TINY, decoder=replace(TINY.decoder, width=128, layers=4)))
    objective = TokenObjective(mentor, None)
    freeze(objective, STAGES[stage].trains)
    ids = torch.full((2, 40), 5)
    ids[:, :16] = TINY.image_id
    batch = {"ids": ids, "mask": ids > 0, "refs": torch.randn(2, 3, 56, 56),
             "tokens": torch.randint(64, (2, TINY.grid**2))}
    seen = counted(lambda: objective(batch).sum().backward())
    assert bench.train_operations(mentor.config, 2, 40, stage) == pytest.approx(seen, rel=0.1)


@pytest.mark.gradients
@pytest.mark.parametrize("command", ["decode", "train", "encode", "vqgan", "loader"])
def test_every_table_can_be_had_as_json(command, monkeypatch, capsys):
    monkeypatch.setattr(bench, "read_rate", lambda device: 1e10)
    monkeypatch.setattr(bench, "product_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(bench, "clock", lambda function, device, **options: 0.5 + 0 * bool([function()]))
    flags = [command, "--size", "toy", "--prefix", "96", "--pixels", "64", "--batch", "2", "--samples", "8",
             "--device", "cpu", "--json"]
    bench.main(flags)
    record = json.loads(capsys.readouterr().out)
    assert record["rows"] and all(row["seconds"] > 0 for row in record["rows"])
    bench.main(flags[:-1])
    table = capsys.readouterr().out
    assert "ceilings: read 10.0 GB/s, product 100 GFLOP/s" in table and record["rows"][0]["what"] in table
    with pytest.raises(InputError, match="a reference picture alone takes"):
        bench.main([*flags, "--prefix", "8"])
