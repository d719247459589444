"""A made-up world to train a small model on: emoji before painted scenes, as many samples as one asks for.

Some 900 emoji (`sprites.py`) stand before 30 scenes (`scenes.py`), 64 x 64 pixels. Every instance of an emoji has its
own look: the hue is turned, the saturation changed, it may be mirrored. No prompt ever mentions the look, so a model
that is to draw this very one has to read the reference picture. A tenth of the emoji is held out of training.

    python emoji.py look                      # a contact sheet of scenes, styles and tasks
    python emoji.py export folder --n 200     # files and a data.jsonl, as a real data set has them
    python emoji.py subject "dog face" folder # pictures of one instance, as one drops them into a folder
    python emoji.py atlas                     # draws assets/emoji.webp anew, from Debian's fonts-noto-color-emoji

`EmojiData` stands in for `data.TaskData`; sample k is a function of (seed, k) alone. Next: `scenes.py`.
"""
import argparse
import json
import os
import re
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

import data
import scenes
from data import InputError
from scenes import PLAIN, SCENES, SIZE, STYLES
from sprites import ALONE, CROWDED, Figure, Look, contrast, draw_atlas, hat_on, inside, paint, subjects

# ---------------------------------------------------------------------------------------------------------------------
# What a picture shows, in words

TEMPLATES = ("{it} {where}", "{where}, {it}", "a picture of {it} {where}", "{it}, {where}", "you see {it} {where}")
SCENE_WORDS = sorted({word for phrases, _ in SCENES.values() for phrase in phrases for word in phrase.split()
                      if len(word) > 2 and word not in ("the", "and")})
HATS = ("top hat", "crown", "billed cap", "helmet", "woman's hat", "military helmet")


def pick(rng, options):
    """One of a sequence; quicker than rng.choice."""
    return options[int(rng.integers(len(options)))]


def with_article(label):
    """A dog face, an owl, jeans."""
    if re.search("[^aiosu]s$", re.split(" with | of | in ", label)[0]):       # plural, not octopus and the like
        return label
    return ("an " if re.match("(?!one|euro)[aeio]|u[mp]|hour", label) else "a ") + label


@dataclass(frozen=True)
class Script:
    """What a picture is to show. subjects: those a reference shows; hat, beside: only the caption names these."""
    subjects: tuple
    scene: str
    style: str | None = None
    hat: int | None = None
    beside: int | None = None

    @property
    def labels(self):
        """The names of its subjects."""
        return [subjects()[i].label for i in self.subjects]

    def caption(self, rng):
        """In words, which never mention the look."""
        it = " and ".join(map(with_article, self.labels))
        for word, index in ((" wearing ", self.hat), (" next to ", self.beside)):
            it += "" if index is None else word + with_article(subjects()[index].label)
        it = pick(rng, STYLES[self.style]).format(it=it) if self.style else it
        return pick(rng, TEMPLATES).format(it=it, where=pick(rng, SCENES[self.scene][0]))


def prompt_of(task, labels, caption):
    """The prompt of a task, with `<image>`."""
    if task == "segment":
        return data.segment_prompt(labels[0])
    if task == "reconstruct":
        return data.reconstruct_prompt(caption)
    return caption if task == "t2i" else data.subject_prompt(labels, caption)


def made_up_name(rng, names):
    """A scene's word and a known name's, in either order: "beach fork", "ringblue"."""
    words = [pick(rng, SCENE_WORDS), pick(rng, pick(rng, names).split())]
    return pick(rng, (" ", "")).join(words[::pick(rng, (1, -1))])


def renamed(prompt, label, name):
    """The prompt with another name for a subject; "mage" leaves <image> alone."""
    prompt = re.sub(rf"\ban? {re.escape(label)}\b", with_article(name), prompt)
    return re.sub(rf"\b{re.escape(label)}\b", name, prompt)


def captions(n, seed=0):
    """Yields n prompts of all tasks and of all subjects, the held-out ones too: to train the text tokenizer on."""
    world = World(held_out=None)
    for k in range(n):
        rng = np.random.default_rng((seed, k))
        task = pick(rng, data.TASKS)
        script = world.script(rng, task)
        yield prompt_of(task, script.labels, script.caption(rng))


# ---------------------------------------------------------------------------------------------------------------------
# The world

CONTRAST, TRIES = 105, 8     # least mean distance in RGB of a figure's rim to what it covers; looks tried for it
STYLED, HATTED, BESIDE = 0.15, 0.1, 0.1      # how often, in the tasks that have room for it
RENAMED = 0.2                                # how often a made-up name stands for the subject that a reference shows
PLAIN_REFERENCE = 0.5                        # how often a pair's reference shows a plain colour behind its subject
STAYS, NEAR, FAR = 0.75, (3, 3, 0.15), (14, 12, 0.35)    # how often a pair's subject moves little; pixels, scale


