import json
import os
import re
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
import model
import scorers
import weights
from cli import InputError

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of a small model with random weights; its prefix holds DreamBench's longest prompt."""
    folder = tmp_path_factory.mktemp("small") / "weights"
    config = replace(TINY, prefix_tokens=160, image_size=32)
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
    assert settings["cfg_scale"] == 2.0 and settings["size"] == 32
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


def dreambench_plus_folder(folder, prompts_of_kitten=9):
    """Three pictures; the kitten has nine prompts, so of all groups, or fewer."""
    for place, subject, prompts in (("live_subject/animal", "Kitten", prompts_of_kitten), ("object", "tea pot", 1),
                                    ("style", "ink", 1)):
        write_image(folder / "images" / place / "00.jpg", "green")
        caption = folder / "captions" / place / "00.txt"
        caption.parent.mkdir(parents=True)
        caption.write_text("\n".join([subject, *(f"a {subject} in place {i}" for i in range(prompts))]) + "\n")
    return str(folder)


def test_dreambench_plus_asks_the_judge_in_passes_and_a_stopped_run_goes_on_where_it_was(tmp_path, networks, small,
                                                                                        endpoint, monkeypatch, capsys):
    monkeypatch.setattr(scorers.time, "sleep", lambda seconds: None)
    folder = dreambench_plus_folder(tmp_path / "bench")
    flags = ["dreambench++", "--weights", small, "--data", folder, *networks, "--device", "cpu", "--passes", "2",
             "--judge-url", endpoint.url, "--judge-model", "eyes", "--batch", "16"]
    # the kitten's nine pictures, then tea pot and style: cp, pf, cp, pf of each
    script = ["Score: 4", "Score: 2", "Score: 3", "Score: 2"] * 9
    script += ["Score: 1", "Score: 4", "Score: 1", "Score: 4", "Score: 2", "hm", "Score: 0", "Score: 2", "Score: 0"]
    endpoint.script[:] = script
    evaluation.main([*flags, "--out", str(tmp_path / "one")])
    said = capsys.readouterr().out
    assert "asked again 1 times; 0 answers could not be read" in said and "cannot be compared with published" in said
    settings, *rows = read(tmp_path / "one")
    assert settings["seed"] == 42 and settings["samples"] == 1 and settings["passes"] == 2
    assert len(rows) == 11 and {row["seed"] for row in rows} == {42}
    assert rows[0]["cp"] == [4, 3] and rows[0]["pf"] == [2, 2] and rows[0]["cp_answers"] == [["Score: 4"], ["Score: 3"]]
    assert rows[10]["cp"] == [2, 2] and rows[10]["pf"] == [0, 0] and rows[10]["pf_answers"][0] == ["hm", "Score: 0"]
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    cp, pf = summary["judge"]["CP"], summary["judge"]["PF"]
    assert set(summary["scores"]) == {"animal", "object", "style", "all"}
    assert cp["animal"] == {"pictures": 9, "score": 3.5 / 4, "spread": pytest.approx((2 * 0.125**2)**0.5)}
    assert cp["object"]["score"] == 0.25 and cp["style"]["score"] == 0.5 and cp["human"]["pictures"] == 0
    assert [pf[name]["pictures"] for name in ("photorealistic", "style transfer", "imaginative")] == [6, 3, 2]
    assert pf["photorealistic"]["score"] == pytest.approx((4 * 2 + 4 + 0) / 6 / 4) and pf["imaginative"]["score"] == 0.5
    overall = (9 * 3.5 + 1 + 2) / 11 / 4, (9 * 2 + 4 + 0) / 11 / 4
    assert summary["judge"]["CP*PF"] == pytest.approx(overall[0] * overall[1])
    texts = [body["messages"][0]["content"][0]["text"] for _, _, body in endpoint.seen]
    assert [number for number, text in enumerate(texts) if "example of a style" in text] == [40, 43]
    # all is done: nobody is asked. Refused in the middle of the third picture: two are kept and not asked again
    seen = len(endpoint.seen)
    evaluation.main([*flags, "--out", str(tmp_path / "one")])
    assert len(endpoint.seen) == seen
    endpoint.script[:] = [*script[:9], 401]
    with pytest.raises(InputError, match="refused the question"):
        evaluation.main([*flags, "--out", str(tmp_path / "two")])
    assert len(read(tmp_path / "two")) == 3
    endpoint.script[:] = script[8:]
    evaluation.main([*flags, "--out", str(tmp_path / "two")])
    for row, again in zip(rows, read(tmp_path / "two")[1:], strict=True):
        assert {**again, "clip_i": 0, "clip_t": 0, "dino": 0} == {**row, "clip_i": 0, "clip_t": 0, "dino": 0}
        assert [again[name] for name in ("clip_i", "clip_t", "dino")] == pytest.approx(
            [row[name] for name in ("clip_i", "clip_t", "dino")], abs=1e-4)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["judge"] == summary["judge"]
    with pytest.raises(InputError, match="another passes"):
        evaluation.main([*flags, "--passes", "3", "--out", str(tmp_path / "two")])
    with pytest.raises(InputError, match="go together"):
        evaluation.main([*flags[:-4], *flags[-2:]])


