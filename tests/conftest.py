"""Shared by all tests: golden outputs, the stand-in weights they were computed with, and where photographs lie.

MENTOR_GOLDEN=folder runs the same tests against another folder of goldens (other salt);
MENTOR_PHOTOS, MENTOR_TOKENIZERS and MENTOR_MANIFESTS name material that is too large for the repository.
"""
import http.server
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

import prepare
import weights
from encoder import T5Config, VisionConfig
from model import SIZES, DecoderConfig, Mentor, MentorConfig, Sampling
from scorers import CLIP_TEXT_NAMES, DINO_NAMES, Clip, Dino, TextConfig
from vqgan import VQConfig

HERE = pathlib.Path(__file__).parent
GOLDEN = pathlib.Path(os.environ.get("MENTOR_GOLDEN", HERE / "golden"))
ROOT = HERE.parent
SHARED = ROOT.parent / "shared"

_spec = importlib.util.spec_from_file_location("fill", HERE / "golden" / "fill.py")
filler = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(filler)

TINY = MentorConfig(
    vision=VisionConfig(width=32, layers=3, heads=2, mlp=64, image_size=56, patch_size=14),
    t5=T5Config(width=48, layers=2, heads=3, head_dim=16, mlp=64, vocab_size=264),
    decoder=DecoderConfig(layers=2, heads=4, width=64, multiple_of=32, codes=64),
    vqgan=VQConfig(channels=16, multipliers=(1, 1, 2), res_blocks=1, latent=16, codes=64),
    prefix_tokens=64, image_size=24, image_id=259, sampling=Sampling(cfg_scale=2.0, top_k=64))


NO_DROPOUT = replace(TINY, decoder=replace(TINY.decoder, dropout=0.0), t5=replace(TINY.t5, dropout=0.0))


