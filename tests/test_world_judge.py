"""The emoji world's judge: its scores against a judge that knows the answers."""
import pytest
import torch
from conftest import close

import data
import weights
from scorers import color_distance
from world import judge
from world.rows import EmojiData


def true_samples(task="t2i", n=6):
    processor = data.Processor(weights.byte_tokenizer(), image_tokens=1, max_tokens=1 << 12, image_size=64)
    dataset = EmojiData(processor, weights={task: 1}, seed=5, held_out=True, extras=False)
    return [dataset[i] for i in range(n)]


class Oracle(torch.nn.Module):
    """A judge that knows the answers, `degrees` off in hue."""

    def __init__(self, metas, degrees=0.0):
        super().__init__()
        self.scene, self.subject, hue = judge.labels(metas)
        self.hue = hue + degrees / 57.29578

    def forward(self, images):
        one_hot = torch.nn.functional.one_hot
        return (one_hot(self.scene, 30).float(), one_hot(self.subject, len(judge.held_out())).float(),
                torch.stack([self.hue.cos(), self.hue.sin()], dim=1) * 3)


@pytest.fixture(scope="module")
def metas():
    return [sample["meta"] for sample in true_samples()]


def test_every_score_is_1_for_the_truth(metas):
    scores = judge.accuracy(Oracle(metas), None, metas)
    assert all((value == 1).all() for value in scores.values())


def test_a_hue_is_right_up_to_45_degrees_either_way(metas):
    assert (judge.accuracy(Oracle(metas, 44), None, metas)["hue"] == 1).all()
    assert (judge.accuracy(Oracle(metas, -46), None, metas)["hue"] == 0).all()


def test_another_scene_and_another_subject_are_wrong(metas):
    other = [{**meta, "scene": "snow" if meta["scene"] != "snow" else "beach"} for meta in metas]
    assert (judge.accuracy(Oracle(metas), None, other)["scene"] == 0).all()
    held_out = judge.held_out()
    other = [{**meta, "subject": held_out[held_out.index(meta["subject"]) - 7]} for meta in metas]
    assert (judge.accuracy(Oracle(metas), None, other)["subject"] == 0).all()


def test_segmentation_scores_are_perfect_for_the_truth_only():
    samples = true_samples("segment")
    targets, metas = torch.stack([s["target"] for s in samples]), [s["meta"] for s in samples]
    overlap = judge.iou(targets, metas)
    assert overlap.mean() > 0.98 and overlap.min() > 0.9       # what is almost black itself is lost
    assert (judge.iou(torch.ones_like(targets), metas) < 0.5).all()


def test_psnr_and_the_distance_of_colours_are_known_for_two_plain_colours():
    black, grey = torch.zeros(6, 3, 8, 8), torch.full((6, 3, 8, 8), 0.2)
    close(judge.psnr(grey, black), torch.full((6,), 20.0), 1e-3)
    close(color_distance(grey, black), torch.full((6,), 0.1 * 3**0.5), 1e-6)
    images = torch.stack([s["target"] for s in true_samples("segment")])
    assert (color_distance(images, images) == 0).all()
