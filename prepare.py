"""Commands on training data: make it of what you have, look at it, encode its targets once for many runs.

    python prepare.py folder my_pictures                                       # writes my_pictures/data.jsonl
    python prepare.py import blip_laion_cc_sbu_558k.json --image-root images --out data.jsonl --holdout 0.01
    python prepare.py look my_pictures/data.jsonl                              # writes out/look.png, counts, problems
    python prepare.py encode my_pictures/data.jsonl --weights W --out codes    # saves train.py the VQGAN's encoder

`import` tells by looking at it what a file or folder is:

    MENTOR's JSON lines, X2I's; LLaVA's conversations, an array or lines; COCO's captions
    metadata.jsonl or .csv of Hugging Face's imagefolder, alone or in its folder; other lines of pictures and captions
    folders of pictures with .txt or .caption files: kohya's (10_dog/), img2dataset's (00000/), one a subject (dog/)
    webdataset's tar archives and Parquet tables, alone or a folder of them; their pictures go to DATA-pictures/

A picture becomes a row of task reconstruct, with its first caption, and a row of task t2i for each of its captions; one
with a mask becomes segment and recover, and pictures of a subject that names tell (dog-00.jpg, dog/00.jpg) subject.

`data.py` describes the JSON lines and the tasks. `train.py --codes codes` reads the codes, by weights.Codes.
"""
import argparse
import csv
import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Callable, Iterable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import cli
import data
import weights
from cli import InputError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
ENDINGS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif"}     # Pillow's
PICTURE_KEYS = ("file_name", "filename", "image", "jpg", "jpeg", "png", "webp")      # where a record names its picture
CAPTION_KEYS = ("text", "caption", "captions", "txt", "prompt", "description")       # and what it shows
NEIGHBOURS = 4      # an image is paired with so many of the same subject: all pairs would outnumber the other tasks
A_SHELF, SHELVES = 10_000, {f"{i:05}" for i in range(100_000)}     # pictures out of archives that lie in one folder
MOST = 1 << 28      # bytes of a picture in an archive; a larger one is damaged


# ---------------------------------------------------------------------------------------------------------------------
# What all formats share: where pictures lie, records, captions

@dataclass
class Source:
    """What is imported."""
    name: str                  # what it is taken for
    entries: Iterable          # (where, entry), or (where, InputError "reason: details") in place of a damaged one
    make: Callable             # (entry, Pictures) -> (what all entries share that must not be torn apart by --holdout,
                               # a picture's name or content, text or bytes; [rows]); InputError "reason: details"
    paths: bool = True         # it names pictures by paths, which --image-root changes
    packed: bool = False       # it holds pictures, which become files
    files: tuple = ()          # what it consists of and must not be replaced, as far as that is no picture
    notes: Callable = list     # -> lines for the end of the report


class Pictures:
    """Where the pictures lie that a file names, or holds.

    Its paths start at its own folder, or at `root` where that is given. There a path of another machine is taken for
    what its last parts name, and all that begin as it does for what lies beside that, lest a missing picture be taken
    for another one of the same name. Rows have paths from the folder of `out` on; absolute ones stay as they are.
    """

    def __init__(self, path, root, out):
        self.folder, self.root = os.path.dirname(path), root
        self.out = os.path.dirname(os.path.abspath(out))
        self.beginnings = []                   # the first parts of paths that stand for `root`
        self.store, self.kept = None, 0        # a folder for pictures out of archives, how many lie there
        self.store_name = os.path.basename(store_of(out))

    def __call__(self, name, folder=None):
        """A path that a file in `folder` names -> the same of a row; InputError where nothing lies there."""
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"the path of a picture is no text or missing: {cli.shortly(name)}")
        if self.root is None:
            place = os.path.join(self.folder if folder is None else folder, name)
        else:
            absolute = re.match(r"[/\\]|[A-Za-z]:", name)
            place = os.path.join(self.root, *self.below_root(re.split(r"[/\\]+", name if absolute else f"./{name}")))
        if not os.path.isfile(place):
            raise InputError(f"no such picture: {place}")
        return place if self.root is None and os.path.isabs(name) else os.path.relpath(place, self.out)

    def below_root(self, parts):
        """Those of a path's parts that are to be looked up under `root`."""
        for beginning in self.beginnings:
            if parts[:len(beginning)] == beginning:
                return parts[len(beginning):]
        for i in range(1, len(parts)):         # the first is /, a drive or the file's folder
            if os.path.isfile(os.path.join(self.root, *parts[i:])):
                self.beginnings.append(parts[:i])
                return parts[i:]
        return parts[1:]

    def keep(self, content):
        """Writes a picture that an archive holds (bytes) to a file. -> its path, for a row"""
        try:
            with Image.open(io.BytesIO(content)) as image:
                ending = ENDINGS[image.format]
        except Exception:                      # Pillow raises many kinds
            raise InputError(f"no picture, or a damaged one: {len(content):,} bytes") from None
        shelf, name = f"{self.kept // A_SHELF:05}", f"{self.kept:09}{ending}"
        os.makedirs(os.path.join(self.store, shelf), exist_ok=True)
        with open(os.path.join(self.store, shelf, name), "wb") as file:
            file.write(content)
        self.kept += 1
        return os.path.join(self.store_name, shelf, name)


def store_of(out):
    """The folder beside a JSONL for pictures out of archives."""
    return os.path.splitext(os.path.abspath(out))[0] + "-pictures"