KITTEN, POT, INK = "live_subject_animal_00_kitten", "object_00_tea_pot", "style_00_ink"


def files_in(folder):
    """{path below the folder: content}"""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_official_layout_is_what_dreambench_plus_reads_and_a_killed_run_ends_as_any(tmp_path, small, monkeypatch,
                                                                                       capsys):
    folder = dreambench_plus_folder(tmp_path / "bench", 2)
    flags = ["dreambench++", "--weights", small, "--data", folder, "--layout", "official", "--device", "cpu"]
    flags += ["--batch", "1", "--samples", "2"]
    evaluation.main([*flags, "--out", str(tmp_path / "one")])
    assert "8 pictures" in capsys.readouterr().out
    whole = files_in(tmp_path / "one")
    pictures = [f"{KITTEN}/{p}_{i}" for p in range(2) for i in range(2)]
    pictures += [f"{name}/0_{i}" for name in (POT, INK) for i in range(2)]
    assert set(whole) == {"settings.json", "negative_prompt.txt", *(f"text/{name}.txt" for name in pictures), *(
        f"{kind}_image/{name}.jpg" for kind in ("src", "tgt") for name in pictures)}
    assert whole["negative_prompt.txt"] == b"" and whole[f"text/{POT}/0_1.txt"] == b"a tea pot in place 0"
    assert json.loads(whole["settings.json"])["cfg_scale"] == 2.0
    with Image.open(tmp_path / "one" / "src_image" / POT / "0_0.jpg") as copy:
        assert copy.format == "JPEG" and copy.size == (90, 70)             # the whole reference, hardly changed
        reference = np.asarray(Image.open(tmp_path / "bench" / "images" / "object" / "00.jpg"), dtype=float)
        assert abs(np.asarray(copy) - reference).mean() < 3
    assert Image.open(tmp_path / "one" / "tgt_image" / KITTEN / "1_1.jpg").size == (32, 32)
    assert whole[f"tgt_image/{KITTEN}/0_0.jpg"] != whole[f"tgt_image/{KITTEN}/0_1.jpg"]
    drawn, draw_one = [], evaluation.sample_images

    def interrupted(*args):
        drawn.append(args)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw_one(*args)

    monkeypatch.setattr(evaluation, "sample_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main([*flags, "--out", str(tmp_path / "two")])
    assert len(list((tmp_path / "two").rglob("tgt_image/*/*.jpg"))) == 3
    evaluation.main([*flags, "--out", str(tmp_path / "two")])
    assert len(drawn) == 4 + 5 and files_in(tmp_path / "two") == whole
    with pytest.raises(InputError, match="settings.json: was made with another cfg_scale"):
        evaluation.main([*flags, "--cfg", "7.5", "--out", str(tmp_path / "two")])
    with pytest.raises(InputError, match="--layout official scores nothing"):
        evaluation.main([*flags, "--judge-url", "http://host/v1", "--judge-model", "eyes"])


def test_what_dreambench_plus_does_not_know_is_one_clear_sentence(tmp_path):
    def message():
        with pytest.raises(InputError) as error:
            evaluation.dreambench_plus_examples(args)
        return str(error.value)

    folder = tmp_path / "bench"
    args = evaluation.parse(["dreambench++", "--data", dreambench_plus_folder(folder)])
    assert len(evaluation.dreambench_plus_examples(args)) == 11
    shutil.copy(folder / "images" / "object" / "00.jpg", folder / "images" / "object" / "00.jpeg")
    assert "00.jpeg has the same category, number and subject" in message()
    (folder / "images" / "object" / "00.jpeg").unlink()
    caption = folder / "captions" / "style" / "00.txt"
    caption.write_text("ink\n" * 11)
    assert "00.txt: has 11 lines; it should hold the subject and the nine prompts" in message()
    caption.write_text("ink\nprompt\n")
    (folder / "images" / "style").rename(folder / "images" / "plants")
    assert "plants/00.jpg: lies in no folder called animal, human, object, style" in message()


def segmentation_rows(folder):
    """A JSONL of three usable segmentation rows: an object in the left half, in the upper half, and both as two."""
    Image.new("RGB", (96, 64), "white").save(folder / "a.png")
    for name, box in (("left", (0, 0, 48, 64)), ("top", (0, 0, 96, 32))):
        mask = Image.new("L", (96, 64))
        mask.paste(255, box)
        mask.save(folder / f"{name}.png")
    row = {"source_image": "a.png", "do_mask": True}
    rows = [{**row, "image_path": "left.png", "objects": "cat"},
            {"input_text": "a dog", "source_image": "a.png", "generation_only": True},
            {**row, "image_path": "gone.png", "objects": "dog"},
            {**row, "image_path": "top.png", "objects": "dog"},
            {**row, "image_path": ["left.png", "top.png"], "objects": ["cat", "dog"]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    return str(folder / "rows.jsonl")


def test_drawn_objects_are_compared_with_the_masks_and_unusable_rows_are_named(tmp_path, small, monkeypatch, capsys):
    flags = ["segment", "--weights", small, "--data", segmentation_rows(tmp_path), "--device", "cpu", "--seed", "5"]
    flags += ["--out", str(tmp_path / "out")]
    white = lambda self, batch, seeds: torch.ones_like(batch["target"])
    for drawn, iou in ((lambda self, batch, seeds: batch["target"], [1, 1, 1]), (white, [0.5, 0.5, 0.75])):
        monkeypatch.setattr(model.Mentor, "sample", drawn)
        evaluation.main(flags)
        record = json.loads((tmp_path / "out" / "segment.json").read_text())
        assert [row["iou"] for row in record["rows"]] == pytest.approx(iou, abs=0.01)
        assert record["iou"] == pytest.approx(sum(iou) / 3, abs=0.01)
    assert [row["row"].rsplit(":")[-1] for row in record["rows"]] == ["1", "4", "5"]
    assert [row["seed"] for row in record["rows"]] == [5, 7, 8] and record["cfg_scale"] == 2.0
    assert record["rows"][2]["prompt"] == "The cat in <image>.\nThe dog in <image>."
    assert all(0 <= row["iou_ceiling"] <= 1 for row in record["rows"])
    first, second = record["unusable"]
    assert "rows.jsonl:6: not JSON" in first and "rows.jsonl:3: " in second and "gone.png" in second
    assert "2 lines could not be used" in capsys.readouterr().out
    (tmp_path / "rows.jsonl").write_text('{"input_text": "a dog", "source_image": "a.png", "generation_only": true}\n')
    with pytest.raises(InputError, match='has no row of an object, its mask and "do_mask": true'):
        evaluation.main(flags)


def test_an_object_outside_of_what_is_drawn_is_no_usable_row(tmp_path, small):
    data_path = segmentation_rows(tmp_path)
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 12, 64))                            # the square begins at 16
    mask.save(tmp_path / "left.png")
    row = {"source_image": "a.png", "image_path": "left.png", "objects": "cat", "do_mask": True}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="no row can be used; .*rows.jsonl:1: nothing of the mask is left"):
        evaluation.main(["segment", "--weights", small, "--data", data_path, "--device", "cpu", "--out", str(tmp_path)])
    assert not (tmp_path / "segment.json").exists()


