"""Pictures, prompts and rows of training data in, tensors out.

Everything the network sees passes through here: a reference photograph becomes CLIP pixels, a target picture becomes
VQGAN pixels, a task's prompt template is filled in, and the text becomes T5 ids in which every reference picture
holds one `<image>` token per CLIP patch. Nothing here computes with the network, but for `encode`.

Training data is a JSON-lines file in the layout MENTOR released; paths are absolute or relative to the file's folder:

    t2i          {"input_text": caption, "source_image": picture, "generation_only": true}
    reconstruct  {"input_text": caption, "source_image": picture}
    segment      {"source_image": picture, "image_path": mask, "objects": "dog", "do_mask": true}
    recover      {"source_image": picture, "image_path": mask, "objects": "dog", "do_replace": true, "input_text": ...}
    subject      {"source_image": target, "image_path": reference, "objects": "dog", "input_text": prompt}
    multi        {"source_image": picture, "image_path": [mask, ...], "objects": ["dog", ...], "input_text": caption};
                 with "input_img_list": true the list holds input pictures, used as they are

A row is one sample of its task, of a subject pair two, one in each order; "swapped_text" may prompt the second.

    python data.py folder my_pictures                                        # makes such a file from your own pictures
    python data.py look my_pictures/data.jsonl                               # shows what the network will see
    python data.py encode my_pictures/data.jsonl --weights W --out codes     # spares training the VQGAN's encoder

Next: `encoder.py` turns these tensors into the prefix the decoder reads.
"""
import argparse
import hashlib
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

IMAGE = "<image>"          # in a prompt: here stands a reference picture
MAX_PIXELS = 180_000_000   # a larger picture is taken for a decompression bomb
MIN_SIDE, MAX_ASPECT = 8, 20
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class InputError(ValueError):
    """What the user gave cannot be used. The message is one sentence: what, where, and how to mend it."""


def run(main):
    """Runs a script's main; bad input becomes one line on stderr and exit code 2, an interrupt exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def check_numbers(args, free=()):
    """Raises InputError for a number on the command line that no run can use; `free` names those that may be anything.
    """
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in free:
            zero = name in ("workers", "seed", "adversarial")
            if not (0 < value < np.inf or value == 0 and zero):
                raise InputError(f"--{name.replace('_', '-')} is {value} but must be "
                                 f"{'0 or more' if zero else 'above 0'}")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def open_image(path):
    """Opens a picture of any common kind as RGB; raises InputError naming the file where that cannot work.

    EXIF rotation is applied, 16-bit greys are reduced to 8, transparency is laid on white, of an animation the first
    frame is taken.
    """
    Image.MAX_IMAGE_PIXELS = None      # our own limit below comes with a sentence that names the file
    try:
        image = Image.open(path)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise InputError(f"{path}: {width} x {height} pixels are too many (at most {MAX_PIXELS:,}); scale it down")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
            raise InputError(f"{path}: {width} x {height} pixels show too little; each side needs at least {MIN_SIDE} "
                             f"pixels and the longer at most {MAX_ASPECT} times the shorter")
        image.seek(0)
        image.load()
        image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path of the picture") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a picture in it") from None
    except PermissionError:
        raise InputError(f"{path}: not readable; check its permissions") from None
    except InputError:
        raise
    except Exception as error:         # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ...
        raise InputError(f"{path}: not a picture, or a damaged one ({error}); open and save it anew") from None
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image).astype(np.float32)
        scale = 255 / 65535 if grey.max() > 255 else 1
        image = Image.fromarray(np.ceil((grey * scale).clip(0, 255)).astype(np.uint8))   # up: what is not 0 stays so
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_square(image, size, rounding=round):
    """Shorter side to `size` by bicubic resampling, then the central square; rounding: of the longer side's length."""
    shorter = min(image.size)
    width, height = (rounding(side * size / shorter) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))


