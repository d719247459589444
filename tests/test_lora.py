"""Low-rank updates: exact when merged, saved alone, resumed exactly."""
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import NO_DROPOUT, close, command, finish, losses, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import lora
import sample
import train
import weights
from cli import InputError
from model import Mentor, MentorConfig, Sampling

GREEDY = Sampling(cfg_scale=2.0, temperature=0, top_k=64)


def adapted(rank=4, trains=lora.BLOCKS):
    """A tiny model with updates that are not zero."""
    torch.manual_seed(0)
    model = Mentor(NO_DROPOUT, weights.byte_tokenizer()).eval()
    torch.nn.init.normal_(model.decoder.output.weight, std=0.2)
    weights.add_lora(model, rank, trains, "tiny")
    for module in lora.adapted(model).values():
        torch.nn.init.normal_(module.lora_b, std=0.1)
    return model


def batch_for(model):
    images = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue")]
    samples = [model.processor("The cat in <image>.", images[:1]), model.processor("<image> and <image>", images)]
    return data.collate([read | {"tokens": torch.arange(36)} for read in samples])


def logits_and_tokens(model):
    batch = batch_for(model)
    prefix = model.prefix(batch["ids"], batch["mask"], batch["refs"])
    return model.decoder(prefix, batch["tokens"][:, :-1], 6), model.generate(prefix, [0, 1], GREEDY)


def test_new_updates_change_nothing_and_merged_ones_are_exact():
    torch.manual_seed(0)
    plain = Mentor(NO_DROPOUT, weights.byte_tokenizer()).eval()
    torch.nn.init.normal_(plain.decoder.output.weight, std=0.2)
    before = logits_and_tokens(plain)
    weights.add_lora(plain, 4, lora.BLOCKS, "tiny")
    assert torch.equal(logits_and_tokens(plain)[0], before[0])
    model = adapted()
    apart = logits_and_tokens(model)
    assert (apart[0] - before[0]).abs().max() > 0.05
    lora.merge(model)
    together = logits_and_tokens(model)
    close(together[0], apart[0], 1e-4)
    assert torch.equal(together[1], apart[1]) and not lora.adapted(model) and not lora.tensors_of(model)


def test_the_linear_layers_of_the_blocks_that_train_are_adapted_and_no_others():
    for trains, parts in ((train.STAGES["1"].trains, {"decoder.layers"}),
                          (train.STAGES["2"].trains, {"decoder.layers", "encoder.t5.encoder.blocks"})):
        model = adapted(trains=trains)
        assert {next(part for part in lora.BLOCKS if name.startswith(part)) for name in lora.adapted(model)} == parts
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
                  and name.startswith(tuple(parts))]
        assert linear == list(lora.adapted(model))
    with pytest.raises(InputError, match="this stage trains none of them, only encoder.connector; leave it out"):
        adapted(trains=train.STAGES["connector"].trains)
    with pytest.raises(InputError, match="--lora 48: is no smaller than a matrix"):
        adapted(rank=48)


@pytest.mark.gradients
def test_nothing_but_the_updates_moves_and_a_run_resumes_exactly_from_its_small_file(toy, tmp_path):
    flags = ["--lora", 2, "--lr", 0.01, "--save-every", 2]
    train.main(command(toy, tmp_path / "whole", *flags, steps=4))
    out = tmp_path / "whole"
    assert not (out / "model.safetensors").exists() and not (out / "step-00000004" / "model.safetensors").exists()
    tensors = load_file(out / weights.ADAPTER)
    assert tensors and all(".lora_" in name for name in tensors) and any(t.abs().max() > 0 for n, t in tensors.items()
                                                                         if n.endswith("lora_b"))
    base, merged = weights.load(toy[0], prefix_tokens=512), weights.load(out)
    moved = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])}
    assert moved and all(name.removesuffix(".weight") + ".lora_b" in tensors for name in moved)
    shutil.copytree(out, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "step-00000004")
    train.main([*command(toy, tmp_path / "cut", *flags, steps=4), "--resume"])
    assert losses(tmp_path / "cut") == losses(out)
    again = load_file(tmp_path / "cut" / weights.ADAPTER)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(InputError, match="the run was started with lora 2, not 3"):
        train.main([*command(toy, tmp_path / "cut", "--lora", 3, steps=4), "--resume"])