def test_the_bundled_model_cuts_out_objects_of_the_example_data(tmp_path):
    evaluation.main(["segment", "--data", str(ROOT / "assets" / "example" / "data.jsonl"), "--device", "cpu",
                     "--out", str(tmp_path)])
    record = json.loads((tmp_path / "segment.json").read_text())
    assert len(record["rows"]) == 6 and not record["unusable"] and record["weights"] == "tiny"
    assert 0.6 < record["iou"] < record["iou_ceiling"] < 1


def test_sampling_flags_decide_what_is_drawn_and_stand_in_the_results(tmp_path, small):
    write_image(tmp_path / "images" / "a.png", "red")
    flags, records = ["reconstruct", "--weights", small, "--data", str(tmp_path / "images"), "--device", "cpu"], []
    for given in ([], ["--temperature", "0", "--cfg", "3", "--top-k", "7", "--top-p", "0.5"]):
        evaluation.main([*flags, *given, "--out", str(tmp_path)])
        records.append(json.loads((tmp_path / "reconstruct.json").read_text()))
    names = "cfg_scale", "temperature", "top_k", "top_p"
    assert [[record[name] for name in names] for record in records] == [[2.0, 1.0, 64, 1.0], [3.0, 0.0, 7, 0.5]]
    assert records[0]["l2"] != records[1]["l2"] and records[0]["l2_ceiling"] == records[1]["l2_ceiling"]
    with pytest.raises(InputError, match="top-k is 16384 but must lie between 1 and the vocabulary's 64"):
        evaluation.main([*flags, "--top-k", "16384", "--out", str(tmp_path)])


