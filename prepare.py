"""Commands on training data: make it from your own images, look at it, encode its targets once for many runs.

    python prepare.py folder my_pictures                                       # writes my_pictures/data.jsonl
    python prepare.py import x2i.jsonl --out data.jsonl --holdout 0.05         # others' files; and val-data.jsonl
    python prepare.py look my_pictures/data.jsonl                              # writes out/look.png, counts, problems
    python prepare.py encode my_pictures/data.jsonl --weights W --out codes    # saves train.py the VQGAN's encoder

`data.py` describes the JSON lines and the tasks. `train.py --codes codes` reads the codes, by weights.Codes.
"""
import argparse
import hashlib
import json
import os
import re
from collections import Counter
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import cli
import data
import weights
from cli import InputError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
NEIGHBOURS = 4      # an image is paired with so many of the same subject: all pairs would outnumber the other tasks
# words of file and folder names that do not say what a picture shows
UNTELLING = set("""
    img imgs image images pic pics picture pictures photo photos my new the of at and copy edited crop final frame scan
    screenshot untitled unnamed download downloads file files out data dataset datasets train val valid test dcim mvimg
    pxl vid dsc dscn dscf dji gopr gp sam imgp mg p cam camera whatsapp signal fb telegram jpg jpeg png tmp coco voc ade
    ilsvrc imagenet n sa cc laion flickr lsun ffhq celeba subset part shard""".split())


# ---------------------------------------------------------------------------------------------------------------------
# folder

def beside(names, stem, endings):
    """Yields STEM.ending as far as they are there, in small letters or not. names: {also in small letters: as it is}"""
    for ending in endings:
        found = names.get(stem + ending) or names.get((stem + ending).lower())
        if found:
            yield found


def caption_of(folder, stem, names):
    """What STEM.txt says, else STEM.caption, "" if neither does."""
    for name in beside(names, stem, (".txt", ".caption")):
        path = os.path.join(folder, name)
        cli.check_file(path, "a caption", most=1 << 20)
        try:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read().strip()
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not readable as UTF-8 text ({error}); save it again") from None
        if text:
            return text
    return ""


def subject_of(folder, stem, names):
    """What a picture's name says it shows, or its folder's where the name is a short number: dog-00, clay_vase/00. None
    where that tells nothing: cameras' and data sets' names, long numbers, and those of img2dataset, with a .json."""
    text = stem
    if re.fullmatch(r"\d{1,5}", stem) and f"{stem}.json" not in names:
        text = os.path.basename(os.path.normpath(folder))      # as it was given: "." is no name
    words = re.sub(r"[\W\d_]+", " ", text).lower().split()
    if UNTELLING.issuperset(words) or re.fullmatch("[0-9a-f-]{16,}", text.lower()):
        return None
    return " ".join(words)


def pairs(subject, images):
    """Subject-driven rows: each image with a few of those after it. images: rows of one subject."""
    for i, target in enumerate(images):
        for reference in images[i + 1:i + 1 + NEIGHBOURS]:
            yield target | {"objects": subject, "image_path": reference["source_image"],
                            "swapped_text": reference["input_text"]}


