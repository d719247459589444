"""The emoji world: who is in it, that a sample is a function of its number, and that pictures, masks and prompts say
the same. All of it is painted here; nothing outside the repository is needed."""
import json
import re

import numpy as np
import pytest
import torch

import data
import emoji
import scenes
import sprites
from data import InputError, Prompter, TaskData, byte_tokenizer
from emoji import EmojiData, World
from model import Mentor
from sprites import Figure, Look, subjects


def prompter():
    return Prompter(byte_tokenizer(), patches=4, max_tokens=256)


def shots(task, n, held_out=False, seed=0):
    world = World(held_out)
    return [world.shot(np.random.default_rng((seed, k)), task) for k in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# Subjects

def test_the_atlas_holds_its_subjects_and_a_tenth_of_them_is_held_out_by_families():
    everyone = subjects()
    labels, out = [subject.label for subject in everyone], {subject.family for subject in everyone if subject.held_out}
    assert 850 <= len(everyone) <= 1100 and len(set(labels)) == len(labels)
    assert all(label == label.lower() and not set(label) & set("<>\n") for label in labels)
    assert abs(sum(subject.held_out for subject in everyone) / len(everyone) - 0.1) < 0.01
    assert out.isdisjoint(subject.family for subject in everyone if not subject.held_out)
    for subject in everyone:
        opaque = np.asarray(subject.sprite)[..., 3] > 127
        assert max(subject.sprite.size) == sprites.CELL and opaque.sum() > 0.15 * sprites.CELL ** 2, subject.label
    with open(f"{sprites.ASSETS}/emoji-OFL.txt", encoding="utf-8") as file:
        assert "SIL OPEN FONT LICENSE Version 1.1" in file.read()


def test_held_out_subjects_and_families_never_appear_in_training():
    out = {subject.family for subject in subjects() if subject.held_out}
    for task in ("subject", "multi"):
        for held_out in (False, True):
            for shot in shots(task, 300, held_out):
                named = [index for index in (shot.script.hat, shot.script.beside) if index is not None]
                assert all((subjects()[i].family in out) == held_out for i in shot.script.subjects)
                assert not any(subjects()[i].family in out for i in named)       # a name alone must be known
                assert {figure.look.subject for figure in shot.figures} == {*shot.script.subjects, *named}


def test_turning_the_hue_changes_the_colours_of_every_subject_and_keeps_its_shape():
    for index in range(len(subjects())):
        looks = [np.asarray(sprites.cut(Figure(Look(index, hue), 32, 32, 40))[0]).astype(int) for hue in (0, 120, 240)]
        opaque = looks[0][..., 3] > 127
        assert all((look[..., 3] == looks[0][..., 3]).all() for look in looks)
        colours = [look[..., :3][opaque] for look in looks]                       # (n, 3)
        assert np.abs(colours[1] - np.roll(colours[0], 1, axis=1)).max() <= 2     # a third of a turn swaps channels
        assert np.abs(colours[1] - colours[0]).mean() > 15, subjects()[index].label


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and words

def test_a_pair_shares_its_look_but_not_its_scene_and_seldom_moves_far():
    near, colours, pairs = 0, [], shots("subject", 200)
    for shot in pairs:
        (target, *_), (reference,), script = shot.figures, shot.other.figures, shot.script
        assert target.look == reference.look and shot.other.script.subjects == script.subjects
        assert script.scene != shot.other.script.scene and shot.other.script.style is None
        moved = max(abs(target.x - reference.x), abs(target.y - reference.y))
        near += moved < 4 and 0.84 < reference.side / target.side < 1.16
        if len(shot.figures) == 1 and not script.style:
            seen = [np.asarray(one.picture)[one.masks[0]].mean(axis=0) for one in (shot, shot.other)]
            colours.append(np.abs(seen[0] - seen[1]).max())
    assert 0.6 < near / len(pairs) < 0.95
    assert np.median(colours) < 8 and max(colours) < 45              # what shines through at the edges differs
    assert len({shot.other.script.scene for shot in pairs}) > 20


def test_the_words_do_not_depend_on_the_look(monkeypatch):
    texts = {task: [shot.caption for shot in shots(task, 60)] for task in data.TASKS}
    monkeypatch.setattr(World, "look", lambda self, rng, subject: Look(subject, 90.0, 1.1, True))
    assert texts == {task: [shot.caption for shot in shots(task, 60)] for task in data.TASKS}
    for shot in shots("t2i", 60):
        assert shot.script.labels[0] in shot.caption
        assert any(phrase in shot.caption for phrase in scenes.SCENES[shot.script.scene][0])


def test_masks_are_exact():
    for shot in shots("segment", 40):
        _, (reference,), target = emoji.compose("segment", shot, np.random.default_rng(0))
        mask, (sprite, left, top) = shot.masks[0], sprites.cut(shot.figures[0])
        cover = np.zeros((2 * scenes.SIZE, 2 * scenes.SIZE), int)
        cover[top + 32:top + 32 + sprite.height, left + 32:left + 32 + sprite.width] = np.asarray(sprite)[..., 3]
        cover = cover[32:32 + scenes.SIZE, 32:32 + scenes.SIZE]
        assert mask.any() and mask.mean() < 0.6 and (mask == (cover > 127)).all()
        assert (np.asarray(target) == np.asarray(reference) * mask[..., None]).all()
        assert (reference.tobytes() == shot.picture.tobytes()) and np.asarray(target)[mask].max() > 40
    for shot in shots("multi", 40):
        assert len(shot.masks) == 2 and all(mask.sum() > 60 for mask in shot.masks)
        assert not (shot.masks[0] & shot.masks[1]).any()


def test_subjects_stand_out_from_their_background():
    world, rng, found = World(), np.random.default_rng(0), []
    for k in range(300):
        script = emoji.Script((emoji.pick(rng, world.subjects),), list(scenes.SCENES)[k % 30])
        ground = scenes.paint(rng, script.scene)
        found.append(sprites.contrast(ground, world.cast(rng, script, [ground])[0][0]))
    assert np.mean(np.array(found) >= emoji.CONTRAST) > 0.97 and min(found) > 50


def test_every_scene_is_told_apart_behind_subjects_never_seen():
    def statistics(held_out, n, seed):
        names, features = list(scenes.SCENES), []
        world, rng = World(held_out), np.random.default_rng(seed)
        for k in range(n * len(names)):
            script = emoji.Script((emoji.pick(rng, world.subjects),), names[k % len(names)])
            ground = scenes.paint(rng, script.scene)
            pixels = np.asarray(sprites.paint(ground, world.cast(rng, script, [ground])[0])[0]) / 255
            cells = pixels.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3))             # mean colour of 16 parts
            features.append(np.concatenate([cells.ravel(), pixels.std(axis=(0, 1))]))
        return np.array(features).reshape(n, len(names), -1)                      # (n, 30, 51)

    means, tests = statistics(False, 16, 1).mean(axis=0), statistics(True, 12, 2)
    distances = ((tests[:, :, None] - means) ** 2).sum(axis=-1)                   # (n, 30, 30)
    assert len(means) == 30 and (distances.argmin(axis=-1) == np.arange(30)).mean() > 0.93