def clip_pixels(image, size=224):
    """PIL RGB picture -> (3, size, size) fp32, normalised for CLIP (openai/clip-vit-large-patch14 preprocessing)."""
    square = center_square(image, size, rounding=int)      # int: as CLIP's published preprocessing truncates
    pixels = np.asarray(square, dtype=np.float32) / 255
    pixels = (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()                         # (3, size, size)


def target_pixels(image, size=512):
    """PIL RGB picture -> (3, size, size) fp32 in [-1, 1], what the VQGAN encodes (LlamaGen's centre crop)."""
    while min(image.size) >= 2 * size:                     # box filter first: texture is averaged, not sampled
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    pixels = np.asarray(center_square(image, size), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()                         # (3, size, size)


def to_image(pixels):
    """(3, H, W) in [-1, 1] -> PIL RGB picture; values outside are cut off."""
    pixels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def contact_sheet(images, columns=None, gap=4):
    """A white sheet with equal-sized pictures in rows of `columns` (default: a near-square)."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# Prompts, as MENTOR's released data has them; in a template `<image>` stands once per reference picture

def subject_prompt(subjects, prompt):
    """Subject-driven, recovery and multi-subject: one line per reference picture, then the prompt."""
    return "\n".join([f"The {subject} in {IMAGE}." for subject in subjects] + [prompt])


def segment_prompt(subject):
    """Segmentation: the answer is the subject on black."""
    return f"The {subject} in {IMAGE}."


def reconstruct_prompt(caption=""):
    """Reconstruction: the answer is the reference itself."""
    return f"The image is {IMAGE}\n{caption}" if caption else f"{IMAGE}\n"


def subject_of(path):
    """What a picture's file name says it shows, or else its folder's: boot-03.jpg, boot/03.jpg -> "boot"."""
    folder, name = os.path.split(os.path.abspath(path))
    for text in (os.path.splitext(name)[0], os.path.basename(folder)):
        if words := re.sub(r"[\W\d_]+", " ", text).strip().lower():
            return words
    return "subject"


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

def byte_tokenizer():
    """A tokenizer that needs no file: one id per byte behind <pad>, </s>, <unk>; for random and tiny models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>"] + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer


def train_tokenizer(texts, size):
    """A byte-pair tokenizer of that many ids, learned from texts; the small model's."""
    tokenizer = byte_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path):
    """Reads a tokenizer.json (FLAN-T5's, or a model folder's own)."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise InputError(f"{path}: not a readable tokenizer.json ({error}); copy it again") from None


class Prompter:
    """Text with `<image>` placeholders -> (ids, mask), each placeholder expanded to one token per CLIP patch.

    tokenizer: a `tokenizers.Tokenizer` whose `</s>` is 1 and whose pad is 0; `<image>` is added behind its vocabulary
    (id 32100 for FLAN-T5). patches: tokens per reference picture. max_tokens: the prefix length S.
    """

    def __init__(self, tokenizer, patches=256, max_tokens=512):
        tokenizer.add_special_tokens([IMAGE])
        self.tokenizer, self.patches, self.max_tokens = tokenizer, patches, max_tokens
        self.image_id = tokenizer.token_to_id(IMAGE)

    def __call__(self, prompt, n_images):
        """-> ids (S,) int64 padded with 0 at the right, mask (S,) bool, True = a token; raises InputError."""
        placeholders = prompt.count(IMAGE)
        if placeholders != n_images:
            raise InputError(f"the prompt has {placeholders} {IMAGE} but {n_images} reference picture(s) came with it; "
                             f"write one {IMAGE} for each")
        ids = self.tokenizer.encode(prompt.replace(IMAGE, IMAGE * self.patches)).ids
        if len(ids) > self.max_tokens:
            images = n_images * self.patches
            raise InputError(f"the prompt needs {len(ids)} tokens ({n_images} picture(s) x {self.patches} = {images}, "
                             f"text {len(ids) - images}) but the prefix has {self.max_tokens}; use fewer reference "
                             f"pictures or a shorter prompt")
        padded = torch.zeros(self.max_tokens, dtype=torch.long)
        padded[:len(ids)] = torch.tensor(ids)
        return padded, torch.arange(self.max_tokens) < len(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of training data

TASKS = ("t2i", "reconstruct", "segment", "recover", "subject", "multi")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a JSONL file; paths are joined with the file's folder."""
    name: str           # file.jsonl:LINE
    task: str           # one of TASKS, or "background"
    source: str         # the picture; of a subject-driven pair the target
    text: str           # caption or prompt
    swapped_text: str   # the prompt when a pair is used the other way round
    images: tuple       # for each object its mask or input picture
    objects: tuple
    as_is: bool         # images are input pictures, not masks
    key: int            # stands for the line's content, to find its codes


def parse_row(line, path, number):
    """One line (bytes) of a file -> Row; a ValueError says what is wrong with it."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise InputError("not a JSON object; write one {...} a line")

    def texts(key):
        value = record.get(key) or []
        value = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) and not re.search("[\ud800-\udfff]", text) for text in value):   # torn emoji
            raise InputError(f'"{key}" must be text, not {record[key]!a:.80}')
        return tuple(value)

    images, objects, flag = texts("image_path"), texts("objects"), record.get
    def one(key):
        if len(found := texts(key)) > 1:
            raise InputError(f'"{key}" must be one text, not {len(found)}; write a line for each')
        return "".join(found)

    text, swapped, source, background = map(one, ("input_text", "swapped_text", "source_image", "input_image"))
    rules = {"background": background, "t2i": flag("generation_only"),
             "multi": flag("input_img_list") or objects and isinstance(record["objects"], list),
             "recover": flag("do_replace"), "segment": flag("do_mask"), "subject": objects, "reconstruct": True}
    task = next(task for task, holds in rules.items() if holds)
    if not objects and len(images) == 1:
        source = images[0]               # without objects image_path is the target picture
    source = source or background
    needs = {"source_image": source}
    if task in ("segment", "recover", "subject", "multi"):
        needs |= {"objects": objects, "image_path": images}
    if task in ("t2i", "recover", "subject", "multi"):
        needs["input_text"] = text or task != "t2i" and "input_text" in record
    if missing := [key for key, value in needs.items() if not value]:
        raise InputError(f'"{missing[0]}" is missing; a row of task {task} needs it')
    if len(objects) != len(images) and ("objects" in needs or len(images) > 1):
        raise InputError(f"{len(objects)} object(s) but {len(images)} path(s) in image_path; give one for each")
    place = "/".join(os.path.abspath(path).split(os.sep)[-2:])       # the same wherever the data is moved to
    key = hashlib.blake2b(place.encode() + line.strip(), digest_size=7).digest()
    source, *images = (os.path.join(os.path.dirname(path), file) for file in (source, *images))
    return Row(f"{path}:{number}", task, source, text, swapped if "swapped_text" in record else text, tuple(images),
               objects, bool(flag("input_img_list")), int.from_bytes(key, "big"))


def read_rows(paths):
    """JSONL files -> (rows, problems, number of lines); a line that cannot be used is a problem named file:line."""
    rows, problems, lines = [], [], 0
    for path in paths:
        try:
            with open(path, "rb") as file:
                numbered = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; give a JSONL file of training data") from None
        lines += len(numbered)
        for number, line in numbered:
            try:
                rows.append(parse_row(line, path, number))
            except ValueError as error:                              # InputError, no JSON, or bytes that are no text
                why = error if isinstance(error, InputError) else f"not JSON ({error}); write one object a line"
                problems.append(f"{path}:{number}: {why}")
    return rows, problems, lines


# ---------------------------------------------------------------------------------------------------------------------
# From a row to pictures and prompt, as the paper describes its tasks (appendix)

CAPTION_DROP = 0.5       # reconstruction: how often the picture comes without its caption
SCALE = (0.1, 1.0)       # recovery: longer side of the pasted object, as a share of the frame
WARPED = 0.5             # how often it is also turned, stretched, sheared and bent in perspective:
TURN, STRETCH, SHEAR, BEND = 20, (0.7, 1.3), 0.3, 0.2    # up to degrees, factors, slope, share of the side


def open_mask(path, picture):
    """The mask of a picture: (H, W) bool, True = object."""
    mask = np.asarray(open_image(path)).max(axis=-1) > 0
    if mask.shape != picture.size[::-1]:
        raise InputError(f"{path}: the mask is {mask.shape[1]} x {mask.shape[0]} but its picture {picture.width} x "
                         f"{picture.height}; make them the same size")
    if not mask.any():
        raise InputError(f"{path}: the mask is empty, nothing in it is above zero; draw it or remove the row")
    return mask


def box_of(mask):
    """(left, top, right, bottom) around a mask."""
    columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def on_black(picture, mask):
    """The object of the mask alone, everything else black."""
    return Image.fromarray(np.asarray(picture) * mask[:, :, None])


def homography(corners, sources):
    """The eight numbers with which Image.transform shows the points `sources` (4, 2) at `corners` (4, 2)."""
    equations, values = [], []
    for (x, y), (u, v) in zip(corners, sources):
        equations += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(equations, values)


def recovery_input(picture, mask, background, size, rng, scale=SCALE):
    """Recovery: the object, scaled and half the time warped, at a random place of a (size, size) background."""
    left, top, right, bottom = box_of(mask)
    cut = picture.crop((left, top, right, bottom))
    cut.putalpha(Image.fromarray(mask[top:bottom, left:right]).convert("L"))
    unit = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], dtype=float)
    corners = (unit - 0.5) * cut.size                                                     # (4, 2), x and y
    if rng.random() < WARPED:
        corners += rng.uniform(-BEND, BEND, (4, 2)) * cut.size
        angle = np.radians(rng.uniform(-TURN, TURN))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        stretch = np.array([[rng.uniform(*STRETCH), rng.uniform(-SHEAR, SHEAR)], [0, rng.uniform(*STRETCH)]])
        corners = corners @ (turn @ stretch).T
    corners -= corners.min(axis=0)
    corners *= rng.uniform(*scale) * size / corners.max()
    longer = int(np.ceil(corners.max()))
    corners += rng.uniform(size=2) * (size - corners.max(axis=0))
    cut.thumbnail((longer, longer))      # a warp reads single pixels: shrink first, so that texture is averaged
    cut = cut.transform((size, size), Image.PERSPECTIVE, homography(corners, unit * cut.size), Image.BICUBIC)
    frame = center_square(background, size)
    frame.paste(cut, mask=cut)
    return frame


def multi_reference(picture, mask, rng):
    """Multi-subject: the object cut out on black or as its box shows it, in a square; outside the picture is black."""
    left, top, right, bottom = box_of(mask)
    side = max(right - left, bottom - top)
    left, top = (left + right - side) // 2, (top + bottom - side) // 2
    picture = on_black(picture, mask) if rng.random() < 0.5 else picture
    return picture.crop((left, top, left + side, top + side))


def compose(task, row, order, rng, background=None, size=448):
    """A row as its task shows it -> (prompt, [PIL reference pictures], function that gives the PIL target).

    task: one of TASKS, or "picture", the target alone, or "caption", whose target is the row's text: no picture (None).
    order: 1 = a subject-driven pair the other way round. background, size: of the recovery input, pixels a side.
    """
    if task in ("t2i", "picture"):
        return row.text if task == "t2i" else "", [], lambda: open_image(row.source)
    if task == "subject":
        reference, target, text = ((row.source, row.images[0], row.swapped_text) if order else
                                   (row.images[0], row.source, row.text))
        return subject_prompt(row.objects, text), [open_image(reference)], lambda: open_image(target)
    if task == "multi" and row.as_is:
        references = [open_image(path) for path in row.images]
        return subject_prompt(row.objects, row.text), references, lambda: open_image(row.source)
    picture = open_image(row.source)
    if task == "caption":
        return IMAGE, [picture], None
    if task == "reconstruct":
        return reconstruct_prompt("" if rng.random() < CAPTION_DROP else row.text), [picture], lambda: picture
    if task == "segment":
        return (segment_prompt(row.objects[0]), [picture],
                lambda: on_black(picture, open_mask(row.images[0], picture)))
    masks = [open_mask(path, picture) for path in row.images]
    if task == "recover":
        references = [recovery_input(picture, masks[0], background, size, rng)]
    else:
        references = [multi_reference(picture, mask, rng) for mask in masks]
    return subject_prompt(row.objects, row.text), references, lambda: picture


# ---------------------------------------------------------------------------------------------------------------------
# The training set

CAPTION_TOKENS = 128     # labels of the connector stage; of a longer caption the beginning is learned
TRIES = 20               # rows drawn in place of a damaged one before giving up


class Codes:
    """VQ tokens written by `python data.py encode`, found by a sample's key."""

    def __init__(self, folder, image_size):
        self.path, self.file = os.path.join(folder, "codes.safetensors"), None
        try:
            with safe_open(self.path, "pt") as file:
                self.keys, about = file.get_tensor("keys").numpy(), file.metadata()
                made_for, self.vqgan = int(about["image_size"]), about["vqgan"]          # the VQGAN's fingerprint
        except Exception as error:
            raise InputError(f"{self.path}: no codes ({error}); make them with `python data.py encode`") from None
        if made_for != image_size:
            raise InputError(f"{self.path}: made for pictures of {made_for} pixels, not {image_size}; encode again")

    def __getitem__(self, key):
        """-> (T,) int64"""
        self.file = self.file or safe_open(self.path, "pt")          # here, so that each worker opens its own
        i = int(np.searchsorted(self.keys, key))
        if i == len(self.keys) or self.keys[i] != key:
            raise InputError(f"{self.path}: no codes of this row, it was damaged then or changed since; encode again")
        return self.file.get_slice("tokens")[i].long()


class TaskData(Dataset):
    """Samples of the tasks by their position in the training run.

    paths: JSONL files. image_size, clip_size: pixels a side of targets and of references. weights: {task: its share of
    the samples}, None as a share = as many as it has rows, no weights = all of TASKS that the rows hold; besides TASKS
    there are "caption" (a picture's caption as labels, for the connector) and "picture" (the target alone, for the
    tokenizer). backgrounds: JSONL files with `input_image`, for recovery; default the other rows' pictures. codes: a
    folder made by `encode`, whose tokens come in place of target pixels.

    Everything random is drawn from (seed, epoch, position): sample k is the same whatever the number of workers and
    ranks, and a run resumes by asking for the next k. `problems` names the lines that cannot be used, of `lines` read.
    """

    def __init__(self, paths, prompter, image_size, clip_size, weights=None, seed=0, backgrounds=(), codes=None):
        (self.rows, *problems), (self.backgrounds, *more) = read_rows(paths), read_rows(backgrounds)
        self.problems, self.lines = (a + b for a, b in zip(problems, more))
        self.prompter, self.image_size, self.clip_size, self.seed = prompter, image_size, clip_size, seed
        self.codes = Codes(codes, image_size) if codes else None
        found = {task: n for task in TASKS if (n := sum(row.task == task for row in self.rows))}
        weights = weights or dict.fromkeys(found)
        self.entries = {task: self.entries_of(task) for task, weight in weights.items() if weight != 0}
        self.tasks, sizes = list(self.entries), [len(entries) for entries in self.entries.values()]
        if "caption" in self.tasks and len(self.tasks) > 1:
            raise InputError("captioning has labels in place of a target picture; give no other task beside it")
        if not sizes or 0 in sizes:
            lacking = " and ".join(task for task in self.tasks if not len(self.entries[task])) or "any task"
            raise InputError(f"{', '.join(map(str, paths))}: no row for {lacking}; add some, or leave the task out "
                             "(train.py --without); they have "
                             + (", ".join(f"{n} {task}" for task, n in found.items()) or "no usable row")
                             + "".join(f"; first problem: {problem}" for problem in self.problems[:1]))
        shares = np.array([size if weights[task] is None else weights[task] for task, size in zip(self.tasks, sizes)])
        exact = shares / shares.sum() * sum(sizes)
        counts = exact.astype(int)                                   # rounded down, the largest remainders up
        counts[np.argsort(counts - exact, kind="stable")[:sum(sizes) - counts.sum()]] += 1
        self.counts = dict(zip(self.tasks, counts.tolist()))         # samples in an epoch
        self.planned = None, None                                    # (epoch, its plan)

    def entries_of(self, task):
        """Which rows serve a task, pairs in both orders. -> (n, 2) int64: row, order"""
        if task == "caption":
            serves = [row.task in ("t2i", "reconstruct") and row.text != "" for row in self.rows]
        else:
            serves = [row.task == task or task == "picture" for row in self.rows]
        rows, orders = np.flatnonzero(serves), 2 if task == "subject" else 1
        return np.column_stack([rows.repeat(orders), np.tile(np.arange(orders), len(rows))])

    def __len__(self):
        """Samples in an epoch: as many as there are entries."""
        return sum(self.counts.values())

    def plan(self, epoch):
        """What an epoch shows, in order. -> (len(self), 3) int64: index into `tasks`, row, order

        A task goes through one permutation of its entries after the other, across epochs, so that it shows each of
        them equally often whatever its weight.
        """
        if self.planned[0] != epoch:
            parts = []
            for number, (task, entries) in enumerate(self.entries.items()):
                count = self.counts[task]
                first, start = divmod(epoch * count, len(entries))
                passes = [np.random.default_rng((self.seed, number, first + i)).permutation(entries)
                          for i in range((start + count) // len(entries) + 1)]
                chosen = np.concatenate(passes)[start:start + count]                      # (count, 2)
                parts.append(np.column_stack([np.full(count, number), chosen]))
            self.planned = epoch, np.random.default_rng((self.seed, epoch)).permutation(np.concatenate(parts))
        return self.planned[1]

    def background(self, row, rng, problems):
        """Another picture for the object of this row to stand on; damaged ones are added to `problems`."""
        pool = self.backgrounds or self.rows
        for other in (pool[i] for i in rng.integers(len(pool), size=TRIES)):
            try:
                if other.source != row.source:
                    return open_image(other.source)
            except InputError as error:
                problems.append(f"{other.name}: {error}")
        raise InputError("no other picture to paste its object on; give a JSONL of backgrounds")

    def sample(self, task, row, order, rng, problems):
        """One entry as tensors; InputError says why it cannot be used.

        -> dict: task, name, key, prompt, ids (S,), mask (S,), refs (n, 3, c, c), problems, and one of target
        (3, size, size), tokens (T,), labels (CAPTION_TOKENS,) padded with -100
        """
        background = self.background(row, rng, problems) if task == "recover" else None
        # recovery is painted at twice the size, for CLIP's preprocessing to average
        prompt, pictures, target = compose(task, row, order, rng, background, 2 * self.clip_size)
        ids, mask = self.prompter(prompt, len(pictures))
        refs = [torch.empty(0, 3, self.clip_size, self.clip_size)]
        refs += [clip_pixels(picture, self.clip_size)[None] for picture in pictures]
        sample = {"task": task, "name": row.name, "key": row.key * 2 + int(order), "prompt": prompt, "ids": ids,
                  "mask": mask, "refs": torch.cat(refs), "problems": problems}
        if task == "caption":
            labels = torch.tensor(self.prompter.tokenizer.encode(row.text).ids[:CAPTION_TOKENS])
            sample["labels"] = F.pad(labels, (0, CAPTION_TOKENS - len(labels)), value=-100)
        elif self.codes and task in TASKS:
            sample["tokens"] = self.codes[sample["key"]]
        else:
            sample["target"] = target_pixels(target(), self.image_size)
        return sample

    def __getitem__(self, k):
        """Sample k of the run, epoch k // len. A damaged row is replaced by a drawn one and named in "problems"."""
        epoch, position = divmod(k, len(self))
        rng = np.random.default_rng((self.seed, epoch, position))
        number, row, order = self.plan(epoch)[position]
        task, problems = self.tasks[number], []
        for _ in range(TRIES):
            try:
                return self.sample(task, self.rows[row], order, rng, problems)
            except InputError as error:
                problems.append(f"{self.rows[row].name}: {error}")
                row, order = rng.choice(self.entries[task])
        raise InputError(f"task {task}: {TRIES} rows one after the other cannot be used; mend the data:\n"
                         + "\n".join(dict.fromkeys(problems)))


def collate(samples):
    """Samples of one kind -> batch: ids and mask (B, S), refs (K, 3, c, c) flat in batch order, one of target
    (B, 3, size, size), tokens (B, T) and labels (B, L), and the lists tasks, names, prompts, problems."""
    batch = {f"{key}s": [sample[key] for sample in samples] for key in ("task", "name", "prompt")}
    batch["problems"] = [problem for sample in samples for problem in sample["problems"]]
    batch["refs"] = torch.cat([sample["refs"] for sample in samples])
    return batch | {key: torch.stack([sample[key] for sample in samples])
                    for key in ("ids", "mask", "target", "tokens", "labels") if key in samples[0]}


def batches(dataset, start, stop, micro, rank=0, world=1, workers=0):
    """Yields this rank's micro-batches of samples start .. stop - 1, in order, read ahead by worker processes.

    The i-th begins at sample start + (i * world + rank) * micro. So with a global batch of G = accum * world * micro
    the ranks together see samples start + g * G .. start + (g + 1) * G - 1 in step g, whatever the world size.
    """
    assert world == 1 or (stop - start) % (micro * world) == 0, f"{stop - start} is no multiple of {micro} x {world}"
    chunks = [range(i, min(i + micro, stop)) for i in range(start + rank * micro, stop, micro * world)]
    # workers live over all epochs, each on one thread (PyTorch's default); the generator spares the global one
    loader = DataLoader(dataset, batch_sampler=chunks, collate_fn=collate, num_workers=workers,
                        prefetch_factor=4 if workers else None, pin_memory=torch.cuda.is_available(),
                        generator=torch.Generator())
    try:
        yield from loader
    except InputError as error:          # a worker's comes with its traceback before it
        error.__traceback__ = None       # lets go of the workers, so that they end at once
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from None


class Problems:
    """Counts what cannot be used, names each problem once through `log`, and stops the run when it is too much."""

    def __init__(self, log=print, share=0.05, least=20):
        self.log, self.share, self.least = log, share, least
        self.named, self.failed, self.seen = {}, 0, 0

    def add(self, problems, seen):
        """problems: those met in `seen` more samples. InputError once they exceed `share` of `least` or more."""
        self.failed, self.seen = self.failed + len(problems), self.seen + seen
        for problem in dict.fromkeys(problems):
            if problem not in self.named:
                self.named[problem] = True
                self.log(f"skipped {problem}")
        if self.seen >= self.least and self.failed > self.share * self.seen:
            raise InputError(f"{self.failed} problems in {self.seen} samples, more than {self.share:.0%}; mend the "
                             "data:\n" + "\n".join(list(self.named)[:20]))


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def attempt(data, entry):
    """The sample of an entry of a TaskData, of a damaged one its problems alone."""
    (task, row, order), problems = entry, []
    try:
        return data.sample(task, data.rows[row], order, np.random.default_rng(row), problems)
    except InputError as error:
        return {"problems": problems + [f"{data.rows[row].name}: {error}"]}


def usable_samples(data, workers):
    """Tries every entry under a progress bar and yields the samples; at the end prints counts and problems."""
    entries = [(task, *entry) for task in data.tasks for entry in data.entries[task].tolist()]
    counts, problems = dict.fromkeys(data.tasks, 0), dict.fromkeys(data.problems)
    # what a DataLoader takes for the making of a batch does the work here, so that it happens in the workers
    for sample in tqdm(DataLoader(entries, batch_size=None, collate_fn=partial(attempt, data), num_workers=workers)):
        problems |= dict.fromkeys(sample["problems"])
        if "task" in sample:
            counts[sample["task"]] += 1
            yield sample
    for task, count in counts.items():
        print(f"{task:12}{count:8,} of {len(data.entries[task]):,} samples usable")
    print(f"{len(problems):,} problem(s)", *problems, sep="\n  ")


def tile(batch, places, drawn=None, side=144, lines=4):
    """A batch of one as the network sees it: references, a picture it has drawn, and the target in a frame, under them
    the prompt. places: room for so many. drawn: (3, H, W) in [-1, 1]. -> PIL RGB"""
    refs = batch["refs"] * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    pictures = [*(2 * refs - 1), *([] if drawn is None else [drawn]), batch["target"][0]]
    canvas = Image.new("RGB", (places * (side + 4) + 12, side + 14 * lines), "white")
    draw = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pictures):
        canvas.paste(to_image(picture).resize((side, side)), (i * (side + 4), 0))
    draw.rectangle((i * (side + 4), 0, i * (side + 4) + side - 1, side - 1), outline="red", width=3)
    words = f"{batch['tasks'][0]}: {batch['prompts'][0]}".encode("ascii", "replace").decode()    # what the font has
    draw.text((2, side), "\n".join(textwrap.wrap(words, canvas.width // 6)[:lines]), "black")
    return canvas


def look(args):
    """Tries every row, shows on a contact sheet what the network will see, counts tasks and names problems."""
    prompter = (Prompter(load_tokenizer(args.tokenizer), max_tokens=args.max_tokens) if args.tokenizer
                else Prompter(byte_tokenizer(), patches=1, max_tokens=1 << 16))
    data = TaskData(args.data, prompter, 256, 224, backgrounds=args.backgrounds)
    shown = {task: [] for task in data.tasks}
    for sample in usable_samples(data, args.workers):
        if len(shown[sample["task"]]) < args.n:
            shown[sample["task"]].append(sample)
    places = max((len(sample["refs"]) + 1 for samples in shown.values() for sample in samples), default=1)
    tiles = []
    for samples in filter(None, shown.values()):         # a line for each task
        tiles += [tile(collate([sample]), places) for sample in samples]
        tiles += [Image.new("RGB", tiles[0].size, "white")] * (args.n - len(samples))
    if not tiles:
        raise InputError("there is no usable sample to show")
    contact_sheet(tiles, columns=args.n).save(args.out, "PNG")
    print(f"wrote {args.out}")


def encode(args):
    """Turns every target into VQ tokens once: codes.safetensors with keys (N,) int64 and tokens (N, T) int32."""
    from model import Mentor
    mentor = Mentor.from_pretrained(args.weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vqgan, size = mentor.vqgan.to(device), mentor.check_size(args.size or mentor.config.image_size)
    prompter = Prompter(byte_tokenizer(), patches=1, max_tokens=1 << 16)                  # prompts do not matter here
    data = TaskData(args.data, prompter, size, 32, backgrounds=args.backgrounds)
    samples, keys, tokens = usable_samples(data, args.workers), [], []
    while group := list(islice(samples, args.batch)):
        keys += [sample["key"] for sample in group]
        pixels = torch.stack([sample["target"] for sample in group])                      # (B, 3, size, size)
        tokens.append(vqgan.encode(pixels.to(device)).cpu().int())                        # (B, T)
    if not tokens:
        raise InputError("there is no usable sample to encode")
    keys, first = np.unique(keys, return_index=True)                 # ascending; of equal lines one is enough
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, "codes.safetensors")
    save_file({"keys": torch.from_numpy(keys), "tokens": torch.cat(tokens)[first]}, f"{path}.partial",
              metadata={"image_size": str(size), "vqgan": vqgan.fingerprint()})
    os.replace(f"{path}.partial", path)
    print(f"wrote {path}")


def folder(args):
    """Makes a JSONL of a folder in which dog-00.jpg shows a dog, dog-00.txt is its caption and dog-00.mask.png its
    mask; text and mask may be absent, and pictures of one name are pairs. Writes --out, default data.jsonl in it."""
    names = sorted(os.listdir(args.pictures)) if os.path.isdir(args.pictures) else ()
    pictures = [name for name in names if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"))
                and not name.lower().endswith(".mask.png")]
    if not pictures:
        raise InputError(f"{args.pictures}: no folder with pictures; put some there as dog-00.jpg, dog-01.jpg, ...")
    out = args.out or os.path.join(args.pictures, "data.jsonl")
    place = os.path.relpath(args.pictures, os.path.dirname(out) or ".")
    place = "" if place == "." else place
    rows, subjects = [], {}
    for name in pictures:
        stem, row = os.path.splitext(name)[0], {"input_text": "", "source_image": os.path.join(place, name)}
        if f"{stem}.txt" in names:
            try:
                with open(os.path.join(args.pictures, f"{stem}.txt"), encoding="utf-8") as file:
                    row["input_text"] = file.read().strip()
            except UnicodeDecodeError:
                raise InputError(f"{args.pictures}: {stem}.txt is not UTF-8; save it as UTF-8 text") from None
        rows += [row] + [row | {"generation_only": True}] * (row["input_text"] != "")
        masked = row | {"image_path": os.path.join(place, f"{stem}.mask.png"), "objects": subject_of(name)}
        if f"{stem}.mask.png" in names:
            rows += [masked | {"do_mask": True}, masked | {"do_replace": True}]
        subjects.setdefault(subject_of(name), []).append(row)
    for subject, shots in subjects.items():
        for i, target in enumerate(shots):
            for reference in shots[i + 1:i + 5]:         # a few neighbours: all pairs would drown the other tasks
                rows.append(target | {"objects": subject, "image_path": reference["source_image"],
                                      "swapped_text": reference["input_text"]})
    with open(out, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"wrote {out}: {len(rows):,} rows of {len(pictures):,} pictures, {len(subjects):,} subject(s)")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    made = {function: commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
            for function in (look, encode, folder)}
    for function, command in made.items():
        command.set_defaults(run=function)
        if function is not folder:
            command.add_argument("data", nargs="+", metavar="DATA.jsonl")
            command.add_argument("--backgrounds", nargs="+", default=[], help="JSONL of pictures for recovery")
            command.add_argument("--workers", type=int, default=2, help="processes that read pictures (default 2)")
    made[look].add_argument("--out", default="look.png", help="the sheet, a PNG (default look.png)")
    made[look].add_argument("--n", type=int, default=3, help="samples shown of each task (default 3)")
    made[look].add_argument("--tokenizer", metavar="tokenizer.json", help="FLAN-T5's, to find prompts too long for it")
    made[look].add_argument("--max-tokens", type=int, default=512, help="the prefix length that goes with "
                            "--tokenizer (default 512; several pictures need 1280)")
    made[encode].add_argument("--weights", required=True, help="a model folder")
    made[encode].add_argument("--out", required=True, help="folder for the codes")
    made[encode].add_argument("--size", type=int, help="pixels a side (default the model's)")
    made[encode].add_argument("--batch", type=int, default=8, help="pictures encoded at once (default 8)")
    made[folder].add_argument("pictures", metavar="PICTURES")
    made[folder].add_argument("--out", metavar="DATA.jsonl")
    args = parser.parse_args(argv)
    check_numbers(args)
    try:
        args.run(args)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; check the path") from None


if __name__ == "__main__":
    import data                # not this file's own copy: model.py raises the InputError of module `data`
    data.run(data.main)
