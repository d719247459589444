import json
import os
import pathlib
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, material
from PIL import Image

import eval as evaluation
import weights
from cli import InputError

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of a small model with random weights; its prefix holds DreamBench's longest prompt."""
    folder = tmp_path_factory.mktemp("small") / "weights"
    config = replace(TINY, prefix_tokens=160, image_size=64)
    weights.save(weights.random_model(config, weights.byte_tokenizer()), folder)
    return str(folder)


def write_image(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(colour))).integers(0, 60, (70, 90, 3))
    Image.fromarray((np.array(Image.new("RGB", (90, 70), colour)) // 2 + noise).astype(np.uint8)).save(path)


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
            write_image(folder / subject / f"{i:02}.jpg", colour)
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
    examples, missing = evaluation.dreambench_examples(args)
    prompts = {}
    for example in examples:
        prompts.setdefault(example.group, set()).add(example.prompt)
    assert len(prompts) + len(missing) == 30 and not set(missing) & set(prompts)
    assert all(len(of_subject) == 25 for of_subject in prompts.values()) and "a dog wearing a red hat" in prompts["dog"]
    assert "a bowl floating in an ocean of milk" in prompts["berry_bowl"]
    keys, seeds = {example.key for example in examples}, {example.seed for example in examples}
    assert len(keys) == len(seeds) == len(examples)


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
        write_image(tmp_path / "bench" / "images" / category / "00.jpg", "green")
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
        write_image(tmp_path / "a" / f"{i}.png", colour)
        write_image(tmp_path / "b" / f"{i}.png", "grey" if i else "red")
    evaluation.main(["reconstruct", "--weights", small, "--data", str(tmp_path / "a"), "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "reconstruct.json").read_text())
    assert len(record["pictures"]) == 3 and 0 < record["l2_ceiling"] < 2 and 0 < record["l2"] < 2
    capsys.readouterr()
    values = []
    for other in ("a", "b"):
        evaluation.main(["cmmd", str(tmp_path / "a"), str(tmp_path / other), *networks[:2], "--device", "cpu"])
        said = capsys.readouterr().out
        values.append(float(said.split()[1]))
        assert "by CLIP ViT-64 channels/14 at 56 pixels, not comparable with published figures" in said
    assert abs(values[0]) < 1e-3 < values[1]


def test_bad_folders_are_one_clear_sentence(tmp_path, networks, small):
    (tmp_path / "empty").mkdir()
    for flags, message in (
            (["dreambench", "--data", str(tmp_path)], "prompts_and_classes.txt: no such file; it should hold Dream"),
            (["dreambench++", "--data", str(tmp_path)], "holds no subjects with pictures"),
            (["reconstruct", "--data", str(tmp_path / "empty")], "no folder with pictures"),
            (["cmmd", str(tmp_path), str(tmp_path), "--clip", str(tmp_path / "empty")], "holds no weights"),
            (["cmmd", str(tmp_path), str(tmp_path), "--clip", networks[3]], "holds no CLIP"),
            (["cmmd", str(tmp_path), str(tmp_path), *networks[:2]], "no folder with pictures; name two")):
        flags += ["--weights", small, "--out", str(tmp_path / "out")] if flags[0] != "cmmd" else []
        with pytest.raises(InputError, match=message):
            evaluation.main([*flags, *(networks if flags[0].startswith("dream") else []), "--device", "cpu"])


def test_a_bad_judge_url_and_a_bad_out_are_reported_before_any_work(tmp_path, networks, monkeypatch):
    def no_work(*args, **kwargs):
        raise AssertionError("the model was loaded before the flags were checked")

    monkeypatch.setattr(weights, "load", no_work)
    folder = dreambench_folder(tmp_path / "bench")
    with pytest.raises(InputError, match="--judge-url 'ftp://host/v1': not an address"):
        evaluation.main(["dreambench++", "--data", folder, "--judge-url", "ftp://host/v1", "--judge-model", "eyes"])
    (tmp_path / "file").write_text("")
    for command in (["dreambench", *networks], ["reconstruct"]):
        with pytest.raises(InputError, match="cannot be written"):
            evaluation.main([*command, "--data", folder, "--out", str(tmp_path / "file"), "--device", "cpu"])
    for flag, value in (("--samples", "0"), ("--batch", "-1"), ("--seed", "x")):
        with pytest.raises(InputError, match=f"{flag}: must be"):
            evaluation.main(["dreambench", "--data", folder, flag, value])


def test_missing_subjects_and_damaged_results_are_said(tmp_path, networks, small, capsys):
    folder, out = dreambench_folder(tmp_path / "bench"), tmp_path / "out"
    shutil.rmtree(tmp_path / "bench" / "ball")
    flags = ["dreambench", "--weights", small, "--data", folder, *networks, "--samples", "1", "--device", "cpu"]
    flags += ["--out", str(out)]
    evaluation.main(flags)
    assert capsys.readouterr().out.count("holds no pictures of 1 of DreamBench's subjects (ball)") == 2
    assert json.loads((out / "summary.json").read_text())["missing_subjects"] == ["ball"]
    assert not list(out.glob(".*"))                            # nothing temporary stays
    whole = (out / "results.jsonl").read_text()
    row = json.loads(whole.splitlines()[1])
    wrong = [json.dumps(row | change) + "\n" for change in (
        {"key": 3}, {"clip_i": None}, {"dino": 7.0}, {"cp": 5}, {"cp_answers": [1]}, {"surprise": 1}, {"seed": True})]
    for number, damage in ((1, "[]\n"), (1, "5\n"), (3, "{}\n"), (3, "no JSON\n"), (3, "[" * 100_000 + "\n"),
                           (3, '{"clip_i": NaN}\n'), *((3, line) for line in wrong)):
        (out / "results.jsonl").write_text(whole + damage if number == 3 else damage)
        with pytest.raises(InputError, match=f"results.jsonl: line {number}"):
            evaluation.main(flags)
    # torn by a kill, another process wrote on behind it; and zeros, as a crash leaves them
    first, second = whole.splitlines(keepends=True)
    pictures = sorted(out.glob("*-*.png"))
    (out / "results.jsonl").write_text(first + second[:30] + second + "\0" * 40 + "\n")
    evaluation.main(flags)
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 4 and json.loads(lines[3]) == pytest.approx(json.loads(second), abs=1e-4)
    assert sorted(out.glob("*-*.png")) == pictures


def test_two_processes_reconstruct_what_one_does(tmp_path, small):
    for i, colour in enumerate(["red", "green", "blue"]):
        write_image(tmp_path / "images" / f"{i}.png", colour)
    flags = ["reconstruct", "--weights", small, "--data", str(tmp_path / "images"), "--batch", "2", "--device", "cpu"]
    evaluation.main([*flags, "--out", str(tmp_path / "one")])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
                    "--rdzv_endpoint=localhost:0", "eval.py", *flags, "--out", str(tmp_path / "two")], cwd=ROOT,
                   check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (json.loads((tmp_path / name / "reconstruct.json").read_text()) for name in ("one", "two"))
    assert [row["picture"] for row in two["pictures"]] == [row["picture"] for row in one["pictures"]]
    for row, again in zip(one["pictures"], two["pictures"]):
        assert again["l2"] == pytest.approx(row["l2"], abs=1e-4)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"reconstruct.json"}
