"""The scenes: each is painted from its random numbers alone, and can be recognised behind a subject."""
import numpy as np
import pytest
from PIL import Image

from world import rows, scenes, sprites


def test_a_scene_is_a_function_of_its_random_numbers():
    for name in scenes.SCENES:
        first, second, other = (scenes.paint(np.random.default_rng(seed), name) for seed in (0, 0, 1))
        assert first.size == (scenes.SIZE, scenes.SIZE) and first.mode == "RGB"
        assert first.tobytes() == second.tobytes() != other.tobytes()


def test_a_scene_has_three_phrases_that_no_other_has():
    phrases = [phrase for entry in scenes.SCENES.values() for phrase in entry.phrases]
    assert len(phrases) == len(set(phrases)) == 3 * len(scenes.SCENES) == 90


def test_every_scene_is_told_apart_behind_subjects_never_seen():
    def statistics(held_out, n, seed):
        names, features = list(scenes.SCENES), []
        world, rng = rows.World(held_out), np.random.default_rng(seed)
        for k in range(n * len(names)):
            description = rows.Description((rows.pick(rng, world.subjects),), names[k % len(names)])
            background = scenes.paint(rng, description.scene)
            image, _ = sprites.paste(background, world.place(rng, description, background)[0])
            pixels = np.asarray(image) / 255                                      # (64, 64, 3)
            cells = pixels.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3))             # mean colour of 16 parts
            features.append(np.concatenate([cells.ravel(), pixels.std(axis=(0, 1))]))
        return np.array(features).reshape(n, len(names), -1)                      # (n, 30, 51)

    means, tests = statistics(False, 16, 1).mean(axis=0), statistics(True, 12, 2)
    distances = ((tests[:, :, None] - means) ** 2).sum(axis=-1)                   # (n, 30, 30)
    assert len(means) == 30 and (distances.argmin(axis=-1) == np.arange(30)).mean() > 0.93


@pytest.mark.parametrize("style", scenes.STYLES)
def test_a_style_changes_the_picture_and_has_phrases_with_room_for_the_subject(style):
    image = scenes.paint(np.random.default_rng(0), "beach")
    cover = Image.new("L", image.size)
    cover.paste(255, (20, 20, 40, 40))
    styled = scenes.apply_style(style, image, cover)
    assert styled.size == image.size and styled.mode == "RGB" and styled.tobytes() != image.tobytes()
    assert all(phrase.count("{it}") == 1 for phrase in scenes.STYLES[style].phrases)