@dataclass(frozen=True)
class Shot:
    """A picture of the world and all about it. other: a pair's reference, or in recovery the background."""
    script: Script
    caption: str
    picture: Image.Image
    masks: list          # of each figure, first the script's subjects
    figures: list
    other: "Shot | None" = None


class World:
    """Draws with the subjects of one split. held_out: None = all subjects."""

    def __init__(self, held_out=False):
        every = list(enumerate(subjects()))
        self.subjects = [i for i, subject in every if held_out is None or subject.held_out == held_out]
        self.known = [i for i, subject in every if not subject.held_out]      # what a caption alone may name
        self.hats = [i for i in self.known if subjects()[i].label in HATS]

    def script(self, rng, task, extras=True):
        """extras: a style, a hat or a second emoji may come in."""
        chosen = [pick(rng, self.subjects)]
        if task == "multi":
            chosen.append(pick(rng, [i for i in self.subjects if i != chosen[0]]))
        script, dice = Script(tuple(chosen), pick(rng, list(SCENES))), rng.random()
        if not extras or task not in ("t2i", "reconstruct", "subject"):
            return script
        if dice < STYLED:
            return replace(script, style=pick(rng, list(STYLES)))
        if dice < STYLED + HATTED:
            return replace(script, hat=pick(rng, self.hats))
        return replace(script, beside=pick(rng, self.known)) if dice < STYLED + HATTED + BESIDE else script

    def look(self, rng, subject):
        """A new instance of a subject."""
        hue, saturation, flip = rng.uniform((0, 0.75, 0), (360, 1.25, 2)).tolist()
        return Look(subject, hue, saturation, flip < 1)

    def instance(self, rng, subject, places, grounds):
        """Figures of one look, one a background, redrawn until they stand out from all. places: (x, y, side, head)"""
        best = -1
        for _ in range(TRIES):
            look = self.look(rng, subject)
            figures = [inside(Figure(look, *place), head) for *place, head in places]
            if (worst := min(map(contrast, grounds, figures))) > best:
                best, chosen = worst, figures
            if best >= CONTRAST:
                break
        return chosen

    def cast(self, rng, script, grounds):
        """-> for each background its figures: the same instances, most often at about the same place."""
        crowd, head = len(script.subjects) > 1 or script.beside is not None, 0 if script.hat is None else 9
        columns, casts = (17, 47) if rng.random() < 0.5 else (47, 17), [[] for _ in grounds]
        for subject, column in zip(script.subjects, columns):
            side, y = rng.uniform(*(CROWDED if crowd else ALONE)), rng.uniform(27, 41)
            x = column + rng.uniform(-3, 3) if crowd else rng.uniform(24, 40)
            places = [(x, y, side, head)]
            for _ in grounds[1:]:
                dx, dy, scale = (rng.uniform(-1, 1, 3) * (NEAR if rng.random() < STAYS else FAR)).tolist()
                places.append((x + dx, y + dy, side * (1 + scale), 0))
            for figures, figure in zip(casts, self.instance(rng, subject, places, grounds)):
                figures.append(figure)
        if script.beside is not None:                    # as it looks by nature, for the prompt gives only its name
            casts[0].append(inside(Figure(Look(script.beside), columns[1], y, rng.uniform(*CROWDED))))
        if script.hat is not None:
            casts[0].append(hat_on(casts[0][0], script.hat))
        return casts

    def shot(self, rng, task, extras=True):
        """-> Shot: a picture for one of data.TASKS with what belongs to it."""
        scripts = [self.script(rng, task, extras)]
        if task in ("subject", "recover"):
            options = PLAIN if rng.random() < PLAIN_REFERENCE else SCENES
            names = [name for name in options if name != scripts[0].scene]
            scripts.append(Script(scripts[0].subjects, pick(rng, names)))
        texts = [script.caption(rng) for script in scripts]
        grounds = [scenes.paint(rng, script.scene) for script in scripts]
        casts = self.cast(rng, scripts[0], grounds[:1] if task == "recover" else grounds) + [[]]
        shots = [Shot(script, text, *paint(ground, figures, script.style), figures)
                 for script, text, ground, figures in zip(scripts, texts, grounds, casts)]
        return replace(shots[0], other=shots[1]) if len(shots) > 1 else shots[0]


# ---------------------------------------------------------------------------------------------------------------------
# Samples

