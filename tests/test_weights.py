"""Weights: every layout in which they come, what may be missing and what may be damaged, and the way from the hub."""
import argparse
import hashlib
import http.server
import json
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, close, material
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import data
import weights
from cli import InputError
from encoder import QueryConfig
from model import SIZES, Mentor, MentorConfig, Sampling
from scorers import CLIP_TEXT_NAMES, Clip, TextConfig
from weights import CLIP_NAMES, byte_tokenizer

ROOT = pathlib.Path(weights.__file__).parent
WHOLE_CLIP = CLIP_NAMES + CLIP_TEXT_NAMES


def random_model(seed=0, **options):
    torch.manual_seed(seed)
    model = Mentor(TINY, byte_tokenizer(), **options).eval()
    torch.nn.init.normal_(model.decoder.output.weight)         # zero at first, which would not look at its input
    return model


def sampled(model, prompt, images=(), seed=0):
    """-> pixels (3, H, W)"""
    return model.sample(data.collate([model.processor(prompt, images)]), [seed])[0]


def public(model, kind):
    """What the public file of that kind would hold of the model, with the extras the real files have."""
    state = model.state_dict()
    tensors = {public: state[ours].clone() for public, ours in weights.public_names(model, kind).items()}
    if kind == "vqgan":
        tensors["quantize.codebook_used"] = torch.zeros(65536)
    if kind == "clip":
        tower = Clip(TINY.vision, TextConfig(32, 1, 2, 64, 100), 16).state_dict()
        tensors |= {weights.public_name(name, WHOLE_CLIP): tensor for name, tensor in tower.items()
                    if not name.startswith("vision.")}
        tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    return tensors


def write_folder(folder, model, kinds, bare=False):
    """A folder of public files as their publishers write them."""
    folder.mkdir(exist_ok=True)
    for kind in kinds:
        tensors = public(model, kind)
        if kind == "t5":
            write_shards(folder, tensors)
        elif kind == "clip":
            save_file(tensors, folder / "clip.safetensors")
        elif kind == "connector" or bare:
            torch.save(tensors, folder / f"{kind}.bin")
        else:
            training = {"optimizer": {"state": {}}, "steps": 7, "args": argparse.Namespace(lr=1e-4)}
            torch.save({"model": tensors, **training}, folder / f"{kind}.pt")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return str(folder)


