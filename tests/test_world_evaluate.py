"""The commands that measure small models on the emoji world."""
import colorsys
import json
import os
import pathlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import log
from PIL import Image

import data
import weights
from cli import InputError
from world import evaluate, rows, scenes
from world.judge import accuracy_on_true_images, load_judge
from world.rows import World
from world.rules import RULES
from world.train import MINI, SMALL, STAGES

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of a small model with random weights, of fewer layers."""
    folder = tmp_path_factory.mktemp("small") / "tiny"
    config = replace(SMALL, vision=replace(SMALL.vision, layers=2), t5=replace(SMALL.t5, layers=1),
                     decoder=replace(SMALL.decoder, layers=1))
    weights.save(weights.random_model(config, rows.small_tokenizer()), str(folder))
    return str(folder)


@pytest.mark.full
def test_the_bundled_model_copies_subjects_it_has_never_seen_and_does_so_from_the_reference():
    mentor = weights.load("tiny")
    args = SimpleNamespace(seed=5, samples=16, batch=16, show=0)
    segmented = evaluate.score_test(mentor, None, "segment", args)[0]
    copied = evaluate.score_test(mentor, None, "reconstruct", args)[0]
    sample = mentor.sample
    mentor.sample = lambda batch, seeds: sample(batch | {"refs": batch["refs"].roll(1, 0)}, seeds)
    wrong = evaluate.score_test(mentor, None, "segment", args)[0]
    assert segmented["iou"].mean() > 0.8 and wrong["iou"].mean() < 0.4
    assert copied["psnr"].mean() > 22.5


def test_the_bundled_model_draws_the_background_that_the_prompt_names():
    mentor, names = weights.load("tiny"), list(scenes.PLAIN)
    reference = Image.open(ROOT / "assets" / "penguin.png").convert("RGB")                 # on yellow
    prompts = [data.prompt_for("subject", ["penguin"], f"a penguin {scenes.SCENES[name].phrases[0]}") for name in names]
    batch = data.collate([mentor.processor(prompt, [reference]) for prompt in prompts])
    images = mentor.sample(batch, range(len(names)))
    corners = ((images[:, :, :8, :8] + 1) / 2).mean((2, 3))                                # (10, 3)
    true = torch.tensor([colorsys.hsv_to_rgb(*colour) for colour in scenes.PLAIN.values()])
    assert (torch.cdist(corners, true).argmin(dim=1) == torch.arange(len(names))).sum() >= 8


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A file of a judge after a few steps."""
    path = str(tmp_path_factory.mktemp("judge") / "judge.safetensors")
    with torch.enable_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("world.judge.accuracy_on_true_images", lambda judge: accuracy_on_true_images(judge, n=100))
        evaluate.main(["judge", "--steps", "3", "--batch", "8", "--out", path])
    return path


def test_scoring_a_small_model_gives_a_record_and_a_sheet(tmp_path, small, judge, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "accuracy_on_true_images", lambda judge: accuracy_on_true_images(judge, n=100))
    command = ["world", "--weights", small, "--judge", judge, "--samples", "4", "--batch", "3", "--show", "2"]
    records = []
    for name in ("a", "b"):
        evaluate.main([*command, "--out", str(tmp_path / name)])
        assert (tmp_path / name / "world.png").exists()
        records.append(json.loads((tmp_path / name / "world.json").read_text()))
    assert records[0] == records[1]                            # a function of weights and seed
    assert set(records[0]["subject"]) >= {"scene", "subject", "hue", "scene_ceiling", "cp", "pf", "cp*pf", "cp/pf"}
    assert "iou" in records[0]["segment"] and set(records[0]["reconstruct"]) >= {"psnr_ceiling", "l2"}
    assert not {"two subjects", "four subjects"} & set(records[0])         # its prefix has no room for two references
    printed = capsys.readouterr().out
    assert "judge on true pictures" in printed and "only 128 prefix rows: two subjects, three" in printed


def test_several_subjects_are_scored_with_as_many_references(tmp_path, small, judge, monkeypatch):
    mentor, asked = weights.load(small, prefix_tokens=360), []
    assert evaluate.tests_that_fit(mentor) == list(evaluate.TESTS)
    monkeypatch.setattr(mentor, "sample", lambda batch, seeds: asked.append(batch) or batch["target"])
    for number, name in enumerate(("two subjects", "three subjects", "four subjects"), start=2):
        scores, _ = evaluate.score_test(mentor, load_judge(judge), name, SimpleNamespace(
            seed=5, samples=4, batch=3, show=0))
        assert {"all", "share", "twice", "missing", "all_ceiling"} <= set(scores) and scores["all"].shape == (4,)
    assert [len(batch["refs"]) / len(batch["ids"]) for batch in asked] == [2, 2, 3, 3, 4, 4]