def compose(task, shot, rng):
    """What data.compose makes of a row: -> prompt, [PIL references], PIL target; all pictures SIZE x SIZE"""
    picture, masks = shot.picture, shot.masks
    dropped = task == "reconstruct" and rng.random() < data.CAPTION_DROP
    prompt = prompt_of(task, shot.script.labels, "" if dropped else shot.caption)
    if task == "recover":
        scale = (0.4, 1.0)                     # smaller ones are a few pixels here
        references = [data.recovery_input(picture, masks[0], shot.other.picture, 2 * SIZE, rng, scale).reduce(2)]
    elif task == "multi":
        references = [data.multi_reference(picture, mask, rng).resize((SIZE, SIZE), Image.BICUBIC) for mask in masks]
    else:
        references = {"t2i": [], "subject": [shot.other and shot.other.picture]}.get(task, [picture])
    return prompt, references, data.on_black(picture, masks[0]) if task == "segment" else picture


class EmojiData(Dataset):
    """Samples of the world, with what train.py uses of a data.TaskData.

    weights: {task: its share}, default all of data.TASKS alike; besides them there are "caption" (a picture's caption
    as labels) and "picture" (the target of any task alone, for the tokenizer). length: what counts as an epoch; later
    samples are new ones. extras: styles, hats and second emoji may come in. In training a reference is at times called
    by a made-up name, or "beach umbrella" and "blueberries", never met before, would be read as scenes. A sample also
    has "meta": what is seen in it, for whoever judges drawn pictures.
    """

    def __init__(self, prompter, image_size=SIZE, clip_size=SIZE, weights=None, seed=0, held_out=False, length=100_000,
                 extras=True):
        self.prompter, self.image_size, self.clip_size, self.seed = prompter, image_size, clip_size, seed
        self.extras, weights = extras, weights or dict.fromkeys(data.TASKS, 1)
        self.rename = RENAMED if extras and held_out is False else 0
        self.tasks = [task for task, weight in weights.items() if weight != 0]
        if "caption" in self.tasks and len(self.tasks) > 1:
            raise InputError("captioning has labels in place of a target picture; give no other task beside it")
        shares = np.array([1 if weights[task] is None else weights[task] for task in self.tasks], dtype=float)
        self.shares = shares / shares.sum()
        self.counts = dict(zip(self.tasks, np.round(self.shares * length).astype(int).tolist()))      # expected
        self.problems, self.lines, self.world = [], length, World(held_out)
        self.names = [subjects()[i].label for i in self.world.known]

    def __len__(self):
        return self.lines

    def __getitem__(self, k):
        rng = np.random.default_rng((self.seed, k))
        task = self.tasks[int(rng.choice(len(self.tasks), p=self.shares))]
        kind = {"caption": "t2i", "picture": pick(rng, data.TASKS)}.get(task, task)
        shot = self.world.shot(rng, kind, self.extras)
        prompt, references, target = compose(kind, shot, rng)
        if task in ("caption", "picture"):
            prompt, references = (data.IMAGE, [shot.picture]) if task == "caption" else ("", [])
        elif references and rng.random() < self.rename:
            prompt = renamed(prompt, shot.script.labels[0], made_up_name(rng, self.names))
        ids, mask = self.prompter(prompt, len(references))
        refs = [torch.empty(0, 3, self.clip_size, self.clip_size)]
        refs += [data.clip_pixels(reference, self.clip_size)[None] for reference in references]
        look = shot.figures[0].look
        meta = {"labels": shot.script.labels, "scene": shot.script.scene, "style": shot.script.style, **vars(look),
                "mask": shot.masks[0].astype(np.uint8)}
        sample = {"task": task, "name": f"emoji:{k}", "key": k, "prompt": prompt, "ids": ids, "mask": mask,
                  "refs": torch.cat(refs), "problems": [], "meta": meta}
        if task == "caption":
            labels = torch.tensor(self.prompter.tokenizer.encode(shot.caption).ids[:data.CAPTION_TOKENS])
            return sample | {"labels": F.pad(labels, (0, data.CAPTION_TOKENS - len(labels)), value=-100)}
        return sample | {"target": data.target_pixels(target, self.image_size)}


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def look(args):
    """Draws a contact sheet: every scene behind three subjects, then samples of every task."""
    world, rng, tiles = World(args.held_out), np.random.default_rng(args.seed), []
    for name in SCENES:
        for _ in range(3):
            script, ground = Script((pick(rng, world.subjects),), name), scenes.paint(rng, name)
            picture, _ = paint(ground, world.cast(rng, script, [ground])[0])
            tiles.append(picture.resize((2 * SIZE, 2 * SIZE), Image.BICUBIC))
    sheets, prompter = [data.contact_sheet(tiles, 15)], data.Prompter(data.byte_tokenizer(), 1, max_tokens=1 << 12)
    for i, task in enumerate(data.TASKS):
        samples = EmojiData(prompter, weights={task: 1}, seed=args.seed + i, held_out=args.held_out)
        sheets.append(data.contact_sheet([data.tile(data.collate([samples[k]]), 3) for k in range(args.n)], args.n))
    out = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height + 8 for sheet in sheets)), "white")
    for i, sheet in enumerate(sheets):
        out.paste(sheet, (0, sum(above.height + 8 for above in sheets[:i])))
    out.save(args.out, "WEBP" if args.out.endswith(".webp") else "PNG")
    print(f"wrote {args.out}")


