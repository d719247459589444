"""A small world to train and to measure a small model in: emoji before painted scenes, as many samples as one asks for.

Some 900 emoji in two designs (`sprites.py`) stand before 30 scenes (`scenes.py`), 64 x 64 pixels, for all six of
MENTOR's tasks and for learning from examples (`rules.py`). Every instance of an emoji has its own hue, saturation and
orientation. No prompt ever mentions these or the design, so a model can show this very instance only if it reads the
reference. A tenth of the emoji is held out of training.

    python -m world.rows look                        # a contact sheet of scenes and tasks: out/world.png
    python -m world.rows export out/world --n 200    # a data set on a disk: data.jsonl, val.jsonl, backgrounds.jsonl
    python -m world.rows export assets/example --n 36    # the one that comes with this repository
    python -m world.rows export out/icl --tasks icl  # lessons: two examples of a rule and a query
    python -m world.rows subject "dog face" out/dog  # images of one instance, with captions and masks
    python -m world.rows atlas                       # draws assets/emoji-*.webp again

`EmojiData` stands in for `data.TaskData`; sample k is a function of (seed, k) alone. Next: `scenes.py`.
"""
import json
import os
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image
from tokenizers import pre_tokenizers, trainers
from torch.utils.data import Dataset

import cli
import data
from cli import InputError
from weights import byte_tokenizer
from world import scenes
from world.rules import EXAMPLES, RULES, TURNS, Lesson
from world.scenes import PLAIN, SCENES, SIZE, STYLES
from world.sprites import (ALONE, CROWDED, CROWDS, DESIGNS, Appearance, PlacedSprite, contrast, draw_atlas, hat_on,
                           hue_matrix, inside, paste, subjects)

TASKS = ("t2i", "reconstruct", "segment", "recover", "subject", "multi")     # for which `World.picture` paints

# ---------------------------------------------------------------------------------------------------------------------
# What a picture shows, in words

TEMPLATES = ("{it} {where}", "{where}, {it}", "a picture of {it} {where}", "{it}, {where}", "you see {it} {where}")
SCENE_WORDS = sorted({word for entry in SCENES.values() for phrase in entry.phrases for word in phrase.split()
                      if len(word) > 2 and word not in ("the", "and")})
CONSONANTS = ("b", "br", "ch", "d", "f", "g", "l", "m", "p", "r", "s", "st", "t", "w")
VOWELS = ("a", "e", "i", "o", "u")
ENDINGS = ("", "", "n", "r", "s", "ck", "rry", "rries")
HATS = ("top hat", "crown", "billed cap", "helmet", "woman's hat", "military helmet")


def pick(rng, options):
    """One of a sequence; faster than rng.choice."""
    return options[int(rng.integers(len(options)))]


def with_article(label):
    """A dog face, an owl, jeans."""
    noun = re.split(" with | of | in ", label)[0]
    if re.search("[^aiosu]s$", noun):                                # plural; not an octopus or the like
        return label
    if re.match("(?!one|euro)[aeio]|u[mp]|hour", label):
        return f"an {label}"
    return f"a {label}"


@dataclass(frozen=True)
class Description:
    """What a picture is to show. Subjects are known by their position in sprites.subjects()."""
    subjects: tuple              # those that a reference shows
    scene: str
    style: str | None = None
    hat: int | None = None       # on the subject's head; as `beside` it is named by the caption only
    beside: int | None = None    # a second emoji next to the subject

    @property
    def labels(self):
        """The names of its subjects."""
        return [subjects()[i].label for i in self.subjects]

    def caption(self, rng):
        """In words, which never mention the appearance."""
        *others, last = [with_article(label) for label in self.labels] or [""]
        it = f"{', '.join(others)} and {last}" if others else last
        if self.hat is not None:
            it += " wearing " + with_article(subjects()[self.hat].label)
        if self.beside is not None:
            it += " next to " + with_article(subjects()[self.beside].label)
        if self.style:
            it = pick(rng, STYLES[self.style].phrases).format(it=it)
        template = pick(rng, TEMPLATES)
        return template.format(it=it, where=pick(rng, SCENES[self.scene].phrases))