def test_smaller_images_are_judged_at_the_worlds_size(judge, monkeypatch):
    mentor = weights.random_model(MINI, rows.small_tokenizer())
    args = SimpleNamespace(seed=5, samples=4, batch=3, show=0)
    monkeypatch.setattr(mentor, "sample", lambda batch, seeds: batch["target"])
    assert evaluate.score_test(mentor, None, "segment", args)[0]["iou"].min() > 0.8
    scores, _ = evaluate.score_test(mentor, load_judge(judge), "subject", args)
    assert scores["cp"].shape == scores["cp_ceiling"].shape == (4,)


def reader(seed):
    """Draws what the first example of each lesson shows, as a model would that has learned every rule."""
    def sample(batch, seeds):
        references, images = batch["refs"].unflatten(0, (-1, 5)), []
        for k, (_, shown, *_) in zip(seeds, references):
            lesson = World(held_out=True).lesson(np.random.default_rng((seed, k - seed)))
            errors = {rule: (data.clip_pixels(lesson.output(0, rule), 64) - shown).abs().max().item() for rule in RULES}
            images.append(data.target_pixels(lesson.output(2, min(errors, key=errors.get)), 64))
        return torch.stack(images)
    return sample


def test_a_model_that_reads_the_examples_draws_their_rule_and_with_others_it_falls_to_chance(monkeypatch):
    mentor, args = weights.load("tiny", prefix_tokens=STAGES["icl"].prefix_tokens), SimpleNamespace(
        seed=5, samples=120, batch=60, show=2)
    monkeypatch.setattr(mentor, "sample", reader(args.seed))
    records, tiles = evaluate.score_lessons(mentor, args)
    scores = evaluate.lesson_scores(records)
    assert scores["accuracy"] == 1 and 0.08 < scores["shuffled"] < 0.26 and scores["ceiling"] > 0.95 and len(tiles) == 2
    assert set(scores) == {"accuracy", "shuffled", "ceiling", *RULES}


def test_a_model_that_copies_the_query_has_drawn_no_rule_and_one_that_is_told_it_is_seen_by_the_shuffled_score(
        monkeypatch):
    mentor, args = weights.load("tiny", prefix_tokens=384), SimpleNamespace(seed=6, samples=20, batch=20, show=0)
    lessons = [World(held_out=True).lesson(np.random.default_rng((6, k))) for k in range(20)]
    queries = torch.stack([data.target_pixels(lesson.input(2), 64) for lesson in lessons])
    for sample, score in ((lambda batch, seeds: queries, 0), (lambda batch, seeds: batch["target"], 1)):
        monkeypatch.setattr(mentor, "sample", sample)
        scores = evaluate.lesson_scores(evaluate.score_lessons(mentor, args)[0])
        assert scores["accuracy"] == scores["shuffled"] == score


def trainings(monkeypatch, tmp_path, table):
    """The commands that train a table's variants, and of each the words that not all of them have."""
    commands = []
    monkeypatch.setattr(evaluate.subprocess, "Popen", lambda command, **options: commands.append(command)
                        or SimpleNamespace(wait=lambda: 0))
    args = SimpleNamespace(init="tiny", out=str(tmp_path), seeds=1, steps=7, global_batch=4, bf16=True)
    for name, variant in table.variants.items():
        evaluate.train_variant(args, name, variant)
    return commands, [set(command) - set.intersection(*map(set, commands)) for command in commands]


def test_the_variants_of_the_architectures_differ_in_their_own_flags_alone(monkeypatch, tmp_path):
    commands, own = trainings(monkeypatch, tmp_path, evaluate.ARCHITECTURES)
    folder = str(tmp_path / "seed0_")
    without = {"--prefix-rope", "identity"}
    assert own == [{"2", "released", f"{folder}2-released"}, {"2", "query", f"{folder}2-query-identity", *without},
                   {"multi", "--lr", "2e-3", "released", f"{folder}multi-2e-3-released"},
                   {"2", "released", f"{folder}2-released-identity", *without}]
    assert STAGES["2"].lr == 2e-3
    assert all(command[command.index("--steps") + 1] == "7" and {"--connector", "--bf16"} <= set(command)
               for command in commands)