# ---------------------------------------------------------------------------------------------------------------------
# Samples

def test_a_sample_is_a_function_of_seed_and_number():
    first, second, other = (EmojiData(prompter(), seed=seed) for seed in (3, 3, 4))
    for k in (5, 2, 200_000):
        a, b, c = first[k], second[k], other[k]
        assert a["prompt"] == b["prompt"] and torch.equal(a["target"], b["target"])
        assert torch.equal(a["refs"], b["refs"]) and torch.equal(a["ids"], b["ids"])
        assert not torch.equal(a["target"], c["target"])
    assert len({first[k]["target"].sum().item() for k in range(60)}) == 60


def test_batches_of_all_tasks_come_by_their_weights():
    weights = {"t2i": 3, "reconstruct": None, "segment": 1, "recover": 0, "subject": 4, "multi": 1}
    samples = EmojiData(prompter(), 32, 24, weights, length=1000)
    assert samples.tasks == ["t2i", "reconstruct", "segment", "subject", "multi"] and len(samples) == 1000
    assert samples.counts == {"t2i": 300, "reconstruct": 100, "segment": 100, "subject": 400, "multi": 100}
    found, places = dict.fromkeys(samples.tasks, 0), {"t2i": 0, "multi": 2}
    for batch in data.batches(samples, 0, 600, 50):
        assert batch["target"].shape == (50, 3, 32, 32) and not batch["problems"]
        assert len(batch["refs"]) == sum(places.get(task, 1) for task in batch["tasks"])
        for task, prompt in zip(batch["tasks"], batch["prompts"]):
            found[task] += 1
            assert prompt.count(data.IMAGE) == places.get(task, 1)
    for task, count in samples.counts.items():
        assert abs(found[task] / 600 - count / 1000) < 0.06, found