@pytest.mark.full
@pytest.mark.gradients
@pytest.mark.parametrize("fsdp", ["--no-fsdp", "--fsdp"])
@pytest.mark.parametrize("stage", ["1", "2", "multi", "icl"])
def test_two_processes_with_lora_equal_one(toy, tmp_path, fsdp, stage):
    flags = ["--micro-batch", 1, "--lora", 2, "--lr", 0.01]
    finish(run(command(toy, tmp_path / "two", *flags, fsdp, stage=stage), processes=2))
    train.main(command(toy, tmp_path / "one", *flags, stage=stage))
    a, b = (load_file(tmp_path / name / weights.ADAPTER) for name in ("one", "two"))
    assert a.keys() == b.keys() and all((a[name] - b[name]).abs().max() < 1e-4 for name in a)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)


@pytest.mark.gradients
def test_an_adapter_draws_with_its_weights_or_beside_them_and_converts_to_whole_ones(toy, tmp_path):
    train.main(command(toy, tmp_path / "mine", "--lora", 2, "--lr", 0.05, stage="multi", steps=3))
    weights.main(["convert", toy[0], str(tmp_path / "whole"), "--lora", str(tmp_path / "mine")])
    pictures = []
    Image.new("RGB", (30, 30), "red").save(tmp_path / "ref.png")
    for flags in (["--weights", tmp_path / "mine"], ["--weights", toy[0], "--lora", tmp_path / "mine"],
                  ["--weights", tmp_path / "whole"], ["--weights", toy[0]]):
        out = tmp_path / f"{len(pictures)}.png"
        sample.main([*map(str, flags), "--prompt", "a cat", "--ref", str(tmp_path / "ref.png"), "--out", str(out)])
        pictures.append(Image.open(out))
    assert json.loads(pictures[1].info["mentor"])["lora"] == str(tmp_path / "mine")
    same = [picture.tobytes() == pictures[0].tobytes() for picture in pictures]
    assert same == [True, True, True, False]


@pytest.mark.parametrize("change, said", [
    (lambda t: t | {"decoder.layers.9.attention.wo.lora_a": torch.zeros(4, 64)}, "update of nothing that this model"),
    (lambda t: {"encoder.clip.blocks.0.fc1.lora_a": torch.zeros(4, 32)}, "update of nothing that this model has"),
    (lambda t: {name: tensor[:, :3] for name, tensor in t.items()}, "do not fit the layer's"),
    (lambda t: {name: tensor for name, tensor in t.items() if name.endswith("_a")}, "lora_b .0., which do not fit"),
    (lambda t: {name: tensor + torch.nan for name, tensor in t.items()}, "values that are not finite")])
def test_an_adapter_of_other_weights_is_named(toy, tmp_path, change, said):
    model = adapted()
    model.adapter = replace(model.adapter, base=toy[0])
    weights.write(model, tmp_path)
    path = tmp_path / weights.ADAPTER
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, about)
    with pytest.raises(InputError, match=f"adapter.safetensors: .*{said}"):
        weights.load(tmp_path)


def test_a_missing_base_a_missing_adapter_and_a_foreign_file_are_one_sentence(tmp_path):
    model = adapted()
    model.adapter = replace(model.adapter, base=str(tmp_path / "gone"))
    weights.write(model, tmp_path)
    with pytest.raises(InputError, match="gone: no such folder of weights"):
        weights.load(tmp_path)
    with pytest.raises(InputError, match="adapter.safetensors: no such file"):
        weights.load("random", lora=tmp_path / "nothing")
    save_file({"x": torch.zeros(2)}, tmp_path / weights.ADAPTER)
    with pytest.raises(InputError, match="adapter.safetensors: what it holds is"):
        weights.load(tmp_path)


def test_lora_fits_a_card_of_16_gb_by_formula():
    with torch.device("meta"):
        mentor = Mentor(MentorConfig())
    weights.add_lora(mentor, 16, train.STAGES["2"].trains, "mentor")
    train.freeze(train.TokenObjective(mentor), train.STAGES["2"].trains)
    weights.halve_frozen(mentor)
    rows = weights.training_memory(mentor, train.STAGES["2"].trains, 1, weights.Way(False, True, 1))
    print(rows)
    assert sum(rows.values()) + weights.SPARE < weights.CARDS[16] and rows["gradients"] < 0.2
