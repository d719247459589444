"""The subjects: who they are, which are held out, what recolouring does to them, and that they can be seen."""
import numpy as np
import pytest

from cli import InputError
from world import rows, scenes, sprites
from world.sprites import Appearance, PlacedSprite, subjects


def test_both_atlases_hold_all_subjects_and_a_tenth_of_them_is_held_out_by_families():
    everyone = subjects()
    labels = [subject.label for subject in everyone if subject.design == "noto"]
    assert labels == [subject.label for subject in everyone if subject.design == "fluent"]
    assert 850 <= len(labels) <= 1100 and len(set(labels)) == len(labels) == len(everyone) / 2
    assert all(label == label.lower() and not set(label) & set("<>\n") for label in labels)
    held_out = {subject.family for subject in everyone if subject.held_out is True}
    assert abs(sum(subject.held_out is True for subject in everyone) / len(everyone) - 0.1) < 0.01
    assert held_out.isdisjoint(subject.family for subject in everyone if subject.held_out is not True)
    for subject in everyone:
        opaque = np.asarray(subject.sprite)[..., 3] > 127
        assert max(subject.sprite.size) == sprites.CELL and opaque.sum() > 0.15 * sprites.CELL ** 2, subject.label
    with open(f"{sprites.ASSETS}/emoji-OFL.txt", encoding="utf-8") as file:
        assert "SIL OPEN FONT LICENSE Version 1.1" in file.read()


def test_a_subject_held_out_in_one_design_is_known_in_the_other():
    new = [subject for subject in subjects() if subject.held_out == sprites.NEW_DESIGN]
    known = {subject.label for subject in subjects() if subject.held_out is False and subject.design == "noto"}
    assert 60 <= len(new) <= 100 and all(subject.design == "fluent" and subject.label in known for subject in new)
    assert {subjects()[i].design for i in rows.World(held_out=sprites.NEW_DESIGN).subjects} == {"fluent"}
    assert {subjects()[i].design for i in rows.World(held_out=True).subjects} == set(sprites.DESIGNS)


def test_a_name_alone_is_drawn_in_one_design_so_that_it_says_which():
    world = rows.World()
    assert {subjects()[i].design for i in (*world.known, *world.hats)} == {"noto"}


def test_turning_the_hue_changes_the_colours_of_every_subject_and_keeps_its_shape():
    for index in range(len(subjects())):
        placed = [PlacedSprite(Appearance(index, hue), 32, 32, 40) for hue in (0, 120, 240)]
        images = [np.asarray(sprites.render(sprite)[0]).astype(int) for sprite in placed]
        opaque = images[0][..., 3] > 127
        assert all((image[..., 3] == images[0][..., 3]).all() for image in images)
        colours = [image[..., :3][opaque] for image in images]                    # (n, 3)
        assert np.abs(colours[1] - np.roll(colours[0], 1, axis=1)).max() <= 2     # a third of a turn swaps channels
        assert np.abs(colours[1] - colours[0]).mean() > 12, subjects()[index].label


def test_subjects_stand_out_from_their_background():
    world, rng, contrasts = rows.World(), np.random.default_rng(0), []
    for k in range(300):
        description = rows.Description((rows.pick(rng, world.subjects),), list(scenes.SCENES)[k % 30])
        background = scenes.paint(rng, description.scene)
        contrasts.append(sprites.contrast(background, world.place(rng, description, background)[0][0]))
    assert np.mean(np.array(contrasts) >= rows.CONTRAST) > 0.97 and min(contrasts) > 50


def test_what_a_later_sprite_covers_is_not_in_the_mask_of_an_earlier_one():
    background = scenes.paint(np.random.default_rng(0), "white")
    below, above = PlacedSprite(Appearance(0), 28, 32, 40), PlacedSprite(Appearance(1), 36, 32, 30)
    _, (whole,) = sprites.paste(background, [below])
    _, (seen, covering) = sprites.paste(background, [below, above])
    assert (whole & covering).any() and (seen == whole & ~covering).all()


def test_the_atlases_are_drawn_from_packages_that_have_to_be_installed(monkeypatch):
    monkeypatch.setattr(sprites, "FONT", "nowhere.ttf")
    monkeypatch.setattr(sprites, "FLUENT", "nowhere")
    with pytest.raises(InputError, match="fonts-noto-color-emoji"):
        sprites.draw_atlas("noto")
    with pytest.raises(InputError, match="npm install @lobehub/fluent-emoji-3d"):
        sprites.draw_atlas("fluent")