def folder(args):
    """Makes a JSONL of a folder in which dog-00.jpg shows a dog, dog-00.txt (or .caption) is its caption and
    dog-00.mask.png its mask; text and mask may be absent, and images of one name are pairs. Writes --out, default
    data.jsonl in it."""
    try:
        listed = sorted(os.listdir(args.pictures))
    except OSError as error:
        raise InputError(f"{args.pictures}: no folder that can be read ({error.strerror}); give one with pictures"
                         ) from None
    names = {name.lower(): name for name in listed} | {name: name for name in listed}
    out = args.out or os.path.join(args.pictures, "data.jsonl")
    cli.probe(out)
    relative = os.path.relpath(args.pictures, os.path.dirname(os.path.abspath(out)))   # paths start at the JSONL
    rows, subjects, pictures = [], {}, 0
    for name in listed:
        stem, ending = os.path.splitext(name)
        if ending.lower() not in IMAGES or stem.lower().endswith(".mask") or name.startswith("."):
            continue
        row = {"source_image": os.path.normpath(os.path.join(relative, name))}
        try:
            row["source_image"].encode()
            cli.check_file(os.path.join(args.pictures, name), "a picture")
        except ValueError as error:                            # a name that is no UTF-8, a folder, a pipe, a dead link
            print(f"skipped {ascii(name)}: {error}")
            continue
        row["input_text"], subject = caption_of(args.pictures, stem, names), subject_of(args.pictures, stem, names)
        rows.append(row)
        if row["input_text"]:
            rows.append(row | {"generation_only": True})
        mask = next(beside(names, stem, [".mask" + ending for ending in IMAGES]), None)
        if mask:
            mask = os.path.normpath(os.path.join(relative, mask))
            masked = row | {"image_path": mask, "objects": subject or "subject"}
            rows += [masked | {"do_mask": True}, masked | {"do_replace": True}]
        subjects.setdefault(subject, []).append(row)
        pictures += 1
    if not rows:
        raise InputError(f"{args.pictures}: no folder with pictures; put some there as dog-00.jpg, dog-01.jpg, ...")
    alone = len(subjects.pop(None, []))
    for subject, shown in subjects.items():
        rows += pairs(subject, shown)
    with cli.atomic_file(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    shown = ", ".join(list(subjects)[:8]) + (", ..." if len(subjects) > 8 else "")
    print(f"wrote {out}: {len(rows):,} rows of {pictures:,} pictures, {len(subjects):,} subject(s): {shown}")
    if alone:
        print(f"{alone:,} picture(s) are in no pair: their names do not say what they show, as dog-00.jpg would")


# ---------------------------------------------------------------------------------------------------------------------
# import: a function for each format, which looks at a file and makes rows of it

class Pictures:
    """Where the pictures lie that a file names.

    Its paths start at its own folder, or at `root` where that is given. There a path of another machine is taken for
    what its last parts name, and all that begin as it does for what lies beside that, lest a missing picture be taken
    for another one of the same name. Rows have paths from the folder of `out` on; absolute ones stay as they are.
    """

    def __init__(self, path, root, out):
        self.folder, self.root = os.path.dirname(path), root
        self.out = os.path.dirname(os.path.abspath(out))
        self.beginnings = []                   # the first parts of paths that stand for `root`

    def __call__(self, name):
        """A path of the file -> the same of a row; InputError where nothing lies there."""
        if self.root is None:
            place = os.path.join(self.folder, name)
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


X2I_PICTURE = re.compile(r"(?:<img>\s*)?<\|image_(\d{1,9})\|>(?:\s*</img>)?")
IN_CONTEXT = re.compile(r"(?<![a-z])icl(?![a-z])|in[-_ ]?context", re.IGNORECASE)


def x2i(path):
    """X2I's JSON lines, of several subjects or in context (OmniGen, arXiv 2409.11340; huggingface.co/yzwang)."""
    if any({"instruction", "output_image"} <= record.keys() for record in first_objects(path)):
        return json_lines(path), x2i_row


def x2i_row(line, pictures):
    """{"task_type", "instruction", "input_images", "output_image"}, <img><|image_1|></img> in the instruction for each
    picture -> task, row with the pictures in the order in which they stand in the text. In context they are the first
    example's input and output, the second's, ..., and the input whose output is asked for."""
    record = cli.parse_json(line, "a damaged line")
    if not isinstance(record, dict):
        raise InputError("no object of JSON")
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
    return ("icl", row | {"in_context": True}) if in_context else ("multi", row)


FORMATS = {      # name: function that returns None unless a file is of that kind, else its entries and what turns one
    "X2I's JSON lines": x2i,                   # of them (bytes) into (task, row), or InputError "reason: details"
}


def format_of(path):
    """Which of FORMATS a file has. -> name, entries, function that makes a row"""
    head = cli.check_file(path, "what is to be imported")
    for name, look_at in FORMATS.items():
        if found := look_at(path):
            return name, *found
    found = cli.what_begins_so(head)
    raise InputError(f"{path}: is {found or 'of no format known here'}; known are {', '.join(FORMATS)}")


def kept_apart(entry, share):
    """Whether an entry belongs to the validation rows, told by its content alone."""
    return int.from_bytes(hashlib.blake2b(entry, digest_size=8).digest(), "big") < share * 2**64


def encoded(row):
    """A row -> its line (bytes), which data.py has read once; InputError where it cannot."""
    try:
        line = json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("half of a letter (a lone surrogate) in the text") from None
    data.parse_row(line)
    return line + b"\n"


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
        return [f"{count:8,}  {reason}; first {self.first[reason]}" for reason, count in self.reasons.most_common()]

    def tasks(self, validation):
        """How many rows of which task."""
        counts = self.rows[validation]
        return f"{counts.total():,} rows ({', '.join(f'{count:,} {task}' for task, count in sorted(counts.items()))})"


def check_import(args, val):
    """Raises InputError where the command would destroy something, or mix training and validation."""
    if args.image_root is not None and not os.path.isdir(args.image_root):
        raise InputError(f"--image-root {args.image_root}: no such folder; give the one with the pictures")
    for path in (args.out, val):
        if os.path.exists(path) and os.path.samefile(path, args.file):
            raise InputError(f"--out {args.out}: would replace the file that is to be imported; choose another name")
    if os.path.basename(args.out).startswith("val") and args.holdout:
        raise InputError(f"--out {args.out}: train.py takes names that begin with val for validation; choose another")
    if not args.holdout and os.path.exists(val):
        raise InputError(f"{val}: is there from an earlier import, and train.py would validate on rows that are now "
                         "trained on; remove it or give --holdout")
    cli.probe(args.out)


def converted(entries, make, pictures, share, tally):
    """Yields (whether it is for validation, the line) of each row that comes out."""
    for where, entry in cli.bar(entries, unit="entry"):
        try:
            task, row = make(entry, pictures)
            line = encoded(row)
        except InputError as error:
            tally.unusable(where, error)
            continue
        validation = kept_apart(entry, share)
        tally.rows[validation][task] += 1
        yield validation, line


def import_rows(args):
    """Makes a JSONL of what others train on, by now X2I's files for several subjects and for learning in context; which
    it is, the file itself tells. Pictures stay where they are. Counts what cannot be used."""
    val = os.path.join(os.path.dirname(args.out), f"val-{os.path.basename(args.out)}")
    kind, entries, make = format_of(args.file)
    check_import(args, val)
    print(f"{args.file}: taken for {kind}")
    pictures, tally, apart = Pictures(args.file, args.image_root, args.out), Tally(), []
    with cli.atomic_file(args.out) as temporary:
        with open(temporary, "wb") as file:
            for validation, line in converted(entries, make, pictures, args.holdout, tally):
                if validation:
                    apart.append(line)
                else:
                    file.write(line)
        if not tally.rows[False]:
            raise InputError(f"{args.file}: no row for training came out; " + ("; ".join(tally.problems()[:3]) or
                             "all are kept apart, lower --holdout"))
        if apart:
            with cli.atomic_file(val) as beside, open(beside, "wb") as file:
                file.writelines(apart)
        elif os.path.exists(val):              # of an earlier import; its rows may be for training now
            os.remove(val)
    print(f"wrote {args.out}: {tally.tasks(False)}")
    if apart:
        print(f"wrote {val}: {tally.tasks(True)}")
    for beginning in pictures.beginnings:
        print(f"pictures of {'/'.join(beginning) or '/'} are taken from {args.image_root}")
    print(f"{tally.reasons.total():,} entries cannot be used", *tally.problems(), sep="\n")


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
    dataset = data.TaskData(args.data, processor, size, backgrounds=args.backgrounds, unusable=1)
    samples, keys, tokens = usable_samples(dataset, args.workers), [], []
    while group := list(islice(samples, args.batch)):
        keys += [sample["key"] for sample in group]
        pixels = torch.stack([sample["target"] for sample in group])                      # (B, 3, size, size)
        tokens.append(vqgan.encode(pixels.to(device)).cpu().int())                        # (B, T)
    if not tokens:
        raise InputError("there is no usable sample to encode; fix the problems above")
    keys, first = np.unique(keys, return_index=True)           # ascending; of equal lines one is enough
    with cli.atomic_file(path) as temporary:
        weights.write_tensors({"keys": torch.from_numpy(keys), "tokens": torch.cat(tokens)[first]}, temporary,
                              metadata={"image_size": str(size), "vqgan": weights.fingerprint(vqgan)})
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def add_data_flags(command):
    """What `look` and `encode` share."""
    command.add_argument("data", nargs="+", metavar="DATA.jsonl")
    command.add_argument("--backgrounds", nargs="+", default=[], metavar="JSONL", help="pictures for recovery")
    command.add_argument("--workers", type=cli.natural, default=2, help="processes that read pictures (default 2)")


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
    command.add_argument("file", metavar="FILE")
    command.add_argument("--out", metavar="DATA.jsonl", required=True, help="replaced if there")
    command.add_argument("--image-root", metavar="FOLDER", help="where the pictures lie (default: where FILE says); "
                         "paths of another machine are matched by their ends")
    command.add_argument("--holdout", type=cli.checked(float, lambda share: 0 <= share < 1, "from 0 to below 1"),
                         default=0.0, metavar="SHARE", help="rows kept apart for validation, in val-DATA.jsonl beside "
                         "--out, the same ones each time (default 0)")

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