def material(variable, default):
    """A folder of material outside the repository; skips the test where there is none."""
    folder = pathlib.Path(os.environ.get(variable, SHARED / default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing; set {variable} to a folder of {default}")
    return folder


class Golden:
    """One golden file: g["name"] is a tensor, g.config and g.salt say what the numbers are."""

    def __init__(self, name):
        path = GOLDEN / f"{name}.safetensors"
        if not path.exists():
            pytest.skip(f"{path} is missing; set MENTOR_GOLDEN to a folder that holds it")
        with safe_open(path, "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
            self.config = json.loads(file.metadata()["config"])
            self.salt = int(file.metadata().get("salt", 0))

    def __getitem__(self, key):
        return self.tensors[key]

    def noise(self, name, shape):
        return filler.noise(name, shape, self.salt)

    def fill(self, module, names):
        """Stand-in weights into the tensors of a module named by {public name: our name}."""
        state = module.state_dict()
        values = filler.fill({public: state[ours] for public, ours in names.items()}, self.salt)
        module.load_state_dict({names[public]: value for public, value in values.items()}, strict=False)
        return module.eval()

    def fill_by_table(self, module, table):
        return self.fill(module, {weights.public_name(name, table): name for name in module.state_dict()})


def vision_config(c):
    return VisionConfig(c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["intermediate_size"],
                        c["image_size"], c["patch_size"])


def text_config(c):
    return TextConfig(c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["intermediate_size"],
                      c["vocab_size"], c["max_position_embeddings"], c["eos_token_id"])


def t5_config(c):
    return T5Config(c["d_model"], c["num_layers"], c["num_heads"], c["d_kv"], c["d_ff"], c["vocab_size"])


def decoder_config(c):
    if isinstance(c, str):
        return SIZES[c.removeprefix("GPT-")].decoder
    return DecoderConfig(c["n_layer"], c["n_head"], c["dim"], c["multiple_of"], c["vocab_size"])


def close(actual, expected, atol):
    """Within atol everywhere; prints the largest error, which `pytest -rP` shows."""
    error = (actual - expected).abs().max().item()
    print(f"largest error {error:.1e}, allowed {atol:.0e}")
    assert actual.shape == expected.shape and error <= atol


@pytest.fixture(autouse=True)
def no_gradients(request):
    """Gradients off, but for tests of training."""
    with torch.set_grad_enabled(request.node.get_closest_marker("gradients") is not None):
        yield


@pytest.fixture(autouse=True)
def one_thread(request):
    """Small networks gain nothing from a second thread, and on a busy machine two wait for each other."""
    before = torch.get_num_threads()
    if not request.node.get_closest_marker("full"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def endpoint():
    """A local server that answers as `endpoint.script` says, in order, the last one for ever."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.seen.append((self.path, self.headers.get("Authorization"), body))
            answer = server.script.pop(0) if len(server.script) > 1 else server.script[0]
            if answer == "slow":
                time.sleep(1.5)
                answer = "Score: 1"
            status = answer if isinstance(answer, int) else 200
            content = {"choices": [{"message": {"content": answer}}]} if isinstance(answer, str) else answer
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"<html>" if answer == 200 else json.dumps(content).encode())
            except OSError:
                pass                                           # the client did not wait

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.script = [], []
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def public(module, table):
    """Stand-in weights under their public names."""
    return filler.fill({weights.public_name(name, table): tensor for name, tensor in module.state_dict().items()}, 0)


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """Folders of a small CLIP, whose vocabulary is the single bytes, and a small DINO. -> flags"""
    folder = tmp_path_factory.mktemp("networks")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vision = vision_config(dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96,
                                image_size=56, patch_size=14))
    text = text_config(dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96,
                            vocab_size=len(words), max_position_embeddings=40, eos_token_id=len(words) - 1))
    for name in ("clip", "dino"):
        (folder / name).mkdir()
    (folder / "clip" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "clip" / "merges.txt").write_text("#version: 0.2\n")
    clip = public(Clip(vision, text, 48), weights.CLIP_NAMES + CLIP_TEXT_NAMES)
    clip["vision_model.embeddings.position_ids"] = torch.arange(17)               # older files hold these too
    torch.save(clip, folder / "clip" / "pytorch_model.bin")
    save_file(public(Dino(32, 64, 2, 1), DINO_NAMES), folder / "dino" / "model.safetensors")
    return ["--clip", str(folder / "clip"), "--dino", str(folder / "dino")]


# ---------------------------------------------------------------------------------------------------------------------
# Training runs

def write_data(folder, pictures=6, side=48):
    """Images with captions and elliptic masks, as `prepare.py folder` reads them, one row of two objects, and one of
    two examples and a query."""
    folder.mkdir()
    for i in range(pictures):
        stem = f"{('cat', 'dog', 'hat')[i % 3]}-{i:02}"
        noise = np.random.default_rng(i).normal(128, 60 + 20 * i, (side, side)).clip(0, 255)
        Image.fromarray(noise.astype(np.uint8)).convert("RGB").save(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text(f"a {stem[:3]} number {i}")
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).ellipse((8, 8, side - 12, side - 8), fill=255)
        mask.save(folder / f"{stem}.mask.png")
    prepare.main(["folder", str(folder)])
    with open(folder / "data.jsonl", "a") as file:
        file.write(json.dumps({"input_text": "both", "source_image": "cat-00.png", "objects": ["cat", "hat"],
                               "image_path": ["cat-00.mask.png"] * 2}) + "\n")
        file.write(json.dumps({"in_context": True, "input_text": "", "source_image": "dog-04.png", "image_path": [
            "cat-00.png", "cat-03.png", "hat-02.png", "hat-05.png", "dog-01.png"]}) + "\n")
    return str(folder / "data.jsonl")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """-> (folder of a tiny model with all of T5, JSONL)"""
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    model = Mentor(NO_DROPOUT, weights.byte_tokenizer(), t5_decoder=True)
    with torch.no_grad():
        torch.nn.init.normal_(model.decoder.output.weight, std=0.02)
        model.vqgan.quantize.embedding.weight.normal_()
    weights.save(model, folder / "init")
    return str(folder / "init"), write_data(folder / "data")


def command(toy, out, *flags, stage="2", steps=3, batch=4):
    return ["--stage", stage, "--init", toy[0], "--data", toy[1], "--out", str(out), "--steps", str(steps),
            "--global-batch", str(batch), "--workers", "0", "--device", "cpu", *map(str, flags)]


def run(arguments, processes=1, cwd=ROOT, module="train", **options):
    """A training script in a process of its own, or under torchrun in several."""
    launcher = [sys.executable, "-m", module]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
                    "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "-m", module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*launcher, *arguments], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **options)


def finish(process, code=0):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output[-3000:]
    return output


def log(out):
    """A run's log, validations beside the losses of their step."""
    records = {}
    for line in (pathlib.Path(out) / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        records.setdefault(record["step"], {}).update(record)
    return list(records.values())


def losses(out):
    return [record["loss"] for record in log(out)]


def assert_same_weights(a, b, atol):
    a, b = (load_file(pathlib.Path(out) / "model.safetensors") for out in (a, b))
    assert a.keys() == b.keys()
    worst = max((a[name] - b[name]).abs().max().item() for name in a)
    assert worst <= atol, worst
