"""Lessons: that a rule shows in the examples' outputs alone, and that no two rules look alike."""
import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageOps

import data
import weights
from world.rows import CONTRAST, EmojiData, World
from world.rules import EXAMPLES, RULES
from world.sprites import contrast, subjects
from world.train import STAGES


def lessons(n, held_out=True):
    return [World(held_out).lesson(np.random.default_rng((9, k))) for k in range(n)]


def distance(first, second):
    """Root mean square over pixels, in [-1, 1]."""
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    return np.sqrt((difference ** 2).mean()) / 127.5


def test_the_six_outputs_of_a_query_and_the_query_itself_are_clearly_different_pictures():
    nearest = []
    for lesson in lessons(80):
        query = lesson.input(EXAMPLES)
        outputs = [lesson.output(EXAMPLES, rule) for rule in RULES]
        between = min(distance(*pair) for pair in itertools.combinations(outputs, 2))
        assert between > 0.15 and min(distance(query, output) for output in outputs) > 0.07
        nearest.append(between)
    assert len(RULES) == 6 and np.median(nearest) > 0.3            # the tokenizer's copies are 0.11 off


def test_nothing_but_the_outputs_tells_the_rule():
    seen, prompt = set(), data.prompt_for("icl", examples=EXAMPLES)
    for lesson in lessons(60):
        own, other = lesson.compose(), lesson.compose(next(rule for rule in RULES if rule != lesson.rule))
        assert own[0] == other[0] == prompt and own[2].tobytes() == other[2].tobytes()
        assert len(own[1]) == 2 * EXAMPLES + 1
        for i, (a, b) in enumerate(zip(own[1], other[1])):
            assert (a.tobytes() == b.tobytes()) == (i % 2 == 0)    # inputs and query alike, outputs not
        seen.add(lesson.rule)
    assert seen == set(RULES) and not any(rule in own[0].lower() for rule in RULES)


def test_a_rule_is_the_same_in_both_examples_and_in_the_query_and_their_subjects_differ():
    for lesson in lessons(20):
        assert len({sprite.appearance.subject for _, sprite in lesson.inputs}) == EXAMPLES + 1
        for i, (background, sprite) in enumerate(lesson.inputs):
            image = np.asarray(lesson.input(i))
            assert lesson.output(i, "mirrored").tobytes() == ImageOps.mirror(lesson.input(i)).tobytes()
            cut = np.asarray(lesson.output(i, "cut out"))
            mask = cut.any(axis=-1)
            assert (cut[mask] == image[mask]).all() and 0.02 < mask.mean() < 0.4
            elsewhere, turned = (np.asarray(lesson.output(i, rule)) for rule in ("another scene", "recoloured"))
            around = np.ones((64, 64), bool)                       # far from subject and shadow
            x, y, reach = round(sprite.x), round(sprite.y), round(sprite.side / 2) + 5
            around[max(0, y - reach):y + reach, max(0, x - reach):x + reach] = False
            assert (elsewhere[around] == np.asarray(lesson.elsewhere)[around]).all()
            assert (turned[around] == image[around]).all()


def test_subjects_stand_out_before_both_scenes_and_when_they_are_recoloured():
    contrasts = []
    for lesson in lessons(60):
        for background, sprite in lesson.inputs:
            appearance = replace(sprite.appearance, hue=sprite.appearance.hue + lesson.turn)
            turned = replace(sprite, appearance=appearance)
            shown = ((background, sprite), (lesson.elsewhere, sprite), (background, turned))
            contrasts += [contrast(*one) for one in shown]
    assert np.mean(np.array(contrasts) >= CONTRAST) > 0.9 and min(contrasts) > 50


@pytest.mark.parametrize("held_out", [False, True])
def test_lessons_are_samples_that_fit_the_prefix_of_their_stage(held_out):
    mentor = weights.load("tiny", prefix_tokens=STAGES["icl"].prefix_tokens)
    dataset = EmojiData(mentor.processor, weights={"icl": 1}, seed=3, held_out=held_out)
    samples = [dataset[k] for k in range(6)]
    batch = data.collate(samples)
    assert batch["refs"].shape == (30, 3, 64, 64) and batch["target"].shape == (6, 3, 64, 64)
    assert batch["mask"].sum(dim=1).unique().numel() == 1 and {meta["rule"] for meta in batch["meta"]} <= set(RULES)
    assert samples[2]["prompt"] == dataset[2]["prompt"] and (samples[2]["refs"] == dataset[2]["refs"]).all()
    shown = {sprite.appearance.subject for lesson in lessons(30, held_out) for _, sprite in lesson.inputs}
    assert all(subjects()[i].held_out == held_out for i in shown)
