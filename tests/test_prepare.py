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
        base | {"image_path": "1.png", "objects": "cat"},
        base | {"image_path": ["mask0.png", "mask1.png"], "objects": ["cat", "sky"]},
        base | {"image_path": ["2.png", "3.png"], "objects": ["cat", "sky"], "input_img_list": True},
        {"source_image": "gone.png"},
    ])


def load(path, **options):
    processor = data.Processor(weights.byte_tokenizer(), patches=4, max_tokens=128, image_size=CLIP)
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
    assert "train.jsonl:8: " in printed
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
    with pytest.raises(InputError, match="no codes .*prepare.py encode"):
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
    for command in (["folder", str(tmp_path / "gone")], ["look", every_task(tmp_path), "--out", blocked]):
        with pytest.raises(InputError, match="gone|file/place.png"):
            prepare.main(command)
