"""The commands on training data. Images are small painted ones."""
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import TINY, material
from PIL import Image

import cli
import data
import prepare
import weights
from cli import InputError
from data import TaskData, batches, open_image

SIZE, CLIP = 24, 28          # pixels a side of targets and references in these tests
ROOT = pathlib.Path(prepare.__file__).parent


def picture(path, seed=0):
    colours = np.random.default_rng(seed).integers(40, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((40, 32), Image.NEAREST).save(path)


def mask(path, box=(10, 5, 26, 25)):
    image = Image.new("L", (40, 32), 0)
    image.paste(1, box)
    image.save(path)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def every_task(folder):
    """Images, masks and a JSONL with a row of each task; the last row's image is missing."""
    for i in range(4):
        picture(folder / f"{i}.png", i)
    mask(folder / "mask0.png")
    mask(folder / "mask1.png", (0, 0, 30, 9))
    base = {"source_image": "0.png", "input_text": "a scene"}
    return write_rows(folder / "train.jsonl", [
        base | {"generation_only": True},
        base | {"source_image": "1.png"},
        base | {"image_path": "mask0.png", "objects": "cat", "do_mask": True},
        base | {"image_path": "mask0.png", "objects": "cat", "do_replace": True},
        base | {"image_path": "1.png", "objects": "cat", "swapped_text": "the other scene"},
        base | {"image_path": ["mask0.png", "mask1.png"], "objects": ["cat", "sky"]},
        base | {"image_path": ["2.png", "3.png"], "objects": ["cat", "sky"], "input_img_list": True},
        base | {"image_path": ["1.png", "2.png", "3.png"], "in_context": True},
        {"source_image": "gone.png"},
    ])


def load(path, fit="crop", **options):
    processor = data.Processor(weights.byte_tokenizer(), image_tokens=4, max_tokens=128, image_size=CLIP)
    processor.fit = fit
    return TaskData([path], processor, SIZE, **options)


def sample(dataset, task, row, swapped):
    return dataset.sample(task, dataset.rows[row], swapped, np.random.default_rng(0), [])


def run(*command, cwd=ROOT):
    return subprocess.run([sys.executable, prepare.__file__, *command], capture_output=True, text=True, cwd=cwd,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


# ---------------------------------------------------------------------------------------------------------------------
# encode

@pytest.fixture
def encoded(tmp_path, capsys):
    """A JSONL of every task, its codes, what the command printed, and the model whose VQGAN made them."""
    return encode(tmp_path, capsys, "crop")


def encode(tmp_path, capsys, fit):
    train, codes = every_task(tmp_path), str(tmp_path / "codes")
    mentor = weights.random_model(TINY, weights.byte_tokenizer())
    weights.save(mentor, str(tmp_path / "tiny"))
    prepare.main(["encode", train, "--weights", str(tmp_path / "tiny"), "--out", codes, "--workers", "0",
                  "--fit", fit])
    return train, codes, capsys.readouterr().out, mentor


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_encoded_targets_stand_in_for_pixels(tmp_path, capsys, fit):
    train, codes, printed, mentor = encode(tmp_path, capsys, fit)
    assert "train.jsonl:9: " in printed
    pixels, tokens = load(train, fit), load(train, fit, codes=weights.Codes(codes, mentor.vqgan, SIZE, fit))
    for task in data.TASKS:
        entries = pixels.entries[task][:-1] if task == "reconstruct" else pixels.entries[task]
        for entry in entries:
            a, b = sample(pixels, task, *entry), sample(tokens, task, *entry)
            assert "target" not in b and torch.equal(b["tokens"], mentor.vqgan.encode(a["target"][None])[0])
    batch, = batches(tokens, 0, 8, 8)
    assert batch["tokens"].shape == (8, (SIZE // TINY.vqgan.factor) ** 2) and batch["tokens"].dtype == torch.int64


def test_codes_serve_only_their_own_rows_size_and_vqgan(encoded, tmp_path):
    train, codes, _, mentor = encoded
    os.rename(codes, tmp_path / "moved")
    with pytest.raises(InputError, match="prepare.py encode"):
        weights.Codes(codes, mentor.vqgan, SIZE)
    codes = str(tmp_path / "moved")
    with pytest.raises(InputError, match="pictures of 24 pixels, not 48"):
        weights.Codes(codes, mentor.vqgan, 48)
    with pytest.raises(InputError, match="made with --fit crop, not pad"):
        weights.Codes(codes, mentor.vqgan, SIZE, "pad")
    other = weights.random_model(TINY, weights.byte_tokenizer(), seed=1)
    with pytest.raises(InputError, match="another VQGAN"):
        weights.Codes(codes, other.vqgan, SIZE)
    write_rows(tmp_path / "train.jsonl", [{"source_image": "1.png", "input_text": "other", "generation_only": True}])
    with pytest.raises(InputError, match="train.jsonl:1: .*no codes of this row"):
        load(train, codes=weights.Codes(codes, mentor.vqgan, SIZE))[0]


# ---------------------------------------------------------------------------------------------------------------------
# folder and look

def test_a_folder_of_pictures_becomes_training_data_that_look_shows(tmp_path):
    pictures = tmp_path / "mine"
    pictures.mkdir()
    for i in range(3):
        picture(pictures / f"red_boot-{i:02}.png", i)
    picture(pictures / "vase.png", 9)
    for name, caption in {"red_boot-00.txt": "a boot on grass", "red_boot-01.caption": "a boot in snow",
                          "vase.txt": "a vase"}.items():
        (pictures / name).write_text(caption + "\n")
    mask(pictures / "red_boot-00.mask.png")
    out, sheet = str(tmp_path / "mine.jsonl"), str(tmp_path / "sheet.png")
    result = run("folder", str(pictures), "--out", out)
    assert result.returncode == 0 and "4 pictures, 2 subject(s): red boot, vase" in result.stdout
    dataset = load(out)
    assert dataset.counts == {"t2i": 3, "reconstruct": 4, "segment": 1, "recover": 1, "subject": 6}
    prompts = set()
    for entry in dataset.entries["subject"]:
        pair = sample(dataset, "subject", *entry)
        prompts.add((pair["prompt"], pair["target"][0, 0, 0].item()))
    text = {0: "a boot on grass", 1: "a boot in snow", 2: ""}
    assert prompts == {(f"The red boot in <image>.\n{text[i]}",
                        data.target_pixels(open_image(pictures / f"red_boot-{i:02}.png"), SIZE)[0, 0, 0].item())
                       for i in range(3)}
    with open(out, "a") as file:
        file.write(json.dumps({"source_image": "gone.png"}) + "\n")
    result = run("look", out, "--out", sheet, "--n", "2", "--workers", "0")
    assert result.returncode == 0 and "4 of 5 samples" in result.stdout and "1 problem" in result.stdout, result.stderr
    assert "mine.jsonl:13: " in result.stdout and "Traceback" not in result.stderr
    width, height = open_image(sheet).size
    assert width > 4 * 144 and height > 5 * 144          # two samples of two pictures, five tasks


def test_a_subject_is_named_by_the_picture_or_its_folder_and_never_by_the_working_directory(tmp_path):
    elsewhere, pictures = tmp_path / "elsewhere", tmp_path / "clay_vase"
    for folder in (elsewhere, pictures):
        folder.mkdir()
    picture(pictures / "00.png", 0)
    picture(pictures / "01.png", 1)
    picture(pictures / "dog-02.png", 2)
    result = run("folder", str(pictures), cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (pictures / "data.jsonl").read_text().splitlines()]
    assert [row["source_image"] for row in rows[:3]] == ["00.png", "01.png", "dog-02.png"]
    assert [row["objects"] for row in rows if "objects" in row] == ["clay vase"]


@pytest.mark.parametrize("name, subject", [
    ("dog-00.jpg", "dog"), ("Red Boot (3).JPG", "red boot"), ("red_boot.png", "red boot"), ("猫-01.webp", "猫"),
    ("dog_img1.png", "dog img"), ("00.jpg", "clay vase"), ("7.png", "clay vase"), ("00000.jpg", "clay vase"),
    ("IMG_0001.JPG", None), ("DSC01234.jpg", None), ("_DSC0042.jpg", None), ("DSCN0007.JPG", None),
    ("P1010001.JPG", None),
    ("PXL_20230101_120000000.jpg", None), ("COCO_train2014_000000000009.jpg", None), ("000000000009.jpg", None),
    ("20230101_120000.jpg", None), ("Screenshot 2024-01-01.png", None), ("image (1).png", None),
    ("photo_2023.jpg", None),
    ("3f9a0b2c4d5e6f708192a3b4c5d6e7f8.jpg", None), ("6fa459ea-ee8a-3ca4-894e-db77e160355e.png", None),
    ("n01440764_10026.jpg", None), ("ILSVRC2012_val_00000001.jpg", None), ("sa_223750.jpg", None)])
def test_a_pictures_subject_is_what_names_tell_and_nothing_where_they_do_not(name, subject):
    assert cli.subject_of(f"somewhere/clay_vase/{name}") == subject
    if subject == "clay vase":                           # short numbers: by the folder, if that is a name
        for folder in ("./", "../", ".//", "/", "", "photos/", "train2014/", "00000/"):
            assert cli.subject_of(folder + name) is None


def test_pictures_without_a_telling_name_are_in_no_pair_and_this_is_said(tmp_path, capsys):
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for i, name in enumerate(["IMG_0001.png", "IMG_0002.png", "00.png", "01.png", "dog-0.png", "dog-1.png"]):
        picture(pictures / name, i)
    mask(pictures / "IMG_0001.mask.png")
    prepare.main(["folder", str(pictures)])
    rows = [json.loads(line) for line in (pictures / "data.jsonl").read_text().splitlines()]
    named = [row["objects"] for row in rows if "objects" in row]
    assert named == ["subject", "subject", "dog"]              # segment and recover of the mask, one pair
    assert "4 picture(s) are in no pair" in capsys.readouterr().out
    assert not any(load(str(pictures / "data.jsonl"))[k]["problems"] for k in range(8))


@pytest.mark.parametrize("names, caption", [
    ({"a-0.txt": "text"}, "text"), ({"a-0.caption": "text"}, "text"), ({"A-0.TXT": "text"}, "text"),
    ({"a-0.txt": "\n", "a-0.caption": "text"}, "text"), ({"a-0.txt": "text", "a-0.caption": "other"}, "text"),
    ({"a-0.txt": "\ufefftext"}, "text"), ({"a-0.txt": "t\u00e4xt \U0001f436\n"}, "t\u00e4xt \U0001f436"), ({}, "")])
def test_captions_are_read_from_text_files_of_both_endings(tmp_path, names, caption):
    picture(tmp_path / "a-0.png")
    for name, text in names.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    prepare.main(["folder", str(tmp_path)])
    row = json.loads((tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row == {"source_image": "a-0.png", "input_text": caption}


def test_masks_of_any_picture_ending_belong_to_their_picture(tmp_path):
    for name in ("a-0.png", "b-0.JPG", "c-0.webp"):
        picture(tmp_path / name)
    mask(tmp_path / "a-0.mask.jpg"), mask(tmp_path / "b-0.MASK.PNG"), mask(tmp_path / "c-0.mask.webp")
    prepare.main(["folder", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert {row["source_image"] for row in rows} == {"a-0.png", "b-0.JPG", "c-0.webp"}
    assert [row["image_path"] for row in rows if "do_mask" in row] == ["a-0.mask.jpg", "b-0.MASK.PNG", "c-0.mask.webp"]


def test_what_is_no_picture_file_is_passed_over_by_name(tmp_path, capsys):
    picture(tmp_path / "a-0.png")
    (tmp_path / "folder.png").mkdir(), (tmp_path / "link.png").symlink_to("gone.png"), os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "._a-0.png").write_bytes(b"what macOS leaves")
    picture(os.fsencode(str(tmp_path)).decode() + "/b\udcff.png")
    prepare.main(["folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "1 rows (1 reconstruct)\n1 pictures, 1 subject(s): a\n3 entries cannot be used\n" in printed
    assert "link.png: a link to a file that is gone" in printed and "a name that is not UTF-8; first" in printed
    os.mkfifo(tmp_path / "a-0.txt")
    with pytest.raises(InputError, match="no row for training came out; .*a-0.txt: is a pipe"):
        prepare.main(["folder", str(tmp_path)])


@pytest.mark.parametrize("command", ["folder", "import", "look", "encode"])
def test_a_disk_that_is_full_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, capsys, command):
    data_path, out = every_task(tmp_path), tmp_path / "out"
    weights.save(weights.random_model(TINY, weights.byte_tokenizer()), str(tmp_path / "tiny"))
    out.mkdir()
    target = {"folder": out / "rows.jsonl", "import": out / "rows.jsonl", "look": out / "look.png",
              "encode": out / "codes.safetensors"}[command]
    target.write_text("older")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.cli, "flush", full)
    arguments = {"folder": [str(tmp_path), "--out", str(target)],
                 "import": [str(webdataset(tmp_path)), "--out", str(target)],
                 "look": [data_path, "--out", str(target), "--workers", "0"],
                 "encode": [data_path, "--out", str(out), "--weights", str(tmp_path / "tiny"), "--workers", "0"]}
    with pytest.raises(InputError, match="No space left"):
        prepare.main([command, *arguments[command]])
    assert target.read_text() == "older" and os.listdir(out) == [target.name]
    assert "wrote" not in capsys.readouterr().out


def test_look_names_what_is_suspicious_apart_from_what_is_damaged(tmp_path, capsys):
    picture(tmp_path / "0.png")
    mask(tmp_path / "whole.png", (0, 0, 40, 32))
    row = {"source_image": "0.png", "image_path": "whole.png", "objects": "cat", "do_mask": True}
    path = write_rows(tmp_path / "rows.jsonl", [row, row])
    prepare.main(["look", path, "--out", str(tmp_path / "sheet.png"), "--workers", "0"])
    printed = capsys.readouterr().out
    assert "2 of 2 samples usable\n0 problem(s)\n1 suspicious\n" in printed and "whole.png: the mask covers" in printed


def test_look_names_all_unusable_lines_however_many(tmp_path, capsys):
    picture(tmp_path / "0.png")
    good = json.dumps({"source_image": "0.png", "input_text": "x"})
    (tmp_path / "rows.jsonl").write_text("\n".join([good, *["{broken"] * 60]))
    prepare.main(["look", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "sheet.png"), "--workers", "0"])
    assert "60 problem(s)" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "2"])
def test_look_tries_every_row_whatever_the_number_of_workers(tmp_path, workers, capsys):
    prepare.main(["look", every_task(tmp_path), "--out", str(tmp_path / "new" / "sheet.png"), "--workers", workers])
    printed = capsys.readouterr().out
    assert "subject            2 of 2 samples" in printed and "reconstruct        1 of 2 samples" in printed
    assert "1 problem(s)\n" in printed and "gone.png: no such file" in printed
    assert (tmp_path / "new" / "sheet.png").exists()


def test_bad_input_on_the_command_line_is_one_sentence(tmp_path):
    result = run("look", str(tmp_path / "gone.jsonl"), "--out", str(tmp_path / "sheet.png"))
    assert result.returncode == 2 and result.stderr.startswith("prepare.py: error: ")
    assert result.stderr.count("\n") == 1
    (tmp_path / "file").write_text("")
    blocked = str(tmp_path / "file" / "place.png")
    picture(tmp_path / "dog-0.png")
    for command in (["folder", str(tmp_path / "gone")], ["folder", str(tmp_path / "file")],
                    ["folder", str(tmp_path), "--out", blocked], ["look", every_task(tmp_path), "--out", blocked]):
        with pytest.raises(InputError, match="gone: no folder|file: no folder|file/place.png"):
            prepare.main(command)


# ---------------------------------------------------------------------------------------------------------------------
# import

def x2i(text, inputs, output="out.png", **more):
    """A line as X2I has it; a number in {} of the text is a picture."""
    for number in range(9):
        text = text.replace(f"{{{number}}}", f"<img><|image_{number}|></img>")
    return {"task_type": "subject_driven", "instruction": text, "input_images": inputs, "output_image": output, **more}


def imported(folder, lines, *flags):
    """The rows that come out of lines of X2I whose pictures are all there, but for those called gone."""
    names = {name for line in lines if isinstance(line, dict) for name in [line["output_image"], *line["input_images"]]}
    for name in names:
        if isinstance(name, str) and "gone" not in name and not name.startswith("/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            picture(folder / name)
    (folder / "x2i.jsonl").write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n"
                                              for line in lines))
    prepare.main(["import", str(folder / "x2i.jsonl"), "--out", str(folder / "data.jsonl"), *flags])
    return read_rows(folder / "data.jsonl")


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ICL = {"task_type": "X2I-in-context_learning"}


@pytest.mark.parametrize("line, row", [
    (x2i("{1} beside {2} in 雪", ["a/1.png", "2.png"]),
     {"input_text": "<image> beside <image> in 雪", "image_path": ["a/1.png", "2.png"]}),
    (x2i("{2} before {1}, and {2}", ["1.png", "2.png"]),
     {"input_text": "<image> before <image>, and <image>", "image_path": ["2.png", "1.png", "2.png"]}),
    (json.dumps({"instruction": "bare <|image_1|>", "input_images": "1.png", "output_image": "out.png"}),
     {"input_text": "bare <image>", "image_path": ["1.png"]}),
    (x2i("a vehicle: {1}", ["1.png"], task_type="vehicle"), {"input_text": "a vehicle: <image>",
                                                              "image_path": ["1.png"]}),
    (x2i("{1} -> {2}; {3} ->", ["1.png", "2.png", "3.png"], **ICL),
     {"input_text": "<image> -> <image>; <image> ->", "image_path": ["1.png", "2.png", "3.png"], "in_context": True}),
    (x2i("{1} {2} {3}", ["1.png", "2.png", "3.png"], task_type="x2i_icl"),
     {"input_text": "<image> <image> <image>", "image_path": ["1.png", "2.png", "3.png"], "in_context": True})])
def test_a_line_of_x2i_becomes_a_row_with_its_pictures_in_the_order_of_the_text(tmp_path, line, row):
    for name in ("1.png", "2.png", "3.png", "out.png"):
        picture(tmp_path / name)
    assert imported(tmp_path, [line]) == [{"source_image": "out.png", "input_img_list": True, **row}]


@pytest.mark.parametrize("line, reason", [
    ("{broken", "a damaged line"), ("[1]", "no object of JSON"), (x2i("{1} {3}", ["1.png", "2.png"]), "lacks"),
    (x2i("{0} {1}", ["1.png"]), "lacks"), (x2i("{1}", ["1.png", "2.png"]), "has no place in the instruction"),
    (x2i("a dog", []), "no input picture"), (x2i("{1} <image>", ["1.png"]), "holds <image> itself"),
    (x2i("{1}", ["gone.png"]), "no such picture"), (x2i("{1}", ["1.png"], output="gone.png"), "no such picture"),
    (x2i("{1}", [7]), "input_images is no text"), (x2i("{1}", ["1.png"], output=None), "output_image is no text"),
    (x2i("{1} {2}", ["1.png", "2.png"], **ICL), "an odd number"), (x2i("{1}", ["1.png"], **ICL), "an odd number"),
    (x2i("{1} \ud83d", ["1.png"]), "half of a letter")])
def test_what_no_row_can_be_made_of_is_counted_with_its_reason_and_first_line(tmp_path, capsys, line, reason):
    good = x2i("{1}", ["1.png"])
    assert len(imported(tmp_path, [good, line, "", line, good])) == 2
    printed = capsys.readouterr().out
    assert "2 entries cannot be used" in printed and "2 multi" in printed and "X2I's JSON lines" in printed
    problem, = [said for said in printed.splitlines() if "; first" in said]
    assert problem.strip().startswith("2 ") and reason in problem and "x2i.jsonl:2" in problem


def test_look_shows_what_was_imported(tmp_path, capsys):
    imported(tmp_path, [x2i("{2} on {1}", ["p/1.png", "p/2.png"]), x2i("{1}", ["p/2.png"])])
    prepare.main(["look", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "sheet.png"), "--workers", "0"])
    assert "multi              2 of 2 samples usable\n0 problem(s)" in capsys.readouterr().out


def test_the_rows_kept_apart_are_the_same_whatever_their_order(tmp_path):
    lines = [x2i(f"{{1}} number {i}", ["1.png"]) for i in range(400)]
    train = imported(tmp_path, lines, "--holdout", "0.1")
    val = read_rows(tmp_path / "val-data.jsonl")
    assert 20 < len(val) < 60 and len(train) + len(val) == 400
    texts = {row["input_text"] for row in val}
    assert not texts & {row["input_text"] for row in train}
    imported(tmp_path, [*reversed(lines), x2i("{1} one more", ["1.png"])], "--holdout", "0.1")
    assert {row["input_text"] for row in read_rows(tmp_path / "val-data.jsonl")} - {"<image> one more"} == texts
    with pytest.raises(InputError, match="val-data.jsonl: is there from an earlier import"):
        imported(tmp_path, lines)
    with pytest.raises(InputError, match="all are kept apart"):
        imported(tmp_path, lines[:1], "--holdout", "0.9999999")


def test_pictures_of_another_machine_are_found_below_the_image_root(tmp_path, capsys):
    root = tmp_path / "here"
    for name in ("a/1.png", "a/2.png", "out.png", "1.png", "3.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(root / name)
    rows = imported(tmp_path, [
        x2i("{1}", ["/share/x2i/a/1.png"], output="/share/x2i/out.png"),
        x2i("{1}", ["/share/x2i/gone/1.png"], output="/share/x2i/out.png"),      # not the 1.png that lies in the root
        x2i("{1}", ["a/2.png"], output="out.png"), x2i("{1}", ["gone/3.png"], output="out.png"),
        x2i("{1}", ["D:\\x\\a\\2.png"], output="D:\\x\\out.png")], "--image-root", str(root))
    assert [[row["source_image"], *row["image_path"]] for row in rows] == [
        ["here/out.png", "here/a/1.png"], ["here/out.png", "here/a/2.png"], ["here/out.png", "here/a/2.png"]]
    printed = capsys.readouterr().out
    assert "2  no such picture" in printed and f"pictures of /share/x2i are taken from {root}" in printed


def test_rows_name_their_pictures_from_the_folder_they_lie_in(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "x2i.jsonl").write_text("\ufeff" + json.dumps(x2i("{1}", ["1.png"], str(tmp_path / "1.png"))))
    (tmp_path / "sub").mkdir()
    prepare.main(["import", str(tmp_path / "x2i.jsonl"), "--out", str(tmp_path / "sub" / "data.jsonl")])
    row, = read_rows(tmp_path / "sub" / "data.jsonl")
    assert row["image_path"] == ["../1.png"] and row["source_image"] == str(tmp_path / "1.png")
    assert not load(str(tmp_path / "sub" / "data.jsonl"))[0]["problems"]


@pytest.mark.parametrize("content, flags, said", [
    ('{"source": "1.png", "words": "whose?"}', [], "no format known here; known are folders and MENTOR's JSON lines"),
    ('[{"instruction": "a", "output_image": "b"}]', [], "of no format known here"), ("PAR1", [], "Parquet table"),
    ("", [], "is empty"), (json.dumps(x2i("{1}", ["gone.png"])), [], "no row for training came out; .*no such picture"),
    (json.dumps(x2i("{1}", ["1.png"])), ["--image-root", "nowhere"], "--image-root nowhere: no such folder"),
    (json.dumps(x2i("{1}", ["1.png"])), ["--holdout", "1"], "--holdout: must be from 0 to below 1"),
    (json.dumps(x2i("{1}", ["1.png"])), ["--out", "{folder}/x2i.jsonl"], "would replace what is to be imported"),
    (json.dumps(x2i("{1}", ["1.png"])), ["--out", "val.jsonl", "--holdout", "0.1"], "begin with val for validation")])
def test_what_cannot_be_imported_is_one_sentence_and_replaces_nothing(tmp_path, content, flags, said):
    picture(tmp_path / "1.png")
    (tmp_path / "x2i.jsonl").write_text(content)
    (tmp_path / "data.jsonl").write_text("older")
    flags = [flag.format(folder=tmp_path) for flag in flags]
    with pytest.raises(InputError, match=said):
        prepare.main(["import", str(tmp_path / "x2i.jsonl"), "--out", str(tmp_path / "data.jsonl"), *flags])
    assert (tmp_path / "x2i.jsonl").read_text() == content and (tmp_path / "data.jsonl").read_text() == "older"
    assert sorted(os.listdir(tmp_path)) == ["1.png", "data.jsonl", "x2i.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# import: each format in its exact layout

def put(path, content):
    """A file of bytes, text, or else JSON; its folders come with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(path, seed)
    return path


def lines(records, end="\n"):
    return "".join(json.dumps(record) + end for record in records)


def said(name, caption="a caption"):
    return {"id": name[:4], "image": name, "conversations": [{"from": "human", "value": "Describe it.\n<image>"},
                                                             {"from": "gpt", "value": caption}]}


def llava_array(folder):
    photo(folder / "00453/004539375.jpg"), photo(folder / "00223/002239345.jpg", 1)
    entries = [said("00453/004539375.jpg"), said("00223/002239345.jpg", "<image>\nanother"), said("gone.jpg"),
               {"id": "5", "conversations": said("x")["conversations"]}]
    entries.append(said("00453/004539375.jpg") | {"conversations": said("x")["conversations"] * 2})
    return put(folder / "blip_laion_cc_sbu_558k.json", b"\xef\xbb\xbf" + json.dumps(entries, indent=2).encode())


def llava_lines(folder):
    photo(folder / "a.jpg")
    return put(folder / "chat.jsonl", lines([said("a.jpg"), said("a.jpg") | {"image": ["a.jpg", "a.jpg"]}, [1]]))


def coco(folder):
    for i in (9, 25, 30):
        photo(folder / f"COCO_val2014_{i:012}.jpg", i)
    images = [{"license": 3, "file_name": f"COCO_val2014_{i:012}.jpg", "height": 32, "width": 40, "id": i}
              for i in (9, 25, 30, 31)]
    annotations = [{"image_id": i, "id": n, "caption": f"caption {n}\n"} for n, i in enumerate((25, 9, 9, 9, 31, 77))]
    annotations.append({"image_id": 9, "id": 99, "caption": "caption 1"})             # said twice: one row
    return put(folder / "captions_val2014.json", {"info": {"year": 2014}, "licenses": [{"id": 3}], "images": images,
                                                  "annotations": annotations})


def imagefolder(folder):
    for split, number in (("train", 0), ("train", 1), ("test", 2)):
        photo(folder / f"hf/{split}/{number:04}.PNG", number)
    train = {"0000.PNG": "a dog", "0001.PNG": None, "0007.PNG": "gone"}
    for split, texts in {"train": train, "test": {"0002.PNG": ["a cat", "a black cat", "a cat"]}}.items():
        put(folder / f"hf/{split}/metadata.jsonl",
            lines([{"file_name": name, "text": text} for name, text in texts.items()], "\r\n"))
    return folder / "hf"


def imagefolder_csv(folder):
    photo(folder / "hf/a/1.jpg"), photo(folder / "hf/a/2.jpg")
    table = '\ufefffile_name,additional_feature\r\na/1.jpg,"a dog, a cat\r\nand ""more"""\r\na/2.jpg,\r\n'
    put(folder / "hf/metadata.csv", table)
    return folder / "hf"


def kohya(folder):
    for i in range(3):
        photo(folder / f"img/20_sls frog/IMG_{i}.JPG", i)
        photo(folder / f"img/reg/1_frog/{i}.png", 5 + i)       # of regularisation: frogs, but not the same one
    put(folder / "img/20_sls frog/IMG_0.txt", "sls frog, grass"), put(folder / "img/20_sls frog/IMG_1.CAPTION", "frog")
    photo(folder / "img/5_0/cat.webp")
    return folder / "img"


def img2dataset(folder):
    for number in (0, 1, 10000):
        shard = folder / f"laion_dogs/{number // 10000:05}"
        photo(shard / f"{number:09}.jpg", number), put(shard / f"{number:09}.txt", f"caption {number}")
        put(shard / f"{number:09}.json", {"url": "x", "caption": f"caption {number}", "key": f"{number:09}"})
        put(shard.with_suffix(".parquet"), "PAR1"), put(shard.parent / f"{shard.name}_stats.json", {"count": 2})
        photo(folder / f"laion_dogs/old/{number % 9}.jpg"), put(folder / f"laion_dogs/old/{number % 9}.json", {})
    return folder / "laion_dogs"


def subjects(folder):
    for name in ("dog/00.jpg", "dog/01.jpg", "dog/02.jpg", "dog2/00.jpg", "dog2/01.jpg", "clay_vase/00.JPG",
                 "holiday/IMG_0001.jpg", "holiday/IMG_0002.jpg", "more/cat-00.jpg",
                 "more/cat2-00.jpg", "more/cat2_01.jpg"):
        photo(folder / "all" / name)
    put(folder / "all/dog/00.txt", "a dog on grass"), mask(folder / "all/dog/00.mask.png")
    photo(folder / "all/.thumbnails/dog-00.jpg"), photo(folder / "all/__MACOSX/dog-00.jpg")
    return folder / "all"


def archive(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            information = tarfile.TarInfo(name)
            information.size = len(content)
            file.addfile(information, io.BytesIO(content))
    return path


def webdataset(folder):
    one, two = (photo(folder / f"{i}.png", i).read_bytes() for i in (0, 2))
    (folder / "shards").mkdir(parents=True)
    archive(folder / "shards/00000.tar", {
        "000000000.png": one, "000000000.txt": b"\xef\xbb\xbfone", "000000000.json": b'{"caption": "other"}',
        "a/b.PNG": two, "a/b.json": b'{"caption": ["two", "zwei"]}', "._x.png": b"", "c.txt": b"alone"})
    archive(folder / "shards/00001.tar", {"1.png": b"no picture", "1.txt": b"x", "2.png": one, "2.txt": b"\xff\xfe",
                                          "3.png": two, "3.cls": b"7"})
    put(folder / "shards/00000.parquet", "PAR1")
    return folder / "shards"


def parquet(folder):
    tables = pytest.importorskip("pyarrow.parquet", reason="Parquet tables need pyarrow")
    table = pytest.importorskip("pyarrow").table
    one, two = (photo(folder / f"{i}.png", i).read_bytes() for i in range(2))
    (folder / "data").mkdir()
    images = [{"bytes": one, "path": "x.png"}, {"bytes": None, "path": "1.png"}, None]
    tables.write_table(table({"image": images, "text": ["one", None, "gone"]}),
                       folder / "data/train-00000-of-00002.parquet")
    tables.write_table(table({"key": ["0", "1"], "jpg": [two, b"no"], "captions": [["two", "zwei"], ["x"]]}),
                       folder / "data/train-00001-of-00002.parquet")
    return folder / "data"


def mentor(folder):
    path = pathlib.Path(every_task(folder))
    with open(path, "a") as file:
        file.write('{"input_image": "0.png"}\n{"source_image": "0.png", "do_mask": 3}\n{broken\n')
    return path


LAYOUTS = {   # format: what it is taken for, how many rows come out, how many entries cannot be used
    mentor: ("MENTOR's JSON lines", {"t2i": 1, "reconstruct": 1, "segment": 1, "recover": 1, "subject": 1, "multi": 2,
                                     "icl": 1, "background": 1}, 3),
    llava_array: ("LLaVA's conversations", {"t2i": 2, "reconstruct": 2}, 3),
    llava_lines: ("LLaVA's conversations", {"t2i": 1, "reconstruct": 1}, 2),
    coco: ("COCO's captions", {"t2i": 4, "reconstruct": 3}, 2),
    imagefolder: ("Hugging Face's imagefolder, 2 table(s): JSON lines", {"t2i": 3, "reconstruct": 3}, 1),
    imagefolder_csv: ('captions in "additional_feature"', {"t2i": 1, "reconstruct": 2}, 0),
    kohya: ("kohya's folders", {"t2i": 2, "reconstruct": 7, "subject": 3}, 0),
    img2dataset: ("img2dataset's folders", {"t2i": 3, "reconstruct": 5}, 0),
    subjects: ("folders of pictures", {"t2i": 1, "reconstruct": 11, "segment": 1, "recover": 1, "subject": 5}, 0),
    webdataset: ("2 tar archive(s), as webdataset has them", {"t2i": 3, "reconstruct": 3}, 3),
    parquet: ('2 Parquet table(s), captions in "text"', {"t2i": 3, "reconstruct": 3}, 2),
}
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def bring(path, out, *flags):
    """The rows that `import` makes."""
    prepare.main(["import", str(path), "--out", str(out), *map(str, flags)])
    return read_rows(out)


def test_import_reads_each_format_that_training_recognises():
    assert prepare.FORMATS.keys() == {name for name, _ in cli.FORMATS}


@by_layout
def test_what_is_imported_can_be_trained_on_and_what_cannot_is_counted(tmp_path, capsys, layout):
    kind, counts, unusable = LAYOUTS[layout]
    path, out = layout(tmp_path), tmp_path / "new" / "data.jsonl"
    (tmp_path / "new").mkdir()
    bring(path, out)
    printed, shown = capsys.readouterr().out, ", ".join(f"{count} {task}" for task, count in sorted(counts.items()))
    assert f"{path}: taken for " in printed and kind in printed.splitlines()[0]
    assert f"wrote {out}: {sum(counts.values())} rows ({shown})\n" in printed
    assert f"{unusable} entries cannot be used" in printed
    before = out.read_bytes()
    prepare.main(["look", str(out), "--out", str(tmp_path / "sheet.png"), "--workers", "0"])
    printed = capsys.readouterr().out
    assert "\n0 problem(s)" in printed and (tmp_path / "sheet.png").exists()
    assert load(str(out)).rows.problems == []
    bring(path, out)                                           # once more: the same
    assert out.read_bytes() == before


@by_layout
def test_training_names_the_command_that_makes_rows_of_a_foreign_file(tmp_path, layout):
    path = layout(tmp_path)
    if layout == mentor:
        assert len(data.Rows([str(path)]))
        return
    with pytest.raises(InputError, match="make MENTOR's JSON lines of it: python prepare.py import .* --out data.json"):
        data.Rows([str(path)])


@by_layout
def test_validation_shares_no_picture_with_training(tmp_path, layout):
    out, path = tmp_path / "data.jsonl", layout(tmp_path)
    names = [set(), set()]
    for share in np.linspace(0.05, 0.95, 19):
        try:
            sides = [bring(path, out, "--holdout", share), read_rows(tmp_path / "val-data.jsonl")]
        except (InputError, FileNotFoundError):                # all on one side
            continue
        names = [{row.get("source_image") or row["input_image"] for row in rows} for rows in sides]
        assert not names[0] & names[1]
        subjects = [{row["image_path"] for row in rows if row.get("swapped_text") is not None} for rows in sides]
        if layout != mentor:
            assert not subjects[0] & names[1] and not subjects[1] & names[0]
    assert layout == llava_lines or all(names)


def test_captions_are_told_by_all_their_rows_and_the_picture_once(tmp_path):
    rows = bring(coco(tmp_path), tmp_path / "data.jsonl")
    assert rows == [
        {"source_image": "COCO_val2014_000000000009.jpg", "input_text": "caption 1"},
        *({"source_image": "COCO_val2014_000000000009.jpg", "input_text": f"caption {n}", "generation_only": True}
          for n in (1, 2, 3)),
        {"source_image": "COCO_val2014_000000000025.jpg", "input_text": "caption 0"},
        {"source_image": "COCO_val2014_000000000025.jpg", "input_text": "caption 0", "generation_only": True},
        {"source_image": "COCO_val2014_000000000030.jpg", "input_text": ""}]


def test_pictures_out_of_archives_become_files_beside_the_rows(tmp_path):
    out = tmp_path / "shards" / "mine.jsonl"                   # in the folder itself
    for _ in range(2):                                         # what is there already is no part of the folder
        rows = bring(webdataset(tmp_path) if not out.exists() else tmp_path / "shards", out)
        assert [(row["source_image"], row["input_text"]) for row in rows if "generation_only" not in row] == [
            ("mine-pictures/00000/000000000.png", "one"), ("mine-pictures/00000/000000001.png", "two"),
            ("mine-pictures/00000/000000002.png", "")]
    for number, seed in enumerate((0, 2, 2)):
        stored = tmp_path / f"shards/mine-pictures/00000/{number:09}.png"
        assert stored.read_bytes() == (tmp_path / f"{seed}.png").read_bytes()
    put(tmp_path / "shards/mine-pictures/notes.txt", "not from here")
    with pytest.raises(InputError, match="mine-pictures: holds notes.txt"):
        bring(tmp_path / "shards", out)


def test_pairs_are_of_one_subject_in_one_folder(tmp_path):
    pairs = {(row["source_image"], row["image_path"], row["objects"])
             for layout in (subjects, kohya, img2dataset) for row in bring(layout(tmp_path), tmp_path / "data.jsonl")
             if "swapped_text" in row}
    assert pairs == {("all/dog/00.jpg", "all/dog/01.jpg", "dog"), ("all/dog/00.jpg", "all/dog/02.jpg", "dog"),
                     ("all/dog/01.jpg", "all/dog/02.jpg", "dog"), ("all/dog2/00.jpg", "all/dog2/01.jpg", "dog"),
                     ("all/more/cat2-00.jpg", "all/more/cat2_01.jpg", "cat"),
                     *((f"img/20_sls frog/IMG_{i}.JPG", f"img/20_sls frog/IMG_{j}.JPG", "sls frog")
                       for i, j in ((0, 1), (0, 2), (1, 2)))}


@pytest.mark.parametrize("layout, root", [
    (llava_array, {"00453/004539375.jpg": "/share/blip/{}"}), (coco, {"COCO_val2014_000000000009.jpg": "D:\\coco\\{}"}),
    (imagefolder_csv, {"a/1.jpg": "/hf/{}"}), (mentor, {"0.png": "/share/mentor/{}", "mask0.png": "/share/mentor/{}"})])
def test_paths_of_another_machine_are_looked_up_under_the_image_root(tmp_path, layout, root):
    path = layout(tmp_path)
    here = path if path.is_dir() else path.parent
    table = path / "metadata.csv" if path.is_dir() else path
    content = table.read_text(encoding="utf-8-sig")
    for name, elsewhere in root.items():
        there = json.dumps(elsewhere.format(name))[1:-1]
        content = re.sub(rf"(?<![\w/]){name}", lambda match: there, content)
    table.write_text(content)
    (tmp_path / "out").mkdir()
    rows = bring(path, tmp_path / "out" / "data.jsonl", "--image-root", here)
    names = {name for row in rows for name in (row.get("source_image"), row.get("image_path")) if isinstance(name, str)}
    assert {os.path.relpath(here / name, tmp_path / "out") for name in root} <= names
    assert all((tmp_path / "out" / name).is_file() for name in names)


def test_unreadable_captions_and_names_leave_out_their_picture_alone(tmp_path, capsys):
    for name in ("dog-00.jpg", "dog-01.jpg", "dog-02.jpg", "dog-03.jpg"):
        photo(tmp_path / "mine" / name)
    for number, text in enumerate(("größe".encode("latin-1"), b"\xef\xbb\xbfa\r\n", "")):
        put(tmp_path / f"mine/dog-0{number}.txt", text)
    rows = bring(tmp_path / "mine", tmp_path / "data.jsonl")
    assert [row["input_text"] for row in rows] == ["a", "a", "", "", "a", "a", ""]
    printed = capsys.readouterr().out
    assert "1 entries cannot be used\n       1  a file that cannot be read; first " in printed
    assert "dog-00.txt: cannot be read" in printed


def test_thousands_of_pictures_make_as_many_rows(tmp_path, capsys):
    one = photo(tmp_path / "one.jpg")
    for i in range(2500):
        shard = tmp_path / f"shards/{i // 1000:05}"
        shard.mkdir(parents=True, exist_ok=True)
        os.link(one, shard / f"{i:09}.jpg"), (shard / f"{i:09}.txt").write_text(f"caption {i}")
    rows = bring(tmp_path / "shards", tmp_path / "data.jsonl", "--holdout", "0.1")
    kept = read_rows(tmp_path / "val-data.jsonl")
    assert len(rows) + len(kept) == 5000 and 300 < len(kept) < 700
    assert "0 subject(s)" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_json_text_reads_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, size):
    monkeypatch.setattr(prepare.JsonText, "CHUNK", size)
    values = [{"a": "ü\\\"\n\U0001f436 ]},{"}, {"b": [1, -2.5e3, None, True, {"c": []}]}, "text", 12345, 0.5, [], {}]
    for text in (json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False).replace("\n", "\r\n"), " [ ] \n"):
        path = put(tmp_path / "a.json", text)
        assert [value for _, value in prepare.json_array(path)] == json.loads(text)
        with open(path, "rb") as file:
            assert list(prepare.JsonText(file, path).items()) == json.loads(text)
    for end in range(1, len(text := json.dumps(values))):
        with pytest.raises(InputError, match="damaged or cut off, no JSON from letter"):
            list(prepare.json_array(put(tmp_path / "a.json", text[:end].encode())))


def cut(path, share=0.7):
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])


@pytest.mark.parametrize("layout, spoil, flags, reason", [
    (llava_array, cut, [], "is damaged or cut off"), (coco, cut, [], "is damaged or cut off"),
    (llava_array, lambda path: put(path, path.read_bytes().replace(b"another", b"\xff")), [], "is not UTF-8 text"),
    (imagefolder_csv, lambda path: put(path / "metadata.csv", b"file_name,text\na.jpg,\xff"), [], "is not UTF-8"),
    (imagefolder_csv, lambda path: put(path / "metadata.csv", "file_name,text\n"), [], "it holds nothing"),
    (coco, lambda path: put(path, {"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": []}]}), [],
     r"give COCO's captions_\*.json"),
    (imagefolder, lambda path: [photo.unlink() for photo in path.rglob("*.PNG")], [], "elsewhere, give --image-root"),
    (subjects, lambda path: None, ["--image-root", "."], "holds its pictures and names no paths"),
    (imagefolder, lambda path: None, ["--out", "{path}/train/metadata.jsonl"], "would replace what is to be imported"),
    (webdataset, lambda path: put(path / "00001.tar", "") and cut(path / "00000.tar", 0.02), [], "a damaged archive"),
    (parquet, lambda path: cut(path / "train-00000-of-00002.parquet"), [], "no Parquet table that can be read"),
    (parquet, lambda path: __import__("pyarrow.parquet").parquet.write_table(
        __import__("pyarrow").table({"url": ["x"]}), path / "train-00000-of-00002.parquet"), [],
     "no column holds pictures, .* it has url")])
