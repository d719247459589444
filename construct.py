"""The paper's data pipeline (2.4, appendix D, Figure 7): plain pictures in, training data out.

    python construct.py my_pictures --vlm-url http://localhost:8000/v1 --vlm-model Qwen/Qwen2.5-VL-7B-Instruct
    python construct.py iou data.jsonl --segmenter grabcut       # how well boxes and points become masks

    text-to-image model --> more pictures (--synthetic)
    pictures --vision-language model--> caption, objects, a box and key points of each --segmenter--> masks
    pairs of pictures of one subject --vision-language model--> subject, a prompt for each picture

The models answer over HTTP, in OpenAI's form; the key comes from the environment variable OPENAI_API_KEY. Every answer
is stored in --out as it comes, under its question, so that a run that was killed goes on by the same command. In --out
come to lie data.jsonl, which `train.py --data` reads, masks/, synthetic/ and look.png, a sheet to look at. The paper
publishes neither its prompts nor its filters: those here are this project's own.
"""
import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
import statistics
import sys
import threading
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

import cli
import data
import prepare
from cli import InputError
from scorers import Endpoint, Refused, Unreachable, data_url, user_message

TRIES = 3                    # a question is asked so often until its answer can be used
WORDS = 120                  # of a caption: with the 256 tokens of a reference it must fit into a prefix of 512
SENT, PATCH = 1008, 28       # sides of a picture that is sent: the most, and a divisor; Qwen2.5-VL resizes all others
SLACK = 0.01                 # of a side: so far out of the picture may a box reach, or a point out of its box
SMALL, FULL, OUTSIDE = 0.03, 0.98, 0.1       # least and most of its box that a mask covers; most of it outside the box
MAX_PICTURE = 64 << 20       # bytes of an HTTP answer with a picture
LONGEST = 100_000            # letters of another answer
SHOWN = 24                   # pictures, and pairs, on the sheet
STEPS = ("batches of prompts", "synthetic pictures", "captions", "lists of objects", "boxes", "masks", "pairs")


# ---------------------------------------------------------------------------------------------------------------------
# What is asked

JSON_ALONE = "\nAnswer with JSON alone, in this form: "
CAPTION = f"""Describe this picture for somebody who is to paint it unseen: what it shows, how the things look (colours,
materials, number), where they are, what they do, the background, the light, and the style if it is no photograph.
One paragraph of at most 90 words, no guesses, no opinion.{JSON_ALONE}{{"caption": "..."}}"""
OBJECTS = f"""This is a description of the picture: "%s"
Name at most %d objects in the picture that could be cut out along their outlines: concrete things that are wholly or
mostly seen, no two of which overlap much or are called the same; no background, ground, sky or light, no part of
another one. Call each by a noun with at most one adjective, such as "brown dog". The main one comes first; the list is
empty if there is none.{JSON_ALONE}{{"objects": ["...", "..."]}}"""
PLACE = f"""Where in the picture is this: %s? Give the tightest box around all that is seen of it, as left, top, right,
bottom, and three to five key points that lie well inside it, on its different parts; null as box if it is not there.
%s{JSON_ALONE}{{"box": [left, top, right, bottom], "points": [[x, y], [x, y], [x, y]]}}"""
UNITS = {"pixels": "Coordinates are pixels of this picture, which is {} wide and {} high.",
         "thousandths": "Coordinates are thousandths of the picture's width and height, whole numbers from 0 to 1000."}
PAIR = f"""Both pictures are said to show the same: %s. If one and the same subject is in both, call it by a short noun
and write for each picture a prompt of at most 60 words with which somebody who knows the subject could paint it: what
it does there, where it is, what surrounds it, the light, the style. Call it by that noun, but do not describe its
looks, because they will be shown. If the pictures have no subject in common, the subject is null.{JSON_ALONE}\
{{"subject": "...", "prompts": ["of the first picture", "of the second"]}}"""
PROMPTS = f"""Write %d prompts for a text-to-image model, numbers %d to %d of a long list. Each asks for a picture with
two or three distinct, wholly visible things, one of which is %s, in a definite place and light. Vary things, places,
angles and styles as you can; most are photographs. One sentence each.{JSON_ALONE}{{"prompts": ["...", "..."]}}"""
THEMES = ("an animal", "a toy", "a dish or fruit", "a vehicle", "a piece of clothing", "furniture", "a plant", "a tool",
          "a musical instrument", "a piece of pottery", "a person at work", "something for sports")