def export(args):
    """Writes samples of every task as files and a data.jsonl, as a data set on disk has them."""
    os.makedirs(args.folder, exist_ok=True)
    world, rows = World(args.held_out), []
    for k in range(args.n):
        task = data.TASKS[k % len(data.TASKS)]
        shot = world.shot(np.random.default_rng((args.seed, k)), task, extras=task != "subject")   # serves both ways
        labels, row = shot.script.labels, {"input_text": shot.caption, "source_image": f"{k:05}.png"}
        pictures = {row["source_image"]: shot.picture}
        masks = {f"{k:05}.mask{i}.png": Image.fromarray(shot.masks[i]) for i in range(len(labels))}
        if task in ("segment", "recover", "multi"):
            several, pictures = task == "multi", pictures | masks
            row |= {"image_path": list(masks), "objects": labels} if several else \
                {"image_path": f"{k:05}.mask0.png", "objects": labels[0]}
        if task == "subject":
            pictures[f"{k:05}.reference.png"] = shot.other.picture
            row |= {"image_path": f"{k:05}.reference.png", "objects": labels[0], "swapped_text": shot.other.caption}
        if flag := {"t2i": "generation_only", "segment": "do_mask", "recover": "do_replace"}.get(task):
            row[flag] = True
        for name, picture in pictures.items():
            picture.save(os.path.join(args.folder, name))
        rows.append(row)
    path = os.path.join(args.folder, "data.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"wrote {path}: {len(rows):,} rows")


def subject(args):
    """Writes pictures of one emoji in one look before several scenes, with the captions and masks beside them that
    `data.py folder` reads."""
    index = next((i for i, known in enumerate(subjects()) if known.label == args.label), None)
    if index is None:
        near = [known.label for known in subjects() if set(known.label.split()) & set(args.label.split())]
        raise InputError(f"{args.label}: no such emoji{'; there are ' * bool(near)}{', '.join(near[:20])}; all names "
                         f"are in assets/emoji.json")
    os.makedirs(args.folder, exist_ok=True)
    stem, rng = os.path.join(args.folder, args.label.replace(" ", "_")), np.random.default_rng(args.seed)
    for k in range(args.n):
        script = Script((index,), args.scene or pick(rng, list(SCENES)))
        figure = inside(Figure(Look(index, args.hue), *rng.uniform(28, 36, 2), rng.uniform(34, 44)))
        picture, masks = paint(scenes.paint(rng, script.scene), [figure])
        picture.save(f"{stem}-{k:02}.png")
        Image.fromarray(masks[0]).save(f"{stem}-{k:02}.mask.png")
        with open(f"{stem}-{k:02}.txt", "w", encoding="utf-8") as file:
            file.write(script.caption(rng) + "\n")
    print(f"wrote {stem}-00.png to -{args.n - 1:02}.png, their masks and captions")


def atlas(args):
    """Draws assets/emoji.webp anew, from Debian's fonts-noto-color-emoji."""
    draw_atlas()


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(prog="emoji.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function in (look, export, subject, atlas):
        command = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        command.set_defaults(run=function)
        if function in (look, export):
            command.add_argument("--held-out", action="store_true", help="with the subjects kept out of training")
        if function is not atlas:
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--n", type=int, default={look: 4, export: 200, subject: 6}[function],
                                 help="samples of a task or pictures in all (default %(default)s)")
        if function is subject:
            command.add_argument("label", help="its name, such as \"dog face\"")
            command.add_argument("--hue", type=float, default=0.0, help="degrees its colours are turned (default 0)")
            command.add_argument("--scene", choices=SCENES, metavar="SCENE", help="one for all; default: any")
        if function is look:
            command.add_argument("--out", default="emoji.png", help="the sheet, .png or .webp (default emoji.png)")
        if function in (export, subject):
            command.add_argument("folder")
    args = parser.parse_args(argv)
    data.check_numbers(args, free=("hue",))
    try:
        args.run(args)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; check the path") from None


if __name__ == "__main__":
    data.run(main)
