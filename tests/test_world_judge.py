"""The emoji world's judge: its scores against a judge that knows the answers."""
from dataclasses import replace

import pytest
import torch
from conftest import close

import data
import weights
from scorers import color_distance
from world import judge
from world.rows import EmojiData
from world.sprites import CROWDS


def true_samples(task="t2i", n=6, several=2):
    processor = data.Processor(weights.byte_tokenizer(), image_tokens=1, max_tokens=1 << 12, image_size=64)
    dataset = EmojiData(processor, weights={task: 1}, seed=5, held_out=True, extras=False,
                        several=(several,))
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


def changed(meta, place=0, **values):
    """A meta with another appearance at a place."""
    appearances = list(meta["appearances"])
    appearances[place] = replace(appearances[place], **values)
    return meta | {"appearances": appearances}


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
    other = [changed(meta, subject=held_out[held_out.index(meta["appearances"][0].subject) - 7]) for meta in metas]
    assert (judge.accuracy(Oracle(metas), None, other)["subject"] == 0).all()


class CrowdOracle(torch.nn.Module):
    """Answers for one cell after the other: which place's subject and hue each shows."""

    def __init__(self, metas, places, turned):
        super().__init__()
        self.answers = []
        for place, degrees in zip(places, turned):
            scene, subject, hue = judge.labels(metas, place)
            hue = hue + degrees / 57.29578
            self.answers.append((torch.nn.functional.one_hot(scene, 30).float(),
                                 torch.nn.functional.one_hot(subject, len(judge.held_out())).float(),
                                 torch.stack([hue.cos(), hue.sin()], dim=1)))

    def forward(self, images):
        return self.answers.pop(0)


@pytest.mark.parametrize("places, turned, expected", [
    ((0, 1), (0, 0), {"all": 1, "share": 1, "twice": 0, "missing": 0}),
    ((1, 0), (0, 0), {"all": 1, "share": 1, "twice": 0, "missing": 0}),
    ((0, 1), (0, 90), {"all": 0, "share": 1 / 2, "twice": 0, "missing": 0}),
    ((0, 0), (0, 0), {"all": 0, "share": 1 / 2, "twice": 1, "missing": 1}),
    ((2, 0, 1), (0, 0, 0), {"all": 1, "share": 1, "twice": 0, "missing": 0}),
    ((2, 0, 0), (0, 0, 0), {"all": 0, "share": 2 / 3, "twice": 1, "missing": 1}),
    ((3, 2, 1, 0), (0, 0, 0, 0), {"all": 1, "share": 1, "twice": 0, "missing": 0}),
    ((3, 2, 1, 0), (0, 90, 90, 0), {"all": 0, "share": 1 / 2, "twice": 0, "missing": 0})])
def test_of_several_subjects_each_must_be_there_once_in_its_own_hue(places, turned, expected):
    metas = [sample["meta"] for sample in true_samples("multi", 4, len(places))]
    images = torch.zeros(4, 3, 64, 64)
    scores = judge.crowd_accuracy(CrowdOracle(metas, places, turned), images, metas)
    found = {name: value.unique().item() for name, value in scores.items()}
    assert found == pytest.approx(expected | {"scene": 1})
    held_out = judge.held_out()
    strangers = [changed(meta, 1, subject=next(i for i in held_out if all(i != one.subject for one
                                                                          in meta["appearances"]))) for meta in metas]
    scores = judge.crowd_accuracy(CrowdOracle(metas, places, turned), images, strangers)
    assert (scores["all"] == 0).all() and (scores["missing"] == 1).all()


def test_cells_are_where_the_subjects_stand():
    picture = torch.zeros(1, 3, 64, 64)
    for several, crowd in CROWDS.items():
        for place, (x, y) in enumerate(crowd.centres):
            picture.zero_()[..., y - 2:y + 2, x - 2:x + 2] = 1
            shown = [cell.mean() for cell in judge.cells(picture, several)]
            assert len(shown) == several and all((value > 0) == (i == place) for i, value in enumerate(shown))


def test_the_judge_learns_from_pictures_of_one_subject_and_from_as_many_cells_of_several():
    for step, several in enumerate(CROWDS):
        images, scene, subject, hue = judge.training_batch(step, 48)
        crowd_images, metas = judge.true_images(judge.TRAIN_SEED, 48 * step, 24 // several, several)
        assert images.shape == (48, 3, 64, 64) and len(scene) == len(subject) == len(hue) == 48
        for place, cell in enumerate(judge.cells(crowd_images, several)):
            start = 24 + place * len(cell)
            assert torch.equal(images[start:start + len(cell)], cell)
            assert torch.equal(subject[start:start + len(cell)], judge.labels(metas, place)[1])
    images, _ = judge.true_images(3, 5, 4)
    again, _ = judge.true_images(3, 7, 1)
    assert torch.equal(images[2:3], again)               # a function of seed and number


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