AT_ONCE = 10                 # prompts that are asked for together
AGAIN = "That cannot be used: %s. Answer again, with JSON alone, in the form that was asked for."
REFUSAL = re.compile(r"sorry|(can(no|')?t|unable to|won't) (help|assist|provide|describe|do|comply|process|identify)",
                     re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------------------
# Answers, kept as they come

class Rejected(Exception):
    """Something is left out, and counted. The message is "reason: what"."""


class Store:
    """What was answered or made, by its question: JSON lines in a file that only grows, not called .jsonl, or train.py
    would take it for data; a torn last line is cut off. It also counts what this run rejects. Threads share it."""

    def __init__(self, folder):
        self.folder, self.path = folder, os.path.join(folder, "answers.log")
        self.lock, self.known, self.closed = threading.Lock(), {}, False
        self.tally, self.counts = prepare.Tally(), Counter()
        if os.path.lexists(self.path):
            cli.check_file(self.path, "answers of construct.py")
        with open(self.path, "ab+") as file:
            file.seek(0)
            *lines, torn = file.read().split(b"\n")
            file.truncate(file.tell() - len(torn))
        for number, line in enumerate(lines, 1):
            try:
                record = cli.json_object(line)
                self.known.setdefault(record["key"], dict(record["answer"]))
            except (ValueError, LookupError, TypeError):       # InputError is a ValueError
                raise InputError(f"{self.path}:{number}: is no line that construct.py wrote; remove it, or choose "
                                 "another --out") from None

    def get(self, question, about, make):
        """The answer, an object of JSON, to a question, anything in JSON; `make()` gives it where it is unknown, or
        where the "file" that it names is gone. about: for people who read the file"""
        key = hashlib.blake2b(json.dumps(question).encode(), digest_size=16).hexdigest()
        answer = self.known.get(key)
        if answer and os.path.exists(os.path.join(self.folder, answer.get("file", ""))):
            return answer
        if self.closed:
            raise CancelledError
        answer = make()
        try:
            with self.lock, open(self.path, "ab") as file:
                file.write(json.dumps({"key": key, "about": about, "answer": answer}).encode() + b"\n")
                return self.known.setdefault(key, answer)      # the first, if two threads asked the same
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); make room, then give the same "
                             "command again") from None

    def each(self, function, items, step):
        """Yields what the function returns of each item, counted under `step`; what it rejects is counted too."""
        for item in items:
            try:
                result = function(item)
            except Rejected as error:
                reason, _, what = str(error).partition(": ")
                with self.lock:
                    self.tally.unusable(what, reason)
                continue
            with self.lock:
                self.counts[step] += 1
            yield result

    def in_parallel(self, function, items, threads, step):
        """The list of what `each` yields, worked out by several threads. An error or Ctrl-C ends it once the requests
        under way are answered, and these answers are kept."""
        with ThreadPoolExecutor(threads) as pool:
            try:
                results = pool.map(lambda item: list(self.each(function, [item], step)), items)
                return [result for part in cli.bar(results, total=len(items), desc=step) for result in part]
            except BaseException:
                self.closed = True
                pool.shutdown(cancel_futures=True)
                raise


# ---------------------------------------------------------------------------------------------------------------------
# The two services

decode = json.JSONDecoder(parse_float=cli.finite, parse_constant=cli.finite).raw_decode


def json_in(text):
    """The first object of JSON in an answer, whatever is around it: fences, a list, sentences, thoughts that end in
    </think>. ValueError where there is none."""
    text = text.rpartition("</think>")[2]
    for brace in re.finditer(r"\{", text):
        with suppress(ValueError, RecursionError):
            return decode(text, brace.start())[0]
    raise ValueError("it holds no object of JSON")


class LanguageModel(Endpoint):
    """The vision-language model. units: of UNITS, in which it is asked for coordinates; given: in which it gives them,
    see `calibrate`."""
    flag, name, kept = "--vlm", "vision-language model", "answered"

    def __init__(self, args, store):
        super().__init__(args.vlm_url, args.vlm_model, os.environ.get("OPENAI_API_KEY"), timeout=args.timeout)
        self.store, self.answered = store, bool(store.known)   # by an earlier run
        self.units = self.given = "pixels" if args.coordinates == "auto" else args.coordinates

    def request(self, messages, options):
        """Asks once. -> {"text": the answer} or {"refused": why}"""
        try:
            choice = self.chat(messages, **options)
        except Refused as error:
            return {"refused": str(error)}
        message, filtered = choice["message"], choice.get("finish_reason") == "content_filter"
        if message.get("refusal") or filtered:
            return {"refused": str(message.get("refusal") or "content filter")}
        return {"text": str(message["content"])[:LONGEST]}

    def ask(self, step, about, text, urls, read, temperature=0):
        """Asks until `read` can use the JSON of the answer, telling the model each time what was wrong with it, read's
        ValueError. -> what it returns; Rejected where the model refuses, or TRIES answers are of no use."""
        messages, options = [user_message(text, urls)], {"temperature": temperature, "max_tokens": 1024}
        for _ in range(TRIES):
            answer = self.store.get([self.model, options, messages], f"{step}: {about}",
                                    lambda: next(self.answers(lambda: self.request(messages, options))))
            try:
                if "text" in answer:
                    return read(json_in(answer["text"]))
            except ValueError as error:
                problem = str(error)
            if "refused" in answer or "{" not in answer["text"] and REFUSAL.search(answer["text"]):
                raise Rejected(f"refused by the language model ({step}): {about}")
            messages += [{"role": "assistant", "content": answer["text"]}, user_message(AGAIN % problem, [])]
        raise Rejected(f"no usable answer in {TRIES} tries ({step}): {about}, {problem}")