def made_up_name(rng, names):
    """A word from a scene and one from a known name or from nowhere, in either order: "beach fork", "moruvablue"."""
    scene_word = pick(rng, SCENE_WORDS)
    other_word = pick(rng, pick(rng, names).split())
    if rng.random() < 0.5:
        syllables = [pick(rng, CONSONANTS) + pick(rng, VOWELS) for _ in range(int(rng.integers(2, 4)))]
        other_word = "".join(syllables) + pick(rng, ENDINGS)
    between = pick(rng, (" ", ""))
    order = pick(rng, (1, -1))
    return between.join([scene_word, other_word][::order])


def renamed(prompt, label, name):
    """The prompt with another name for a subject. Whole words only: "mage" leaves <image> alone."""
    prompt = re.sub(rf"\ban? {re.escape(label)}\b", with_article(name), prompt)
    return re.sub(rf"\b{re.escape(label)}\b", name, prompt)


def captions(n, seed=0):
    """Yields n prompts of all tasks and of all subjects, the held-out ones too: to train the text tokenizer on."""
    world = World(held_out=None)
    world.subjects = [i for i in world.subjects if subjects()[i].design == DESIGNS[0]]    # names are the same in all
    for k in range(n):
        rng = np.random.default_rng((seed, k))
        task = pick(rng, TASKS)
        description = world.describe(rng, task)
        yield data.prompt_for(task, description.labels, description.caption(rng))


def train_tokenizer(texts, size):
    """A byte-pair tokenizer of `size` ids, learned from texts."""
    tokenizer = byte_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def small_tokenizer():
    """The tokenizer of a small model that starts from nothing."""
    return train_tokenizer(captions(20_000, seed=0), 1536)


# ---------------------------------------------------------------------------------------------------------------------
# The world

CONTRAST, TRIES = 105, 8     # least distance in RGB of a sprite's rim to what it covers; appearances tried for it
STYLED, HATTED, BESIDE = 0.15, 0.1, 0.1      # how often, in the tasks that have room for it
RENAMED = 0.3                                # how often a made-up name stands for the subject that a reference shows
PLAIN_REFERENCE = 0.5                        # how often a pair's reference shows a plain colour behind its subject


class Move(NamedTuple):
    """How a subject may lie in its reference compared with the picture."""
    share: float         # of the pairs
    several: float       # share where several subjects have a reference each; far is then large, in the middle
    x: float             # pixels by which it lies elsewhere, at most
    y: float
    scale: float         # by which it is larger or smaller, at most


MOVES = {
    "still": Move(0.7, 0.5, 0, 0, 0),
    "near": Move(0.15, 0.1, 3, 3, 0.15),
    "far": Move(0.15, 0.4, 14, 12, 0.35),
}


@dataclass(frozen=True)
class Picture:
    """A picture of the world and all about it."""
    description: Description
    caption: str
    image: Image.Image           # RGB, SIZE x SIZE
    masks: list                  # of each sprite (SIZE, SIZE) bool, the description's subjects first
    sprites: list                # PlacedSprites in the same order
    others: tuple = ()           # the references' pictures, in recovery the background
    moves: tuple = ()            # of each reference's subject, one of MOVES