def test_in_training_a_fifth_of_the_references_go_by_a_made_up_name_and_held_out_ones_never():
    for held_out, low, high in ((False, 0.1, 0.3), (True, 0, 0)):
        samples = EmojiData(prompter(), weights={"segment": 1, "subject": 1}, held_out=held_out)
        renamed = 0
        for k in range(150):
            prompt, label = samples[k]["prompt"], samples[k]["meta"]["labels"][0]
            name = re.search("The (.*) in <image>", prompt)[1]
            assert prompt.count(name) >= 1 + (samples[k]["task"] == "subject")        # wherever the subject is named
            renamed += name != label
        assert low <= renamed / 150 <= high
    prompt = "The mage in <image>.\non a stage, a mage wearing a crown"
    assert emoji.renamed(prompt, "mage", "owl") == "The owl in <image>.\non a stage, an owl wearing a crown"


def test_the_tokenizer_and_the_connector_have_their_tasks():
    pictures, caption = EmojiData(prompter(), weights={"picture": 1}), EmojiData(prompter(), weights={"caption": 1})[0]
    assert all(pictures[k]["refs"].shape == (0, 3, 64, 64) and pictures[k]["prompt"] == "" for k in range(20))
    assert any((pictures[k]["target"] == -1).float().mean() > 0.3 for k in range(40))     # those cut out on black too
    assert caption["labels"].shape == (data.CAPTION_TOKENS,) and caption["prompt"] == data.IMAGE
    assert "target" not in caption and caption["refs"].shape == (1, 3, 64, 64)


def test_prompts_for_the_tokenizer_hold_every_name_and_phrase():
    text = "\n".join(emoji.captions(6000))
    words = set(text.replace(",", " ").replace(".", " ").split())
    names = [subject.label for subject in subjects()] + [phrase for phrases, _ in scenes.SCENES.values()
                                                         for phrase in phrases]
    missing = {word for name in names for word in name.split()} - words
    assert not missing and data.IMAGE in text


def test_every_prompt_fits_the_prefix_of_the_small_model():
    tiny = Mentor.random("tiny").prompter
    longest = max(int(tiny(prompt, 1)[1].sum()) for prompt in emoji.captions(6000) if prompt.count(data.IMAGE) == 1)
    assert longest < 0.9 * tiny.max_tokens


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def test_an_export_is_read_as_any_other_data(tmp_path, capsys):
    emoji.main(["export", str(tmp_path), "--n", "24", "--held-out"])
    assert "24 rows" in capsys.readouterr().out
    held_out = {subject.label for subject in subjects() if subject.held_out}
    with open(tmp_path / "data.jsonl", encoding="utf-8") as file:
        for objects in (json.loads(line).get("objects", []) for line in file):
            assert held_out.issuperset([objects] if isinstance(objects, str) else objects)
    rows = TaskData([tmp_path / "data.jsonl"], prompter(), 64, 64)
    assert rows.tasks == list(data.TASKS) and rows.lines == 24 and not rows.problems and len(rows) == 28
    samples = [rows[k] for k in range(len(rows))]
    assert not any(sample["problems"] for sample in samples)
    world = World(True)
    for sample in samples:
        if sample["task"] == "segment":
            shot = world.shot(np.random.default_rng((0, int(sample["name"].rpartition(":")[2]) - 1)), "segment")
            target = data.on_black(shot.picture, shot.masks[0])
            assert torch.equal(sample["target"], data.target_pixels(target, 64))


def test_pictures_of_one_subject_are_read_as_any_folder_of_pictures(tmp_path, capsys):
    emoji.main(["subject", "dog face", str(tmp_path), "--n", "3", "--hue", "200"])
    data.main(["folder", str(tmp_path)])
    rows = TaskData([tmp_path / "data.jsonl"], prompter(), 64, 64)
    assert rows.lines == 15 and rows.counts == {"t2i": 3, "reconstruct": 3, "segment": 3, "recover": 3, "subject": 6}
    assert not any(rows[k]["problems"] for k in range(len(rows)))
    assert "The dog face in" in rows[len(rows) - 1]["prompt"]
    with pytest.raises(InputError, match="dog fac: no such emoji; there are .*dog"):
        emoji.main(["subject", "dog fac", str(tmp_path)])


def test_commands_and_their_errors(tmp_path, monkeypatch, capsys):
    emoji.main(["look", "--n", "1", "--out", str(tmp_path / "look.png")])
    assert data.open_image(tmp_path / "look.png").width > 1000
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        emoji.main(["export", str(tmp_path / "file")])
    monkeypatch.setattr(sprites, "FONT", "nowhere.ttf")
    with pytest.raises(InputError, match="fonts-noto-color-emoji"):
        emoji.main(["atlas"])