class Painter(Endpoint):
    """The text-to-image model."""
    flag, name, kept, path = "--t2i", "text-to-image model", "made", "images/generations"

    def paint(self, prompt, size):
        """Asks once. size: "512x512". -> PIL RGB"""
        answer = self.post({"model": self.model, "prompt": prompt, "n": 1, "size": size,
                            "response_format": "b64_json"}, MAX_PICTURE)
        try:
            return cli.to_rgb(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))))
        except (LookupError, TypeError, ValueError, OSError):
            raise Unreachable("an answer without a picture in b64_json", hopeless=True) from None


# ---------------------------------------------------------------------------------------------------------------------
# What is read of answers; ValueError is what the model is told

def texts_in(answer, key, words, count=None):
    """The texts of a list, each of at most so many words. count: how many there must be; else each is taken once."""
    texts = answer.get(key)
    if not isinstance(texts, list) or count and len(texts) != count:
        raise ValueError(f'"{key}" must be a list of {count or ""} texts')
    if not all(isinstance(text, str) and text.replace(data.IMAGE, "").strip() for text in texts):
        raise ValueError(f'"{key}" must hold text')
    texts = [" ".join(text.replace(data.IMAGE, "").split()) for text in texts]
    for text in texts:
        if len(text.split()) > words or cli.half_a_letter(text):
            raise ValueError(f'"{key}" has {len(text.split())} words, at most {words} of whole letters are allowed')
    return texts if count else list(dict.fromkeys(texts))


def text_in(answer, key, words):
    """One text."""
    return texts_in({key: [answer.get(key)]}, key, words)[0]


def numbers_in(values, count):
    """A list of so many numbers."""
    if not isinstance(values, list) or [type(value) in (int, float) for value in values] != [True] * count:
        raise ValueError(f"{cli.shortly(values)} must be {count} numbers")
    return values


def place_in(answer, units, size):
    """A box, "bbox_2d" as Qwen is used to, and key points. units: of UNITS; size: of the picture as it was sent.
    -> box (4,), points (n, 2) in shares of the picture's sides, both fp64; None where the object is not there"""
    box = answer.get("box", answer.get("bbox_2d"))
    if box is None:
        return None
    whole = np.array([1000, 1000] if units == "thousandths" else size)
    box = np.array(numbers_in(box, 4)) / np.tile(whole, 2)
    if box.min() < -SLACK or box.max() > 1 + SLACK:
        raise ValueError(f"the box reaches out of the picture, whose right lower corner is {whole.tolist()}")
    box = box.clip(0, 1)
    if (box[2:] - box[:2]).min() < SLACK:
        raise ValueError("the box is empty; left, top, right, bottom come in this order")
    points = answer.get("points")
    if not isinstance(points, list) or not points:
        raise ValueError('"points" must be a list of at least one [x, y]')
    points = np.array([numbers_in(point, 2) for point in points]) / whole
    if (points < box[:2] - SLACK).any() or (points > box[2:] + SLACK).any():
        raise ValueError("a point lies outside of the box")
    return box, points.clip(box[:2], box[2:])


def calibrate(model):
    """How a model gives coordinates, pixels of what it is sent (Qwen2.5-VL) or thousandths (Qwen2-VL, Qwen3-VL), though
    it is asked for pixels. It is shown a red rectangle which is so far to the right and the bottom that an answer can
    be that in one of the two ways only. -> one of UNITS"""
    size, true = np.array([560, 420]), np.array([364, 252, 504, 378])
    image = Image.new("RGB", size.tolist(), "white")
    ImageDraw.Draw(image).rectangle(true.tolist(), fill="red")

    def units_of(answer):
        box = np.array(numbers_in(answer.get("box", answer.get("bbox_2d")), 4))
        for units, scale in (("pixels", 1), ("thousandths", np.tile(size, 2) / 1000)):
            if np.abs(box * scale - true).max() < 0.25 * (true[2:] - true[:2]).min():
                return units
        raise ValueError("that is not where the red rectangle is")

    text = PLACE % ("red rectangle", UNITS[model.units].format(*size))
    try:
        return model.ask("coordinates", "red rectangle", text, [data_url(image)], units_of)
    except Rejected as error:
        raise InputError(f"--coordinates auto: the model does not find a red rectangle on white ({error}); say how it "
                         "gives coordinates, or take a model that gives boxes") from None


