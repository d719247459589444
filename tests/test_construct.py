"""construct.py against a server of its own that sees the truth, and tells it well, badly, late or not at all."""
import base64
import http.server
import importlib.util
import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import finish, material, run
from PIL import Image

import cli
import construct
import data
import prepare
import scorers
from cli import InputError
from world.rows import World

grabcut = pytest.mark.skipif(importlib.util.find_spec("cv2") is None,
                             reason="needs OpenCV: pip install opencv-python-headless")
STEPS = {"Describe": "caption", "This is a description": "objects", "Where in": "box", "Both pictures": "pair",
         "Write": "prompts", "Is ": "filter"}
SIDE = 256                   # of the pictures


class Server:
    """A vision-language model that looks pictures up among those it knows, and a text-to-image model.

    truth: [(thumbnail, {"objects": {label: (box, points)}, "caption": ...})], places in shares of the sides.
    units: in which it gives coordinates. bend: {step: function of (good answer, how often it was told that its answer
    cannot be used, what is asked) that gives the answer: text, a status, or all of the JSON}. first: a status, or
    "slow", of the first try of each question. seen: [(step, number of earlier answers, text, body)].
    """

    def __init__(self):
        self.truth, self.units, self.bend, self.first, self.seen, self.tried = [], "pixels", {}, None, [], set()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                status, content = self.reply(handler.path, body)
                try:
                    handler.send_response(status)
                    handler.end_headers()
                    handler.wfile.write(json.dumps(content).encode())
                except OSError:
                    pass                       # nobody waited

            def log_message(handler, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def know(self, image, caption, objects):
        self.truth.append((thumbnail(image), {"caption": caption, "objects": objects}))

    def look(self, url):
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        if image.size == (560, 420):           # the red rectangle
            return image.size, {"objects": {"red rectangle": ([0.65, 0.6, 0.9, 0.9], [[0.7, 0.7]])}}
        distances = [np.square(thumbnail(image) - known).mean() for known, _ in self.truth]
        return image.size, self.truth[int(np.argmin(distances))][1]

    def reply(self, path, body):
        key = json.dumps(body)
        if self.first and key not in self.tried:
            self.tried.add(key)
            if self.first != "slow":
                return self.first, {"error": "try again"}
            time.sleep(1.5)
        if path.endswith("images/generations"):
            self.seen.append(("paint", 0, body["prompt"], body))
            color = int.from_bytes(body["prompt"].encode()[-3:], "big") & 0xFFFFFF
            buffer = io.BytesIO()
            Image.new("RGB", (64, 64), f"#{color:06x}").save(buffer, "PNG")
            answer = {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}
            return self.bent("paint", answer, 0, body["prompt"])
        question, tries = body["messages"][0]["content"], len(body["messages"]) // 2
        text, pictures = question[0]["text"], [self.look(part["image_url"]["url"]) for part in question[1:]]
        step = next(step for beginning, step in STEPS.items() if text.startswith(beginning))
        self.seen.append((step, tries, text, body))
        return self.bent(step, json.dumps(getattr(self, step)(text, *pictures)), tries, text)

    def bent(self, step, answer, tries, asked):
        answer = self.bend.get(step, lambda answer, *_: answer)(answer, tries, asked)
        if isinstance(answer, int):
            return answer, {"error": {"message": "no", "code": "content_policy_violation" if answer == 400 else "x"}}
        if isinstance(answer, str):
            answer = {"choices": [{"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]}
        return 200, answer

    def caption(self, text, picture):
        return {"caption": picture[1]["caption"]}

    def objects(self, text, picture):
        return {"objects": list(picture[1]["objects"])}

    def box(self, text, picture):
        size, known = picture
        label = text.split("this: ")[1].split("? ")[0]
        box, points = known["objects"][label]
        whole = np.array([1000, 1000] if self.units == "thousandths" else size)
        return {"box": (np.array(box) * np.tile(whole, 2)).round(1).tolist(),
                "points": (np.array(points) * whole).round(1).tolist()}

    def pair(self, text, *pictures):
        return {"subject": list(pictures[0][1]["objects"])[0], "prompts": [known["caption"] for _, known in pictures]}

    def prompts(self, text, *none):
        count, start = (int(text.split()[i]) for i in (1, 8))
        return {"prompts": [f"a picture of thing number {start + i}" for i in range(count)]}

    def filter(self, text, *picture):
        return {"answer": "no"}

    def asked(self, step):
        return [text for seen, _, text, _ in self.seen if seen == step]


@pytest.fixture
def fast(monkeypatch):
    """Masks as good as such a small picture lets them be: enough where they are not looked at."""
    monkeypatch.setattr(construct.GrabCut, "SIDE", 64)


def thumbnail(image):
    return np.asarray(image.convert("RGB").resize((16, 16), Image.BOX), dtype=float)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(scorers.Endpoint.__init__, "__defaults__", (None, 5, 0.01, 60))   # waits less between tries
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def place_of(mask):
    """A true mask -> box and key points in shares of the sides, as the server tells them."""
    size = np.array(mask.shape[::-1])
    points = construct.points_inside(mask, np.random.default_rng(0))
    return (np.array(data.box_of(mask)) / np.tile(size, 2)).tolist(), (points / size).tolist()


def emoji(folder, server, n=2, seed=0):
    """n pairs of scenes of an emoji each, enlarged, in a folder; the server knows them. -> {file name: true mask}"""
    folder.mkdir(parents=True, exist_ok=True)
    masks = {}
    for k in range(n):
        picture = World().picture(np.random.default_rng((seed, k)), "subject", extras=False)
        label = picture.description.labels[0]
        for i, one in enumerate((picture, picture.others[0])):
            name = f"{''.join(c if c.isalpha() else '_' for c in label)}-{i}.png"
            image = one.image.resize((SIDE, SIDE), Image.BICUBIC)
            image.save(folder / name)
            masks[name] = np.asarray(Image.fromarray(one.masks[0]).resize((SIDE, SIDE)))
            server.know(image, one.caption, {label: place_of(masks[name])})
    return masks


def flags(server, folder, out, *more):
    return [str(folder), "--vlm-url", server.url, "--vlm-model", "eyes", "--segmenter", "grabcut", "--parallel", "3",
            "--out", str(out), *map(str, more)]


def make(server, folder, out, *more):
    """Runs the pipeline. -> its rows"""
    construct.main(flags(server, folder, out, *more))
    return [json.loads(line) for line in (Path(out) / "data.jsonl").read_text().splitlines()]


def tasks(rows):
    return [data.parse_row(json.dumps(row).encode()).task for row in rows]


@grabcut
@pytest.mark.parametrize("units", construct.UNITS)
def test_pictures_become_rows_and_masks_that_training_reads_whatever_the_units(tmp_path, server, units, capsys):
    masks = emoji(tmp_path / "in", server)
    server.units = units
    rows = make(server, tmp_path / "in", tmp_path / "out")
    assert f"gives coordinates in {units}" in capsys.readouterr().out
    assert sorted(tasks(rows)) == sorted(["t2i", "reconstruct", "segment", "recover"] * 4 + ["subject"] * 2)
    overlaps = []
    for row in rows:
        if row.get("do_mask"):
            mask = np.asarray(Image.open(tmp_path / "out" / row["image_path"])) > 0
            true = masks[os.path.basename(row["source_image"])]
            overlaps.append((mask & true).sum() / (mask | true).sum())
    assert len(overlaps) == 4 and min(overlaps) > 0.75, overlaps
    pair = [row for row in rows if "swapped_text" in row][0]
    captions = {name: known["caption"] for name, (_, known) in zip(masks, server.truth)}
    assert pair["input_text"] == captions[os.path.basename(pair["source_image"])]
    assert pair["swapped_text"] == captions[os.path.basename(pair["image_path"])]
    prepare.main(["look", str(tmp_path / "out" / "data.jsonl"), "--workers", "0", "--out", str(tmp_path / "look.png")])
    told = capsys.readouterr().out
    assert "0 problem(s)" in told and "suspicious" not in told and "subject            4 of 4" in told
    assert Image.open(tmp_path / "out" / "look.png").size > (300, 200)


@grabcut
def test_answers_in_fences_lists_and_thoughts_are_read(tmp_path, fast, server):
    emoji(tmp_path / "in", server, n=1)
    plain = make(server, tmp_path / "in", tmp_path / "plain")
    server.bend = {"caption": lambda answer, *_: f"Sure!\n```json\n{answer}\n```\nAnything else?",
                   "objects": lambda answer, *_: f'<think>perhaps {{"objects": ["sky"]}}</think>{answer}',
                   "box": lambda answer, *_: "[" + answer.replace('"box"', '"bbox_2d"') + "]"}
    assert make(server, tmp_path / "in", tmp_path / "wrapped") == plain


@grabcut
@pytest.mark.parametrize("step, bad, told", [
    ("caption", "A fine picture.", "it holds no object of JSON"),
    ("caption", '{"caption": 7}', '"caption" must hold text'),
    ("caption", json.dumps({"caption": "very " * 200}), "200 words, at most 120"),
    ("caption", '{"caption": " <image>"}', '"caption" must hold text'),
    ("objects", '{"objects": "dog"}', '"objects" must be a list of'),
    ("box", '{"box": [10, 10, 20], "points": [[12, 12]]}', "must be 4 numbers"),
    ("box", '{"box": [10, 10, 20, 900], "points": [[12, 12]]}', "reaches out of the picture"),
    ("box", '{"box": [20, 10, 10, 30], "points": [[12, 12]]}', "the box is empty"),
    ("box", '{"box": [10, 10, 90, 90], "points": [[12, 200]]}', "a point lies outside of the box"),
    ("box", '{"box": [10, 10, 90, 90], "points": []}', "at least one"),
    ("box", '{"box": [10, 10, 90, NaN], "points": [[12, 12]]}', "it holds no object of JSON"),
    ("pair", '{"subject": "dog", "prompts": ["one"]}', "must be a list of 2 texts")])
def test_an_unusable_answer_is_asked_again_with_what_was_wrong_and_given_up_in_the_end(tmp_path, fast, server, capsys,
                                                                                      step, bad, told):
    emoji(tmp_path / "in", server, n=1)
    good = make(server, tmp_path / "in", tmp_path / "good")
    server.bend = {step: lambda answer, tries, asked: bad if tries == 0 and "red rectangle" not in asked else answer}
    server.seen.clear()
    assert make(server, tmp_path / "in", tmp_path / "late") == good
    second = next(body for seen, tries, _, body in server.seen if seen == step and tries == 1)
    assert second["messages"][1]["content"] == bad and told in second["messages"][2]["content"][0]["text"]
    server.bend = {step: lambda answer, tries, asked: answer if "red rectangle" in asked else bad}
    server.seen.clear(), capsys.readouterr()
    if step == "caption":
        with pytest.raises(InputError, match=r"no row came out; +2  no usable answer in 3 tries .caption.; first"):
            make(server, tmp_path / "in", tmp_path / "never")
    else:
        left = make(server, tmp_path / "in", tmp_path / "never")
        assert len(left) < len(good) and f"no usable answer in 3 tries ({step}); first" in capsys.readouterr().out
    questions = [text for text in server.asked(step) if "red rectangle" not in text]
    assert questions and all(questions.count(text) % 3 == 0 for text in questions)


@grabcut
def test_what_the_models_refuse_or_the_filter_flags_is_left_out_and_counted(tmp_path, fast, server, capsys):
    masks = emoji(tmp_path / "in", server, n=4)
    server.know(Image.new("RGB", (64, 64), "#722031"), "a red wall", {})                  # what is painted here
    captions = [known["caption"] for _, known in server.truth]
    refusals = {0: "I'm sorry, but I can't describe this picture.", 2: 400, 4: {"choices": [
        {"message": {"content": None, "refusal": "no"}}]}}
    server.bend = {
        "caption": lambda answer, *_: refusals.get(captions.index(json.loads(answer)["caption"]), answer),
        "filter": lambda answer, tries, asked: '{"answer": "yes"}' if "number 3" in asked else answer,
        "paint": lambda answer, tries, asked: 400 if "number 2" in asked else answer}
    rows = make(server, tmp_path / "in", tmp_path / "out", "--reject", "Is it unsafe?", "--synthetic", 4, "--t2i-url",
                server.url, "--t2i-model", "brush")
    told = capsys.readouterr().out
    assert "3  refused by the language model (caption); first" in told and "1  flagged by --reject; first a pic" in told
    assert "1  refused by the text-to-image model; first a picture of thing number 2" in told
    shown = {os.path.basename(row["source_image"]) for row in rows}
    names = list(masks)
    assert not shown & {names[0], names[2], names[4]} and {names[1], names[3], *names[5:]} < shown
    synthetic = [row for row in rows if row["source_image"].startswith("synthetic/")]
    assert tasks(synthetic) == ["t2i", "reconstruct"] * 2
    assert len(server.asked("filter")) == len(masks) + 4 + 2 and len(server.asked("pair")) == 1


@grabcut
@pytest.mark.parametrize("first", [429, 500, "slow"])
def test_busy_failing_and_slow_servers_are_asked_again(tmp_path, fast, server, first):
    emoji(tmp_path / "in", server, n=1)
    plain = make(server, tmp_path / "in", tmp_path / "plain")
    server.first = first
    assert make(server, tmp_path / "in", tmp_path / "late", "--timeout", 0.4, "--parallel", 8) == plain


@grabcut
def test_a_server_that_fails_or_is_not_there_stops_the_run_and_keeps_the_answers(tmp_path, fast, server):
    emoji(tmp_path / "in", server, n=1)
    server.bend = {"box": lambda answer, tries, asked: answer if "red rectangle" in asked else 503}
    with pytest.raises(InputError, match="gave no answer in 5 tries .HTTP 503.; what is answered is kept"):
        make(server, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "data.jsonl").exists()
    server.bend = {}
    captions = len(server.asked("caption"))
    assert len(make(server, tmp_path / "in", tmp_path / "out")) == 9
    assert len(server.asked("caption")) == captions == 2
    server.bend = {"coordinates": 401, "box": lambda *_: 401}
    with pytest.raises(InputError, match="refused the question .HTTP 401.; check --vlm-url, --vlm-model and the key"):
        make(server, tmp_path / "in", tmp_path / "other")
    server.http.shutdown(), server.http.server_close()
    with pytest.raises(InputError, match="no answer of a vision-language model .*refused.; check --vlm-url"):
        make(server, tmp_path / "in", tmp_path / "nobody")


@grabcut
@pytest.mark.full
def test_a_killed_run_goes_on_asks_nothing_twice_and_ends_like_an_uninterrupted_one(tmp_path, server):
    emoji(tmp_path / "in", server, n=3)
    whole = make(server, tmp_path / "in", tmp_path / "whole")
    sheet = (tmp_path / "whole" / "look.png").read_bytes()
    questions = len(server.seen)
    server.seen.clear()
    arrived, killed = threading.Event(), threading.Event()

    def late(answer, *_):
        if len(server.seen) >= 12:
            arrived.set()
            killed.wait(60)
        return answer

    server.bend = {"box": late}
    process = run(flags(server, tmp_path / "in", tmp_path / "out"), module="construct")
    assert arrived.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed.set()
    kept = (tmp_path / "out" / "answers.log").read_bytes()
    (tmp_path / "out" / "answers.log").write_bytes(kept[:-9])            # the last line is torn
    time.sleep(0.5)
    before = len(server.seen)
    assert make(server, tmp_path / "in", tmp_path / "out") == whole
    assert (tmp_path / "out" / "look.png").read_bytes() == sheet
    assert before < questions and len(server.seen) <= questions + 3 + 1  # three under way at once, and the torn one
    seen = len(server.seen)
    os.remove(next((tmp_path / "out" / "masks").iterdir()))
    assert make(server, tmp_path / "in", tmp_path / "out") == whole and len(server.seen) == seen
    assert {path.name for path in (tmp_path / "out" / "masks").iterdir()} == {
        path.name for path in (tmp_path / "whole" / "masks").iterdir()}


@grabcut
@pytest.mark.full
def test_ctrl_c_keeps_the_answers_that_are_under_way(tmp_path, server):
    emoji(tmp_path / "in", server, n=2)
    both, stopped = threading.Barrier(3), threading.Event()
    server.bend = {"caption": lambda answer, *_: both.wait(60) < 0 or stopped.wait(60) and answer}
    process = run(flags(server, tmp_path / "in", tmp_path / "out", "--parallel", 2), module="construct")
    both.wait(60)
    process.send_signal(signal.SIGINT)
    time.sleep(2)                              # until it has heard
    stopped.set()
    assert "Traceback" not in finish(process, 130)
    answers = [json.loads(line)["about"] for line in (tmp_path / "out" / "answers.log").read_text().splitlines()]
    assert len(answers) == 3 and answers[0].startswith("coordinates: ")
    assert all(about.startswith("caption: ") for about in answers[1:])


@grabcut
def test_a_photograph_that_exif_turns_gets_its_mask_the_way_it_is_seen(tmp_path, server):
    picture = World().picture(np.random.default_rng(5), "segment")
    seen = picture.image.resize((240, 240), Image.BICUBIC).crop((0, 0, 240, 200))
    mask = np.asarray(Image.fromarray(picture.masks[0]).resize((240, 240)).crop((0, 0, 240, 200)))
    server.know(seen, "upside down", {"thing": place_of(mask)})
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[cli.ORIENTATION] = 3
    seen.transpose(Image.ROTATE_180).save(tmp_path / "in" / "a.png", exif=exif)
    row = next(row for row in make(server, tmp_path / "in", tmp_path / "out") if row.get("do_mask"))
    image, doubts = data.open_image(tmp_path / "in" / "a.png"), []
    read = cli.open_mask(tmp_path / "out" / row["image_path"], image, tmp_path / "in" / "a.png", doubts)
    assert (read & mask).sum() / (read | mask).sum() > 0.7 and not doubts


@pytest.mark.parametrize("drawn, reason", [
    ((0, 0, 0, 0), "the mask is empty"), ((20, 20, 60, 60), "the mask fills its box"),
    ((50, 20, 90, 60), "the mask lies outside of its box"), ((25, 25, 50, 50), None)])
def test_a_mask_must_be_something_within_its_box(drawn, reason):
    mask = np.zeros((100, 200), bool)
    mask[drawn[1]:drawn[3], 40 + drawn[0]:40 + drawn[2]] = True
    box = [60.2, 20, 99.8, 60]
    if reason:
        with pytest.raises(construct.Rejected, match=reason):
            construct.checked_mask(mask, box)
    else:
        assert (construct.checked_mask(mask, box) == mask).all()
    aside = np.roll(mask, 100, axis=1)
    if reason is None:
        with pytest.raises(construct.Rejected, match="outside of the central square"):
            construct.checked_mask(aside, [160, 20, 200, 60])


@grabcut
def test_masks_and_pairs_that_are_none_are_counted_and_their_pictures_stay(tmp_path, fast, server, capsys):
    emoji(tmp_path / "in", server, n=2)
    labels = [list(known["objects"])[0] for _, known in server.truth]
    whole = json.dumps({"box": [0, 0, 280, 280], "points": [[140, 140]]})
    server.bend = {"box": lambda answer, tries, asked: '{"box": null}' if f": {labels[0]}?" in asked
                   else answer if "red rectangle" in asked else whole, "pair": lambda *_: '{"subject": null}'}
    rows = make(server, tmp_path / "in", tmp_path / "out")
    told = capsys.readouterr().out
    assert tasks(rows) == ["t2i", "reconstruct"] * 4 and "4 captions, 4 lists of objects, 2 boxes" in told
    for reason in ("2  an object is not found again", "2  there is nothing around the box", "2  no subject in common"):
        assert reason in told, told


def test_pictures_are_paired_within_their_folder_only_and_masks_are_no_pictures(tmp_path):
    for name in ("dog/00.jpg", "dog/01.jpg", "dog3/00.jpg", "dog3/01.jpg", "cat-0.png", "cat-1.png", "IMG_1.jpg",
                 "IMG_2.jpg", "cat-1.mask.png", ".hidden.png", "out/masks/cat-0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pictures = construct.find_pictures(str(tmp_path), str(tmp_path / "out"))
    assert [picture.name for picture in pictures] == ["IMG_1.jpg", "IMG_2.jpg", "cat-0.png", "cat-1.png", "dog/00.jpg",
                                                      "dog/01.jpg", "dog3/00.jpg", "dog3/01.jpg"]
    pairs = [(row["source_image"], row["image_path"], row["objects"]) for row in construct.pairs_of(pictures)]
    assert pairs == [(str(tmp_path / a), str(tmp_path / b), name) for a, b, name in (
        ("cat-0.png", "cat-1.png", "cat"), ("dog/00.jpg", "dog/01.jpg", "dog"), ("dog3/00.jpg", "dog3/01.jpg", "dog"))]


@pytest.mark.parametrize("size, sent", [((4000, 3000), (1008, 756)), ((64, 64), (84, 84)), ((1008, 1008), (1008, 1008)),
                                        ((3000, 160), (1008, 56))])
def test_a_picture_is_sent_with_sides_that_the_model_keeps(size, sent):
    url, told = construct.sent(Image.new("RGB", size))
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert image.format == "JPEG" and image.size == tuple(told) == sent


@grabcut
def test_iou_is_that_of_masks_from_true_boxes_and_points(tmp_path, server, capsys):
    masks = emoji(tmp_path / "in", server, n=2)
    for name, mask in masks.items():
        Image.fromarray(mask).save(tmp_path / "in" / name.replace(".png", ".mask.png"))
    prepare.main(["folder", str(tmp_path / "in")])
    capsys.readouterr()
    construct.main(["iou", str(tmp_path / "in" / "data.jsonl"), "--segmenter", "grabcut"])
    told = capsys.readouterr().out
    assert told.startswith("4 masks by grabcut") and float(told.split("kept: mean ")[1][:5]) > 0.8
    with pytest.raises(InputError, match="has no row of an object"):
        (tmp_path / "none.jsonl").write_text('{"source_image": "a.png"}\n')
        construct.main(["iou", str(tmp_path / "none.jsonl"), "--segmenter", "grabcut"])


@grabcut
def test_bad_flags_folders_and_files_are_one_clear_sentence(tmp_path, fast, server):
    emoji(tmp_path / "in", server, n=1)
    for more, message in ((["--synthetic", 3], "--synthetic, --t2i-url and --t2i-model go together"),
                          (["--vlm-url", "host"], "--vlm-url 'host': not an address"),
                          (["--timeout", 0], "must be a number above 0"),
                          (["--segmenter", "sam", "--sam-model", tmp_path / "none"], "--sam-model|needs transformers")):
        with pytest.raises(InputError, match=message):
            make(server, tmp_path / "in", tmp_path / "out", *more)
    for folder, message in (("none", "no such folder"), ("empty", "holds no pictures")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=message):
            make(server, tmp_path / folder, tmp_path / "out")
    (tmp_path / "out").mkdir(exist_ok=True)
    for line in ("{}", "[]", '{"key": "a", "answer": 5}', "what is this"):
        (tmp_path / "out" / "answers.log").write_text(f"{line}\n")
        with pytest.raises(InputError, match="answers.log:1: is no line that construct.py wrote"):
            make(server, tmp_path / "in", tmp_path / "out")
    assert not server.seen
    server.bend = {"box": lambda *_: '{"box": [1, 2, 3, 4], "points": [[2, 3]]}'}
    with pytest.raises(InputError, match="auto: the model does not find a red rectangle"):
        make(server, tmp_path / "in", tmp_path / "blind")


@grabcut
def test_a_damaged_picture_is_named_and_the_others_go_on(tmp_path, fast, server, capsys):
    emoji(tmp_path / "in", server, n=1)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    assert len(make(server, tmp_path / "in", tmp_path / "out")) == 9
    assert "1  unreadable; first 'broken.png', " in capsys.readouterr().out


def small_sam(kind, folder):
    """Writes a SAM of random weights as `transformers` does."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    decoder = dict(hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16)
    prompts = dict(hidden_size=16, image_size=64, patch_size=16)
    if kind == "Sam":
        vision = dict(hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=64,
                      patch_size=16, global_attn_indexes=[0], num_pos_feats=8, mlp_dim=32)
        processor = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    else:
        pytest.importorskip("torchvision", reason="transformers' SAM 2 needs torchvision")
        backbone = dict(model_type="sam2_hiera_det_model", hidden_size=8, num_attention_heads=1, image_size=[64, 64],
                        window_positional_embedding_background_size=[4, 4], blocks_per_stage=[1, 1, 2, 1],
                        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
                        window_size_per_stage=[8, 4, 4, 2], global_attention_blocks=[3])
        vision = dict(backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=16,
                      backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]])
        processor = transformers.Sam2ImageProcessor(size={"height": 64, "width": 64})
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, prompt_encoder_config=prompts,
                                                    mask_decoder_config=decoder)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    getattr(transformers, f"{kind}Processor")(processor).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["Sam", "Sam2"])
def test_sam_and_sam_2_make_a_mask_of_the_pictures_size_from_box_and_points(tmp_path, kind):
    small_sam(kind, tmp_path)
    sam = construct.Sam(construct.parse(["iou", "x", "--sam-model", str(tmp_path)]))
    image = World().picture(np.random.default_rng(0), "segment").image.resize((90, 60))
    mask, other = (sam(image, box, points) for box, points in (
        ([10.0, 10.0, 50.0, 40.0], [[20.0, 20.0], [30.0, 30.0]]), ([60.0, 30.0, 85.0, 55.0], [[70.0, 40.0]])))
    assert mask.shape == other.shape == (60, 90) and mask.dtype == bool and (mask != other).any()


@grabcut
@pytest.mark.full
def test_the_whole_way_of_photographs(tmp_path, server, capsys):
    folder = material("MENTOR_PHOTOS", "photos")
    for path in sorted(folder.glob("*/*.jpg")):
        server.know(data.open_image(path), f"a {path.parent.name}", {path.parent.name.replace("_", " "): (
            [0.1, 0.1, 0.9, 0.9], [[0.45, 0.5], [0.5, 0.55]])})
    rows = make(server, folder, tmp_path / "out")
    assert tasks(rows).count("t2i") == len(server.truth) and tasks(rows).count("segment") > len(server.truth) / 2
    prepare.main(["look", str(tmp_path / "out" / "data.jsonl"), "--workers", "0", "--out", str(tmp_path / "look.png")])
    assert "0 problem(s)" in capsys.readouterr().out
