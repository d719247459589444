"""The emoji world: that a sample is a function of its number, that images, masks and prompts say the same, and that its
files are read as any other data. All of it is painted here; nothing outside the repository is needed."""
import hashlib
import json
import os
import re

import numpy as np
import pytest
import torch

import data
import prepare
import weights
from cli import InputError
from data import Processor, TaskData
from weights import byte_tokenizer
from world import rows, scenes, sprites
from world.rows import EmojiData, World
from world.sprites import Appearance, subjects
from world.train import SMALL, STAGES

EXAMPLE = os.path.join(sprites.ASSETS, "example")
STAGE_2 = {"t2i": 600, "segment": 150, "recover": 150, "subject": 400}            # the published mixture


def processor(image_size=64):
    return Processor(byte_tokenizer(), image_tokens=4, max_tokens=512, image_size=image_size)


def pictures(task, n, held_out=False, seed=0, several=2):
    world = World(held_out)
    return [world.picture(np.random.default_rng((seed, k)), task, several=several) for k in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and words

def test_held_out_subjects_and_families_never_appear_in_training():
    families = {subject.family for subject in subjects() if subject.held_out is True}
    for task in ("subject", "multi"):
        for held_out in (False, True):
            for picture in pictures(task, 300, held_out):
                description = picture.description
                named = [index for index in (description.hat, description.beside) if index is not None]
                assert all((subjects()[i].family in families) == held_out for i in description.subjects)
                assert not any(subjects()[i].family in families for i in named)           # a name alone must be known
                shown = {sprite.appearance.subject for sprite in picture.sprites}
                assert shown == {*description.subjects, *named}
                assert len(set(description.labels)) == len(description.labels)   # nor one subject in two designs


def test_a_pair_shares_its_appearance_but_not_its_scene_and_seldom_moves():
    counts, colours, pairs = dict.fromkeys(rows.MOVES, 0), [], pictures("subject", 200)
    for picture in pairs:
        in_reference, = picture.others
        target, reference = picture.sprites[0], in_reference.sprites[0]
        description, other = picture.description, in_reference.description
        assert len(in_reference.sprites) == 1
        assert target.appearance == reference.appearance and other.subjects == description.subjects
        assert description.scene != other.scene and other.style is None
        move, = picture.moves
        counts[move] += 1
        if description.hat is None:                      # a hat's room moves a subject down
            assert abs(target.x - reference.x) <= rows.MOVES[move].x
            assert abs(target.y - reference.y) <= rows.MOVES[move].y
            assert abs(reference.side / target.side - 1) <= rows.MOVES[move].scale + 1e-9
        if len(picture.sprites) == 1 and not description.style:
            seen = [np.asarray(one.image)[one.masks[0]].mean(axis=0) for one in (picture, in_reference)]
            colours.append(np.abs(seen[0] - seen[1]).max())
    for move, count in counts.items():
        assert abs(count / len(pairs) - rows.MOVES[move].share) < 0.1
    assert np.median(colours) < 8 and max(colours) < 45              # what shines through at the edges differs
    assert len({picture.others[0].description.scene for picture in pairs}) > 20


def test_a_share_of_the_pairs_shows_the_subject_before_its_references_own_background(monkeypatch):
    painted, paste = [], rows.paste
    monkeypatch.setattr(rows, "paste", lambda background, *rest: painted.append(background) or paste(background, *rest))
    made = {}
    for copies in (0, 0.5, 1):
        world = World(copies=copies)
        made[copies] = [world.picture(np.random.default_rng((7, k)), "subject") for k in range(40)]
    assert all(one is other for one, other in zip(painted[-80::2], painted[-79::2]))      # the very same, at share 1
    for picture in made[1]:
        scene = picture.others[0].description.scene
        assert picture.description.scene == scene
        assert any(phrase in picture.caption for phrase in scenes.SCENES[scene].phrases)
    assert any(picture.image.tobytes() == picture.others[0].image.tobytes() for picture in made[1])
    same = [one.image.tobytes() == two.image.tobytes() and one.caption == two.caption
            and one.others[0].image.tobytes() == two.others[0].image.tobytes() for one, two in zip(made[0], made[0.5])]
    copied = [picture.description.scene == picture.others[0].description.scene for picture in made[0.5]]
    assert same == [not whether for whether in copied] and 10 < sum(copied) < 30


def test_no_task_but_the_subject_driven_one_knows_of_copies():
    for task in rows.TASKS:
        if task != "subject":
            one, two = (World(copies=copies).picture(np.random.default_rng(5), task) for copies in (0, 1))
            assert one.image.tobytes() == two.image.tobytes() and one.caption == two.caption


@pytest.mark.parametrize("several", sprites.CROWDS)
def test_several_subjects_stand_in_their_cells_in_the_order_of_their_references(several):
    stays = []
    for picture in pictures("multi", 40, several=several):
        assert len(picture.sprites) == len(picture.others) == len(set(picture.description.subjects)) == several
        *first, last = [rows.with_article(label) for label in picture.description.labels]
        assert f"{', '.join(first)} and {last}" in picture.caption
        for place, (left, top, right, bottom) in enumerate(sprites.CROWDS[several].cells):
            sprite, other = picture.sprites[place], picture.others[place]
            assert sprite.appearance.subject == picture.description.subjects[place]
            assert [one.appearance for one in other.sprites] == [sprite.appearance]
            assert other.description.scene != picture.description.scene
            assert picture.masks[place][top:bottom, left:right].sum() >= 0.97 * picture.masks[place].sum() > 0
            stays.append(max(abs(sprite.x - other.sprites[0].x), abs(sprite.y - other.sprites[0].y)) < 4)
        prompt, references, target = rows.compose("multi", picture, np.random.default_rng(0))
        assert prompt.count(data.IMAGE) == several and target is picture.image
        assert [image.tobytes() for image in references] == [other.image.tobytes() for other in picture.others]
    assert 0.5 < np.mean(stays) < 0.75


def test_the_words_do_not_depend_on_the_appearance(monkeypatch):
    texts = {task: [picture.caption for picture in pictures(task, 60)] for task in data.TASKS}
    monkeypatch.setattr(World, "appearance", lambda self, rng, subject: Appearance(subject, 90.0, 1.1, True))
    assert texts == {task: [picture.caption for picture in pictures(task, 60)] for task in data.TASKS}
    for picture in pictures("t2i", 60):
        assert picture.description.labels[0] in picture.caption
        assert any(phrase in picture.caption for phrase in scenes.SCENES[picture.description.scene].phrases)


def test_masks_are_exact():
    for picture in pictures("segment", 40):
        _, (reference,), target = rows.compose("segment", picture, np.random.default_rng(0))
        mask, (sprite, left, top) = picture.masks[0], sprites.render(picture.sprites[0])
        cover = np.zeros((2 * scenes.SIZE, 2 * scenes.SIZE), int)
        cover[top + 32:top + 32 + sprite.height, left + 32:left + 32 + sprite.width] = np.asarray(sprite)[..., 3]
        cover = cover[32:32 + scenes.SIZE, 32:32 + scenes.SIZE]
        assert mask.any() and mask.mean() < 0.6 and (mask == (cover > 127)).all()
        assert (np.asarray(target) == np.asarray(reference) * mask[..., None]).all()
        assert reference.tobytes() == picture.image.tobytes() and np.asarray(target)[mask].max() > 40
    for picture in pictures("multi", 40):
        assert len(picture.masks) == 2 and all(mask.sum() > 60 for mask in picture.masks)
        assert not (picture.masks[0] & picture.masks[1]).any()


# ---------------------------------------------------------------------------------------------------------------------
# Samples

def test_a_sample_is_a_function_of_seed_and_number():
    first, second, other = (EmojiData(processor(), seed=seed) for seed in (3, 3, 4))
    for k in (5, 2, 200_000):
        a, b, c = first[k], second[k], other[k]
        assert a["prompt"] == b["prompt"] and torch.equal(a["target"], b["target"])
        assert torch.equal(a["refs"], b["refs"]) and torch.equal(a["ids"], b["ids"])
        assert not torch.equal(a["target"], c["target"])
    assert len({first[k]["target"].sum().item() for k in range(60)}) == 60


def test_batches_of_all_tasks_come_by_their_weights():
    shares = {"t2i": 3, "reconstruct": None, "segment": 1, "recover": 0, "subject": 4, "multi": 1}
    samples = EmojiData(processor(24), 32, shares, length=1000)
    assert samples.tasks == ["t2i", "reconstruct", "segment", "subject", "multi"] and len(samples) == 1000
    assert samples.counts == {"t2i": 300, "reconstruct": 100, "segment": 100, "subject": 400, "multi": 100}
    seen, places, crowds = dict.fromkeys(samples.tasks, 0), {"t2i": 0}, set()
    for batch in data.batches(samples, 0, 600, 50):
        assert batch["target"].shape == (50, 3, 32, 32) and not any(batch["problems"])
        assert len(batch["refs"]) == sum(prompt.count(data.IMAGE) for prompt in batch["prompt"])
        for task, prompt, meta in zip(batch["task"], batch["prompt"], batch["meta"]):
            seen[task] += 1
            if task == "multi":
                crowds.add(prompt.count(data.IMAGE))
                assert prompt.count(data.IMAGE) == len(meta["labels"]) == len(meta["appearances"])
            else:
                assert prompt.count(data.IMAGE) == places.get(task, 1)
    assert crowds == {2, 3, 4}
    for task, count in samples.counts.items():
        assert abs(seen[task] / 600 - count / 1000) < 0.06, seen


def test_moves_and_names_of_references_can_be_chosen():
    samples = EmojiData(processor(), weights={"subject": 1}, held_out=True, moves=("far",), called=("quilt", "walrus"))
    for k in range(10):
        meta, prompt = samples[k]["meta"], samples[k]["prompt"]
        assert meta["moves"] == ("far",) and re.search("The (.*) in <image>", prompt)[1] in ("quilt", "walrus")
        assert meta["labels"][0] not in prompt


def test_in_training_some_references_go_by_a_made_up_name_and_held_out_ones_never():
    for held_out, low, high in ((False, 0.2, 0.4), (True, 0, 0)):
        samples = EmojiData(processor(), weights={"segment": 1, "subject": 1}, held_out=held_out)
        renamed = 0
        for k in range(150):
            prompt, label = samples[k]["prompt"], samples[k]["meta"]["labels"][0]
            name = re.search("The (.*) in <image>", prompt)[1]
            assert prompt.count(name) >= 1 + (samples[k]["task"] == "subject")        # wherever the subject is named
            renamed += name != label
        assert low <= renamed / 150 <= high
    for k in range(40):                                  # of several subjects all or none
        sample = EmojiData(processor(), weights={"multi": 1})[k]
        known = [label in re.findall("The (.*) in <image>", sample["prompt"]) for label in sample["meta"]["labels"]]
        assert len(set(known)) == 1
    prompt = "The mage in <image>.\non a stage, a mage wearing a crown"
    assert rows.renamed(prompt, "mage", "owl") == "The owl in <image>.\non a stage, an owl wearing a crown"


def test_the_tokenizer_and_the_connector_have_their_tasks():
    alone, caption = EmojiData(processor(), weights={"picture": 1}), EmojiData(processor(), weights={"caption": 1})[0]
    assert all(alone[k]["refs"].shape == (0, 3, 64, 64) and alone[k]["prompt"] == "" for k in range(20))
    assert any((alone[k]["target"] == -1).float().mean() > 0.3 for k in range(40))        # those cut out on black too
    assert caption["labels"].shape == (data.CAPTION_TOKENS,) and caption["prompt"] == data.IMAGE
    assert "target" not in caption and caption["refs"].shape == (1, 3, 64, 64)
    with pytest.raises(InputError, match="no other task"):
        EmojiData(processor(), weights={"caption": 1, "t2i": 1})


def test_prompts_for_the_tokenizer_hold_every_name_and_phrase():
    text = "\n".join(rows.captions(6000))
    words = set(text.replace(",", " ").replace(".", " ").split())
    names = [subject.label for subject in subjects()]
    names += [phrase for entry in scenes.SCENES.values() for phrase in entry.phrases]
    missing = {word for name in names for word in name.split()} - words
    assert not missing and data.IMAGE in text


def test_every_prompt_fits_the_prefix_of_the_small_model():
    tokenizer, patches = weights.load("tiny").processor.tokenizer, SMALL.vision.grid**2
    with_one_image = [prompt for prompt in rows.captions(6000) if prompt.count(data.IMAGE) == 1]
    longest = max(len(tokenizer.encode(prompt).ids) + patches - 1 for prompt in with_one_image)
    assert longest < 0.9 * STAGES["2"].prefix_tokens


def test_every_prompt_of_several_subjects_fits_the_prefix_of_stage_multi():
    tokenizer, patches = weights.load("tiny").processor.tokenizer, SMALL.vision.grid**2
    world, longest = World(None), 0
    for k in range(1500):
        rng = np.random.default_rng(k)
        description = world.describe(rng, "multi", several=4)
        prompt = data.prompt_for("multi", description.labels, description.caption(rng))
        longest = max(longest, len(tokenizer.encode(prompt).ids) + 4 * (patches - 1))
    assert 4 * patches < longest < STAGES["multi"].prefix_tokens


def test_the_text_tokenizer_of_the_small_model_can_be_learned_again():
    bundled = weights.load("tiny").processor.tokenizer
    bundled, learned = (json.loads(tokenizer.to_str())["model"] for tokenizer in (bundled, rows.small_tokenizer()))
    assert bundled == learned and len(learned["vocab"]) == 1536


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()


def files_below(folder):
    """-> {path relative to the folder: content}"""
    paths = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    contents = {}
    for path in paths:
        with open(path, "rb") as file:
            contents[os.path.relpath(path, folder)] = file.read()
    return contents


def test_an_export_is_read_as_any_other_data(tmp_path, capsys):
    rows.main(["export", str(tmp_path), "--n", "24", "--held-out"])
    assert "24 rows" in capsys.readouterr().out
    held_out = {subject.label for subject in subjects() if subject.held_out is True}
    for line in read_lines(tmp_path / "data.jsonl"):
        objects = json.loads(line).get("objects", [])
        assert held_out.issuperset([objects] if isinstance(objects, str) else objects)
    dataset = TaskData([tmp_path / "data.jsonl"], processor(), 64)
    assert dataset.tasks == list(rows.TASKS) and dataset.lines == 24 and not dataset.problems and len(dataset) == 28
    samples = [dataset[k] for k in range(len(dataset))]
    assert not any(sample["problems"] for sample in samples)
    world = World(True)
    for sample in samples:
        if sample["task"] == "segment":
            number = int(sample["name"].rpartition(":")[2]) - 1
            picture = world.picture(np.random.default_rng((0, number)), "segment")
            target = data.on_black(picture.image, picture.masks[0])
            assert torch.equal(sample["target"], data.target_pixels(target, 64))


def test_lessons_are_exported_as_lists_of_pictures_that_end_with_the_query(tmp_path):
    rows.main(["export", str(tmp_path), "--n", "3", "--tasks", "icl", "t2i"])
    first, _, third = [json.loads(line) for line in read_lines(tmp_path / "data.jsonl")]
    for k, row in ((0, first), (2, third)):
        _, references, target = World().lesson(np.random.default_rng((0, k))).compose()
        paths = row.pop("image_path") + [row.pop("source_image")]
        assert row == {"in_context": True, "input_img_list": True, "input_text": ""} and len(paths) == 6
        for path, image in zip(paths, [*references, target]):
            assert data.open_image(tmp_path / path).tobytes() == image.tobytes()


def test_the_example_in_the_repository_serves_every_stage():
    paths = {name: os.path.join(EXAMPLE, f"{name}.jsonl") for name in ("data", "val", "backgrounds")}
    options = dict(processor=processor(), image_size=64, backgrounds=[paths["backgrounds"]])
    for name in ("data", "val"):
        for shares in (STAGE_2, None, {"caption": 1}, {"picture": 1}):
            dataset = TaskData([paths[name]], weights=shares, **options)
            assert dataset.tasks == list(shares or rows.TASKS) and not dataset.problems
            assert not any(dataset[k]["problems"] for k in range(len(dataset)))
    assert sum(len(content) for content in files_below(EXAMPLE).values()) < 2**20


def test_the_examples_validation_rows_and_backgrounds_hold_nothing_that_is_trained_on():
    held_out = {subject.label for subject in subjects() if subject.held_out is True}
    for name, expected in (("data", False), ("val", True)):
        for line in read_lines(os.path.join(EXAMPLE, f"{name}.jsonl")):
            objects = json.loads(line).get("objects", [])
            objects = [objects] if isinstance(objects, str) else objects
            assert all((label in held_out) == expected for label in objects)
    images = {}
    for path, content in files_below(EXAMPLE).items():
        if path.endswith(".png") and ".mask" not in path:
            images.setdefault(path.split(os.sep)[0], set()).add(hashlib.sha256(content).hexdigest())
    assert set(images) == {"data", "val", "backgrounds"}
    assert images["data"].isdisjoint(images["val"] | images["backgrounds"])
    lines = {name: set(read_lines(os.path.join(EXAMPLE, f"{name}.jsonl"))) for name in images}
    assert lines["data"].isdisjoint(lines["val"] | lines["backgrounds"])


def test_an_export_is_the_same_twice_and_the_example_is_one(tmp_path):
    for name in ("first", "second"):
        rows.main(["export", str(tmp_path / name), "--n", "36"])
    first, example = files_below(tmp_path / "first"), files_below(EXAMPLE)
    assert first == files_below(tmp_path / "second") and set(first) == set(example)
    for path in example:
        if path.endswith(".jsonl"):
            assert first[path] == example[path]
        else:                                            # another version of Pillow may compress differently
            images = [data.open_image(os.path.join(folder, path)) for folder in (tmp_path / "first", EXAMPLE)]
            assert images[0].tobytes() == images[1].tobytes()


def test_pictures_of_one_subject_are_read_as_any_folder_of_pictures(tmp_path, capsys):
    rows.main(["subject", "dog face", str(tmp_path), "--n", "3", "--hue", "200"])
    prepare.main(["folder", str(tmp_path)])
    dataset = TaskData([tmp_path / "data.jsonl"], processor(), 64)
    assert dataset.lines == 15
    assert dataset.counts == {"t2i": 3, "reconstruct": 3, "segment": 3, "recover": 3, "subject": 6}
    assert not any(dataset[k]["problems"] for k in range(len(dataset)))
    assert "The dog face in" in dataset[len(dataset) - 1]["prompt"]
    with pytest.raises(InputError, match="dog fac: no such emoji; there are .*dog"):
        rows.main(["subject", "dog fac", str(tmp_path)])


def test_commands_and_their_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows.main(["look", "--n", "1"])
    assert data.open_image(tmp_path / "out" / "world.png").width > 1000 and os.listdir(tmp_path) == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        rows.main(["export", str(tmp_path / "file")])
    with pytest.raises(InputError, match="--n: must be a whole number above 0"):
        rows.main(["export", str(tmp_path / "folder"), "--n", "0"])
    monkeypatch.setattr(sprites, "FONT", "nowhere.ttf")
    with pytest.raises(InputError, match="fonts-noto-color-emoji"):
        rows.main(["atlas"])