def test_the_rows_of_copying_differ_in_its_share_and_in_recovery_alone(monkeypatch, tmp_path):
    commands, own = trainings(monkeypatch, tmp_path, evaluate.COPYING)
    folder = f"{tmp_path}/seed0_2-1e-3"
    assert own == [{"0.0", f"{folder}-0.0"}, {"0.0", f"{folder}-0.0-recover", "--without", "recover"},
                   {"0.9", f"{folder}-0.9"}, {"0.9", f"{folder}-0.9-recover", "--without", "recover"}]
    assert all(command[command.index("--copies") + 1] in own[k] for k, command in enumerate(commands))


def test_the_grid_is_a_sheet_of_subjects_and_scenes(tmp_path, small):
    evaluate.main(["grid", "--weights", small, "--rows", "2", "--scenes", "snow", "red", "--out",
                   str(tmp_path / "grid.webp")])
    assert Image.open(tmp_path / "grid.webp").size == (3 * 132 - 4, 2 * 132 - 4)


def test_bad_input_is_one_clear_sentence(tmp_path, small, judge):
    (tmp_path / "budget.json").write_text("{")
    large = str(tmp_path / "large")
    weights.save(weights.random_model(replace(SMALL, image_size=96), rows.small_tokenizer()), large)
    for command, message in (
            (["world", "--judge", str(tmp_path / "absent.safetensors")], "no judge yet"),
            (["world", "--weights", large, "--judge", judge], "96 pixels a side, more than the emoji world's 64"),
            (["world", "--samples", "0"], "must be a whole number above 0, not 0"),
            (["grid", "--out", str(tmp_path / "grid.txt")], "end the name in .png"),
            (["grid", "--weights", small, "--rows", "200", "--out", str(tmp_path / "g.png")], "178 held-out subjects"),
            (["ablation", "--init", small, "--aligned", small, "--judge", judge, "--steps", "2"], "give 3 or more"),
            (["ablation", "--init", small, "--judge", judge, "--rows", "full, aligned"], "no such folder of weights"),
            (["ablation", "--rows", "empty"], "invalid choice: 'empty'"),
            (["ablation", "--init", small, "--judge", judge, "--rows", "full", "--out", str(tmp_path)],
             "budget.json: is no JSON")):
        with pytest.raises(InputError, match=message):
            evaluate.main(command)


def flags_of(command):
    """{flag: its values} of a training's command."""
    found = {}
    for word in command[3:]:
        if word.startswith("--"):
            values = found.setdefault(word, [])
        else:
            values.append(word)
    return found