def write_shards(folder, tensors):
    """T5 as its publisher does: two shards and an index, the token table stored once under an alias."""
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    names, files = sorted(tensors), ("t5-00001-of-00002.safetensors", "t5-00002-of-00002.safetensors")
    for part, file in enumerate(files):
        save_file({name: tensors[name] for name in names[part::2]}, folder / file)
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    (folder / "t5.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def load(folder, **options):
    return weights.load(folder, config=TINY, **options)


def same(a, b, but=()):
    state = b.state_dict()
    return all(torch.equal(value, state[name]) for name, value in a.state_dict().items() if not name.startswith(but))


# ---------------------------------------------------------------------------------------------------------------------
# Layouts

@pytest.mark.parametrize("file, kind", [
    ("mentor-stage2", "mentor"), ("llamagen-t2i_XL_stage2_512", "decoder"), ("llamagen-vq_ds16_t2i", "vqgan"),
    ("flan-t5-xl", "t5"), ("clip-vit-large-patch14", "clip")])
def test_every_public_name_and_shape_is_produced_or_known_as_an_extra(file, kind):
    published = json.loads((material("MENTOR_MANIFESTS", "manifests") / f"{file}.json").read_text())["tensors"]
    with torch.device("meta"):
        model = Mentor(replace(MentorConfig(), prefix_tokens=120 if kind == "decoder" else 512), t5_decoder=True)
    state = model.state_dict()
    produced = {public: list(state[ours].shape) for public, ours in weights.public_names(model, kind).items()
                if kind == "t5" or "language_model.decoder" not in public and "lm_head" not in public}
    assert {name: published.get(name) for name in produced} == produced
    assert all(weights.EXTRAS.search(name) for name in published.keys() - produced.keys())


def test_the_whole_of_clip_has_its_public_names_and_shapes():
    published = json.loads((material("MENTOR_MANIFESTS", "manifests") / "clip-vit-large-patch14.json").read_text())
    with torch.device("meta"):
        state = Clip().state_dict()
    produced = {weights.public_name(name, WHOLE_CLIP): list(tensor.shape) for name, tensor in state.items()}
    assert produced == published["tensors"]


@pytest.mark.parametrize("bare", [False, True])
def test_a_mentor_checkpoint_loads_completely(tmp_path, bare):
    model = random_model()
    assert same(model, load(write_folder(tmp_path, model, ["mentor", "vqgan"], bare)))


WITH_QUERIES = replace(TINY, connector="query", query=QueryConfig(32, 2, 2, 48, 120, 64, 4, dropout=0.0))


def query_model(config=WITH_QUERIES, seed=0):
    """Its connector reads words of its own, of which there are 120."""
    torch.manual_seed(seed)
    pieces = Tokenizer(models.WordPiece({word: i for i, word in enumerate(["[PAD]", "[UNK]", "cat", "##s"])}))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    model = Mentor(config, byte_tokenizer(), words=pieces).eval()
    torch.nn.init.normal_(model.decoder.output.weight)
    return model


@pytest.mark.parametrize("kinds", [["mentor", "vqgan"], ["vqgan", "decoder", "t5", "clip", "connector"]])
def test_query_connectors_load_under_the_releases_and_instructblips_names(tmp_path, kinds):
    model = query_model()
    folder = write_folder(tmp_path / "public", model, kinds)
    with pytest.raises(InputError, match="qformer_tokenizer.json is missing, the words that the query connector knows"):
        weights.load(folder, config=WITH_QUERIES)
    model.processor.words.save(f"{folder}/{weights.WORDS}")
    if "connector" in kinds:                   # as in InstructBLIP's file, which holds its other networks too
        extra = {"vision_model.encoder.layers.0.self_attn.qkv.bias": torch.zeros(6), "language_model.shared.weight":
                 torch.zeros(2, 2), "qformer.embeddings.position_ids": torch.arange(64)[None]}
        torch.save(torch.load(f"{folder}/connector.bin") | extra, f"{folder}/connector.bin")
    loaded = weights.load(folder, config=WITH_QUERIES)
    assert same(model, loaded) and not loaded.config.untrained
    weights.save(loaded, tmp_path / "saved")
    again = weights.load(tmp_path / "saved")
    assert same(model, again) and again.config.connector == "query"
    image = Image.new("RGB", (20, 20), "red")
    read = [each.processor("<image>", [image], ["cats"])["words"] for each in (model, again)]
    assert read[0].tolist() == read[1].tolist() == [[2, 3]]
    (tmp_path / "saved" / weights.WORDS).unlink()
    with pytest.raises(InputError, match="qformer_tokenizer.json is missing"):
        weights.load(tmp_path / "saved")


def test_a_q_former_for_other_patch_features_starts_with_new_keys_and_values(tmp_path):
    model, news = query_model(), []
    folder = write_folder(tmp_path, query_model(replace(WITH_QUERIES, vision=replace(TINY.vision, width=40)), seed=1),
                          ["connector"])
    write_folder(tmp_path, model, ["vqgan", "decoder", "t5", "clip"])
    model.processor.words.save(f"{folder}/{weights.WORDS}")
    loaded = weights.load(folder, config=WITH_QUERIES, log=news.append)
    assert loaded.config.untrained == ("encoder.connector",) and "patch features of another width" in news[0]
    assert same(model, loaded, but=("encoder.connector",))
    assert loaded.encoder.connector.blocks[0].cross.k.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("kinds", [["mentor", "vqgan"], ["vqgan", "decoder", "t5", "clip", "connector"], []])
def test_a_connector_of_the_other_kind_is_named(tmp_path, kinds):
    for model, config, said in ((random_model(), WITH_QUERIES, "holds an MLP for its connector but the configuration "
                                 ".query. asks for the query connector"),
                                (query_model(), TINY, "holds the query connector but the configuration .released. asks "
                                 "for an MLP")):
        folder = tmp_path / config.connector
        if kinds:
            write_folder(folder, model, kinds)
        else:
            weights.save(model, folder)
        query_model().processor.words.save(f"{folder}/{weights.WORDS}")
        with pytest.raises(InputError, match=said):
            weights.load(folder, config=config)


def test_a_new_connector_takes_the_place_of_the_weights_own(tmp_path):
    model = random_model()
    weights.save(model, tmp_path / "f")
    for form in ("released", "query"):
        loaded = weights.load(tmp_path / "f", connector=form)
        assert loaded.config.connector == form and loaded.config.untrained == ("encoder.connector",)
        parts = ("encoder.clip", "encoder.t5", "projector", "decoder", "vqgan")
        assert all(same(model.get_submodule(part), loaded.get_submodule(part)) for part in parts)
    assert not same(model.encoder.connector, weights.load(tmp_path / "f", connector="released").encoder.connector)
    loaded.config = replace(loaded.config, untrained=())
    assert torch.isfinite(sampled(loaded, "The cat in <image>.", [Image.new("RGB", (30, 30))])).all()


def test_separate_public_files_load_completely(tmp_path):
    model = random_model(t5_decoder=True)
    folder = write_folder(tmp_path, model, ["decoder", "vqgan", "t5", "clip", "connector"])
    assert same(model, load(folder, t5_decoder=True))
    assert same(load(folder), model)           # the encoder alone ignores the decoder half


def test_a_saved_folder_loads_as_it_was_and_replaces_an_older_one(tmp_path):
    for seed in (0, 1):
        model = random_model(seed)
        weights.save(model, tmp_path / "folder")
        loaded = weights.load(tmp_path / "folder")
        assert loaded.config == TINY and same(model, loaded)
    assert os.listdir(tmp_path) == ["folder"]
    assert torch.equal(sampled(model, "a cat"), sampled(loaded, "a cat"))


def test_conversion_writes_a_folder_that_holds_the_same_model(tmp_path, monkeypatch, capsys):
    model = random_model()
    folder = write_folder(tmp_path / "public", model, ["mentor", "vqgan"])
    monkeypatch.setattr(weights, "public_config", lambda *args: TINY)
    weights.main(["convert", folder, str(tmp_path / "out")])
    assert same(model, weights.load(tmp_path / "out")) and "wrote" in capsys.readouterr().out
    weights.main(["convert", folder, str(tmp_path / "half"), "--half"])
    half, full = weights.load(tmp_path / "half").state_dict(), model.state_dict()
    for name, tensor in half.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, full[name].half().float())
    sizes = [os.path.getsize(tmp_path / name / "model.safetensors") for name in ("half", "out")]
    assert sizes[0] < 0.6 * sizes[1]


