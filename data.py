"""Images, prompts and rows of training data in, tensors out.

Everything the network sees passes through here: a reference photograph becomes CLIP pixels, a target image becomes
VQGAN pixels, the prompt template of a task is filled in, and the text becomes T5 ids in which every reference image
holds as many `<image>` tokens as the connector makes rows of it, one for each CLIP patch with an MLP (a MENTOR prompt
of one dog: "The dog in " + 256 x <image> + ".\\n...").

Training data is a JSON-lines file in the layout of MENTOR's (huggingface.co/datasets/BleachNick/Mentor_Stage2);
paths are absolute or relative to the file's folder:

    t2i          {"input_text": caption, "source_image": image, "generation_only": true}
    reconstruct  {"input_text": caption, "source_image": image}; with another "image_path" that is drawn from the image
    segment      {"source_image": image, "image_path": mask, "objects": "dog", "do_mask": true}; or lists of both
    recover      {"source_image": image, "image_path": mask, "objects": "dog", "do_replace": true, "input_text": ...}
    subject      {"source_image": target, "image_path": reference, "objects": "dog", "input_text": prompt};
                 with "swapped_text", the reference's own prompt, it is a second sample the other way round
    multi        {"source_image": image, "image_path": [mask, ...], "objects": ["dog", ...], "input_text": caption};
                 with "input_img_list": true the list holds input images, used as they are
    icl          the same with "in_context": true, the list being input, output, input, output, ..., query: pairs that
                 show by example what is to be done with the query; the prompt names all in order, or is made so

`python prepare.py folder my_photos` writes such a file, `import` makes one of other formats (X2I's, LLaVA's, COCO's,
img2dataset's, ...), assets/example holds a small one of every task.

Shape letters: S prefix rows, T image tokens, K reference images of a batch, c their pixels a side.
Next: `encoder.py` turns these tensors into the rows that the decoder reads.
"""
import hashlib
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import cli
from cli import InputError, box_of, homography, on_black, open_image, open_mask

IMAGE = "<image>"          # in a prompt: here stands a reference image
WHOLE = "whole image"      # what the query connector looks for where no subject is named
NAME_TOKENS = 64           # of a subject's name; of a longer one the connector reads the beginning
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# ---------------------------------------------------------------------------------------------------------------------
# Images

def cut_off(image):
    """What share of an image is not in its central square."""
    return 1 - min(image.size) / max(image.size)


def center_square(image, size, rounding=round, fit="crop"):
    """Shorter side to `size` by bicubic resampling, then the central square; with fit="pad" the whole image between
    black bars. rounding: of the longer side's length."""
    if fit == "pad":
        image = ImageOps.pad(image, (max(image.size), max(image.size)))
    shorter = min(image.size)
    width, height = (rounding(side * size / shorter) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))