def test_every_row_of_the_ablation_trains_what_it_says_and_stage_2_alike_long_but_in_one(monkeypatch, tmp_path, capsys):
    commands = {}

    def pretend(command, **options):
        told = flags_of(command)
        name = os.path.basename(told["--out"][0])
        assert name not in commands                            # variants that begin alike share a folder
        commands[name] = told
        os.makedirs(f"{told['--out'][0]}/step-{int(told['--steps'][0]):08}")
        return SimpleNamespace(wait=lambda: 0)

    scores = {"subject": {"cp": 0.5, "pf": 0.4, "cp*pf": 0.2, "cp/pf": 1.25, "hue": 1.0}, "segment": {"iou": 0.5},
              "reconstruct": {"l2": 0.1}}
    monkeypatch.setattr(evaluate.subprocess, "Popen", pretend)
    for name in ("load_small", "load_judge"):
        monkeypatch.setattr(evaluate, name, lambda name: None)
    monkeypatch.setattr(evaluate, "score_variant", lambda folder, judge, args: scores)
    monkeypatch.setattr(evaluate, "accuracy_on_true_images", lambda judge: {"scene": 1.0})
    evaluate.main(["ablation", "--init", "captioned", "--aligned", "aligned", "--steps", "7", "--seeds",
                   "1", "--out", str(tmp_path)])
    steps = {name: told["--steps"] for name, told in commands.items()}
    starts = {name: os.path.basename(told["--init"][0]) for name, told in commands.items()}
    first, second = "seed0_1-third", "seed0_1-third_2-0.5-rest"
    assert steps == {name: ["2" if name.count("_") == 1 and "_1" in name else "7" if name == "seed0_2-0.5" else "5"]
                     for name in commands}
    assert starts[first] == starts["seed0_2-0.5-rest"] == starts["seed0_2-0.5"] == "captioned"
    assert starts["seed0-aligned_1-third"] == starts["seed0-aligned_2-0.5-rest"] == "aligned"
    assert starts[second] == "seed0_1-third"
    own = {"--stage", "--init", "--out", "--steps", "--sample-every"}
    plain = {flag: values for flag, values in commands[first].items() if flag not in own}
    differing = {name: {flag: values for flag, values in told.items() if flag not in own and plain.get(flag) != values}
                 for name, told in commands.items()}
    half = {"--copies": ["0.5"]}
    assert differing == {
        first: {},
        "seed0-aligned_1-third": {},
        "seed0_1-segment-third": {"--without": ["segment"]},
        "seed0_1-identity-third": {"--prefix-rope": ["identity"]},
        second: half,
        "seed0_2-0.5-rest": half,
        "seed0_2-0.5": half,
        "seed0_1-segment-third_2-0.5-rest": half,
        "seed0-aligned_1-third_2-0.5-rest": half,
        "seed0-aligned_2-0.5-rest": half,
        "seed0_1-third_2-0.5-recover-rest": half | {"--without": ["recover"]},
        "seed0_1-third_2-0.5-segment-rest": half | {"--without": ["segment"]},
        "seed0_1-third_2-subject-rest": {"--without": ["subject"]},
        "seed0_1-third_2-0.5-t2i-rest": half | {"--without": ["t2i"]},
        "seed0_1-identity-third_2-0.5-identity-rest": half | {"--prefix-rope": ["identity"]},
        "seed0_1-third_2-0.0-rest": {"--copies": ["0.0"]},
        "seed0_1-third_2-0.0-recover-rest": {"--copies": ["0.0"], "--without": ["recover"]},
        "seed0_1-third_2-0.9-rest": {"--copies": ["0.9"]},
        "seed0_1-third_2-0.9-recover-rest": {"--copies": ["0.9"], "--without": ["recover"]}}
    record, printed = json.loads((tmp_path / "ablation.json").read_text()), capsys.readouterr().out
    assert [row["variant"] for row in record["rows"]] == list(evaluate.ABLATION.variants)
    row = record["rows"][0]
    assert (row["pretrain"], row["copies"], row["paper"]) == ("captioned", 0.5, [.555, .839, .466])
    assert row["runs"][1] == {"stage": "2", "flags": ["--copies", "0.5"], "steps": 5} and row["subject"]["cp"] == 0.5
    assert record["aligned"] == "aligned" and "0.555, 0.839, 0.466" in printed
    assert [line.split()[2:4] for line in printed.splitlines() if line.startswith("full, aligned  ")] == [
        ["aligned", "0.5"]]


@pytest.mark.full
@pytest.mark.gradients
def test_rows_of_the_ablation_are_trained_and_scored_and_the_command_can_be_given_again(tmp_path, small, judge, capfd):
    flags = ["ablation", "--init", small, "--aligned", small, "--judge", judge, "--steps", "3", "--seeds", "1",
             "--samples", "2", "--show", "2", "--out", str(tmp_path / "out"), "--rows", "full", "without stage 1",
             "without stage 1, equal total", "without recovery", "full, aligned"]
    evaluate.main(flags)
    steps = {entry.name: len(log(entry.path)) for entry in os.scandir(tmp_path / "out") if entry.is_dir()}
    assert steps == {"seed0_1-third": 1, "seed0_1-third_2-0.5-rest": 2, "seed0_2-0.5-rest": 2, "seed0_2-0.5": 3,
                     "seed0_1-third_2-0.5-recover-rest": 2, "seed0-aligned_1-third": 1,
                     "seed0-aligned_1-third_2-0.5-rest": 2}
    record = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [row["variant"] for row in record["rows"]] == flags[flags.index("--rows") + 1:]
    assert all({"subject", "segment", "reconstruct"} < set(row) for row in record["rows"])
    capfd.readouterr()
    evaluate.main(flags)
    printed = capfd.readouterr().out
    assert "steps ->" not in printed and "0.555, 0.839, 0.466" in printed
    with pytest.raises(InputError, match="was begun with"):
        evaluate.main([*flags, "--global-batch", "8"])