def record_of(entry):
    """A line (bytes) or a value of JSON -> dict; InputError."""
    record = cli.parse_json(entry, "a damaged line") if isinstance(entry, bytes) else entry
    if not isinstance(record, dict):
        raise InputError("no object of JSON")
    return record


def captions_of(value):
    """A field with a caption, a list of them, or none -> list of different texts, without `<image>`."""
    texts = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise InputError(f"the caption is no text: {cli.shortly(value)}")
    return list(dict.fromkeys(filter(None, ((text or "").replace(data.IMAGE, "").strip() for text in texts))))


def captioned(source, captions):
    """The rows of a picture: reconstruct with its first caption, and t2i for each of them."""
    row = {"source_image": source, "input_text": captions[0] if captions else ""}
    return [row, *(row | {"input_text": caption, "generation_only": True} for caption in captions)]


def caption_key(records):
    """Where records have their captions: the first of CAPTION_KEYS that one has, else the only other field of all that
    holds texts. -> its name or None"""
    found = {key: value for record in reversed(records) for key, value in record.items() if value is not None}
    texts = [key for key, value in found.items() if isinstance(value, str) and key not in PICTURE_KEYS]
    return next((key for key in CAPTION_KEYS if key in found), texts[0] if len(texts) == 1 else None)


def said_of_captions(key):
    """What the name of a source says of its captions."""
    return f'captions in "{key}"' if key else f"without captions, which {', '.join(CAPTION_KEYS)} would hold"


# ---------------------------------------------------------------------------------------------------------------------
# JSON, by lines or as one text

def first_objects(path, most=20):
    """The JSON objects among the first lines of a file."""
    objects = []
    with open(path, "rb") as file:
        for _ in range(most):
            line = file.readline(cli.LONGEST).removeprefix(b"\xef\xbb\xbf").strip()
            try:
                objects.append(cli.parse_json(line, path))
            except InputError:                 # damaged, or no JSON at all
                continue
    return [record for record in objects if isinstance(record, dict)]


def json_lines(path):
    """Yields (file:LINE, the line) of all lines that are not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if line:
                yield f"{path}:{number}", line


class JsonText:
    """A large JSON text (UTF-8) that is read value by value: CHUNK letters and a value of at most LONGEST are held.

    path: for messages. InputError where the text is damaged or cut off.
    """
    CHUNK, LONGEST = 1 << 20, 1 << 24
    SPACES, AFTER = re.compile(r"\s*"), re.compile(r"[\s,:\]}]")

    def __init__(self, file, path):
        self.file, self.path = io.TextIOWrapper(file, "utf-8-sig"), path
        self.text, self.at, self.passed = "", 0, 0

    def more(self):
        """Reads on. -> whether there was more"""
        try:
            chunk = self.file.read(self.CHUNK)
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: is not UTF-8 text; save it as UTF-8") from None
        if chunk:
            self.passed += self.at
            self.text, self.at = self.text[self.at:] + chunk, 0
        return chunk != ""

    def damaged(self):
        """The error of what is no JSON."""
        return InputError(f"{self.path}: is damaged or cut off, no JSON from letter {self.passed + self.at + 1:,} on; "
                          "download it again")

    def peek(self):
        """The next letter that is no space, "" at the end."""
        while True:
            self.at = self.SPACES.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at:self.at + 1]

    def take(self, letter):
        """Passes over a letter that must be the next one."""
        if self.peek() != letter:
            raise self.damaged()
        self.at += 1

    def value(self):
        """Whatever value is next."""
        self.peek()
        while True:
            try:
                value, end = cli.decode_json(self.text, self.at)
                if self.AFTER.match(self.text, end) or not self.more():      # else a number could go on
                    self.at = end
                    return value
            except (ValueError, RecursionError):
                if len(self.text) - self.at > self.LONGEST or not self.more():
                    raise self.damaged() from None

    def parts(self, brackets, part):
        """Yields what `part` reads between brackets and commas."""
        self.take(brackets[0])
        if self.peek() != brackets[1]:
            yield part()
            while self.peek() == ",":
                self.at += 1
                yield part()
        self.take(brackets[1])

    def items(self):
        """Yields the values of an array."""
        return self.parts("[]", self.value)

    def members(self):
        """Yields the names in an object; whoever asks for the next one has taken the value of the last."""
        def name():
            key = self.value()
            self.take(":")
            return key
        return self.parts("{}", name)


def json_array(path):
    """Yields (where, value) for each value of a JSON array."""
    with open(path, "rb") as file:
        for number, value in enumerate(JsonText(file, path).items(), 1):
            yield f"{path}, entry {number}", value


# ---------------------------------------------------------------------------------------------------------------------
# Files, a function for each format

def mentor(path):
    """MENTOR's own lines: they stay as they are, but for paths, and must be what data.py can read."""
    return Source(cli.OURS, json_lines(path), mentor_rows)


def mentor_rows(line, pictures):
    """-> the target picture's name, [the row]"""
    row = record_of(line)
    checked(row)
    for key in ("source_image", "input_image", "image_path"):
        value = row.get(key)
        if value:
            row[key] = [pictures(name) for name in value] if isinstance(value, list) else pictures(value)
    return str(row.get("source_image") or row.get("input_image") or row.get("image_path")), [row]