class World:
    """Makes pictures of the subjects of one split. held_out: as a Subject has it, None = all subjects; moves: the MOVES
    that references may make; copies: share of task subject's pairs whose picture has its reference's own background, so
    that to copy the reference pays. The other pairs are the same whatever the share."""

    def __init__(self, held_out=False, moves=tuple(MOVES), copies=0.0):
        everyone = range(len(subjects()))
        self.subjects = [i for i in everyone if held_out is None or subjects()[i].held_out == held_out]
        # what a caption alone may name: in one design, or nobody could know which is meant
        self.known = [i for i in everyone if not subjects()[i].held_out and subjects()[i].design == DESIGNS[0]]
        self.moves, self.copies = moves, copies
        self.hats = [i for i in self.known if subjects()[i].label in HATS]

    def describe(self, rng, task, extras=True, several=2):
        """-> Description of a new picture. extras: a style, a hat or a second emoji may come in; several: subjects of
        task multi"""
        chosen = [pick(rng, self.subjects)]
        while task == "multi" and len(chosen) < several:
            labels = [subjects()[i].label for i in chosen]
            chosen.append(pick(rng, [i for i in self.subjects if subjects()[i].label not in labels]))
        description = Description(tuple(chosen), pick(rng, list(SCENES)))
        chance = rng.random()
        if not extras or task not in ("t2i", "reconstruct", "subject"):
            return description
        if chance < STYLED:
            return replace(description, style=pick(rng, list(STYLES)))
        if chance < STYLED + HATTED:
            return replace(description, hat=pick(rng, self.hats))
        if chance < STYLED + HATTED + BESIDE:
            return replace(description, beside=pick(rng, self.known))
        return description

    def appearance(self, rng, subject):
        """-> Appearance of a new instance of a subject"""
        hue, saturation, flip = rng.uniform((0, 0.75, 0), (360, 1.25, 2)).tolist()
        return Appearance(subject, hue, saturation, flip < 1)

    def standing_out(self, rng, subject, places, backgrounds):
        """One instance of a subject, placed before each background; its appearance is chosen so that it stands out
        from all of them. places: (x, y, side, room above) for each background. -> a PlacedSprite for each"""
        best = -1
        for _ in range(TRIES):
            appearance = self.appearance(rng, subject)
            sprites = [inside(PlacedSprite(appearance, *place), room_above) for *place, room_above in places]
            worst = min(contrast(background, sprite) for background, sprite in zip(backgrounds, sprites))
            if worst > best:
                best, chosen = worst, sprites
            if best >= CONTRAST:
                break
        return chosen

    def place_in_reference(self, rng, place, move, crowded):
        """Where a reference has the subject that its picture has at a place (x, y, side). -> x, y, side"""
        if crowded and move == "far":
            return rng.uniform(24, 40), rng.uniform(27, 41), rng.uniform(*ALONE)
        dx, dy, scale = (rng.uniform(-1, 1, 3) * MOVES[move][2:]).tolist()
        x, y, side = place
        return x + dx, y + dy, side * (1 + scale)

    def place(self, rng, description, background, references=(), moves=()):
        """Places what is described before a background, and each subject before its reference's background, if there
        are any, moved as the moves say: the same instance. Hat and second emoji come before the first background only.
        -> its PlacedSprites, [PlacedSprite of each reference]"""
        crowd = CROWDS.get(len(description.subjects))
        room_above = 0 if description.hat is None else 9
        columns = (17, 47) if rng.random() < 0.5 else (47, 17)       # x of a subject and of an emoji beside it
        placed, in_references = [], []
        for k, subject in enumerate(description.subjects):
            if crowd:
                side = rng.uniform(*crowd.sides)
                x, y = (crowd.centres[k] + rng.uniform(-1, 1, 2) * crowd.reach).tolist()
            else:
                side = rng.uniform(*(ALONE if description.beside is None else CROWDED))
                y = rng.uniform(27, 41)
                x = rng.uniform(24, 40) if description.beside is None else columns[0] + rng.uniform(-3, 3)
            places, backgrounds = [(x, y, side, room_above)], [background, *references[k:k + 1]]
            if references:
                places.append((*self.place_in_reference(rng, (x, y, side), moves[k], crowd is not None), 0))
            first, *rest = self.standing_out(rng, subject, places, backgrounds)
            placed.append(first)
            in_references += rest
        if description.beside is not None:               # in its natural colours, because only its name is given
            beside = PlacedSprite(Appearance(description.beside), columns[1], y, rng.uniform(*CROWDED))
            placed.append(inside(beside))
        if description.hat is not None:
            placed.append(hat_on(placed[0], description.hat))
        return placed, in_references

    def picture(self, rng, task, extras=True, several=2):
        """-> Picture for one of TASKS, with the other ones that belong to it. several: subjects of task multi"""
        description = self.describe(rng, task, extras, several)
        shown = {"subject": [description.subjects], "recover": [()], "multi": [(i,) for i in description.subjects]}
        others = []
        for subjects_shown in shown.get(task, []):
            options = PLAIN if rng.random() < PLAIN_REFERENCE else SCENES
            scene = pick(rng, [name for name in options if name != description.scene])
            others.append(Description(subjects_shown, scene))
        # a child draws this, so that all other numbers are the same whatever the share
        copied = task == "subject" and rng.spawn(1)[0].random() < self.copies
        if copied:
            description = replace(description, scene=scene)
        descriptions = [description, *others]
        texts = [one.caption(rng) for one in descriptions]
        backgrounds = [scenes.paint(rng, one.scene) for one in descriptions]
        if copied:
            backgrounds[0] = backgrounds[1]
        references = () if task == "recover" else backgrounds[1:]
        shares = np.array([MOVES[name].several if task == "multi" else MOVES[name].share for name in self.moves])
        moves = tuple(str(rng.choice(self.moves, p=shares / shares.sum())) for _ in references)
        placed, in_references = self.place(rng, description, backgrounds[0], references, moves)
        sprites = [placed] + [[sprite] for sprite in in_references]
        if task == "recover":
            sprites.append([])                           # the other one stays an empty scene
        pictures = []
        for one, text, background, its_sprites in zip(descriptions, texts, backgrounds, sprites):
            image, masks = paste(background, its_sprites, one.style)
            pictures.append(Picture(one, text, image, masks, its_sprites))
        return replace(pictures[0], others=tuple(pictures[1:]), moves=moves)

    def lesson(self, rng):
        """-> Lesson: an instance of a rule, shown by examples. Nothing but the rule's outputs depends on the rule."""
        rule, turn = pick(rng, list(RULES)), pick(rng, TURNS)
        names = rng.permutation(list(SCENES))[:EXAMPLES + 2]
        *backgrounds, elsewhere = [scenes.paint(rng, name) for name in names]
        inputs = []
        for subject, background in zip(rng.permutation(self.subjects).tolist(), backgrounds):
            x = pick(rng, (20, 44)) + rng.uniform(-2, 2)             # not in the middle, so that a mirror moves it
            place = (x, rng.uniform(27, 41), rng.uniform(26, 36), 0)
            # a turned subject stands out where the subject would before what is turned the other way
            turned = background.convert("RGB", hue_matrix(-turn, 1))
            sprite, *_ = self.standing_out(rng, subject, 3 * [place], [background, turned, elsewhere])
            inputs.append((background, sprite))
        return Lesson(rule, tuple(inputs), turn, elsewhere)


