"""The commands on training data. Images are small painted ones."""
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY
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


def load(path, **options):
    processor = data.Processor(weights.byte_tokenizer(), image_tokens=4, max_tokens=128, image_size=CLIP)
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
    train, codes = every_task(tmp_path), str(tmp_path / "codes")
    mentor = weights.random_model(TINY, weights.byte_tokenizer())
    weights.save(mentor, str(tmp_path / "tiny"))
    prepare.main(["encode", train, "--weights", str(tmp_path / "tiny"), "--out", codes, "--workers", "0"])
    return train, codes, capsys.readouterr().out, mentor


def test_encoded_targets_stand_in_for_pixels(encoded):
    train, codes, printed, mentor = encoded
    assert "train.jsonl:9: " in printed
    pixels, tokens = load(train), load(train, codes=weights.Codes(codes, mentor.vqgan, SIZE))
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


@pytest.mark.parametrize("command", ["folder", "look", "encode"])
def test_a_disk_that_is_full_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, capsys, command):
    data_path, out = every_task(tmp_path), tmp_path / "out"
    weights.save(weights.random_model(TINY, weights.byte_tokenizer()), str(tmp_path / "tiny"))
    out.mkdir()
    target = {"folder": out / "rows.jsonl", "look": out / "look.png", "encode": out / "codes.safetensors"}[command]
    target.write_text("older")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.cli, "flush", full)
    arguments = {"folder": [str(tmp_path), "--out", str(target)],
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
    ('{"source": "1.png", "words": "whose?"}', [], "of no format known here; known are folders and MENTOR's JSON lines"),
    ('[{"instruction": "a", "output_image": "b"}]', [], "of no format known here"), ("PAR1", [], "a Parquet table"),
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