X2I_PICTURE = re.compile(r"(?:<img>\s*)?<\|image_(\d{1,9})\|>(?:\s*</img>)?")
IN_CONTEXT = re.compile(r"(?<![a-z])icl(?![a-z])|in[-_ ]?context", re.IGNORECASE)


def x2i(path):
    """X2I's JSON lines, of several subjects or in context (OmniGen, arXiv 2409.11340; huggingface.co/yzwang)."""
    return Source("X2I's JSON lines", json_lines(path), x2i_rows)


def x2i_rows(line, pictures):
    """{"task_type", "instruction", "input_images", "output_image"}, <img><|image_1|></img> in the instruction for each
    picture -> the line, [row with the pictures in the order in which they stand in the text]. In context they are the
    first example's input and output, the second's, ..., and the input whose output is asked for."""
    record = record_of(line)
    text, inputs, output = (record.get(key) for key in ("instruction", "input_images", "output_image"))
    inputs = [inputs] if isinstance(inputs, str) else inputs or []
    for key, value in {"instruction": [text], "output_image": [output], "input_images": inputs}.items():
        if not isinstance(value, list) or not all(isinstance(each, str) and each.strip() for each in value):
            raise InputError(f"{key} is no text or missing: {cli.shortly(record.get(key))}")
    order = [int(number) for number in X2I_PICTURE.findall(text)]
    if not inputs:
        raise InputError("no input picture")
    if data.IMAGE in text:
        raise InputError(f"the instruction holds {data.IMAGE} itself")
    if not set(order) <= set(range(1, len(inputs) + 1)):
        raise InputError(f"the instruction names a picture that input_images lacks: {order} of {len(inputs)}")
    if len(set(order)) < len(inputs):
        raise InputError(f"a picture of input_images has no place in the instruction: {order} of {len(inputs)}")
    in_context = IN_CONTEXT.search(str(record.get("task_type"))) is not None
    if in_context and (len(order) < 3 or len(order) % 2 == 0):
        raise InputError(f"pairs of examples and an input make an odd number of pictures, 3 or more: {len(order)}")
    row = {"input_text": X2I_PICTURE.sub(data.IMAGE, text), "source_image": pictures(output),
           "image_path": [pictures(inputs[number - 1]) for number in order], "input_img_list": True}
    return line, [row | {"in_context": True} if in_context else row]


def llava(path, entries=json_array):
    """LLaVA's pretraining set (github.com/haotian-liu/LLaVA, docs/Data.md) and what is written like it."""
    return Source("LLaVA's conversations", entries(path), llava_rows)


def llava_rows(entry, pictures):
    """{"image": path, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]} ->
    the picture's name, its rows. Longer conversations answer questions and caption nothing."""
    record = record_of(entry)
    names, turns = record.get("image"), record.get("conversations")
    names = names if isinstance(names, list) else [names]
    if names in ([None], []):
        raise InputError("a conversation without a picture")
    if len(names) > 1:
        raise InputError(f"a conversation about several pictures: {len(names)}")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"conversations is no list of turns: {cli.shortly(turns)}")
    if len(turns) != 2:
        raise InputError(f"no question and one answer that would be a caption: {len(turns)} turns")
    captions = captions_of(turns[1].get("value"))
    return str(names[0]), captioned(pictures(names[0]), captions)


def coco(path):
    """COCO's captions_*.json (cocodataset.org, "Data format"). All names and captions are held, nothing else."""
    return Source("COCO's captions", coco_pictures(path), coco_rows)


def coco_pictures(path):
    """{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]} -> yields where, (name, captions)"""
    names, captions = {}, {}
    with open(path, "rb") as file:
        text = JsonText(file, path)
        for member in text.members():
            if member not in ("images", "annotations"):
                text.value()
                continue
            number, kept = ("id", names) if member == "images" else ("image_id", captions)
            for i, record in enumerate(text.items(), 1):
                where = f"{path}, {member} {i}"
                if not isinstance(record, dict) or not isinstance(record.get(number), (int, str)):
                    yield where, InputError(f"an entry without {number}: {cli.shortly(record)}")
                elif member == "images":
                    names[record[number]] = where, record.get("file_name")
                elif "caption" in record:
                    kept.setdefault(record[number], (where, []))[1].append(record["caption"])
    if not captions:
        raise InputError(f"{path}: has no captions among its annotations; give COCO's captions_*.json")
    for number, (where, name) in names.items():
        yield where, (name, captions.pop(number, (where, []))[1])
    for where, texts in captions.values():
        yield where, InputError("captions of a picture that images does not list")


def coco_rows(entry, pictures):
    """-> the picture's name, its rows"""
    name, captions = entry
    return str(name), captioned(pictures(name), captions_of(captions))


def json_captions(path):
    """Lines {"file_name": path, "text": caption}, as a metadata.jsonl of Hugging Face's imagefolder has them."""
    objects = first_objects(path)
    key, folder = caption_key(objects), os.path.dirname(path)
    return Source(f"JSON lines of pictures and captions, {said_of_captions(key)}", json_lines(path),
                  lambda line, pictures: table_rows(record_of(line), key, pictures, folder))


