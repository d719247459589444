"""Weights: every layout in which they come, what may be missing and what may be damaged, and the way from the hub."""
import argparse
import hashlib
import http.server
import json
import os
import pathlib
import pickle
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from conftest import TINY, close, material
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import weights
from cli import InputError
from encoder import CLIP_NAMES
from model import Mentor, MentorConfig
from scorers import CLIP_TEXT_NAMES, Clip, TextConfig
from weights import byte_tokenizer

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
    monkeypatch.setattr(weights, "public_config", lambda files: TINY)
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
    config = weights.public_config({"decoder": ("folder/t2i_XL_stage1_256.pt", state)})
    assert (config.decoder.layers, config.prefix_tokens, config.image_size) == (36, 120, 256)
    assert config.decoder.prefix_rope == "zero"                # LlamaGen's own weights were trained so
    config = weights.public_config({"decoder": ("folder/generator_ckpt.pt", state)})
    assert (config.image_size, config.decoder.prefix_rope) == (512, "identity")


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


def test_a_folder_with_a_damaged_configuration_is_named(tmp_path):
    weights.save(random_model(), tmp_path / "f")
    for text in ("{", "[1]", '{"colour": 3}', '{"decoder": 5}'):
        (tmp_path / "f" / "config.json").write_text(text)
        with pytest.raises(InputError, match="config.json"):
            weights.load(tmp_path / "f")


# ---------------------------------------------------------------------------------------------------------------------
# Download

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
    ("repo", False, ""), ("repo", True, "the download was damaged"), ("nothing", False, "the download failed")])
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