def test_public_files_are_recognised_beside_the_hubs_own_config_json(tmp_path):
    model = random_model()
    folder = write_folder(tmp_path, model, ["mentor", "vqgan", "clip"])
    (tmp_path / "clip.safetensors").rename(tmp_path / "model.safetensors")         # as CLIP's publisher names it
    (tmp_path / "config.json").write_text('{"architectures": ["CLIPModel"], "model_type": "clip"}')
    assert same(model, load(folder))


def test_a_folder_that_holds_anything_else_is_not_replaced(tmp_path):
    weights.save(random_model(), tmp_path / "f")
    (tmp_path / "f" / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match="holds notes.txt"):
        weights.save(random_model(1), tmp_path / "f")
    with pytest.raises(InputError, match="holds notes.txt"):                       # before any weights are read
        weights.main(["convert", "nowhere", str(tmp_path / "f")])
    assert same(random_model(), weights.load(tmp_path / "f")) and (tmp_path / "f" / "notes.txt").exists()


@pytest.mark.parametrize("device", ["cuda:99", "meta", "teapot", ""])
def test_a_device_that_is_not_there_is_one_sentence_from_python_too(device):
    with pytest.raises(InputError, match=f"--device {device} does not work here"):
        weights.load("random", device=device)


@pytest.mark.parametrize("dtype, times, told", [
    (torch.bfloat16, 40, True), (torch.float16, 40, True), (torch.bfloat16, 0.4, False), (torch.float32, 40, False)])
def test_who_asks_a_cpu_for_products_that_it_makes_by_detours_is_told_so(monkeypatch, dtype, times, told):
    monkeypatch.setattr(weights.fast, "slowdown", lambda dtype: times)
    said = []
    weights.load("random", "cpu", dtype, log=said.append)
    assert [line for line in said if "take this CPU 40 times as long" in line] == said[:1] and bool(said) == told


@pytest.mark.parametrize("seeds", [[], [-1], [2**63], [0, -1], range(0)])
def test_seeds_that_cannot_be_drawn_with_are_refused_from_python_too(seeds):
    model = random_model()
    with pytest.raises(ValueError, match="seeds for 1 prompts; give as many, or a multiple, all 0 or above"):
        model.sample(data.collate([model.processor("a cat")]), seeds)


def test_random_weights_are_the_same_every_time_and_of_the_size_asked_for():
    assert same(weights.load("random"), weights.load("random-toy"))
    state = torch.get_rng_state()
    assert same(weights.random_model(TINY, byte_tokenizer(), 3), weights.random_model(TINY, byte_tokenizer(), 3))
    assert not same(weights.random_model(TINY, byte_tokenizer(), 3), weights.random_model(TINY, byte_tokenizer(), 4))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InputError, match="random-huge: no such size; the sizes are toy, B"):
        weights.load("random-huge")


def test_the_fingerprint_tells_codebooks_apart():
    one, other = random_model(0).vqgan, random_model(1).vqgan
    assert weights.fingerprint(one) == weights.fingerprint(random_model(0).vqgan) != weights.fingerprint(other)
    other.quantize.load_state_dict(one.quantize.state_dict())
    assert weights.fingerprint(one) == weights.fingerprint(other)


def test_the_published_size_is_recognised_from_the_files():
    with torch.device("meta"):
        state = {"tok_embeddings.weight": torch.empty(16384, 1280),
                 "cls_embedding.uncond_embedding": torch.empty(120, 2048),
                 **{f"layers.{i}.attention_norm.weight": torch.empty(1280) for i in range(36)}}
    config = weights.public_config("folder", {"decoder": ("folder/t2i_XL_stage1_256.pt", state)})
    assert (config.decoder.layers, config.prefix_tokens, config.image_size) == (36, 120, 256)
    assert config.decoder.prefix_rope == "zero"                # LlamaGen's own weights were trained so
    config = weights.public_config("folder", {"decoder": ("folder/generator_ckpt.pt", state)})
    assert (config.image_size, config.decoder.prefix_rope) == (512, "identity")


@pytest.mark.parametrize("rows, kind, rope, sampling", [
    (120, "decoder", "zero", Sampling()), (512, "decoder", "identity", Sampling()),
    (120, "mentor", "identity", Sampling(2.5, 0.9, 5000, 1.0)), (512, "mentor", "identity", weights.DEMO)])
def test_rotation_and_sampling_come_with_the_tensors_whatever_the_file_is_called(rows, kind, rope, sampling):
    with torch.device("meta"):
        state = {"tok_embeddings.weight": torch.empty(16384, 1280),
                 "cls_embedding.uncond_embedding": torch.empty(rows, 2048),
                 **{f"layers.{i}.attention_norm.weight": torch.empty(1280) for i in range(36)}}
    news = []
    config = weights.public_config("folder", {kind: ("folder/renamed.pt", state)}, news.append)
    assert (config.decoder.prefix_rope, config.prefix_tokens, config.sampling) == (rope, rows, sampling)
    if kind == "decoder":
        assert len(news) == 1 and rope in news[0] and "--prefix-rope" in news[0]
    else:
        assert not news


# ---------------------------------------------------------------------------------------------------------------------
# What the release did, and what may be missing

def test_a_shorter_unconditional_table_fills_the_first_rows(tmp_path):
    model = random_model()
    folder = write_folder(tmp_path, model, ["mentor", "vqgan"])
    longer = load(folder, prefix_tokens=100)
    close(longer.projector.uncond[:64], model.projector.uncond, 0)
    assert longer.projector.uncond.shape == (100, 48) and (longer.projector.uncond[64:] != 0).all()
    assert longer.processor.max_tokens == 100