def csv_captions(path):
    """A table with a line of names at its top, among them file_name, as a metadata.csv of imagefolder."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        key, folder = caption_key(list(islice(csv_records(file, path), 20))), os.path.dirname(path)
    return Source(f"a table (CSV) of pictures and captions, {said_of_captions(key)}", csv_lines(path),
                  lambda record, pictures: table_rows(record, key, pictures, folder))


def csv_records(file, path):
    """Yields a dict for each line of a table; InputError where it is none."""
    try:
        yield from csv.DictReader(file)
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}: is no table that can be read ({error}); save it as CSV again") from None


def csv_lines(path):
    """Yields (where, record)."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, record in enumerate(csv_records(file, path), 1):
            yield f"{path}, row {number}", record


def table_rows(record, key, pictures, folder):
    """A record with a path under one of PICTURE_KEYS and captions under `key` -> the picture's name, its rows"""
    name = next((record[each] for each in PICTURE_KEYS if record.get(each)), None)
    if isinstance(name, dict):                 # imagefolder once more: {"path", "bytes"}
        name = name.get("path")
    return str(name), captioned(pictures(name, folder), captions_of(record.get(key)))


# ---------------------------------------------------------------------------------------------------------------------
# Archives

def parquet(*paths):
    """Parquet tables, of whose columns one has pictures: bytes, Hugging Face's {"bytes", "path"}, or paths."""
    try:
        from pyarrow import ArrowException, parquet as tables, types        # here, because nothing else needs it
    except ImportError:
        raise InputError(f"{paths[0]}: is a Parquet table, which needs pyarrow; pip install pyarrow") from None
    columns, packed = {}, False
    for path in paths:
        try:
            schema = tables.read_schema(path)
        except (ArrowException, OSError) as error:
            raise InputError(f"{path}: no Parquet table that can be read ({cli.first_line(error)}); download it again"
                             ) from None
        image = next((key for key in PICTURE_KEYS if key in schema.names), None)
        if not image:
            raise InputError(f"{path}: no column holds pictures, one would be called {', '.join(PICTURE_KEYS)}; it has "
                             f"{', '.join(schema.names[:20])}")
        is_text = {field.name: types.is_string(field.type) or types.is_large_string(field.type) for field in schema}
        columns[path] = image, caption_key([{name: "" if text else [] for name, text in is_text.items()}])
        packed |= not is_text[image]

    def entries():
        """Yields where a row stands and (picture, captions), or an InputError in their place."""
        for path, (image, caption) in columns.items():
            number = 0
            try:                               # buffered: else a whole row group, often a whole file, is held
                for batch in tables.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False).iter_batches(
                        64, columns=[name for name in (image, caption) if name]):
                    for record in batch.to_pylist():
                        number += 1
                        yield f"{path}, row {number}", (record[image], record.get(caption))
            except (ArrowException, OSError) as error:
                yield f"{path} behind row {number}", InputError(f"a damaged table: {cli.first_line(error)}")

    told = said_of_captions(columns[paths[0]][1])
    return Source(f"{len(paths):,} Parquet table(s), {told}", entries(), packed_rows, packed=packed, files=paths)


def packed_rows(entry, pictures):
    """(bytes, {"bytes", "path"} or path; captions) -> the picture's content or name, its rows"""
    image, captions = entry[0], captions_of(entry[1])
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is None:
        raise InputError("an entry without a picture")
    if isinstance(image, bytes):
        return image, captioned(pictures.keep(image), captions)
    return str(image), captioned(pictures(image), captions)


def webdataset(*paths):
    """Tar archives in which the files of a sample follow each other and share the name up to its first dot: a picture,
    its caption as .txt, .text or .caption or within .json (github.com/webdataset/webdataset)."""
    samples = (sample for path in paths for sample in tar_samples(path))
    return Source(f"{len(paths):,} tar archive(s), as webdataset has them", samples, webdataset_rows, paths=False,
                  packed=True, files=paths)


def tar_samples(path):
    """Yields (where, {ending in small letters: content}) of an archive; one that is cut off is read up to there."""
    wanted, last, sample = (*IMAGES, ".txt", ".text", ".caption", ".json"), None, {}
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - tarfile.BLOCKSIZE))
            whole = not any(file.read())       # an archive ends with zeros; tarfile does not miss them
        with tarfile.open(path, "r|") as archive:
            for member in archive:
                folder, name = os.path.split(member.name)
                stem, _, ending = name.partition(".")
                if not member.isfile() or not stem:            # what macOS leaves begins with a dot
                    continue
                if (folder, stem) != last:
                    if sample:
                        yield f"{path}, {'/'.join(filter(None, last))}", sample
                    last, sample = (folder, stem), {}
                if f".{ending.lower()}" in wanted:
                    sample[f".{ending.lower()}"] = archive.extractfile(member).read() if member.size < MOST else b""
        if sample:
            yield f"{path}, {'/'.join(filter(None, last))}", sample
        if not whole:
            raise tarfile.TarError("it is cut off")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        yield path, InputError(f"a damaged archive: {cli.first_line(error)}")