def test_a_damaged_import_writes_nothing_and_replaces_nothing(tmp_path, layout, spoil, flags, reason):
    path = layout(tmp_path)
    spoil(path)
    (tmp_path / "data.jsonl").write_text("older")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(InputError, match=reason):
        bring(path, tmp_path / "data.jsonl", *[flag.format(path=path) for flag in flags])
    assert (tmp_path / "data.jsonl").read_text() == "older" and sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_damaged_archive_costs_no_other_one(tmp_path, capsys):
    path = webdataset(tmp_path)
    size = (path / "00000.tar").stat().st_size
    for share in (0.05, 0.25, 0.32, 0.33, 1 - 512 / size, 1):  # within a member, a header, between them, at the end
        webdataset(tmp_path / f"{share}")
        cut(tmp_path / f"{share}/shards/00000.tar", share)
        assert bring(tmp_path / f"{share}/shards", tmp_path / "data.jsonl")[-1]["input_text"] == ""    # of the other
        assert ("a damaged archive" in capsys.readouterr().out) == (share < 0.5)


def test_without_pyarrow_a_parquet_table_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="a.parquet: is a Parquet table, which needs pyarrow; pip install pyarrow"):
        bring(put(tmp_path / "a.parquet", "PAR1"), tmp_path / "data.jsonl")


def test_dreambooths_folders_of_subjects_become_pairs(tmp_path):
    photos = material("MENTOR_PHOTOS", "photos")
    rows = bring(photos, tmp_path / "data.jsonl")
    pairs = [row for row in rows if "swapped_text" in row]
    folders = {name for name in os.listdir(photos) if (photos / name).is_dir()}
    assert {os.path.basename(os.path.dirname(row["source_image"])) for row in pairs} == folders
    assert all(os.path.dirname(row["source_image"]) == os.path.dirname(row["image_path"]) for row in pairs)
    assert {"dog", "clay vase" if "clay_vase" in folders else "vase"} <= {row["objects"] for row in pairs}