def clip_pixels(image, size=224, fit="crop"):
    """PIL RGB image -> (3, size, size) fp32, normalised for CLIP (openai/clip-vit-large-patch14 preprocessing)."""
    square = center_square(image, size, rounding=int, fit=fit)         # int: CLIP's published preprocessing truncates
    pixels = np.asarray(square, dtype=np.float32) / 255
    pixels = (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()                         # (3, size, size)


def target_pixels(image, size=512, fit="crop"):
    """PIL RGB image -> (3, size, size) fp32 in [-1, 1], what the VQGAN encodes (LlamaGen's centre crop)."""
    while min(image.size) >= 2 * size:                     # box filter first: texture is averaged, not sampled
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    pixels = np.asarray(center_square(image, size, fit=fit), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()                         # (3, size, size)


def to_image(pixels):
    """(3, H, W) in [-1, 1] -> PIL RGB image; values outside are cut off."""
    pixels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def tile(sample, places, image=None):
    """A sample as the network sees it: references, an image it made, (3, H, W) in [-1, 1] or None, and the target in a
    red frame, above the prompt. places: room for so many images. -> PIL RGB"""
    refs = sample["refs"] * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    images = [*(2 * refs - 1), sample["target"]]
    if image is not None:
        images.insert(-1, image)
    return cli.captioned([to_image(pixels) for pixels in images], f"{sample['task']}: {sample['prompt']}", places)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and tokens

def prompt_for(task, subjects=(), text="", examples=0):
    """The prompt of a task as MENTOR's released data has it, `<image>` standing once for each reference image.

    task: one of TASKS, "caption" (an image to be described) or "picture" (no prompt). text: caption or prompt.
    examples: of task icl, whose wording is ours.
    """
    if task == "icl":
        lines = [f"Input {i + 1}: {IMAGE} output {i + 1}: {IMAGE}" for i in range(examples)]
        return "\n".join([*lines, f"Input {examples + 1}: {IMAGE} output {examples + 1}: {text}".rstrip()])
    lines = [f"The {subject} in {IMAGE}." for subject in subjects]
    if task == "segment":
        return "\n".join(lines)
    if task in ("recover", "subject", "multi"):
        return "\n".join([*lines, text])
    if task == "reconstruct":
        return f"The image is {IMAGE}\n{text}" if text else f"{IMAGE}\n"
    if task == "caption":
        return IMAGE
    return text


class Processor:
    """A prompt with its reference images -> what the network reads.

    tokenizer: a `tokenizers.Tokenizer` whose `</s>` is 1 and whose pad is 0; `<image>` is added behind its vocabulary
    (id 32100 for FLAN-T5). image_tokens: rows for each image. max_tokens: the prefix length S. image_size: CLIP's c.
    words: the tokenizer of a query connector, which is told what each image shows; its pad is 0, too. `fit`: what
    becomes of images that are not square, "crop" or "pad".
    """
    fit = "crop"

    def __init__(self, tokenizer, image_tokens=256, max_tokens=512, image_size=224, words=None):
        tokenizer.add_special_tokens([IMAGE])
        self.tokenizer, self.words, self.image_tokens = tokenizer, words, image_tokens
        self.max_tokens, self.image_size = max_tokens, image_size
        self.image_id = tokenizer.token_to_id(IMAGE)

    def __call__(self, prompt, images=(), subjects=()):
        """images: PIL, one for each `<image>`; subjects: their names, none = WHOLE. -> {"prompt", "ids" (S,) int64 with
        0 behind the text, "mask" (S,) bool, True = a token, "refs" (n, 3, c, c), and "words" (n, W) int64 for a query
        connector}; raises InputError where the numbers do not fit."""
        if not all(isinstance(image, Image.Image) and image.mode == "RGB" for image in images):
            raise InputError("references are RGB pictures of Pillow; open files by data.open_image")
        placeholders = prompt.count(IMAGE)
        if placeholders != len(images):
            raise InputError(f"the prompt has {placeholders} {IMAGE} but {len(images)} reference picture(s) came with "
                             f"it; write one {IMAGE} for each")
        ids = self.tokenizer.encode(prompt.replace(IMAGE, IMAGE * self.image_tokens)).ids
        if len(ids) > self.max_tokens:
            raise InputError(self.too_long(len(ids), len(images)))
        padded = torch.zeros(self.max_tokens, dtype=torch.long)
        padded[:len(ids)] = torch.tensor(ids)
        refs = torch.empty(len(images), 3, self.image_size, self.image_size)
        for i, image in enumerate(images):
            refs[i] = clip_pixels(image, self.image_size, self.fit)
        read = {"prompt": prompt, "ids": padded, "mask": torch.arange(self.max_tokens) < len(ids), "refs": refs}
        return read | {"words": self.words_of(subjects, len(images))} if self.words else read

    def too_long(self, tokens, images):
        """The error of a prompt that does not fit, with the ways out that there are. -> text"""
        rows = images * self.image_tokens
        ways = "fewer reference pictures, weights with a longer prefix (train.py --stage multi) or " if images else ""
        if images and not self.words:
            ways = ways.replace(" or ", ", those with the query connector (32 tokens a picture) or ")
        return (f"the prompt needs {tokens} tokens ({images} picture(s) x {self.image_tokens} = {rows}, text "
                f"{tokens - rows}) but the prefix has {self.max_tokens}; use {ways}a shorter prompt")

    def words_of(self, subjects, images):
        """What so many images show, for the query connector. -> (images, W) int64, 0 behind the words"""
        subjects = subjects or [WHOLE] * images
        if len(subjects) != images:
            raise InputError(f"{len(subjects)} subject(s) are named but the prompt shows {images} picture(s), and the "
                             "query connector looks for one in each; name one for each or none")
        if not all(subject.strip() for subject in subjects):
            raise InputError("the name of a subject is empty, and the query connector reads it; name what the picture "
                             "shows")
        return pad_rows([torch.tensor([self.words.encode(subject).ids[:NAME_TOKENS]]) for subject in subjects])


def pad_rows(parts):
    """Rows of ids one behind the other, zeros behind the shorter ones. parts: (n, W) each -> (all n, longest W)"""
    longest = max((part.size(1) for part in parts), default=1)
    padded = [F.pad(part, (0, longest - part.size(1))) for part in parts]
    return torch.cat(padded) if padded else torch.zeros(0, longest, dtype=torch.long)


def collate(samples):
    """Samples of one kind -> batch under the same keys: tensors stacked, "refs" (K, 3, c, c) and "words" (K, W) one
    behind the other, all else as lists; prompts cut to the longest of them (what is cut off is padding)."""
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    together = {"refs": torch.cat(batch.pop("refs"))}                                     # (K, 3, c, c)
    if "words" in batch:
        together["words"] = pad_rows(batch.pop("words"))                                  # (K, W)
    for key, values in batch.items():
        if isinstance(values[0], torch.Tensor):
            batch[key] = torch.stack(values)
    longest = int(batch["mask"].sum(dim=1).max())
    batch["ids"] = batch["ids"][:, :longest]                                              # (B, S)
    batch["mask"] = batch["mask"][:, :longest]                                            # (B, S)
    return batch | together


# ---------------------------------------------------------------------------------------------------------------------
# Rows

TASKS = ("t2i", "reconstruct", "segment", "recover", "subject", "multi", "icl")
UNNAMED = ("t2i", "reconstruct", "caption", "picture")         # tasks whose images no subject is looked for in
KINDS = {task: i for i, task in enumerate((*TASKS, "background"))}
FLAGS = ("generation_only", "input_img_list", "do_replace", "do_mask", "in_context")
INDEX = [("task", "u1"), ("captions", "?"), ("reversible", "?")]         # what is kept of a row


class Row(NamedTuple):
    """One line of a JSONL file."""
    task: str                  # one of TASKS, or "background"
    source: str                # the image; of a pair the target
    text: str                  # caption or prompt
    swapped_text: str | None   # the prompt when a pair is used the other way round; None = it is not
    images: tuple              # for each object its mask or input image; without objects the reference of an edit
    objects: tuple
    as_is: bool                # images are input images, not masks
    name: str = ""             # file.jsonl:LINE
    key: int = 0               # stands for the line's content, to find its codes


def task_of(record, objects):
    """The task that a row's flags tell (MENTOR's dataset/t2i.py)."""
    for flag in FLAGS:
        if record.get(flag) not in (None, False, True):
            raise InputError(f'"{flag}" must be true or false, not {cli.shortly(record[flag])!a}')
    if record.get("input_image"):
        return "background"
    if record.get("generation_only"):
        return "t2i"
    if record.get("in_context"):
        return "icl"
    if record.get("input_img_list"):
        return "multi"
    if record.get("do_replace"):
        return "recover"
    if record.get("do_mask"):
        return "segment"
    if objects:
        return "multi" if isinstance(record["objects"], list) else "subject"
    return "reconstruct"


def parse_row(line):
    """One line (bytes) -> Row with the paths as they stand there; InputError says what is wrong with it."""
    record = cli.json_object(line)
    images, objects = cli.texts_of(record, "image_path"), cli.texts_of(record, "objects")
    keys = "input_text", "swapped_text", "source_image", "input_image"
    text, swapped_text, source, background = ["".join(cli.texts_of(record, key, several=False)) for key in keys]
    task, source, reference = task_of(record, objects), source or background, ()
    as_is = bool(record.get("input_img_list")) or task == "icl"
    own_prompt = as_is and IMAGE in text
    if not as_is:                        # the released loader does so: it puts its own where they belong
        text, swapped_text = text.replace(IMAGE, ""), swapped_text.replace(IMAGE, "")
    if images and not objects and task in ("t2i", "reconstruct"):            # image_path is the target
        if task == "reconstruct" and source and os.path.normpath(source) != os.path.normpath(images[0]):
            reference = (source,)                              # of an edit
        source = images[0]
    needed = {"source_image": source}
    if task in ("segment", "recover", "subject", "multi"):
        needed |= {"objects": objects or own_prompt, "image_path": images}
    if task == "icl":
        needed["image_path"] = images
    if task in ("recover", "subject", "multi"):
        needed["input_text"] = "input_text" in record          # it may be empty
    if task == "t2i" or reference:
        needed["input_text"] = text
    for key, value in needed.items():
        if not value:
            raise InputError(f'"{key}" is missing; a row of task {task} needs it')
    if task == "icl":
        if len(images) < 3 or len(images) % 2 == 0:
            raise InputError(f"{len(images)} path(s) in image_path, but examples are pairs of input and output, and "
                             "behind them comes the query, the input to be treated alike: 3, 5, 7, ... paths")
    elif len(objects) != len(images) and not own_prompt and ("objects" in needed or len(images) > 1):
        raise InputError(f"{len(objects)} object(s) but {len(images)} path(s) in image_path; give one for each")
    if len(objects) > 1 and task == "recover":
        raise InputError(f"do_replace moves one object, not {len(objects)}; write a line for each")
    return Row(task, source, text, None if record.get("swapped_text") is None else swapped_text,
               images if "image_path" in needed else reference, objects, as_is)


class Rows(cli.JsonLines):
    """The rows of JSONL files. `table` has what INDEX names."""

    def __init__(self, paths):
        super().__init__(paths, self.entry, INDEX)

    @staticmethod
    def entry(line):
        """What is kept of a line."""
        row = parse_row(line)
        captions = row.task in ("t2i", "reconstruct") and row.text != "" and not row.images
        return KINDS[row.task], captions, row.task == "subject" and row.swapped_text is not None

    def __getitem__(self, i):
        """-> Row with its paths joined with the file's folder; InputError where the file is not what it was."""
        path, name, line = self.line(i)
        folder, row = os.path.dirname(path), parse_row(line)
        place = "/".join(os.path.abspath(path).split(os.sep)[-2:])           # the same wherever the data is moved to
        key = int.from_bytes(hashlib.blake2b(place.encode() + line, digest_size=7).digest(), "big")
        images = tuple(os.path.join(folder, image) for image in row.images)
        return row._replace(source=os.path.join(folder, row.source), images=images, name=name, key=key)


# ---------------------------------------------------------------------------------------------------------------------
# From a row to prompt, references and target, as the paper describes its tasks (2.3, appendix D)

CAPTION_DROP = 0.5       # reconstruction: how often the image comes without its caption
SCALE = (0.2, 1.0)       # recovery: side of the pasted frame, as a share of the background's
WARPED = 0.5             # how often it is also rotated, stretched, sheared and bent in perspective:
ROTATION, STRETCH, SHEAR, BEND = 20, (0.7, 1.3), 0.3, 0.2    # up to degrees, factors, slope, share of the side


def recovery_input(image, mask, background, size, rng, object_scale=None):
    """Recovery: the image's central square without what is not its object, scaled and half the time warped, at a random
    place of a (size, size) background. object_scale: instead of the square the object's box, scaled within these."""
    cut = image.copy()
    cut.putalpha(Image.fromarray(mask).convert("L"))
    cut = cut.crop(box_of(mask)) if object_scale else center_square(cut, min(cut.size))
    unit = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], dtype=float)
    corners = (unit - 0.5) * np.divide(cut.size, max(cut.size))                           # (4, 2), x and y
    if rng.random() < WARPED:
        corners *= 1 - rng.uniform(0, 2 * BEND, (4, 2))        # inwards
        angle = np.radians(rng.uniform(-ROTATION, ROTATION))
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        stretch = np.array([[rng.uniform(*STRETCH), rng.uniform(-SHEAR, SHEAR)], [0, rng.uniform(*STRETCH)]])
        corners = corners @ (rotation @ stretch).T
    corners -= corners.min(axis=0)
    corners *= size * min(rng.uniform(*(object_scale or SCALE)), 1 / corners.max())       # it must lie within
    longer = int(np.ceil(corners.max()))
    corners += rng.uniform(size=2) * (size - corners.max(axis=0))
    cut.thumbnail((longer, longer))      # a warp reads single pixels: shrink first, so that texture is averaged
    cut = cut.transform((size, size), Image.PERSPECTIVE, homography(corners, unit * cut.size), Image.BICUBIC)
    frame = center_square(background, size)
    frame.paste(cut, mask=cut)
    return frame