def webdataset_rows(sample, pictures):
    """-> the picture's content, its rows"""
    image = next((sample[ending] for ending in IMAGES if ending in sample), None)
    if image is None:
        raise InputError("a sample without a picture")
    text = next((sample[ending] for ending in (".txt", ".text", ".caption") if ending in sample), None)
    try:
        captions = [] if text is None else captions_of(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError("a caption that is not UTF-8 text") from None
    if text is None and ".json" in sample:
        record = record_of(sample[".json"])
        captions = captions_of(record.get(caption_key([record])))
    return image, captioned(pictures.keep(image), captions)


FORMATS = {"MENTOR's JSON lines": mentor, "X2I's JSON lines": x2i, "LLaVA's JSON array": llava,
           "LLaVA's JSON lines": partial(llava, entries=json_lines), "COCO's captions": coco,
           "JSON lines of pictures and captions": json_captions, "a table (CSV) of pictures and captions": csv_captions,
           "a Parquet table": parquet, "a tar archive, as webdataset has them": webdataset}     # those of cli.FORMATS


# ---------------------------------------------------------------------------------------------------------------------
# Folders

def walk(folder, without=None):
    """Yields (a folder, the names in it) for a folder and all below it, in order; not the hidden ones, not `without`.
    InputError where there is none."""
    try:
        os.listdir(folder)
    except OSError as error:
        raise InputError(f"{folder}: no folder that can be read ({error.strerror}); give one with pictures") from None
    for place, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith((".", "__MACOSX"))
                          and os.path.abspath(os.path.join(place, name)) != without)
        yield place, sorted(names)


def is_picture(name):
    """Whether a file is named as a picture, and not as a mask."""
    stem, ending = os.path.splitext(name)
    return ending.lower() in IMAGES and not stem.lower().endswith(".mask") and not name.startswith(".")


def folder_format(folder, out):
    """What lies in a folder -> Source. Tables of metadata come first, then archives, then single pictures."""
    tables, archives, pictures = [], {".tar": [], ".parquet": []}, PictureFolder(folder, store_of(out))
    for place, names in walk(folder, store_of(out)):
        tables += [os.path.join(place, name) for name in ("metadata.jsonl", "metadata.csv") if name in names][:1]
        for name in names:
            stem, ending = os.path.splitext(name)
            unpacked = os.path.isdir(os.path.join(place, stem))          # as img2dataset's tables of what lies there
            if ending in archives and not unpacked:
                archives[ending].append(os.path.join(place, name))
    if tables:
        return imagefolder(tables)
    if archives[".tar"]:
        return webdataset(*archives[".tar"])
    if archives[".parquet"]:
        return parquet(*archives[".parquet"])
    return pictures.source()


def imagefolder(paths):
    """Tables of Hugging Face's imagefolder, each in the folder with its pictures."""
    sources = [(csv_captions if path.endswith(".csv") else json_captions)(path) for path in paths]
    entries = ((where, entry if isinstance(entry, InputError) else (source, entry))
               for source in sources for where, entry in source.entries)
    return Source(f"Hugging Face's imagefolder, {len(paths):,} table(s): {sources[0].name}", entries,
                  lambda entry, pictures: entry[0].make(entry[1], pictures), files=tuple(paths))


def beside(names, stem, endings):
    """Yields STEM.ending as far as they are there, in small letters or not. names: {also in small letters: as it is}"""
    for ending in endings:
        found = names.get(stem + ending) or names.get((stem + ending).lower())
        if found:
            yield found


def caption_of(folder, stem, names):
    """What STEM.txt says, else STEM.caption, "" if neither does."""
    for name in beside(names, stem, (".txt", ".caption")):
        if text := cli.read_text(os.path.join(folder, name), "a caption, as UTF-8 text").strip():
            return text
    return ""


def pairs(subject, images):
    """Subject-driven rows: each image with a few of those after it. images: rows of one subject."""
    for i, target in enumerate(images):
        for reference in images[i + 1:i + 1 + NEIGHBOURS]:
            yield target | {"objects": subject, "image_path": reference["source_image"],
                            "swapped_text": reference["input_text"]}