# ---------------------------------------------------------------------------------------------------------------------
# 1. Pictures: those of a folder, and synthetic ones

class Picture(NamedTuple):
    """A picture to begin with."""
    path: str
    name: str                  # for messages: from the folder on
    subject: str | None = None           # what its name says; those of one subject in one folder are paired


def find_pictures(root, out):
    """Pictures in a folder and below it, but for masks and for what lies in `out`. -> [Picture]"""
    pictures = []
    for folder, below, listed in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith(".")
                          and os.path.realpath(os.path.join(folder, name)) != os.path.realpath(out))
        for name in sorted(listed):
            stem, ending = os.path.splitext(name)
            if ending.lower() in prepare.IMAGES and not stem.lower().endswith(".mask") and not name.startswith("."):
                path = os.path.join(folder, name)
                pictures.append(Picture(path, os.path.relpath(path, root), cli.subject_of(path)))
    return pictures


def check_wanted(question, model, about, text="", urls=()):
    """The paper filters unsafe content; here the model is asked --reject. Rejected where it says yes."""
    def word(answer):
        if answer.get("answer") not in ("yes", "no"):
            raise ValueError('"answer" must be "yes" or "no"')
        return answer["answer"]

    if question and model.ask("filter", about, f'{question}{text}{JSON_ALONE}{{"answer": "yes or no"}}', urls,
                              word) == "yes":
        raise Rejected(f"flagged by --reject: {about}")


