import colorsys
import json
import os
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import material
from PIL import Image

import eval as evaluation
import scenes
from data import InputError
from model import Mentor

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of a small model with random weights."""
    folder = tmp_path_factory.mktemp("small") / "tiny"
    Mentor.from_pretrained("random-tiny").save_pretrained(folder)
    return str(folder)


def picture(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(colour))).integers(0, 60, (70, 90, 3))
    Image.fromarray((np.array(Image.new("RGB", (90, 70), colour)) // 2 + noise).astype(np.uint8)).save(path)


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks

def test_the_discrepancy_of_two_sets_is_0_for_equal_ones_and_known_for_two_points():
    a = torch.nn.functional.normalize(torch.randn(50, 16), dim=-1)
    assert abs(evaluation.mmd(a, a.flip(0))) < 1e-12
    east, west = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    assert abs(1000 * evaluation.mmd(east, west) - 2000 * (1 - np.exp(-4 / 200))) < 1e-9


PROMPTS = """Classes

subject_name,class
ball,toy
rex,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on the beach'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a chef outfit'.format(unique_token, class_token)
]
"""


def dreambench_folder(folder):
    for subject, colours in {"ball": ["red", "blue"], "rex": ["brown"]}.items():
        for i, colour in enumerate(colours):
            picture(folder / subject / f"{i:02}.jpg", colour)
    (folder / "prompts_and_classes.txt").write_text(PROMPTS)
    return str(folder)


def read(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_dreambench_scores_every_prompt_and_two_processes_finish_what_one_began(tmp_path, networks, small):
    folder = dreambench_folder(tmp_path / "bench")
    flags = ["dreambench", "--weights", small, "--data", folder, *networks, "--samples", "2", "--batch", "3"]
    flags += ["--device", "cpu"]
    evaluation.main([*flags, "--out", str(tmp_path / "one")])
    settings, *rows = read(tmp_path / "one")
    assert settings["cfg_scale"] == 2.0 and settings["size"] == 64
    assert {row["prompt"] for row in rows} == {
        "The toy in <image>.\na toy on the beach", "The toy in <image>.\na red toy",
        "The dog in <image>.\na dog in a chef outfit"}
    assert len(rows) == 6 and all(-1 <= row[name] <= 1 for row in rows for name in ("clip_i", "clip_t", "dino"))
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())["scores"]
    assert set(summary) == {"ball", "rex", "all"}
    assert abs(summary["all"]["dino"] - sum(row["dino"] for row in rows) / 6) < 1e-9
    assert (tmp_path / "one" / "sheet.png").exists() and len(list((tmp_path / "one").glob("*-*-*-*.png"))) == 6
    # killed in the middle of its third line, the second's picture lost; then finished by two processes
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one" / f"{rows[0]['key']}.png", tmp_path / "two")
    lines = (tmp_path / "one" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two" / "results.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
                    "--rdzv_endpoint=localhost:0", "eval.py", *flags, "--out", str(tmp_path / "two")], cwd=ROOT,
                   check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert len(read(tmp_path / "two")) == 3 + 5
    again = {row["key"]: row for row in read(tmp_path / "two")[1:]}
    for row in rows:
        assert again[row["key"]] == pytest.approx(row, abs=1e-4)
    with pytest.raises(InputError, match="another seed"):
        evaluation.main([*flags, "--seed", "5", "--out", str(tmp_path / "one")])


def test_dreambench_reads_the_published_prompts_and_photographs():
    photos = material("MENTOR_PHOTOS", "photos")
    args = evaluation.parse(["dreambench", "--data", str(photos), "--samples", "1", "--refs", "all"])
    units = evaluation.dreambench_units(args)
    prompts = {}
    for unit in units:
        prompts.setdefault(unit.group, set()).add(unit.prompt)
    assert all(len(found) == 25 for found in prompts.values()) and "a dog wearing a red hat" in prompts["dog"]
    assert "a bowl floating in an ocean of milk" in prompts["berry_bowl"]
    assert len({unit.key for unit in units}) == len({unit.seed for unit in units}) == len(units)


@pytest.mark.full
def test_dreambench_scores_real_photographs(tmp_path, networks, small):
    photos = material("MENTOR_PHOTOS", "photos")
    for name in ("dog", "vase"):
        shutil.copytree(photos / name, tmp_path / "bench" / name)
    shutil.copy(photos / "prompts_and_classes.txt", tmp_path / "bench")
    evaluation.main(["dreambench", "--weights", small, "--data", str(tmp_path / "bench"), *networks, "--samples", "1",
                     "--out", str(tmp_path / "out"), "--device", "cpu"])
    rows = read(tmp_path / "out")[1:]
    assert len(rows) == 50 and {row["group"] for row in rows} == {"dog", "vase"}
    assert all(np.isfinite([row["clip_i"], row["clip_t"], row["dino"]]).all() for row in rows)
    assert Image.open(tmp_path / "out" / "sheet.png").size == (5 * 260 - 4, 2 * 260 - 4)


def test_dreambench_plus_asks_for_concept_preservation_and_prompt_following(tmp_path, networks, small, endpoint,
                                                                            capsys):
    for category, subject in {"object": "ball", "live/animal": "dog"}.items():
        picture(tmp_path / "bench" / "images" / category / "00.jpg", "green")
        caption = tmp_path / "bench" / "captions" / category / "00.txt"
        caption.parent.mkdir(parents=True)
        caption.write_text(f"{subject}\na {subject} in the snow\n")
    flags = ["dreambench++", "--weights", small, "--data", str(tmp_path / "bench"), *networks, "--samples", "1",
             "--device", "cpu", "--judge-url", endpoint.url, "--judge-model", "eyes", "--out", str(tmp_path / "out")]
    endpoint.script[:] = ["Score: 4", "Score: 2", "Score: 2", "Score: 3"]
    evaluation.main(flags)
    scores = json.loads((tmp_path / "out" / "summary.json").read_text())["scores"]
    assert scores["live/animal"]["CP"] == 1.0 and scores["live/animal"]["PF"] == 0.5
    assert scores["all"]["CP"] == 0.75 and scores["all"]["PF"] == 0.625
    assert scores["all"]["CP*PF"] == pytest.approx(0.46875) and scores["all"]["CP/PF"] == pytest.approx(1.2)
    assert "asked again 0 times" in capsys.readouterr().out
    seen = len(endpoint.seen)
    evaluation.main(flags)                                     # all is done: nobody is asked
    assert len(endpoint.seen) == seen
    with pytest.raises(InputError, match="go together"):
        evaluation.main(flags[:-4])


def test_reconstruction_and_cmmd_print_their_numbers(tmp_path, networks, small, capsys):
    for i, colour in enumerate(["red", "green", "blue"]):
        picture(tmp_path / "a" / f"{i}.png", colour)
        picture(tmp_path / "b" / f"{i}.png", "grey" if i else "red")
    evaluation.main(["reconstruct", "--weights", small, "--data", str(tmp_path / "a"), "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "reconstruct.json").read_text())
    assert len(record["pictures"]) == 3 and 0 < record["l2_ceiling"] < 2 and 0 < record["l2"] < 2
    capsys.readouterr()
    values = []
    for other in ("a", "b"):
        evaluation.main(["cmmd", str(tmp_path / "a"), str(tmp_path / other), *networks[:2], "--device", "cpu"])
        values.append(float(capsys.readouterr().out.split()[1]))
    assert abs(values[0]) < 1e-3 < values[1]


def test_bad_folders_are_one_clear_sentence(tmp_path, networks, small):
    (tmp_path / "empty").mkdir()
    for flags, said in (
            (["dreambench", "--data", str(tmp_path)], "prompts_and_classes.txt: not readable"),
            (["dreambench++", "--data", str(tmp_path)], "holds no subjects with pictures"),
            (["reconstruct", "--data", str(tmp_path / "empty")], "no folder with pictures"),
            (["cmmd", str(tmp_path), str(tmp_path), "--clip", str(tmp_path / "empty")], "holds no weights"),
            (["cmmd", str(tmp_path), str(tmp_path), "--clip", networks[3]], "holds no CLIP"),
            (["cmmd", str(tmp_path), str(tmp_path), *networks[:2]], "no folder with pictures; name two")):
        flags += ["--weights", small, "--out", str(tmp_path / "out")] if flags[0] != "cmmd" else []
        with pytest.raises(InputError, match=said):
            evaluation.main([*flags, *(networks if flags[0].startswith("dream") else []), "--device", "cpu"])


# ---------------------------------------------------------------------------------------------------------------------
# The emoji world

def test_the_bundled_model_copies_subjects_it_has_never_seen_and_does_so_from_the_reference():
    mentor = Mentor.from_pretrained("tiny")
    args = SimpleNamespace(seed=5, samples=16, batch=16, show=0)
    with torch.no_grad():
        segmented = evaluation.score_task(mentor, None, "segment", args)[0]
        copied = evaluation.score_task(mentor, None, "reconstruct", args)[0]
        mentor.prefix = lambda ids, mask, refs, plain=mentor.prefix: plain(ids, mask, refs.roll(1, 0))
        astray = evaluation.score_task(mentor, None, "segment", args)[0]
    assert segmented["iou"].mean() > 0.8 and astray["iou"].mean() < 0.4
    assert copied["psnr"].mean() > 22.5


def test_the_bundled_model_draws_the_background_that_the_prompt_names():
    mentor, names = Mentor.from_pretrained("tiny"), list(scenes.PLAIN)
    reference = Image.open(ROOT / "assets" / "penguin.png").convert("RGB")                 # on yellow
    prompts = [f"The penguin in <image>.\na penguin {scenes.SCENES[name][0][0]}" for name in names]
    with torch.no_grad():
        drawn = evaluation.draw(mentor, prompts, [[reference]] * len(names), range(len(names)))
    corners = ((drawn[:, :, :8, :8] + 1) / 2).mean((2, 3))                                 # (10, 3)
    true = torch.tensor([colorsys.hsv_to_rgb(*colour) for colour in scenes.PLAIN.values()])
    assert (torch.cdist(corners, true).argmin(dim=1) == torch.arange(len(names))).sum() >= 8


@pytest.mark.gradients
def test_a_trained_judge_and_a_small_model_give_a_record_and_a_sheet(tmp_path, small, capsys):
    path = tmp_path / "judge.safetensors"
    with pytest.raises(InputError, match="no judge yet"):
        evaluation.main(["world", "--weights", "random", "--judge", str(path)])
    evaluation.main(["judge", "--steps", "3", "--batch", "8", "--out", str(path)])
    with pytest.raises(InputError, match="not the emoji world's 64"):
        evaluation.main(["world", "--weights", "random", "--judge", str(path)])
    command = ["world", "--weights", small, "--judge", str(path), "--samples", "6", "--batch", "4", "--show", "4"]
    records = []
    for name in ("a", "b"):
        evaluation.main([*command, "--out", str(tmp_path / name)])
        assert (tmp_path / name / "world.png").exists()
        records.append(json.loads((tmp_path / name / "world.json").read_text()))
    assert records[0] == records[1]                            # a function of weights and seed
    assert set(records[0]["subject"]) >= {"scene", "subject", "hue", "scene_ceiling", "cp", "pf", "cp*pf", "cp/pf"}
    assert "iou" in records[0]["segment"] and set(records[0]["reconstruct"]) >= {"psnr_ceiling", "l2"}
    assert "judge on true pictures" in capsys.readouterr().out
    evaluation.main(["grid", "--weights", small, "--rows", "2", "--scenes", "snow", "red", "--out",
                     str(tmp_path / "grid.webp")])
    assert Image.open(tmp_path / "grid.webp").size == (3 * 132 - 4, 2 * 132 - 4)


@pytest.mark.full
@pytest.mark.gradients
def test_the_ablation_trains_every_variant_shares_stage_1_and_can_be_started_again(tmp_path, small, capfd):
    path = tmp_path / "judge.safetensors"
    evaluation.main(["judge", "--steps", "1", "--batch", "4", "--out", str(path)])
    flags = ["ablation", "--init", small, "--judge", str(path), "--steps", "3", "--seeds", "1", "--samples", "2",
             "--show", "2", "--out", str(tmp_path / "out")]
    evaluation.main(flags)
    folders = {entry.name for entry in os.scandir(tmp_path / "out") if entry.is_dir()}
    assert folders == {"seed0_1", "seed0_1_2", "seed0_none_2", "seed0_1-segment", "seed0_1-segment_2",
                       "seed0_1_2-recover", "seed0_1_2-segment", "seed0_1_2-t2i"}
    record = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [row["variant"] for row in record["rows"]] == list(evaluation.VARIANTS)
    steps = {name: len((tmp_path / "out" / name / "log.jsonl").read_text().splitlines()) for name in folders}
    assert steps["seed0_1"] == 1 and steps["seed0_1_2"] == 2 and steps["seed0_none_2"] == 3
    capfd.readouterr()
    evaluation.main(flags)
    printed = capfd.readouterr().out
    assert "steps ->" not in printed and "0.555, 0.839, 0.466" in printed