class PictureFolder:
    """Pictures in a folder and all below it: dog-00.jpg, or 00.jpg in a folder dog, shows a dog, dog-00.txt is its
    caption (or .caption) and dog-00.mask.png its mask. Pictures of one subject in one folder are pairs.

    Entries are functions of Pictures: one for each picture, then one for each subject, of its usable pictures.
    """

    def __init__(self, folder, without):
        self.folder, self.without = os.path.normpath(folder), without
        self.subjects, self.pictures, self.alone = {}, 0, 0    # {(folder, subject, its number): [rows]}; how many

    def source(self):
        """What it is, by the first pictures that tell; InputError where there are none."""
        name = None
        for place, names in walk(self.folder, self.without):
            stems = [os.path.splitext(each)[0] for each in names if is_picture(each)]
            if any(stem.isdigit() and f"{stem}.json" in names for stem in stems):
                name = "img2dataset's folders"
            elif stems and re.match(r"\d{1,3}_", os.path.basename(place)):
                name = "kohya's folders"
            elif stems:
                name = name or ("a folder of pictures" if place == self.folder else "folders of pictures")
        if name is None:
            raise InputError(f"{self.folder}: no folder with pictures; put some there as dog-00.jpg, dog-01.jpg, ...")
        return Source(name, self.entries(), lambda entry, pictures: entry(pictures), paths=False, notes=self.notes)

    def entries(self):
        """Yields (where, function)."""
        for place, listed in walk(self.folder, self.without):
            names = {name.lower(): name for name in listed} | {name: name for name in listed}
            for name in filter(is_picture, listed):
                yield os.path.join(place, name), partial(self.picture, place, name, names)
        for (place, subject, _), shown in self.subjects.items():
            if len(shown) > 1:
                yield place, partial(self.paired, place, subject, shown)

    def group(self, place, name):
        """What --holdout keeps together; the same wherever the folder lies."""
        return os.path.join(os.path.relpath(place, self.folder), name)

    def picture(self, place, name, names, pictures):
        """-> its subject or own name, its rows. names: of all files beside it, also in small letters"""
        stem, path = os.path.splitext(name)[0], os.path.join(place, name)
        try:
            name.encode()
            cli.check_file(path, "a picture")
            caption = caption_of(place, stem, names)
        except UnicodeEncodeError:
            raise InputError("a name that is not UTF-8") from None
        except InputError as error:
            raise InputError(f"a file that cannot be read: {error}") from None
        of_img2dataset = stem.isdigit() and f"{stem}.json" in names          # numbered, not named
        subject = None if of_img2dataset else cli.subject_of(path)
        rows = captioned(pictures(name, place), captions_of(caption))
        mask = next(beside(names, stem, [".mask" + ending for ending in IMAGES]), None)
        if mask:
            masked = rows[0] | {"image_path": pictures(mask, place), "objects": subject or "subject"}
            rows += [masked | {"do_mask": True}, masked | {"do_replace": True}]
        self.pictures += 1
        if subject is None:
            self.alone += 1
            return self.group(place, name), rows
        number = re.fullmatch(r".*[^\W\d_](\d+)[\W_]+\d+[\W_]*", stem)     # dog2-00 shows another dog than dog-00
        self.subjects.setdefault((place, subject, number and number[1]), []).append(rows[0])
        return self.group(place, subject), rows

    def paired(self, place, subject, shown, pictures):
        """-> the subject, its pairs"""
        return self.group(place, subject), list(pairs(subject, shown))

    def notes(self):
        """Subjects, and pictures in no pair."""
        shown = [subject for _, subject, _ in islice(self.subjects, 8)] + ["..."] * (len(self.subjects) > 8)
        yield f"{self.pictures:,} pictures, {len(self.subjects):,} subject(s): {', '.join(shown)}"
        if self.alone:
            yield (f"{self.alone:,} picture(s) are in no pair: their names do not say what they show, as dog-00.jpg "
                   "would")


# ---------------------------------------------------------------------------------------------------------------------
# import and folder

def source_of(path, out):
    """What a file or folder is, for a JSONL `out`. -> Source"""
    if os.path.isdir(path):
        return folder_format(path, out)
    head, kind = cli.check_file(path, "what is to be imported"), cli.training_format(path)
    if kind is None:
        found = cli.what_begins_so(head) or "of no format known here"
        raise InputError(f"{path}: is {found}; known are folders and {', '.join(FORMATS)}")
    return FORMATS[kind](path)


def kept_apart(group, share):
    """Whether an entry belongs to the validation rows, told by its group (text or bytes) alone."""
    group = group.encode(errors="surrogatepass") if isinstance(group, str) else group
    return int.from_bytes(hashlib.blake2b(group, digest_size=8).digest(), "big") < share * 2**64


def checked(row):
    """A row -> its task and its line (bytes), which data.py has read once; InputError where it cannot."""
    try:
        line = json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("half of a letter (a lone surrogate) in the text") from None
    try:
        return data.parse_row(line).task, line + b"\n"
    except InputError as error:
        raise InputError(f"no row that can be used: {error}") from None


class Tally:
    """Counts rows by task, of training and of validation, and the entries that cannot be used by their reasons."""

    def __init__(self):
        self.rows, self.reasons, self.first = {False: Counter(), True: Counter()}, Counter(), {}

    def unusable(self, where, error):
        """error: "reason: details"; the first one of a reason is kept as its example."""
        reason, _, details = str(error).partition(": ")
        self.reasons[reason] += 1
        self.first.setdefault(reason, f"{where}: {details}" if details else where)

    def problems(self):
        """A line for each reason, the most frequent first."""
        lines = [f"{count:8,}  {reason}; first {self.first[reason]}" for reason, count in self.reasons.most_common()]
        return [line.encode(errors="backslashreplace").decode() for line in lines]       # names of files may be no text

    def tasks(self, validation):
        """How many rows of which task."""
        counts = self.rows[validation]
        return f"{counts.total():,} rows ({', '.join(f'{count:,} {task}' for task, count in sorted(counts.items()))})"


def check_import(args, val, source):
    """Raises InputError where the command would destroy something, or mix training and validation."""
    if args.image_root is not None and not source.paths:
        raise InputError(f"--image-root {args.image_root}: {args.file} holds its pictures and names no paths; leave "
                         "the flag out")
    if args.image_root is not None and not os.path.isdir(args.image_root):
        raise InputError(f"--image-root {args.image_root}: no such folder; give the one with the pictures")
    for path in filter(os.path.exists, (args.out, val)):
        if any(os.path.samefile(path, file) for file in (args.file, *source.files)):
            raise InputError(f"--out {args.out}: would replace what is to be imported; choose another name")
    if os.path.basename(args.out).startswith("val") and args.holdout:
        raise InputError(f"--out {args.out}: train.py takes names that begin with val for validation; choose another")
    if not args.holdout and os.path.exists(val):
        raise InputError(f"{val}: is there from an earlier import, and train.py would validate on rows that are now "
                         "trained on; remove it or give --holdout")
    cli.probe(args.out)