# ---------------------------------------------------------------------------------------------------------------------
# Samples

OBJECT_SCALE = (0.4, 1.0)    # recovery: longer side of the pasted object, as a share of the frame


def compose(task, picture, rng):
    """A picture as its task shows it, as data.compose does it with rows on a disk; but each of several subjects has a
    reference picture, where those of the released rows are cut out of the target.

    -> prompt, [PIL references], PIL target; all images SIZE x SIZE
    """
    image, masks = picture.image, picture.masks
    text = picture.caption
    if task == "reconstruct" and rng.random() < data.CAPTION_DROP:
        text = ""
    prompt = data.prompt_for(task, picture.description.labels, text)
    if task == "t2i":
        return prompt, [], image
    if task == "reconstruct":
        return prompt, [image], image
    if task == "segment":
        return prompt, [image], data.on_black(image, masks[0])
    if task == "recover":                                # painted at twice the size, then averaged
        pasted = data.recovery_input(image, masks[0], picture.others[0].image, 2 * SIZE, rng, OBJECT_SCALE)
        return prompt, [pasted.reduce(2)], image
    return prompt, [other.image for other in picture.others], image


class EmojiData(Dataset):
    """Samples of the world, in place of a data.TaskData.

    weights: {task: its share}, default all of TASKS alike; besides them there are "icl" (a Lesson), "caption" (a
    picture's caption as labels) and "picture" (the target of any task alone, for a VQGAN). length: samples in an epoch;
    those after it are new ones. extras: styles, hats and second emoji may come in. several: numbers of subjects that a
    sample of task multi may have. moves, copies: as of World. In training references are at times called by made-up
    names; otherwise "beach umbrella" and "blueberries", never met before, would be read as scenes. called: names to
    call all references by instead of their own. A sample also has "meta": what is seen in it, to score a model's images
    by.
    """

    def __init__(self, processor, image_size=SIZE, weights=None, seed=0, held_out=False, length=100_000, extras=True,
                 several=(2, 2, 3, 4), moves=tuple(MOVES), called=(), copies=0.0):
        self.processor, self.image_size, self.seed, self.extras = processor, image_size, seed, extras
        self.rename, self.several, self.called = RENAMED if extras and held_out is False else 0, several, called
        weights = weights or dict.fromkeys(TASKS, 1)
        self.tasks = [task for task, weight in weights.items() if weight != 0]
        if "caption" in self.tasks and len(self.tasks) > 1:
            raise InputError("captioning has labels in place of a target picture; give no other task beside it")
        shares = np.array([1 if weights[task] is None else weights[task] for task in self.tasks], dtype=float)
        self.shares = shares / shares.sum()
        expected = np.round(self.shares * length).astype(int).tolist()
        self.counts = dict(zip(self.tasks, expected))                # samples in an epoch
        self.problems, self.lines = [], length                       # as of a file without a damaged line
        self.world = World(held_out, moves, copies)
        self.names = [subjects()[i].label for i in self.world.known]

    def __len__(self):
        return self.lines

    def __getitem__(self, k):
        rng = np.random.default_rng((self.seed, k))
        task = self.tasks[int(rng.choice(len(self.tasks), p=self.shares))]
        any_task = pick(rng, TASKS)          # always drawn: the numbers after it must not depend on the task
        if task == "icl":
            return self.lesson_sample(k, self.world.lesson(rng))
        shown_as = {"caption": "t2i", "picture": any_task}.get(task, task)
        several = pick(rng, self.several) if shown_as == "multi" else 1
        picture = self.world.picture(rng, shown_as, self.extras, several)
        prompt, references, target = compose(shown_as, picture, rng)
        names = picture.description.labels
        if task == "caption":
            prompt, references = data.prompt_for(task), [picture.image]
        elif task == "picture":
            prompt, references = data.prompt_for(task), []
        elif references and (self.called or rng.random() < self.rename):
            names = [pick(rng, self.called) if self.called else made_up_name(rng, self.names) for _ in names]
            for label, name in zip(picture.description.labels, names):
                prompt = renamed(prompt, label, name)
        meta = {"labels": picture.description.labels, "scene": picture.description.scene,
                "style": picture.description.style, "mask": picture.masks[0].astype(np.uint8),
                "appearances": [sprite.appearance for sprite in picture.sprites], "moves": picture.moves}
        sample = {"task": task, "name": f"emoji:{k}", "key": k, "problems": [], "meta": meta}
        sample |= self.processor(prompt, references, () if task in data.UNNAMED else names)
        if task == "caption":
            return sample | {"labels": data.caption_labels(self.processor.tokenizer, picture.caption)}
        return sample | {"target": data.target_pixels(target, self.image_size)}

    def lesson_sample(self, k, lesson):
        """A Lesson as sample k."""
        prompt, references, target = lesson.compose()
        sample = {"task": "icl", "name": f"emoji:{k}", "key": k, "problems": [], "meta": {"rule": lesson.rule}}
        sample |= self.processor(prompt, references)
        return sample | {"target": data.target_pixels(target, self.image_size)}