def synthesize(args, store, model):
    """The paper's synthetic pictures (2.4): the language model writes prompts, the other one paints. -> [Picture]"""
    painter = Painter(args.t2i_url, args.t2i_model, os.environ.get("OPENAI_API_KEY"), timeout=args.timeout)

    def write(start):
        count = min(AT_ONCE, args.synthetic - start)
        text = PROMPTS % (count, start + 1, start + count, THEMES[start // AT_ONCE % len(THEMES)])
        return model.ask("prompts", f"{start + 1} to {start + count}", text, [],
                         lambda answer: texts_in(answer, "prompts", WORDS)[:count], temperature=1)

    def draw(prompt):
        """-> Picture of a prompt; Rejected where it is not wanted or refused"""
        check_wanted(args.reject, model, prompt, f'\nThis is about a picture of: "{prompt}"')
        question = [painter.model, args.t2i_size, prompt]
        name = f"synthetic/{hashlib.blake2b(json.dumps(question).encode(), digest_size=6).hexdigest()}.png"

        def make():
            try:
                image = next(painter.answers(lambda: painter.paint(prompt, args.t2i_size)))
            except Refused as error:
                return {"refused": str(error)}
            with cli.atomic_file(os.path.join(args.out, name)) as temporary:
                image.save(temporary, "PNG")
            return {"file": name}

        if "refused" in store.get(question, f"picture: {prompt}", make):
            raise Rejected(f"refused by the text-to-image model: {prompt}")
        return Picture(os.path.join(args.out, name), name)

    batches = store.in_parallel(write, range(0, args.synthetic, AT_ONCE), args.parallel, "batches of prompts")
    prompts = list(dict.fromkeys(sum(batches, [])))
    return store.in_parallel(draw, prompts, args.parallel, "synthetic pictures")


# ---------------------------------------------------------------------------------------------------------------------
# 2. A caption, objects, where they are, and their masks

class Found(NamedTuple):
    """An object in a picture; box (left, top, right, bottom), points (x, y) in its pixels; mask: path from --out."""
    label: str
    box: list
    points: list
    mask: str


class Annotated(NamedTuple):
    """What came out of a picture; objects: of Found."""
    picture: Picture
    caption: str
    objects: list


def sent(image, most=SENT):
    """A picture as it is sent: no side longer than `most`, both multiples of PATCH. -> data URL, (width, height)"""
    scale = min(1, most / max(image.size))
    size = [math.ceil(side * scale / PATCH - 0.01) * PATCH for side in image.size]
    return data_url(image.resize(size, Image.BICUBIC), "JPEG", quality=90), size


def locate(label, picture, image, model, url, size):
    """An object -> (label, box, points) in pixels of the picture."""
    text = PLACE % (label, UNITS[model.units].format(*size))
    about = f"{picture.name}, {label}"
    found = model.ask("box", about, text, [url], lambda answer: place_in(answer, model.given, size))
    if found is None:
        raise Rejected(f"an object is not found again: {about}")
    box, points = found
    return label, (box * np.tile(image.size, 2)).round(1).tolist(), (points * image.size).round(1).tolist()


def annotate(picture, args, store, model, segmenter):
    """The paper's way of a picture: a comprehensive caption; then the concrete, distinct objects that can be segmented;
    for each a box and key points; of these a mask. -> Annotated; Rejected if there is not even a caption"""
    try:
        picture.name.encode()
        image = data.open_image(picture.path)
    except ValueError as error:                # a name that is no UTF-8 too
        raise Rejected(f"unreadable: {ascii(picture.name)}, {error}") from None
    url, size = sent(image)
    check_wanted(args.reject, model, picture.name, urls=[url])
    caption = model.ask("caption", picture.name, CAPTION, [url], lambda answer: text_in(answer, "caption", WORDS))

    def name(question):
        labels = model.ask("objects", picture.name, question, [url], lambda answer: texts_in(answer, "objects", 8))
        if not labels:
            raise Rejected(f"no object to be cut out: {picture.name}")
        return labels[:args.objects]

    lists = store.each(name, [OBJECTS % (caption, args.objects)], "lists of objects")
    places = store.each(lambda label: locate(label, picture, image, model, url, size), next(lists, []), "boxes")
    found = store.each(lambda place: Found(*place, cut_out(picture, image, place, args.out, store, segmenter)), places,
                       "masks")
    return Annotated(picture, caption, list(found))


class GrabCut:
    """OpenCV's GrabCut around the box, the key points being of the object for sure: no network, nothing to download."""
    SIDE, MARGIN, DOT, SPECK = 224, 0.25, 0.03, 0.02     # pixels; shares of the box, of its shorter side, of the mask

    def __init__(self, args):
        try:
            import cv2                         # here, because only this needs it
        except ImportError:
            raise InputError("--segmenter grabcut needs OpenCV; run `pip install opencv-python-headless`") from None
        cv2.setNumThreads(1)                   # several pictures are worked on at once
        self.cv2, self.name = cv2, "grabcut"

    def __call__(self, image, box, points):
        """PIL RGB, box and points in its pixels -> mask (H, W) bool, True = object"""
        cv2, box = self.cv2, np.reshape(box, (2, 2))
        margin = self.MARGIN * (box[1] - box[0]) + 2
        start, stop = (box + [-margin, margin]).clip(0, image.size).astype(int)
        crop = image.crop((*start.tolist(), *stop.tolist()))
        scale = self.SIDE / max(crop.size)
        small = crop.resize([max(1, round(side * scale)) for side in crop.size], Image.BICUBIC)
        (left, top), (right, bottom) = ((box - start) * scale).round().astype(int).tolist()
        labels = np.full((small.height, small.width), cv2.GC_BGD, np.uint8)               # (h, w)
        labels[top:bottom, left:right] = cv2.GC_PR_FGD
        if cv2.GC_BGD not in labels:
            raise Rejected("there is nothing around the box to compare it with")
        for point in ((np.array(points) - start) * scale).astype(int).tolist():
            cv2.circle(labels, point, max(1, round(self.DOT * min(right - left, bottom - top))), cv2.GC_FGD, -1)
        cv2.setRNGSeed(0)                      # it starts from random clusters; each thread has its own numbers
        pixels = np.ascontiguousarray(np.asarray(small)[:, :, ::-1])
        cv2.grabCut(pixels, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_MASK)
        _, parts, facts, _ = cv2.connectedComponentsWithStats(labels % 2)
        large = facts[:, cv2.CC_STAT_AREA] > self.SPECK * np.count_nonzero(parts)
        large[0] = False                       # the background
        cut = Image.fromarray(np.uint8(255 * large[parts])).resize(crop.size, Image.BILINEAR)
        mask = np.zeros((image.height, image.width), bool)
        mask[start[1]:stop[1], start[0]:stop[0]] = np.asarray(cut) > 127
        return mask


class Sam:
    """Segment Anything, the paper's segmenter: any checkpoint of SAM or SAM 2 that `transformers` loads."""

    def __init__(self, args):
        try:
            from transformers import AutoModelForMaskGeneration, AutoProcessor            # here, as only this needs it
        except ImportError:
            raise InputError("--segmenter sam needs transformers; run `pip install transformers`, or take "
                             "--segmenter grabcut") from None
        self.name, self.device, self.lock = f"sam {args.sam_model}", cli.pick_device(), threading.Lock()
        try:
            self.processor = AutoProcessor.from_pretrained(args.sam_model)
            self.model = AutoModelForMaskGeneration.from_pretrained(args.sam_model).to(self.device).eval()
        except Exception as error:             # transformers raises many kinds
            raise InputError(f"--sam-model {args.sam_model}: cannot be loaded ({cli.first_line(error)}); name one of "
                             f"the hub or a folder, or take --segmenter grabcut") from None

    def __call__(self, image, box, points):
        """PIL RGB, box and points in its pixels -> mask (H, W) bool, True = object"""
        with self.lock, torch.inference_mode():
            inputs = self.processor(image, input_boxes=[[box]], input_points=[[points]],
                                    input_labels=[[[1] * len(points)]], return_tensors="pt").to(self.device)
            masks = self.model(**inputs, multimask_output=False).pred_masks.float().cpu()         # (1, 1, 1, h, w)
        sizes = [inputs[key].cpu() for key in ("original_sizes", "reshaped_input_sizes") if key in inputs]
        return self.processor.post_process_masks(masks, *sizes)[0][0, 0].numpy()                  # (H, W)


SEGMENTERS = {"sam": Sam, "grabcut": GrabCut}


def checked_mask(mask, box):
    """A mask, (H, W) bool, as far as it lies in its box; Rejected where it is empty, fills the box or leaves it."""
    left, top, right, bottom = np.round(box).astype(int).tolist()
    inside = np.zeros_like(mask)
    inside[top:bottom, left:right] = mask[top:bottom, left:right]
    share, side = inside.sum() / max(1, (right - left) * (bottom - top)), min(mask.shape)
    first = (np.array(mask.shape) - side) // 2
    used = inside[first[0]:first[0] + side, first[1]:first[1] + side]
    for wrong, reason in ((inside.sum() < (1 - OUTSIDE) * mask.sum(), "the mask lies outside of its box"),
                          (share < SMALL, "the mask is empty"), (share > FULL, "the mask fills its box"),
                          (not used.any(), "the object lies outside of the central square that is used")):
        if wrong:
            raise Rejected(reason)
    return inside


def cut_out(picture, image, place, out, store, segmenter):
    """An object's (label, box, points) -> the path of its mask, from `out` on"""
    label, box, points = place
    question = [segmenter.name, hashlib.blake2b(image.tobytes()).hexdigest(), box, points]
    stem = re.sub(r"\W+", "-", os.path.splitext(picture.name)[0])[-60:]
    name = f"masks/{stem}-{hashlib.blake2b(json.dumps(question).encode(), digest_size=6).hexdigest()}.png"

    def make():
        """Asks the segmenter; the mask becomes a file. -> what the store keeps"""
        try:
            mask = checked_mask(segmenter(image, box, points), box)
        except Rejected as error:
            return {"rejected": str(error)}
        upright = Image.Exif()
        upright[cli.ORIENTATION] = 1           # drawn on the turned picture: it is not to be turned with it once more
        with cli.atomic_file(os.path.join(out, name)) as temporary:
            Image.fromarray(mask).save(temporary, "PNG", exif=upright)
        return {"file": name}

    answer = store.get(question, f"mask: {picture.name}, {label}", make)
    if "rejected" in answer:
        raise Rejected(f"{answer['rejected']}: {picture.name}, {label}")
    return name


# ---------------------------------------------------------------------------------------------------------------------
# 3. Pairs of pictures of one subject

def pairs_of(pictures):
    """Rows of pairs whose texts are still to be written, of pictures that are called the same and lie in one folder."""
    subjects = {}
    for picture in pictures:
        row = {"source_image": picture.path, "input_text": ""}
        subjects.setdefault((os.path.dirname(picture.path), picture.subject), []).append(row)
    return [row for (_, name), rows in subjects.items() if name for row in prepare.pairs(name, rows)]


def recaption(row, model):
    """The paper captions pairs anew: what is the common subject, and a prompt for each picture, which leaves the looks
    to the other one. -> the row with its texts"""
    about = " and ".join((row["source_image"], row["image_path"]))

    def texts(answer):
        if answer.get("subject", "") is None:
            return None
        return text_in(answer, "subject", 8), *texts_in(answer, "prompts", WORDS, 2)

    urls = [sent(data.open_image(row[key]))[0] for key in ("source_image", "image_path")]
    found = model.ask("pair", about, PAIR % row["objects"], urls, texts)
    if found is None:
        raise Rejected(f"no subject in common: {about}")
    return row | dict(zip(("objects", "input_text", "swapped_text"), found))


# ---------------------------------------------------------------------------------------------------------------------
# 4. Rows, and a sheet to look at

def rows_of(annotated, tally):
    """Yields the rows of all that a picture is good for, and counts them."""
    row = {"input_text": annotated.caption, "source_image": annotated.picture.path}
    rows = [("t2i", row | {"generation_only": True}), ("reconstruct", row)]
    for found in annotated.objects:
        masked = row | {"image_path": found.mask, "objects": found.label}
        rows += [("segment", masked | {"do_mask": True}), ("recover", masked | {"do_replace": True})]
    if len(annotated.objects) > 1:
        rows.append(("multi", row | {"image_path": [found.mask for found in annotated.objects],
                                     "objects": [found.label for found in annotated.objects]}))
    tally.rows[False].update(task for task, _ in rows)
    return [row for _, row in rows]


def annotated_tile(annotated, out, places):
    """What a picture's masks cut out, then itself with boxes and points, above its objects and caption. -> PIL RGB"""
    image, images, colours = data.open_image(annotated.picture.path), [], ("red", "lime", "cyan", "yellow", "magenta")
    drawn, width = image.copy(), max(1, max(image.size) // 100)
    pen = ImageDraw.Draw(drawn)
    for i, found in enumerate(annotated.objects):
        mask = cli.open_mask(os.path.join(out, found.mask), image, annotated.picture.path, [])
        images.append(data.on_black(image, mask))
        pen.rectangle(found.box, outline=colours[i % len(colours)], width=width)
        for x, y in found.points:
            pen.ellipse((x - width, y - width, x + width, y + width), fill=colours[i % len(colours)], outline="black")
    text = f"{', '.join(found.label for found in annotated.objects)}: {annotated.caption}"
    return cli.captioned([*images, drawn], text, places, lines=6)


def sheet(results, pairs, out):
    """The first pictures with masks, then the first pairs: reference, target in a red frame, prompt. -> PIL, or None"""
    shown = [annotated for annotated in results if annotated.objects][:SHOWN]
    places = max([2, *(len(annotated.objects) + 1 for annotated in shown)])
    tiles = [annotated_tile(annotated, out, places) for annotated in shown]
    for row in pairs[:SHOWN]:
        images = [data.open_image(row[key]) for key in ("image_path", "source_image")]
        prompt = data.prompt_for("subject", [row["objects"]], row["input_text"])
        tiles.append(cli.captioned(images, f"subject: {prompt}", places, lines=6))
    return cli.contact_sheet(tiles) if tiles else None


def write(args, store, results, pairs):
    """Writes rows and sheet; prints what there is and what was left out."""
    rows, tally, out = [], store.tally, os.path.join(args.out, "data.jsonl")
    for annotated in results:
        rows += rows_of(annotated, tally)
    tally.rows[False].update("subject" for _ in pairs)
    if not rows:
        raise InputError(f"{args.folder}: no row came out; " + "; ".join(tally.problems()[:3]))
    with cli.atomic_file(out) as temporary, open(temporary, "wb") as file:
        for row in rows + pairs:               # paths start at the JSONL, as those of masks already do
            paths = {key: os.path.relpath(row[key], args.out) for key in ("source_image", "image_path")
                     if key == "source_image" or "swapped_text" in row}
            file.write(prepare.checked(row | paths)[1])
    print(f"wrote {out}: {tally.tasks(False)}")
    if page := sheet(results, pairs, args.out):
        with cli.atomic_file(os.path.join(args.out, "look.png")) as temporary:
            page.save(temporary, "PNG")
        print(f"wrote {args.out}/look.png")
    print(", ".join(f"{store.counts[step]:,} {step}" for step in STEPS if step in store.counts))
    print(f"left out: {tally.reasons.total():,}", *tally.problems(), sep="\n")


def construct(args):
    """The whole pipeline over a folder of pictures."""
    if not os.path.isdir(args.folder):
        raise InputError(f"{args.folder}: no such folder; give one with pictures")
    pictures = find_pictures(args.folder, args.out)
    if not pictures and not args.synthetic:
        raise InputError(f"{args.folder}: holds no pictures; put some there as dog/00.jpg, dog/01.jpg, ...")
    cli.probe(os.path.join(args.out, "data.jsonl"))
    segmenter = SEGMENTERS[args.segmenter](args)
    with cli.lock(os.path.join(args.out, ".lock")):
        for made in ("masks", "synthetic"):
            cli.clean(os.path.join(args.out, made, "any"))
        store = Store(args.out)
        model = LanguageModel(args, store)
        if args.coordinates == "auto":
            model.given = calibrate(model)
            print(f"the model gives coordinates in {model.given}")
        if args.synthetic:
            pictures += synthesize(args, store, model)
        results = store.in_parallel(lambda picture: annotate(picture, args, store, model, segmenter), pictures,
                                    args.parallel, "captions")
        rows = pairs_of([annotated.picture for annotated in results])
        pairs = store.in_parallel(lambda row: recaption(row, model), rows, args.parallel, "pairs")
        write(args, store, results, pairs)


# ---------------------------------------------------------------------------------------------------------------------
# How good the masks are

def points_inside(mask, rng, n=4):
    """Key points of a true mask, (n, 2): anywhere in what is left of it when its rim is taken off again and again."""
    core = Image.fromarray(mask).convert("L")
    while np.count_nonzero(smaller := core.filter(ImageFilter.MinFilter(3))) > 0.25 * mask.sum():
        core = smaller
    rows, columns = np.nonzero(np.asarray(core))
    chosen = rng.integers(len(rows), size=n)
    return np.column_stack([columns, rows])[chosen] + 0.5


def iou(args):
    """Prints how well a segmenter's masks agree with the true ones of a JSONL's segmentation rows, boxes and points
    being taken from these: of masks that are kept, and of those that are rejected for whatever reason."""
    rows = data.Rows([args.data])
    numbers = np.flatnonzero(rows.table["task"] == data.KINDS["segment"])[:args.n]
    if not len(numbers):
        raise InputError(f'{args.data}: has no row of an object, its mask and "do_mask": true; add some')
    segmenter, scores, boxes = SEGMENTERS[args.segmenter](args), {}, []
    for number in cli.bar(numbers, unit="row"):
        row, rng = rows[number], np.random.default_rng(number)
        image = data.open_image(row.source)
        for true in (cli.open_mask(path, image, row.source, []) for path in row.images):
            box = np.array(data.box_of(true), dtype=float)
            box += rng.uniform(-args.jitter, args.jitter, 4) * np.tile(box[2:] - box[:2], 2)
            box = box.clip(0, np.tile(image.size, 2))
            points = points_inside(true, rng).clip(box[:2], box[2:])
            left, top, right, bottom = box.round().astype(int)
            common = true[top:bottom, left:right].sum()
            boxes.append(common / ((right - left) * (bottom - top) + true.sum() - common))
            mask, reason = segmenter(image, box.tolist(), points.tolist()), "kept"
            try:
                mask = checked_mask(mask, box)
            except Rejected as error:
                reason = str(error)
            scores.setdefault(reason, []).append((true & mask).sum() / (true | mask).sum())
    print(f"{len(boxes):,} masks by {segmenter.name}, IoU with the true ones; the boxes alone reach "
          f"{statistics.fmean(boxes):.3f}")
    for reason, values in scores.items():
        print(f"{len(values):8,} {reason}: mean {statistics.fmean(values):.3f}, median {statistics.median(values):.3f},"
              f" below 0.5: {np.mean(np.array(values) < 0.5):.1%}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def add_segmenter(parser):
    """Flags of what makes masks."""
    parser.add_argument("--segmenter", choices=SEGMENTERS, default="sam", help="sam needs the package transformers "
                        "and weights, grabcut opencv-python-headless alone (default sam)")
    parser.add_argument("--sam-model", metavar="NAME", default="facebook/sam-vit-base", help="of SAM or SAM 2, on the "
                        "hub or a folder (default %(default)s)")


def parse(argv):
    """The command line -> arguments, `run` among them."""
    if argv[:1] == ["iou"]:
        parser = cli.Parser(prog="construct.py iou", description=iou.__doc__)
        parser.set_defaults(run=iou)
        parser.add_argument("data", metavar="DATA.jsonl")
        add_segmenter(parser)
        parser.add_argument("--n", type=cli.positive_int, help="only so many rows")
        parser.add_argument("--jitter", type=cli.nonnegative_float, default=0.0, metavar="SHARE", help="move each side "
                            "of a box by up to this share of its length, as a model's boxes are off (default 0)")
        return parser.parse_args(argv[1:])
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=construct)
    parser.add_argument("folder", metavar="FOLDER", help="pictures, and folders of pictures (one called iou: ./iou)")
    parser.add_argument("--out", metavar="FOLDER", default="out/construct", help="default %(default)s")
    parser.add_argument("--vlm-url", metavar="URL", required=True, help="OpenAI-compatible endpoint, including /v1")
    parser.add_argument("--vlm-model", metavar="NAME", required=True, help="the vision-language model's name there")
    parser.add_argument("--coordinates", choices=["auto", *UNITS], default="auto", help="how the model gives them; "
                        "auto (default) shows it a red rectangle and sees")
    parser.add_argument("--objects", type=cli.positive_int, default=4, metavar="N", help="at most so many of a "
                        "picture (default 4)")
    add_segmenter(parser)
    parser.add_argument("--reject", metavar="QUESTION", help="the language model is asked this about every picture and "
                        "prompt, and what it says yes to is left out")
    parser.add_argument("--synthetic", type=cli.natural, default=0, metavar="N", help="add up to so many pictures of a "
                        "text-to-image model (default 0)")
    parser.add_argument("--t2i-url", metavar="URL", help="its endpoint, including /v1")
    parser.add_argument("--t2i-model", metavar="NAME", help="its name there")
    parser.add_argument("--t2i-size", default="1024x1024", metavar="WxH", help="of its pictures (default %(default)s)")
    parser.add_argument("--parallel", type=cli.positive_int, default=8, metavar="N", help="requests at once (default "
                        "8)")
    parser.add_argument("--timeout", type=cli.positive_float, default=120.0, metavar="SECONDS", help="for an answer "
                        "(default 120)")
    args = parser.parse_args(argv)
    if bool(args.synthetic) != bool(args.t2i_url and args.t2i_model):
        raise InputError("--synthetic, --t2i-url and --t2i-model go together; give all three or none")
    return args


def main(argv=None):
    """The command line."""
    args = parse(sys.argv[1:] if argv is None else argv)
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