def converted(source, pictures, share, tally):
    """Yields (whether it is for validation, the line) of each row that comes out."""
    for where, entry in cli.bar(source.entries, unit="entry"):
        try:
            if isinstance(entry, InputError):
                raise entry
            group, rows = source.make(entry, pictures)
            lines = [checked(row) for row in rows]
        except InputError as error:
            tally.unusable(where, error)
            continue
        validation = kept_apart(group, share)
        for task, line in lines:
            tally.rows[validation][task] += 1
            yield validation, line


def write_rows(source, args, val, pictures, tally):
    """Writes the rows and, with --holdout, those for validation, which are held until then. -> whether there are any"""
    apart = []
    with ExitStack() as stack:
        out = stack.enter_context(cli.atomic_file(args.out))
        if source.packed:
            pictures.store = stack.enter_context(cli.atomic_folder(store_of(args.out), SHELVES))
        with open(out, "wb") as file:
            for validation, line in converted(source, pictures, args.holdout, tally):
                if validation:
                    apart.append(line)
                else:
                    file.write(line)
        if not tally.rows[False]:
            lost = "no such picture" in tally.reasons and args.image_root is None
            empty = "all are kept apart, lower --holdout" if apart else "it holds nothing"
            raise InputError(f"{args.file}: no row for training came out; {'; '.join(tally.problems()[:3]) or empty}"
                             + ("; if the pictures lie elsewhere, give --image-root" if lost else ""))
        if apart:
            with cli.atomic_file(val) as temporary, open(temporary, "wb") as file:
                file.writelines(apart)
        elif os.path.exists(val):              # of an earlier import; its rows may be for training now
            os.remove(val)
    return bool(apart)


def import_rows(args):
    """Makes a JSONL of what you or others train on, a file or a folder; which of the formats it is, it tells itself
    (prepare.py's docstring lists them). Pictures stay where they are, but for those in archives. Counts what cannot be
    used. Of data in several splits name the one to train on."""
    convert(source_of(args.file, args.out), args)


def convert(source, args):
    """Writes the JSONL of a source and reports."""
    val = os.path.join(os.path.dirname(args.out), f"val-{os.path.basename(args.out)}")
    check_import(args, val, source)
    print(f"{args.file}: taken for {source.name}")
    pictures, tally = Pictures(args.file, args.image_root, args.out), Tally()
    apart = write_rows(source, args, val, pictures, tally)
    print(f"wrote {args.out}: {tally.tasks(False)}")
    if apart:
        print(f"wrote {val}: {tally.tasks(True)}")
    if pictures.kept:
        print(f"wrote {store_of(args.out)}: {pictures.kept:,} pictures")
    for beginning in pictures.beginnings:
        print(f"pictures of {'/'.join(beginning) or '/'} are taken from {args.image_root}")
    print(*source.notes(), f"{tally.reasons.total():,} entries cannot be used", *tally.problems(), sep="\n")


def folder(args):
    """Makes a JSONL of a folder in which dog-00.jpg shows a dog, dog-00.txt (or .caption) is its caption and
    dog-00.mask.png its mask; text and mask may be absent, and images of one name are pairs. Writes --out, default
    data.jsonl in it. The same as `import`, for pictures of your own."""
    args.file, args.image_root, args.holdout = args.pictures, None, 0.0
    args.out = args.out or os.path.join(args.pictures, "data.jsonl")
    convert(PictureFolder(args.pictures, store_of(args.out)).source(), args)


# ---------------------------------------------------------------------------------------------------------------------
# look and encode