def test_a_large_model_is_compiled_before_it_draws(tmp_path, small, monkeypatch):
    write_image(tmp_path / "images" / "a.png", "red")
    compiled = []
    monkeypatch.setattr(weights, "is_large", lambda config: True)
    monkeypatch.setattr(weights.fast, "compile_blocks", compiled.append)
    evaluation.main(["reconstruct", "--weights", small, "--data", str(tmp_path / "images"), "--device", "cpu", "--out",
                     str(tmp_path)])
    assert len(compiled) == 1 and isinstance(compiled[0], model.Decoder)


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


@pytest.mark.full
@pytest.mark.parametrize("command", ["reconstruct", "segment", "dreambench++"])
def test_two_processes_make_what_one_does(tmp_path, small, command):
    if command == "dreambench++":
        flags = [command, "--data", dreambench_plus_folder(tmp_path / "bench", 2), "--layout", "official"]
    elif command == "segment":
        flags = [command, "--data", segmentation_rows(tmp_path)]
    else:
        flags = [command, "--data", str(tmp_path / "images")]
        for i, colour in enumerate(["red", "green", "blue"]):
            write_image(tmp_path / "images" / f"{i}.png", colour)
    flags += ["--weights", small, "--batch", "1", "--device", "cpu"]
    torch.set_num_threads(1)                   # as the two have, for the last digit depends on it
    evaluation.main([*flags, "--out", str(tmp_path / "one")])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
                    "--rdzv_endpoint=localhost:0", "eval.py", *flags, "--out", str(tmp_path / "two")], cwd=ROOT,
                   check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = files_in(tmp_path / "one"), files_in(tmp_path / "two")
    assert set(one) == set(two) and len(one) == (2 + 3 * 4 if command == "dreambench++" else 1)
    assert one == two                          # with a batch of one, to the last digit


def test_rounding_to_fp32_changes_nothing_and_to_int8_a_little(toy, capsys):
    said = {}
    for dtype in ("fp32", "int8"):
        evaluation.main(["rounding", "--weights", toy[0], "--data", toy[1], "--n", "6", "--batch", "4",
                         "--dtype", dtype, "--device", "cpu"])
        said[dtype] = [float(number) for number in re.findall(r"\d+\.\d+|\d+(?=%)", capsys.readouterr().out)]
    before, after, same, to_the_end = said["fp32"]
    assert before == after and same == to_the_end == 100
    before, after, same, to_the_end = said["int8"]
    assert before == said["fp32"][0] and 0 < abs(after - before) < 0.05 and 30 < same < 100