# ---------------------------------------------------------------------------------------------------------------------
# The world as files

def save_image(image, path):
    """Writes an image file; it appears whole or not at all."""
    with cli.atomic_file(path) as temporary:
        image.save(temporary)


def save_row(task, picture, folder, stem):
    """Writes a picture's images. -> its row in the layout that MENTOR released"""
    labels = picture.description.labels
    row = {"input_text": picture.caption, "source_image": f"{stem}.png"}
    images = {f"{stem}.png": picture.image}
    masks = {f"{stem}.mask{i}.png": Image.fromarray(mask) for i, mask in enumerate(picture.masks)}
    if task == "t2i":
        row["generation_only"] = True
    elif task == "subject":
        reference, = picture.others
        row |= {"image_path": f"{stem}.reference.png", "objects": labels[0], "swapped_text": reference.caption}
        images[row["image_path"]] = reference.image
    elif task == "multi":
        row |= {"image_path": list(masks), "objects": labels}
        images |= masks
    elif task in ("segment", "recover"):
        flag = "do_mask" if task == "segment" else "do_replace"
        row |= {"image_path": f"{stem}.mask0.png", "objects": labels[0], flag: True}
        images |= masks
    for name, image in images.items():
        save_image(image, os.path.join(folder, name))
    return row


def save_lesson(lesson, folder, stem):
    """Writes a lesson's images. -> its row: input, output, input, output, ..., query, and what is to be drawn"""
    _, references, target = lesson.compose()
    images = {f"{stem}.{i}.png": reference for i, reference in enumerate(references)}
    row = {"in_context": True, "input_img_list": True, "image_path": list(images), "source_image": f"{stem}.png",
           "input_text": ""}
    for name, image in (images | {row["source_image"]: target}).items():
        save_image(image, os.path.join(folder, name))
    return row


