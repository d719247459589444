"""The page to try the model in a browser."""
import json
import os
import re
import socket
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT, finish, run
from PIL import Image

import app
import sample
import weights
from cli import InputError


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def page(tmp_path):
    """A page with the bundled model, in a process of its own whose folder is tmp_path. -> its address"""
    pytest.importorskip("gradio", reason="the page needs Gradio; pip install gradio")
    process = run(["--port", free_port()], module="app", cwd=tmp_path)
    seen = iter(process.stdout.readline, "")
    yield next(found[0] for found in map(re.compile("http://127[^ \\n]+").search, seen) if found)
    process.kill()
    process.communicate()


@pytest.mark.full
def test_a_page_draws_row_by_row_what_sample_draws_and_says_what_is_wrong(page, tmp_path):
    from gradio_client import Client, handle_file
    client = Client(page, verbose=False, download_files=str(tmp_path / "got"))

    def draw(path, prompt="a dog face under water", subjects="", top_k=512, seed=3, n=1):
        refs = [{"image": handle_file(path), "caption": None}]
        return client.submit(refs, prompt, subjects, 2, 0.9, top_k, 0.8, seed, n, api_name="/draw")

    job = draw(sample.EXAMPLE[0])
    [picture], download = job.result(timeout=100)
    assert len(job.outputs()) > 3                              # the pictures so far, then the whole one
    sample.main(["--ref", sample.EXAMPLE[0], "--prompt", "a dog face under water", "--cfg", "2", "--temperature", "0.9",
                 "--top-k", "512", "--top-p", "0.8", "--seed", "3", "--out", str(tmp_path / "same.png")])
    wanted, drawn = Image.open(tmp_path / "same.png"), Image.open(download)
    assert drawn.tobytes() == wanted.tobytes() == Image.open(picture["image"]).tobytes()
    settings = json.loads(wanted.info["mentor"])
    for key, value in json.loads(drawn.info["mentor"]).items():
        assert value == (["dog_face.png"] if key == "refs" else settings.get(key))

    (tmp_path / "bad.png").write_bytes((ROOT / "assets" / "penguin.png").read_bytes()[:300])
    for said, asked in (("^bad.png: not a picture, or a damaged one", draw(tmp_path / "bad.png")),
                        ("^the prompt needs .* tokens", draw(sample.EXAMPLE[0], prompt="a dog " * 100)),
                        ("^top-k is 5000 but must lie between 1 and", draw(sample.EXAMPLE[0], top_k=5000)),
                        ("^2 --subject were given for 1 --ref", draw(sample.EXAMPLE[0], subjects="dog, cat")),
                        ("^argument --seed: must be a whole number", draw(sample.EXAMPLE[0], seed=-1))):
        with pytest.raises(Exception, match=said):
            asked.result(timeout=100)
    assert len(draw(sample.EXAMPLE[0], n=2).result(timeout=100)[0]) == 2


def test_drawing_tells_of_finished_rows_and_ends_when_it_is_to_stop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mentor, told, stop = weights.load("tiny"), [], threading.Event()
    fields = None, "a volcano", "", 2, 0.9, 512, 0.8, 0, 2
    pictures, sheet = app.draw(mentor, {"weights": "tiny"}, fields, told.append, stop)
    assert [Image.open(path).size for path in (*pictures, sheet)] == [(256, 256), (256, 256), (516, 256)]
    greys = [(np.asarray(images[1]) == 128).all(axis=(1, 2)) for images, _ in told]           # rows of the second one
    heights = [int(grey.sum()) for grey in greys]
    assert len(told) > 3 and heights == sorted(set(heights), reverse=True)
    assert not any((height + 6) % 16 for height in heights)    # whole rows of tokens; enlarging blurs six pixels
    assert all(grey[256 - height:].all() for grey, height in zip(greys, heights))
    with pytest.raises(InputError, match="stopped"):
        app.draw(mentor, {"weights": "tiny"}, fields, lambda news: stop.set(), stop)
    assert len(os.listdir("out")) == 3                         # of the stopped one nothing


@pytest.mark.full
def test_a_taken_port_is_one_sentence():
    pytest.importorskip("gradio", reason="the page needs Gradio; pip install gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"app.py: error: --port {port}: " in finish(run(["--port", port], module="app"), code=2)


def test_bad_flags_and_a_missing_gradio_are_one_sentence(monkeypatch):
    with pytest.raises(InputError, match="argument --port: must be"):
        app.main(["--port", "99999"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match="pip install gradio"):
        app.main([])