def test_a_saved_models_unconditional_rows_stay_where_prompts_read_them(tmp_path):
    model = random_model()
    weights.save(model, tmp_path / "f")
    longer = weights.load(tmp_path / "f", prefix_tokens=100)
    close(longer.projector.uncond[-64:], model.projector.uncond, 0)
    assert torch.equal(sampled(model, "a cat", seed=3), sampled(longer, "a cat", seed=3))          # with guidance


def test_a_checkpoint_of_mentor_wins_over_other_files_of_its_parts(tmp_path):
    model, news = random_model(), []
    folder = write_folder(tmp_path, model, ["mentor", "vqgan"])
    for kind in ("decoder", "t5"):
        torch.save(public(random_model(1), kind), tmp_path / f"another_{kind}.pt")
    assert same(model, load(folder, log=news.append))
    assert [f"another_{kind}.pt: is not used" in line for kind, line in zip(("decoder", "t5"), news)] == [True, True]


def test_the_checkpoints_own_clip_wins_and_a_difference_is_reported(tmp_path):
    model, news = random_model(), []
    folder = write_folder(tmp_path, model, ["mentor", "vqgan", "clip"])
    load(folder, log=news.append)
    assert news == []
    other = public(random_model(1), "clip")
    save_file(other, tmp_path / "clip.safetensors")
    assert same(model, load(folder, log=news.append))
    assert len(news) == 1 and "CLIP" in news[0] and "differ" in news[0]


def test_clip_tensors_that_the_checkpoint_lacks_come_from_clips_own_file(tmp_path):
    model = random_model()
    folder = write_folder(tmp_path, model, ["vqgan", "clip"])
    torch.save({k: v for k, v in public(model, "mentor").items() if "vision_tower" not in k}, tmp_path / "stage2.pt")
    assert same(model, load(folder))
    os.remove(tmp_path / "clip.safetensors")
    with pytest.raises(InputError, match="class_embedding is missing"):
        load(folder)


def test_without_a_connector_only_text_to_image_is_possible(tmp_path):
    news = []
    model = load(write_folder(tmp_path, random_model(), ["decoder", "vqgan", "t5", "clip"]), log=news.append)
    assert "no connector" in news[0] and sampled(model, "a cat").shape == (3, 24, 24)
    weights.save(model, tmp_path / "saved")
    for model in (model, weights.load(tmp_path / "saved")):
        with pytest.raises(InputError, match="no trained connector"):
            sampled(model, "The cat in <image>.\na cat", [Image.new("RGB", (40, 40))])


# ---------------------------------------------------------------------------------------------------------------------
# Damage