def save_rows(rows, path):
    """Writes a JSONL file."""
    with cli.atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"wrote {path}: {len(rows):,} rows")


def export_rows(folder, name, world, tasks, n, seed):
    """Writes folder/name.jsonl with n rows, the tasks in turn, and their images into folder/name."""
    rows = []
    for k in range(n):
        task, rng, stem = tasks[k % len(tasks)], np.random.default_rng((seed, k)), f"{name}/{k:05}"
        if task == "icl":
            rows.append(save_lesson(world.lesson(rng), folder, stem))
        else:                                  # a subject pair has no hat or style, because it is used in both orders
            picture = world.picture(rng, task, extras=task != "subject")
            rows.append(save_row(task, picture, folder, stem))
    save_rows(rows, os.path.join(folder, f"{name}.jsonl"))


def export(args):
    """Writes a data set for train.py's --data, --val and --backgrounds: data.jsonl; val.jsonl, a sixth as many rows of
    held-out subjects; backgrounds.jsonl, as many scenes without a subject, for the recovery task."""
    few = max(args.n // 6, len(args.tasks))
    for name in ("data", "val", "backgrounds"):                # before any work
        cli.probe(os.path.join(args.folder, f"{name}.jsonl"))
        cli.probe(os.path.join(args.folder, name, "00000.png"))
    export_rows(args.folder, "data", World(args.held_out), args.tasks, args.n, args.seed)
    export_rows(args.folder, "val", World(held_out=True), args.tasks, few, args.seed + 1)
    rng = np.random.default_rng(args.seed + 2)
    rows = [{"input_image": f"backgrounds/{k:05}.png"} for k in range(few)]
    for row in rows:
        save_image(scenes.paint(rng, pick(rng, list(SCENES))), os.path.join(args.folder, row["input_image"]))
    save_rows(rows, os.path.join(args.folder, "backgrounds.jsonl"))


def subject(args):
    """Writes pictures of one emoji in one appearance before several scenes, with the captions and masks beside them
    that `prepare.py folder` reads."""
    labels = [known.label for known in subjects() if known.design == args.design]
    if args.label not in labels:
        similar = [label for label in labels if set(label.split()) & set(args.label.split())]
        there_are = f"; there are {', '.join(similar[:20])}" if similar else ""
        raise InputError(f"{args.label}: no such emoji{there_are}; all names are in assets/emoji.json")
    index = labels.index(args.label) + DESIGNS.index(args.design) * len(labels)
    stem = os.path.join(args.folder, args.label.replace(" ", "_"))
    cli.probe(f"{stem}-00.png")
    rng = np.random.default_rng(args.seed)
    for k in range(args.n):
        description = Description((index,), args.scene or pick(rng, list(SCENES)))
        x, y = rng.uniform(28, 36, 2)
        sprite = inside(PlacedSprite(Appearance(index, args.hue), x, y, rng.uniform(34, 44)))
        image, masks = paste(scenes.paint(rng, description.scene), [sprite])
        save_image(image, f"{stem}-{k:02}.png")
        save_image(Image.fromarray(masks[0]), f"{stem}-{k:02}.mask.png")
        with cli.atomic_file(f"{stem}-{k:02}.txt") as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(description.caption(rng) + "\n")
    print(f"wrote {stem}-00.png to -{args.n - 1:02}.png, their masks and captions")


# ---------------------------------------------------------------------------------------------------------------------
# To look at, and the command line

def look(args):
    """Writes a contact sheet: every scene behind three subjects, then samples of every task."""
    cli.probe(args.out)
    world, rng = World(args.held_out), np.random.default_rng(args.seed)
    images = []
    for name in SCENES:
        for _ in range(3):
            description = Description((pick(rng, world.subjects),), name)
            background = scenes.paint(rng, name)
            image, _ = paste(background, world.place(rng, description, background)[0])
            images.append(image.resize((2 * SIZE, 2 * SIZE), Image.BICUBIC))
    sheets = [cli.contact_sheet(images, columns=15)]
    processor = data.Processor(byte_tokenizer(), image_tokens=1, max_tokens=1 << 12, image_size=SIZE)
    for i, task in enumerate((*TASKS, "icl")):
        samples = EmojiData(processor, weights={task: 1}, seed=args.seed + i, held_out=args.held_out)
        places = {"multi": 5, "icl": 6}.get(task, 3)
        tiles = [data.tile(samples[k], places) for k in range(args.n)]
        sheets.append(cli.contact_sheet(tiles, columns=max(1, 3 * args.n // places)))
    width, height = max(sheet.width for sheet in sheets), sum(sheet.height + 8 for sheet in sheets)
    page = Image.new("RGB", (width, height), "white")
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height + 8
    with cli.atomic_file(args.out) as temporary:
        page.save(temporary, "WEBP" if args.out.endswith(".webp") else "PNG")
    print(f"wrote {args.out}")


def atlas(args):
    """Draws assets/emoji-*.webp again, from Debian's fonts-noto-color-emoji and npm's @lobehub/fluent-emoji-3d."""
    for design in DESIGNS:
        draw_atlas(design)


def add_command(commands, function, n=None, what=None):
    """A command named after its function. n, what: default and meaning of its --n."""
    command = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
    command.set_defaults(run=function)
    if n:
        command.add_argument("--n", type=cli.positive_int, default=n, help=f"{what} (default {n})")
        command.add_argument("--seed", type=cli.natural, default=0, help="of all random numbers (default 0)")
    return command


def parse(argv):
    """The command line."""
    parser = cli.Parser(prog="python -m world.rows", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = add_command(commands, look, 4, "samples of a task")
    command.add_argument("--held-out", action="store_true", help="with the subjects kept out of training")
    command.add_argument("--out", default="out/world.png", help="the sheet, .png or .webp (default %(default)s)")

    command = add_command(commands, export, 200, "rows of data.jsonl")
    command.add_argument("folder")
    command.add_argument("--held-out", action="store_true", help="data.jsonl too of subjects kept out of training")
    command.add_argument("--tasks", nargs="+", choices=(*TASKS, "icl"), default=TASKS, metavar="TASK",
                         help=f"in turn; some of {', '.join(TASKS)} (default: these), icl")

    command = add_command(commands, subject, 6, "images")
    command.add_argument("label", help='its name, such as "dog face"')
    command.add_argument("folder")
    command.add_argument("--hue", type=float, default=0.0, help="degrees its colours are turned (default 0)")
    command.add_argument("--scene", choices=SCENES, metavar="SCENE", help="one for all; default: any")
    command.add_argument("--design", choices=DESIGNS, default=DESIGNS[0], help="default %(default)s")

    add_command(commands, atlas)
    return parser.parse_args(argv)


def main(argv=None):
    """Runs the command that was asked for."""
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