def multi_reference(image, mask, rng):
    """Multi-subject: the object cut out on black or as its box shows it, in a square; outside the image is black."""
    left, top, right, bottom = box_of(mask)
    side = max(right - left, bottom - top)
    left, top = (left + right - side) // 2, (top + bottom - side) // 2
    if rng.random() < 0.5:
        image = on_black(image, mask)
    return image.crop((left, top, left + side, top + side))


def compose(task, row, swapped, rng, doubts, background=None, size=448):
    """A row as its task shows it -> (prompt, [PIL references], function that gives the PIL target).

    task: one of TASKS, or "picture", the target alone, or "caption", whose target is the row's text: no image (None).
    swapped: a subject-driven pair the other way round. doubts: a list, to which open_mask adds. background, size: of
    the recovery input, pixels a side.
    """
    if task in ("t2i", "picture"):
        return prompt_for(task, (), row.text if task == "t2i" else ""), [], lambda: open_image(row.source)
    if task == "subject" and swapped:
        prompt = prompt_for(task, row.objects, row.swapped_text)
        return prompt, [open_image(row.source)], lambda: open_image(row.images[0])
    if task == "subject" or row.as_is:
        prompt = row.text if IMAGE in row.text else prompt_for(task, row.objects, row.text, len(row.images) // 2)
        return prompt, [open_image(path) for path in row.images], lambda: open_image(row.source)
    if task == "reconstruct" and row.images:                  # an edit of another picture
        return prompt_for(task, (), row.text), [open_image(row.images[0])], lambda: open_image(row.source)
    image = open_image(row.source)
    if task == "caption":
        return prompt_for(task), [image], None
    if task == "reconstruct":
        text = "" if rng.random() < CAPTION_DROP else row.text
        return prompt_for(task, (), text), [image], lambda: image
    prompt = prompt_for(task, row.objects, row.text)
    masks = lambda: [open_mask(path, image, row.source, doubts) for path in row.images]
    if task == "segment":
        references = [image] * len(row.objects)                # one for each line
        return prompt, references, lambda: on_black(image, np.logical_or.reduce(masks()))
    if task == "recover":
        return prompt, [recovery_input(image, masks()[0], background, size, rng)], lambda: image
    return prompt, [multi_reference(image, mask, rng) for mask in masks()], lambda: image


# ---------------------------------------------------------------------------------------------------------------------
# The training set

STREAMS = {"sample": 2, "pass": 3, "plan": 4}        # train.py draws from (seed, 1, position)
CAPTION_TOKENS = 128     # labels of the connector stage; of a longer caption the beginning is learned
TRIES = 20               # rows drawn in place of a damaged one before giving up


def stream(purpose, seed, *numbers):
    """Random numbers that no other purpose, seed or number shares. seed: below 2**64, numbers: below 2**32"""
    return np.random.default_rng((STREAMS[purpose], seed & 0xFFFFFFFF, seed >> 32, *numbers))


def caption_labels(tokenizer, text):
    """A caption as T5's labels, -100 behind its end. -> (CAPTION_TOKENS,) int64"""
    labels = torch.tensor(tokenizer.encode(text).ids[:CAPTION_TOKENS])
    return F.pad(labels, (0, CAPTION_TOKENS - len(labels)), value=-100)


class TaskData(Dataset):
    """Samples of the tasks by their position in the training run.

    paths: JSONL files. image_size: pixels a side of targets. weights: {task: its share of the samples}, None as a share
    = as many as it has rows, no weights = all of TASKS that the rows hold; besides TASKS there are "caption" (a row's
    caption as labels, for the connector) and "picture" (the target alone, for a tokenizer). backgrounds: JSONL files
    with `input_image`, for recovery; default the other rows' images. codes: weights.Codes, whose tokens come instead of
    target pixels.

    Everything random is drawn from (seed, epoch, position): sample k is the same whatever the number of workers and
    ranks, and a run resumes by asking for the next k. `problems` names the lines that cannot be used, of `lines` read;
    a larger share of them than `unusable` is an InputError. `fingerprint` tells rows of other content or order apart.
    """

    def __init__(self, paths, processor, image_size, weights=None, seed=0, backgrounds=(), codes=None,
                 unusable=cli.UNUSABLE):
        self.rows, self.backgrounds = Rows(paths), Rows(backgrounds)
        self.problems = self.rows.problems + self.backgrounds.problems
        self.lines = self.rows.lines + self.backgrounds.lines
        checks = self.rows.table["check"].tobytes(), self.backgrounds.table["check"].tobytes()
        self.fingerprint = hashlib.blake2b(b"backgrounds".join(checks), digest_size=16).hexdigest()
        self.processor, self.image_size, self.seed, self.codes = processor, image_size, seed, codes
        if self.lines >= cli.FEW and len(self.problems) > unusable * self.lines:
            raise InputError(f"{len(self.problems)} of {self.lines} lines cannot be used, more than {unusable:.0%}; "
                             f"`python prepare.py look` names them all, the first is {self.problems[0]}")
        if backgrounds and not len(self.backgrounds):
            raise InputError(f"{', '.join(map(str, backgrounds))}: no usable row of a background; give others or none")
        present = [task for task in TASKS if KINDS[task] in self.rows.table["task"]]
        weights = weights or dict.fromkeys(present)
        self.entries = {task: self.entries_of(task) for task, weight in weights.items() if weight != 0}
        self.tasks = list(self.entries)
        self.check(paths, present)
        self.counts = self.samples_in_an_epoch(weights)              # {task: number}
        self.planned = None, None                                    # (epoch, its plan)

    def check(self, paths, present):
        """Leaves out the tasks without a row, and names them in `lacking`; InputError where none is left."""
        if "caption" in self.tasks and len(self.tasks) > 1:
            raise InputError("captioning has labels in place of a target picture; give no other task beside it")
        self.lacking = [task for task in self.tasks if not len(self.entries[task])]
        self.entries = {task: entries for task, entries in self.entries.items() if task not in self.lacking}
        if self.entries:
            self.tasks = list(self.entries)
            return
        counts = [f"{np.sum(self.rows.table['task'] == KINDS[task])} {task}" for task in present]
        message = (f"{', '.join(map(str, paths))}: no row for {' or '.join(self.lacking) or 'any task'}; they have "
                   f"{', '.join(counts) or 'no usable row'}")
        if self.problems:
            message += f"; first problem: {self.problems[0]}"
        raise InputError(message)

    def samples_in_an_epoch(self, weights):
        """As many samples as there are entries, shared out by the weights. -> {task: number}"""
        sizes = [len(entries) for entries in self.entries.values()]
        shares = [size if weights[task] is None else weights[task] for task, size in zip(self.tasks, sizes)]
        exact = np.array(shares) / sum(shares) * sum(sizes)
        counts = exact.astype(int)                                   # rounded down, the largest remainders up
        largest = np.argsort(counts - exact, kind="stable")[:sum(sizes) - counts.sum()]
        counts[largest] += 1
        return dict(zip(self.tasks, counts.tolist()))

    def entries_of(self, task):
        """Which rows serve a task, pairs in both orders where they can be. -> (n, 2) int32: row, swapped"""
        table = self.rows.table
        serves = {"caption": table["captions"], "picture": np.ones(len(table), bool)}
        rows = serves[task] if task in serves else table["task"] == KINDS[task]
        orders = [rows, rows & table["reversible"]] if task == "subject" else [rows]
        parts = [np.column_stack([np.flatnonzero(rows), np.full(rows.sum(), i)]) for i, rows in enumerate(orders)]
        return np.concatenate(parts).astype(np.int32)

    def __len__(self):
        """Samples in an epoch."""
        return sum(self.counts.values())

    def plan(self, epoch):
        """What an epoch shows, in order. -> (len(self), 3) int32: index into `tasks`, row, swapped

        A task goes through one permutation of its entries after the other, across epochs, so that it shows each of
        them equally often whatever its weight.
        """
        if self.planned[0] != epoch:
            parts = []
            for number, (task, entries) in enumerate(self.entries.items()):
                count = self.counts[task]
                first, start = divmod(epoch * count, len(entries))
                passes = [stream("pass", self.seed, number, first + i).permutation(entries)
                          for i in range((start + count) // len(entries) + 1)]
                chosen = np.concatenate(passes)[start:start + count]                      # (count, 2)
                parts.append(np.column_stack([np.full(count, number, np.int32), chosen]))
            self.planned = epoch, stream("plan", self.seed, epoch).permutation(np.concatenate(parts))
        return self.planned[1]

    def background(self, row, rng, problems):
        """Another image for the object of this row to stand on; damaged ones are added to `problems`."""
        pool = self.backgrounds if len(self.backgrounds) else self.rows
        for i in rng.integers(len(pool), size=TRIES):
            other = pool[i]
            if other.source == row.source:
                continue
            try:
                return open_image(other.source)
            except InputError as error:
                problems.append(f"{other.name}: {error}")
        raise InputError("no other picture to paste its object on; give a JSONL of backgrounds")

    def sample(self, task, row, swapped, rng, problems):
        """One entry as tensors; InputError says why it cannot be used.

        -> dict: task, name, key, what the processor gives, problems, doubts, and one of target (3, size, size), tokens
        (T,), labels (CAPTION_TOKENS,)
        """
        background = self.background(row, rng, problems) if task == "recover" else None
        subjects = () if task in UNNAMED else row.objects
        doubts = []
        # recovery is painted at twice the size, for CLIP's preprocessing to average
        prompt, images, target = compose(task, row, swapped, rng, doubts, background, 2 * self.processor.image_size)
        fit = self.processor.fit
        if fit == "crop" and any(cut_off(image) > 1 / 3 for image in images):
            doubts.append("of some references the central square leaves out more than a third; --fit pad shows all")
        sample = {"task": task, "name": row.name, "key": row.key * 2 + int(swapped), "problems": problems,
                  "doubts": doubts}
        sample |= self.processor(prompt, images, subjects)
        if task == "caption":
            sample["labels"] = caption_labels(self.processor.tokenizer, row.text)
        elif self.codes and task in TASKS:
            sample["tokens"] = self.codes[sample["key"]]
        else:
            aligned = task in ("reconstruct", "segment")       # the target lies where the reference does
            sample["target"] = target_pixels(target(), self.image_size, fit if aligned else "crop")
        return sample

    def __getitem__(self, k):
        """Sample k of the run, epoch k // len. A damaged row is replaced by a drawn one and named in "problems"."""
        epoch, position = divmod(k, len(self))
        rng = stream("sample", self.seed, epoch, position)
        number, i, swapped = self.plan(epoch)[position]
        task, problems = self.tasks[number], []
        for _ in range(TRIES):
            row = self.rows[i]                                 # not to be passed over: a file that has changed
            try:
                return self.sample(task, row, swapped, rng, problems)
            except InputError as error:
                problems.append(f"{row.name}: {error}")
                i, swapped = rng.choice(self.entries[task])
        raise InputError(f"task {task}: {TRIES} rows one after the other cannot be used; fix the data:\n"
                         + "\n".join(dict.fromkeys(problems)))


class Batches(Dataset):
    """Batches of a dataset, as items that workers can load. An InputError comes as a value: one that a worker raises
    would arrive with the worker's traceback in its message."""

    def __init__(self, dataset, chunks):
        self.dataset, self.chunks = dataset, chunks

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, i):
        try:
            return collate([self.dataset[k] for k in self.chunks[i]])
        except InputError as error:
            return error


def batches(dataset, start, stop, micro, rank=0, world=1, workers=0):
    """Yields this rank's micro-batches of samples start .. stop - 1, in order, read ahead by worker processes.

    The i-th begins at sample start + (i * world + rank) * micro. So with a global batch of G = accum * world * micro
    the ranks together see samples start + g * G .. start + (g + 1) * G - 1 in step g, whatever the world size.
    """
    assert world == 1 or (stop - start) % (micro * world) == 0, f"{stop - start} is no multiple of {micro} x {world}"
    chunks = [range(i, min(i + micro, stop)) for i in range(start + rank * micro, stop, micro * world)]
    # workers live over all epochs, each on one thread (PyTorch's default); the generator spares the global one
    loader = DataLoader(Batches(dataset, chunks), batch_size=None, num_workers=workers,
                        prefetch_factor=4 if workers else None, pin_memory=torch.cuda.is_available(),
                        generator=torch.Generator(), worker_init_fn=cli.leave_signals_to_the_trainer)
    named = set()
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        for doubt in set(sum(batch.get("doubts", []), [])) - named:
            named.add(doubt)
            tqdm.write(f"suspicious: {doubt}")
        yield batch