def test_missing_extra_and_misshaped_tensors_are_all_named(tmp_path):
    tensors = public(random_model(), "mentor")
    del tensors["norm.weight"]
    tensors["output.weight"] = tensors["output.weight"][:5]
    tensors["surprise.weight"] = torch.zeros(2)
    folder = write_folder(tmp_path, random_model(), ["vqgan"])
    torch.save({"model": tensors}, tmp_path / "stage2.pt")
    with pytest.raises(InputError) as error:
        load(folder)
    for part in ("stage2.pt", "norm.weight is missing", "output.weight is [5, 64] but should be [64, 64]",
                 "surprise.weight is not part"):
        assert part in str(error.value)


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path):
    for protocol in ({}, {"_use_new_zipfile_serialization": False}):
        path = tmp_path / "stage2.pt"
        torch.save({"model": {"a": torch.zeros(1)}, "x": Bomb(str(tmp_path / "ran"))}, path, **protocol)
        with pytest.raises(InputError, match="stage2.pt: this pickle would run code .* nothing of it was run"):
            weights.read_tensors(path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(str(tmp_path / "ran"))))
    with pytest.raises(InputError, match="plain.pt"):
        weights.read_tensors(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


def test_old_style_pickles_still_load(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert weights.read_tensors(tmp_path / "old.pt")["a"].sum() == 3


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model.index.json", "model.bin"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "absent"])
def test_damaged_weight_files_are_named(tmp_path, name, damage):
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file({"a": torch.zeros(100)}, path)
    elif name.endswith(".json"):
        path.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    else:
        torch.save({"a": torch.zeros(100)}, path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:len(content) // 2], "foreign": b"\x89PNG not weights" * 9, "empty": b"",
                      "absent": b""}[damage])
    if damage == "absent":
        path.unlink()
    with pytest.raises(InputError, match=name):
        weights.read_tensors(path)


def test_folders_that_hold_too_little_or_too_much_say_so(tmp_path):
    with pytest.raises(InputError, match="no such folder of weights"):
        weights.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no file there holds the clip or the decoder or the t5 or the vqgan"):
        weights.load(tmp_path)
    folder = write_folder(tmp_path, random_model(), ["mentor", "vqgan"])
    torch.save(public(random_model(), "vqgan"), tmp_path / "another.pt")
    with pytest.raises(InputError, match="two vqgan files"):
        load(folder)
    torch.save({"strange": torch.zeros(1)}, tmp_path / "another.pt")
    with pytest.raises(InputError, match="another.pt: its tensors .strange"):
        load(folder)
    weights.save(random_model(), tmp_path / "f")
    os.remove(tmp_path / "f" / "tokenizer.json")
    with pytest.raises(InputError, match="tokenizer.json is missing"):
        weights.load(tmp_path / "f")
    for name in ("model.safetensors", "config.json"):
        weights.save(random_model(), tmp_path / name / "f")
        os.remove(tmp_path / name / "f" / name)
        with pytest.raises(InputError, match=f"{name} is missing; it lies beside"):
            weights.load(tmp_path / name / "f")
    (tmp_path / "run" / "step-00000007").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no finished weights, only checkpoints; .*step-00000007"):
        weights.load(tmp_path / "run")


def test_a_folder_with_a_damaged_configuration_is_named(tmp_path):
    weights.save(random_model(), tmp_path / "f")
    for text in ("{", "[1]", '{"colour": 3}', '{"decoder": 5}'):
        (tmp_path / "f" / "config.json").write_text(text)
        with pytest.raises(InputError, match="config.json"):
            weights.load(tmp_path / "f")


def changed(config, field, value):
    """The configuration as JSON has it, with another value at "decoder.heads" or the like."""
    values = json.loads(json.dumps(asdict(config)))
    *path, name = field.split(".")
    inner = values
    for part in path:
        inner = inner[part]
    inner[name] = value
    return values


@pytest.mark.parametrize("field, value, said", [
    ("decoder.prefix_rope", "sideways", "must be one of grid, identity, zero"),
    ("decoder.prefix_rope", ["zero"], "must be a text"),
    ("connector", "new", "must be one of paper, query, released"),
    ("untrained", 1, "must be a list"), ("untrained", [1], "must be a text"),
    ("untrained", ["encoder.nose"], "must be one of"), ("untrained", "decoder", "must be a list"),
    ("decoder.heads", 3, "decoder.width must be a multiple of 4 x decoder.heads"),
    ("decoder.heads", 32, "decoder.width must be a multiple of 4 x decoder.heads"),
    ("vision.heads", 5, "vision.heads must divide"), ("vision.patch_size", 15, "vision.patch_size must divide"),
    ("decoder.layers", 0, "must be a whole number from 1 to"), ("decoder.layers", 2.0, "must be a whole number"),
    ("decoder.layers", True, "must be a whole number"), ("decoder.layers", "2", "must be a whole number"),
    ("decoder.layers", None, "must be a whole number"), ("decoder.layers", 10**30, "from 1 to 1024"),
    ("decoder.dropout", -0.5, "must be a number from 0 to 0.99"), ("decoder.rope_base", 0, "must be a number from"),
    ("decoder.codes", 65, "decoder.codes must equal vqgan.codes"), ("t5", None, "t5 is None but must be an object"),
    ("t5.vocab_size", 100, "image_id must be less"), ("t5.buckets", 30, "t5.buckets must be a multiple of 4"),
    ("t5.max_distance", 16, "t5.max_distance more than half"), ("vqgan.multipliers", [], "must be 1 to 8 numbers"),
    ("vqgan.multipliers", [1, "2"], "must be a whole number"), ("vqgan.multipliers", {}, "must be a list"),
    ("vqgan.channels", 18, "vqgan.channels must be a multiple"), ("image_size", 25, "image_size must be a multiple"),
    ("image_size", -24, "must be a whole number from 8"), ("prefix_tokens", 0, "from 1 to"),
    ("sampling.top_k", 65, "sampling.top_k must be at most"), ("sampling.top_p", 0, "must be a number from"),
    ("sampling.temperature", -1, "must be a number from 0"), ("sampling.surprise", 1, "holds sampling.surprise"),
    ("decoder", [1], "decoder is .1. but must be an object"), ("surprise", 1, "holds surprise")])
def test_a_wrong_field_of_a_configuration_is_one_sentence(tmp_path, field, value, said):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed(TINY, field, value)))
    with pytest.raises(InputError, match=f"config.json: .*{said}") as error:
        weights.read_config(str(path))
    assert len(str(error.value)) < 400


def test_every_configuration_there_is_passes_the_check(tmp_path):
    toy = replace(SIZES["toy"], image_id=259)  # as random_model sets it
    for config in (TINY, toy, *list(SIZES.values())[1:], replace(TINY, untrained=("encoder.connector",))):
        (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
        assert weights.read_config(str(tmp_path / "config.json")) == config
    assert weights.read_config(str(ROOT / "assets" / "tiny" / "config.json")).untrained == ()


def test_a_lacking_field_is_named(tmp_path):
    for path in ("decoder", "decoder.prefix_rope", "sampling.top_k"):
        values = changed(TINY, path, 0)
        *parts, name = path.split(".")
        inner = values
        for part in parts:
            inner = inner[part]
        del inner[name]
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(InputError, match=f"config.json: lacks {path}"):
            weights.read_config(str(tmp_path / "config.json"))


def test_any_value_in_any_field_gives_a_configuration_that_builds_or_one_sentence(tmp_path):
    """Fuzzed: one or two fields of the small configuration take values of every kind."""
    generator = np.random.default_rng(0)
    values = [0, 1, -1, 2, 3, 7, 48, 64, 1e9, 10**9, 0.5, -0.0, True, None, "", "zero", "x" * 1000, [], [1], [[1]], {},
              {"a": 1}, 1e308, "\ud800"]
    fields = ["connector", "prefix_tokens", "image_size", "image_id", "untrained"]
    for part in ("vision", "t5", "decoder", "vqgan", "sampling"):
        fields += [part, *(f"{part}.{name}" for name in asdict(TINY)[part])]
    path, built = tmp_path / "config.json", 0
    for _ in range(300):
        content = changed(TINY, fields[generator.integers(len(fields))], values[generator.integers(len(values))])
        if generator.random() < 0.3 and isinstance(content["decoder"], dict):
            content["decoder"]["layers"] = values[generator.integers(len(values))]
        path.write_text(json.dumps(content))
        try:
            config = weights.read_config(str(path))
        except InputError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 500
            continue
        with torch.device("meta"):
            Mentor(config)
        built += 1
    assert 10 < built < 200


FOREIGN = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n": "is a git-LFS pointer",
    b"<!DOCTYPE html><html>": "is a web page", b"\n <HTML>": "is a web page", b"": "is empty", b"\0" * 600: "but zeros",
    b'{"error":"Repository not found"}': "server's error message", b"\x1f\x8b\x08": "is gzipped",
    b"\x89PNG\r\n": "is a picture", b"PAR1abc": "is a Parquet table"}


