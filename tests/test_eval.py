import json

import pytest
import torch
from conftest import close

import eval as evaluation
import sprites
from data import InputError
from emoji import EmojiData
from model import Mentor


def true_samples(task="t2i", n=6):
    world = EmojiData(evaluation.plain_prompter(), weights={task: 1}, seed=5, held_out=True, extras=False)
    return [world[k] for k in range(n)]


class Oracle(torch.nn.Module):
    """A judge that knows the truth, `wrong` degrees off in hue."""

    def __init__(self, metas, wrong=0.0):
        super().__init__()
        self.scene, self.subject, hue = evaluation.truth(metas)
        self.hue = hue + wrong / 57.29578

    def forward(self, pixels):
        one_hot = torch.nn.functional.one_hot
        return (one_hot(self.scene, 30).float(), one_hot(self.subject, len(sprites.subjects())).float(),
                torch.stack([self.hue.cos(), self.hue.sin()], dim=1) * 3)


def test_the_verdict_is_right_for_the_truth_and_wrong_for_another_hue_scene_or_subject():
    metas = [sample["meta"] for sample in true_samples()]
    scores = evaluation.verdict(Oracle(metas), None, metas)
    assert all((value == 1).all() for value in scores.values())
    assert (evaluation.verdict(Oracle(metas, 44), None, metas)["hue"] == 1).all()
    assert (evaluation.verdict(Oracle(metas, -46), None, metas)["hue"] == 0).all()
    other = [{**meta, "scene": "snow" if meta["scene"] != "snow" else "beach"} for meta in metas]
    assert (evaluation.verdict(Oracle(metas), None, other)["scene"] == 0).all()
    held_out = [i for i, subject in enumerate(sprites.subjects()) if subject.held_out]
    other = [{**meta, "subject": held_out[held_out.index(meta["subject"]) - 7]} for meta in metas]
    assert (evaluation.verdict(Oracle(metas), None, other)["subject"] == 0).all()


def test_segmentation_and_reconstruction_scores_are_perfect_for_the_truth_only():
    samples = true_samples("segment")
    true, metas = torch.stack([s["target"] for s in samples]), [s["meta"] for s in samples]
    assert (evaluation.iou(true, metas) > 0.85).all()          # dark parts of a subject count as background
    assert (evaluation.iou(torch.ones_like(true), metas) < 0.5).all()
    close(evaluation.decibels(true * 0 + 0.2, true * 0), torch.full((6,), 20.0), 1e-3)


@pytest.mark.gradients
def test_a_trained_judge_and_a_small_model_give_a_record_and_a_sheet(tmp_path, capsys):
    path = tmp_path / "judge.safetensors"
    with pytest.raises(InputError, match="no judge yet"):
        evaluation.main(["world", "--weights", "random", "--judge", str(path)])
    evaluation.main(["judge", "--steps", "3", "--batch", "8", "--out", str(path)])
    with pytest.raises(InputError, match="not the emoji world's 64"):
        evaluation.main(["world", "--weights", "random", "--judge", str(path)])
    Mentor.random("tiny").save_pretrained(tmp_path / "tiny")
    command = ["world", "--weights", str(tmp_path / "tiny"), "--judge", str(path), "--n", "6", "--batch", "4",
               "--show", "4"]
    records = []
    for name in ("a", "b"):
        evaluation.main([*command, "--out", str(tmp_path / name)])
        assert (tmp_path / name / "world.png").exists()
        records.append(json.loads((tmp_path / name / "world.json").read_text()))
    assert records[0] == records[1]                            # a function of weights and seed
    assert set(records[0]["subject"]) >= {"scene", "subject", "hue", "scene_ceiling"}
    assert "iou" in records[0]["segment"] and "psnr_ceiling" in records[0]["reconstruct"]
    assert "judge on true pictures" in capsys.readouterr().out