class EveryEntry(Dataset):
    """Each entry of a TaskData once, in order; a damaged one gives its problems alone."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.ends = np.cumsum([len(dataset.entries[task]) for task in dataset.tasks])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        number, problems = np.searchsorted(self.ends, i, side="right"), []
        task = self.dataset.tasks[number]
        row, swapped = self.dataset.entries[task][i - self.ends[number]]                  # counted from the end
        try:
            row, rng = self.dataset.rows[row], np.random.default_rng(row)
        except InputError as error:                            # the file has changed
            return {"problems": [str(error)]}
        try:
            return self.dataset.sample(task, row, swapped, rng, problems)
        except InputError as error:
            return {"problems": problems + [f"{row.name}: {error}"]}


def usable_samples(dataset, workers):
    """Tries every entry under a progress bar and yields the samples; at the end prints counts and problems."""
    counts = dict.fromkeys(dataset.tasks, 0)
    problems, doubts = dict.fromkeys(dataset.problems), {}     # dicts, so that each is named once and in order
    for sample in cli.bar(DataLoader(EveryEntry(dataset), batch_size=None, num_workers=workers)):
        problems |= dict.fromkeys(sample["problems"])
        if "task" in sample:
            doubts |= dict.fromkeys(sample["doubts"])
            counts[sample["task"]] += 1
            yield sample
    for task, count in counts.items():
        print(f"{task:12}{count:8,} of {len(dataset.entries[task]):,} samples usable")
    print(f"{len(problems):,} problem(s)", *problems, sep="\n  ")
    if doubts:
        print(f"{len(doubts):,} suspicious", *doubts, sep="\n  ")


def look(args):
    """Tries every row, shows on a contact sheet what the network will see, counts tasks and names problems."""
    cli.probe(args.out)
    if args.tokenizer:
        processor = data.Processor(weights.load_tokenizer(args.tokenizer), max_tokens=args.max_tokens)
    else:                                                      # no prompt is too long for this one
        processor = data.Processor(weights.byte_tokenizer(), image_tokens=1, max_tokens=1 << 16)
    processor.fit = args.fit
    dataset = data.TaskData(args.data, processor, 256, backgrounds=args.backgrounds, unusable=1)
    shown = {task: [] for task in dataset.tasks}
    for sample in usable_samples(dataset, args.workers):
        if len(shown[sample["task"]]) < args.n:
            shown[sample["task"]].append(sample)
    places = max((len(sample["refs"]) + 1 for samples in shown.values() for sample in samples), default=1)
    tiles = []
    for samples in shown.values():                             # a line of the sheet for each task
        line = [data.tile(sample, places) for sample in samples]
        if line:
            tiles += line + [Image.new("RGB", line[0].size, "white")] * (args.n - len(line))
    if not tiles:
        raise InputError("there is no usable sample to show; fix the problems above")
    with cli.atomic_file(args.out) as temporary:
        cli.contact_sheet(tiles, columns=args.n).save(temporary, "PNG")
    print(f"wrote {args.out}")


@torch.inference_mode()
def encode(args):
    """Turns every target into VQ tokens once: codes.safetensors with keys (N,) int64 and tokens (N, T) int32."""
    path = os.path.join(args.out, "codes.safetensors")
    cli.probe(path)
    mentor = weights.load(args.weights)
    device = cli.pick_device(None, ("cuda", "cpu"))
    vqgan, size = mentor.vqgan.to(device), mentor.check_size(args.size or mentor.config.image_size)
    # the codes are of the targets alone, so prompts and references are made as small as they can be
    processor = data.Processor(weights.byte_tokenizer(), image_tokens=1, max_tokens=1 << 16, image_size=32)
    processor.fit = args.fit
    dataset = data.TaskData(args.data, processor, size, backgrounds=args.backgrounds, unusable=1)
    samples, keys, tokens = usable_samples(dataset, args.workers), [], []
    while group := list(islice(samples, args.batch)):
        keys += [sample["key"] for sample in group]
        pixels = torch.stack([sample["target"] for sample in group])                      # (B, 3, size, size)
        tokens.append(vqgan.encode(pixels.to(device)).cpu().int())                        # (B, T)
    if not tokens:
        raise InputError("there is no usable sample to encode; fix the problems above")
    keys, first = np.unique(keys, return_index=True)           # ascending; of equal lines one is enough
    made = {"image_size": str(size), "vqgan": weights.fingerprint(vqgan), "fit": args.fit}
    with cli.atomic_file(path) as temporary:
        weights.write_tensors({"keys": torch.from_numpy(keys), "tokens": torch.cat(tokens)[first]}, temporary, made)
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def add_data_flags(command):
    """What `look` and `encode` share."""
    command.add_argument("data", nargs="+", metavar="DATA.jsonl")
    command.add_argument("--backgrounds", nargs="+", default=[], metavar="JSONL", help="pictures for recovery")
    command.add_argument("--workers", type=cli.natural, default=2, help="processes that read pictures (default 2)")
    cli.add_fit_flag(command)


def main(argv=None):
    """Runs one command."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("folder", help=folder.__doc__, description=folder.__doc__)
    command.set_defaults(run=folder)
    command.add_argument("pictures", metavar="PICTURES", help="a folder")
    command.add_argument("--out", metavar="DATA.jsonl", help="default: data.jsonl in the folder")

    command = commands.add_parser("import", help=import_rows.__doc__, description=import_rows.__doc__)
    command.set_defaults(run=import_rows)
    command.add_argument("file", metavar="FILE", help="or a folder")
    command.add_argument("--out", metavar="DATA.jsonl", required=True, help="replaced if there")
    command.add_argument("--image-root", metavar="FOLDER", help="where the pictures lie that FILE names (default: "
                         "where it says); paths of another machine are matched by their ends")
    command.add_argument("--holdout", type=cli.checked(float, lambda share: 0 <= share < 1, "from 0 to below 1"),
                         default=0.0, metavar="SHARE", help="rows kept apart for validation, those of a picture or a "
                         "subject together, in val-DATA.jsonl beside --out, the same ones each time (default 0)")

    command = commands.add_parser("look", help=look.__doc__, description=look.__doc__)
    command.set_defaults(run=look)
    add_data_flags(command)
    command.add_argument("--n", type=cli.positive_int, default=3, help="samples shown of each task (default 3)")
    command.add_argument("--tokenizer", metavar="tokenizer.json", help="FLAN-T5's, to find prompts too long for it")
    command.add_argument("--max-tokens", type=cli.positive_int, default=512, help="the prefix length that goes with "
                         "--tokenizer (default 512; several reference images need 1280)")
    command.add_argument("--out", default="out/look.png", help="the sheet, a PNG (default out/look.png)")

    command = commands.add_parser("encode", help=encode.__doc__, description=encode.__doc__)
    command.set_defaults(run=encode)
    add_data_flags(command)
    command.add_argument("--weights", required=True, help="whose VQGAN encodes: as for sample.py")
    command.add_argument("--size", type=cli.positive_int, help="pixels a side (default: the weights' own)")
    command.add_argument("--batch", type=cli.positive_int, default=8, help="images encoded at once (default 8)")
    command.add_argument("--out", required=True, metavar="FOLDER", help="for the codes")

    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