@pytest.mark.parametrize("name", ["stage2.pt", "model.safetensors", "x.bin", "t5.index.json", "config.json",
                                  "tokenizer.json"])
@pytest.mark.parametrize("content", FOREIGN, ids=lambda content: content[:9].decode("latin-1").strip())
def test_what_lies_in_place_of_a_file_is_called_what_it_is(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    read = {"config.json": weights.read_config, "tokenizer.json": weights.load_tokenizer}
    if content.startswith(b"{") and name in ("config.json", "t5.index.json"):
        pytest.skip("is JSON, whose fields are then found to be others")
    with pytest.raises(InputError, match=FOREIGN[content]) as error:
        read.get(name, weights.read_tensors)(str(path))
    assert name in str(error.value) and "pickle" not in str(error.value)


@pytest.mark.parametrize("name", ["stage2.pt", "model.safetensors", "t5.index.json", "config.json", "tokenizer.json",
                                  "codes.safetensors"])
@pytest.mark.parametrize("kind, said", [("fifo", "a pipe or a device"), ("folder", "is a folder"),
                                        ("link", "a link to a file that is gone"), ("device", "a pipe or a device")])
def test_only_regular_files_are_opened(tmp_path, name, kind, said):
    path = tmp_path / name
    {"fifo": os.mkfifo, "folder": os.mkdir, "link": lambda p: os.symlink("gone", p),
     "device": lambda p: os.symlink("/dev/zero", p)}[kind](path)
    read = {"config.json": weights.read_config, "tokenizer.json": weights.load_tokenizer,
            "codes.safetensors": lambda p: weights.Codes(os.path.dirname(p), random_model().vqgan, 24)}
    with pytest.raises(InputError, match=said):
        read.get(name, weights.read_tensors)(str(path))


@pytest.mark.parametrize("content", [
    [1], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}},
    {"weight_map": {"a": "../x.safetensors"}}, {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": "x.txt"}}])
def test_an_index_names_files_beside_it(tmp_path, content):
    (tmp_path / "t5.index.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="t5.index.json: "):
        weights.read_tensors(tmp_path / "t5.index.json")


@pytest.mark.parametrize("make, said", [
    (lambda t: t.to(torch.int8), "holds torch.int8"), (lambda t: t > 0, "holds torch.bool"),
    (lambda t: t.to(torch.complex64), "holds torch.complex64"), (lambda t: t.to(torch.int64), "holds torch.int64"),
    (lambda t: t.fill_(torch.nan), "not finite"), (lambda t: torch.where(t == t.max(), torch.inf, t), "not finite"),
    (lambda t: torch.where(t == t.max(), -torch.inf, t).half(), "not finite"), (lambda t: t.to("meta"), "or is sparse"),
    (lambda t: t.to_sparse(), "or is sparse"), (lambda t: t * torch.tensor(1e39).double(), "")])
def test_weights_that_are_no_finite_floats_are_refused_by_name(tmp_path, make, said):
    model, name = random_model(), "decoder.layers.1.attention.wqkv.weight"
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    name = next(key for key in tensors if key.startswith("decoder.layers.1") and tensors[key].dim() == 2)
    tensors[name] = make(tensors[name])
    with torch.device("meta"):
        empty = Mentor(TINY)
    if said:
        with pytest.raises(InputError, match=f"file: does not fit this model: {name} .*{said}"):
            weights.fill_in(empty, tensors, {key: key for key in tensors}, "file")


def test_large_numbers_whose_sum_is_not_finite_are_finite():
    assert weights.is_finite(torch.full((1000,), 3e38)) and not weights.is_finite(torch.tensor([torch.inf, -torch.inf]))


def test_a_saved_file_is_read_by_whom_other_files_are(tmp_path):
    before = os.umask(0o027)
    try:
        weights.save(random_model(), tmp_path / "f")
    finally:
        os.umask(before)
    assert {name: os.stat(tmp_path / "f" / name).st_mode & 0o777 for name in os.listdir(tmp_path / "f")} == \
        dict.fromkeys(weights.MODEL_FILES, 0o640)


def test_numbers_too_large_for_fp16_are_said_at_conversion(tmp_path):
    model = random_model()
    model.decoder.norm.weight[3] = 1e6
    weights.save(model, tmp_path / "f")
    with pytest.raises(InputError, match="decoder.norm.weight holds numbers that are too large for fp16"):
        weights.main(["convert", str(tmp_path / "f"), str(tmp_path / "half"), "--half"])
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("room", [0, 2000, 100_000])
def test_a_full_disk_is_one_sentence_and_leaves_the_older_model(tmp_path, room):
    weights.save(random_model(0), tmp_path / "f")
    weights.save(random_model(1), tmp_path / "g")
    code = (f"import resource, sys, cli, weights; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room})); "
            f"sys.argv = ['weights.py', 'convert', {str(tmp_path / 'g')!r}, {str(tmp_path / 'f')!r}]; "
            "cli.run(weights.main)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr and "cannot be written" in result.stderr
    assert same(random_model(0), weights.load(tmp_path / "f")) and sorted(os.listdir(tmp_path)) == ["f", "g"]


def test_conversion_replaces_only_a_folder_of_ours_and_not_its_source(tmp_path):
    weights.save(random_model(), tmp_path / "f")
    for out in (tmp_path / "f", tmp_path / "f" / ".", str(tmp_path / "f") + "/"):
        with pytest.raises(InputError, match="is where the weights come from"):
            weights.main(["convert", str(tmp_path / "f"), str(out)])
    os.symlink(tmp_path / "f", tmp_path / "link")
    with pytest.raises(InputError, match="is where the weights come from"):
        weights.main(["convert", str(tmp_path / "f"), str(tmp_path / "link")])
    assert same(random_model(), weights.load(tmp_path / "f"))
    # another program's model, in files of the same names
    other = tmp_path / "other"
    for content in ('{"model_type": "clip"}', "{}", "[", None):
        shutil.rmtree(other, ignore_errors=True)
        other.mkdir()
        (other / "model.safetensors").write_text("precious")
        if content:
            (other / "config.json").write_text(content)
        with pytest.raises(InputError, match="other: is no folder of ours that may be replaced"):
            weights.main(["convert", str(tmp_path / "f"), str(other)])
        assert (other / "model.safetensors").read_text() == "precious"
    for neighbour in ("new.old", "new.part"):
        (tmp_path / neighbour).mkdir()
    weights.main(["convert", str(tmp_path / "f"), str(tmp_path / "new")])
    weights.main(["convert", str(tmp_path / "f"), str(tmp_path / "new")])                # ours: replaced
    assert sorted(os.listdir(tmp_path)) == ["f", "link", "new", "new.old", "new.part", "other"]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def write_checkpoint(out, step, model, sealed=True):
    """As train.py does."""
    folder = out / f"step-{step:08}"
    folder.mkdir(parents=True)
    weights.write(model, folder)
    weights.write_tensors({"exp_avg:x": torch.ones(3)}, folder / "training.safetensors")
    (folder / "training.json").write_text(json.dumps({"step": step, "settings": {"lr": 1}}))
    if sealed:
        weights.seal(folder)
    return folder


@pytest.mark.parametrize("name", sorted({*weights.CHECKPOINT_FILES} - {weights.WORDS, weights.ADAPTER}))
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found_and_the_older_one_taken(tmp_path, name):
    old, new = random_model(0), random_model(1)
    write_checkpoint(tmp_path, 5, old)
    path = write_checkpoint(tmp_path, 9, new) / name
    assert same(new, weights.newest_checkpoint(tmp_path)[0])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    news = []
    model, tensors, training = weights.newest_checkpoint(tmp_path, log=news.append)
    assert same(old, model) and training == {"step": 5, "settings": {"lr": 1}} and list(tensors) == ["exp_avg:x"]
    assert len(news) == 1 and "step-00000009: is damaged" in news[0] and "falling back" in news[0]


def test_a_checkpoint_without_a_seal_is_taken_and_a_damaged_setting_is_not(tmp_path):
    write_checkpoint(tmp_path, 5, random_model(0), sealed=False)
    assert weights.newest_checkpoint(tmp_path)[2]["step"] == 5
    for content in ("[]", '{"step": -1, "settings": {}}', '{"step": 5}', '{"step": 5, "settings": []}', "{" * 10**5):
        (tmp_path / "step-00000005" / "training.json").write_text(content)
        with pytest.raises(InputError, match="holds no checkpoint"):
            weights.newest_checkpoint(tmp_path, log=lambda line: None)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("same_run", [True, False])
def test_wherever_publishing_is_killed_out_holds_one_model_or_none(tmp_path, monkeypatch, same_run):
    """Every call that changes the folder is in turn the last one."""
    old = random_model(0)
    torch.manual_seed(1)
    new = Mentor(TINY if same_run else replace(TINY, sampling=replace(TINY.sampling, top_k=5)), byte_tokenizer()).eval()
    folders = [write_checkpoint(tmp_path / "run", step, model) for step, model in ((1, old), (2, new))]
    for calls in range(100):
        out = tmp_path / f"out{calls}"
        out.mkdir()
        weights.publish(folders[0], out)
        left = [calls]

        def dying(call):
            def wrapped(*args, **options):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return call(*args, **options)
            return wrapped

        with monkeypatch.context() as patch:
            for name in ("replace", "remove", "link"):
                patch.setattr(os, name, dying(getattr(os, name)))
            with suppress(Killed):
                weights.publish(folders[1], out)
        if (out / "config.json").exists():
            loaded = weights.load(out)
            assert any(same(model, loaded) and loaded.config == model.config for model in (old, new))
        else:
            assert not same_run
        weights.publish(folders[1], out)
        assert same(new, weights.load(out)) and weights.load(out).config == new.config
        if left[0] > 0:
            break
    assert 2 < calls < 50


# ---------------------------------------------------------------------------------------------------------------------
# Codes

@pytest.mark.parametrize("change, said", [
    ({"tokens": torch.full((2, 36), 64, dtype=torch.int32)}, "codes of row 0 lie outside the vocabulary of 64"),
    ({"tokens": torch.full((2, 36), -1, dtype=torch.int32)}, "codes of row 0 lie outside"),
    ({"tokens": torch.zeros(2, 35, dtype=torch.int32)}, "holds I32 tokens of shape .2, 35."),
    ({"tokens": torch.zeros(3, 36, dtype=torch.int32)}, "holds I32 tokens of shape .3, 36."),
    ({"tokens": torch.zeros(72, dtype=torch.int32)}, "tokens of shape .72."),
    ({"tokens": torch.zeros(2, 36)}, "holds F32"), ({"keys": None}, "no codes"), ({"tokens": None}, "no codes"),
    ({"keys": torch.zeros(2)}, "torch.float32"), ({"keys": torch.tensor(3)}, "for keys of shape ..,"),
    ({"keys": torch.tensor([7, 3])}, "keys are not in order"),
    ({"size": "x"}, "no codes"), ({"size": "48"}, "made for pictures of 48"), ({"vqgan": "x"}, "another VQGAN")])
def test_wrong_codes_are_one_sentence(tmp_path, change, said):
    vqgan = random_model().vqgan
    content = {"keys": torch.tensor([3, 7]), "tokens": torch.arange(72, dtype=torch.int32).view(2, 36) % 64} | change
    metadata = {"image_size": content.pop("size", "24"), "vqgan": content.pop("vqgan", weights.fingerprint(vqgan))}
    tensors = {name: tensor for name, tensor in content.items() if tensor is not None}
    weights.write_tensors(tensors, tmp_path / "codes.safetensors", metadata)
    with pytest.raises(InputError, match=f"codes.safetensors: .*{said}"):
        weights.Codes(tmp_path, vqgan, 24)[3]


# ---------------------------------------------------------------------------------------------------------------------
# Download

@pytest.mark.parametrize("name, said", [
    ("out/typo", "no such folder"), ("./typo", "no such folder"), ("../typo", "no such folder"), ("~/typo", "no such"),
    ("/nowhere/typo", "no such folder"), ("tests/typo", "no such folder"), ("assets/tinny", "no such folder"),
    ("mentro", "no such folder"), ("a b/c", "no such folder"), ("", "no such folder"), ("README.md", "is no folder"),
    ("a--b/c", "is no name of a hub repository"), ("a/b..c", "is no name of a hub repository"),
    ("a/" + "x" * 120, "is no name of a hub repository"), ("someone/b.git", "is no name of a hub repository")])
def test_a_slip_in_a_path_is_answered_at_once(monkeypatch, name, said):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *args: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=said):
        weights.load(name)


@pytest.mark.parametrize("status, code, said", [
    (404, "RepoNotFound", "no such repository, or a private one"), (404, "EntryNotFound", "has no such file"),
    (404, None, "has no such file"), (401, None, "no such repository, or a private one"),
    (403, "GatedRepo", "accept the terms"), (403, None, "accept the terms"),
    (500, None, "answers with an error .HTTP 500")])
def test_what_the_hub_says_is_told_apart_from_a_broken_connection(monkeypatch, tmp_path, status, code, said):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a/b/resolve/main/config.json"
        monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda *args: url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with pytest.raises(InputError, match=f"a/b/config.json: .*{said}"):
            weights.download("a/b", "config.json")
        server.shutdown()
    assert len(asked) == 1                     # nothing is tried again


def test_a_broken_connection_is_said_to_be_one(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a/b/resolve/main/config.json"
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda *args: url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(InputError, match="a/b/config.json: the download failed .*check the connection"):
        weights.download("a/b", "config.json")


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for the files of one folder; `damage` flips a byte of what it sends."""
    folder, damage = None, False

    def answer(self, body):
        name = self.path.split("/resolve/")[-1].split("/", 1)[-1]
        path = self.folder / name
        if "/resolve/" not in self.path or not path.exists():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        for key, value in {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "0" * 40,
                           "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:-1] + b"\xff" if self.damage else content)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("files, damage, message", [
    ("repo", False, ""), ("repo", True, "the download was damaged"), ("nothing", False, "has no such file")])
def test_a_hub_repository_is_downloaded_checked_and_loaded_or_the_failure_named(tmp_path, files, damage, message):
    weights.save(random_model(), tmp_path / "repo")
    handler = type("Handler", (Hub,), {"folder": tmp_path / files, "damage": damage})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                       "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
        result = subprocess.run([sys.executable, "sample.py", "--weights", "someone/mentor", "--prompt", "a cat",
                                 "--out", str(tmp_path / "cat.png")], cwd=ROOT, env=environment, capture_output=True,
                                text=True)
        server.shutdown()
    assert result.returncode == (2 if message else 0), result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert (tmp_path / "cat.png").exists() == (not message)


def test_reading_maps_the_file_instead_of_copying_it(tmp_path):
    save_file({"a": torch.arange(4.)}, tmp_path / "a.safetensors")
    tensor = weights.read_tensors(tmp_path / "a.safetensors")["a"]
    tensor[0] = 9                                              # private to this process
    assert load_file(tmp_path / "a.safetensors")["a"][0] == 0


@pytest.mark.parametrize("device, size, images, wanted, compiled", [
    ("cpu", "XL", 1, None, True), ("cpu", "toy", 100, None, False), ("cuda", "XL", 31, None, False),
    ("cuda", "XL", 32, None, True), ("cpu", "XL", 1, False, False), ("cpu", "toy", 1, True, True)])
def test_a_decoder_is_compiled_where_that_pays_or_is_asked_for(monkeypatch, device, size, images, wanted, compiled):
    done = []
    monkeypatch.setattr(weights.fast, "compile_blocks", done.append)
    mentor = SimpleNamespace(config=SIZES[size], device=torch.device(device), decoder="the decoder")
    weights.compile_decoder(mentor, images, wanted)
    assert done == ["the decoder"] * compiled
