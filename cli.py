"""What all command lines share: errors in one sentence, number types for flags, files that appear whole or not at all,
processes and signals, the log of a run, opening images and making sheets of them.

Nothing here is about MENTOR; a reader of the network can skip it. Next: `data.py`, where the images come in.
"""
import argparse
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import textwrap
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps


class InputError(ValueError):
    """What the user gave cannot be used. The message is one sentence: what, where, and how to fix it."""


# ---------------------------------------------------------------------------------------------------------------------
# Running a script

def first_to_report():
    """Whether this process is to report an error that several may have met: under torchrun, the first that asks."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return os.environ.get("RANK", "0") == "0"
    # the file lies in a folder of this process, which lies in one that torchrun made for all of them
    folder = os.path.dirname(os.path.dirname(os.environ["TORCHELASTIC_ERROR_FILE"]))
    try:
        os.close(os.open(os.path.join(folder, "reported"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


@contextmanager
def enough_memory(advice):
    """Turns the machine's or the GPU's running out of memory into an InputError; advice: what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:               # PyTorch's own is a RuntimeError
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            reason = (str(error).strip().splitlines() or ["the machine's"])[0][:160]
            raise InputError(f"out of memory ({reason}); {advice}") from None
        raise


def run(main):
    """Runs a script's main; bad input becomes one line on stderr and exit code 2, an interrupt exit code 130."""
    try:
        with enough_memory("close other programs, or ask for less at once"):
            main()
    except InputError as error:
        if first_to_report():
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose usage errors are reported once under torchrun."""

    def error(self, message):
        """One line, then exit code 2."""
        raise InputError(f"{message}; see --help")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers on the command line, as `type=` of a flag

def checked(convert, condition, requirement):
    """A type for argparse: what `convert` makes of the text, if it meets the condition."""
    def parse(text):
        with suppress(ValueError):
            value = convert(text)
            if condition(value):
                return value
        raise argparse.ArgumentTypeError(f"must be {requirement}, not {text}")
    return parse


positive_int = checked(int, lambda value: 0 < value < 2**53, "a whole number above 0")
natural = checked(int, lambda value: 0 <= value < 2**53, "a whole number, 0 or above")
positive_float = checked(float, lambda value: 0 < value < math.inf, "a number above 0")
nonnegative_float = checked(float, lambda value: 0 <= value < math.inf, "a number, 0 or above")


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders that appear whole or not at all

def temporary_name(path):
    """A name beside `path` that nobody can guess, with the same extension."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(folder, f".{secrets.token_hex(8)}-{name}")


def flush(path):
    """Waits until the file's content is on the disk: a name must not outlive a crash that its content did not."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def create_beside(path):
    """Makes an empty file beside `path`, and the folders on the way. -> its name; InputError where that fails."""
    temporary = temporary_name(path)
    if os.path.isdir(path) or not os.path.basename(path):
        raise InputError(f"{path}: is a folder; choose another name for the file")
    try:
        os.makedirs(os.path.dirname(temporary), exist_ok=True)
        open(temporary, "xb").close()
    except FileExistsError:
        raise InputError(f"{path}: cannot be written, what should be its folder is a file; choose another place"
                         ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
    return temporary


def probe(path):
    """Raises InputError unless a file of that name can be written; to be called before any work is done."""
    os.remove(create_beside(path))


@contextmanager
def atomic_file(path):
    """Yields a temporary name to write to; it takes the place of `path` when the block ends, and goes if it fails."""
    temporary = create_beside(path)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        with suppress(OSError):
            os.remove(temporary)


def check_folder(path, ours=()):
    """Raises InputError unless a folder of that name can be made, or replaced: it holds names in `ours` only."""
    try:
        foreign = sorted(set(os.listdir(path)) - set(ours))
    except FileNotFoundError:
        return probe(os.path.abspath(path))
    except OSError as error:
        raise InputError(f"{path}: cannot become a folder ({error.strerror}); choose another place") from None
    if foreign:
        raise InputError(f"{path}: holds {foreign[0]}, which is no part of what would take its place; choose another "
                         f"folder")


@contextmanager
def atomic_folder(path, ours=()):
    """Like atomic_file for a folder; one that is there already is replaced if `check_folder` lets it."""
    check_folder(path, ours)
    path = os.path.realpath(path)              # a link stays a link to what takes its folder's place
    temporary, old = temporary_name(path), temporary_name(path)
    try:
        os.makedirs(temporary)
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                flush(os.path.join(folder, name))
        if os.path.exists(path):
            os.rename(path, old)
        os.rename(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        if os.path.exists(old) and not os.path.exists(path):
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path, content):
    """Writes a JSON file; it appears whole or not at all."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


# ---------------------------------------------------------------------------------------------------------------------
# Problems that are counted, processes, signals

class Problems:
    """Counts what cannot be used, names each problem once through `log`, and stops the run when it is too much.

    What tries a sample counts it in `seen`.
    """

    def __init__(self, log=print, share=0.05, least=20):
        self.log, self.share, self.least = log, share, least
        self.named, self.failed, self.seen = [], 0, 0

    def add(self, problem):
        """InputError once the problems exceed `share` of `seen`, the samples tried, if these are `least` or more."""
        self.failed += 1
        if problem not in self.named:
            self.named.append(problem)
            self.log(f"skipped {problem}")
        if self.seen >= self.least and self.failed > self.share * self.seen:
            raise InputError(f"{self.failed} problems in {self.seen} samples, more than {self.share:.0%}; fix the "
                             "data:\n" + "\n".join(self.named[:20]))


def pick_device(name=None, choices=("cuda", "mps", "cpu")):
    """The device of that name, by default the first of the choices that this machine has. -> its name; InputError"""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return next(choice for choice in choices if available[choice])
    try:
        torch.empty(1, device=name).item()     # which `meta` cannot
    except Exception as error:                 # each backend raises its own
        raise InputError(f"--device {name} does not work here ({str(error).splitlines()[0]}); try cpu") from None
    if name.startswith("cuda"):
        torch.backends.cudnn.allow_tf32 = False                # one code in a thousand of a VQGAN would be another
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)            # graphs are captured on the current device, not on that of the tensors
    return name


TIMEOUT = timedelta(hours=2)   # others wait while rank 0 writes 25 GB or asks a judge; NCCL's own is ten minutes


@dataclass
class Ranks:
    """Where this process stands among all that torchrun started; a single process is rank 0 of 1."""
    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device=None):
        """Joins the others, if there are any. device: its name, default cuda, else cpu."""
        if "RANK" in os.environ and device in (None, "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"        # at once, or all would take room on the first card
        name = pick_device(device, ("cuda", "cpu"))
        if "RANK" not in os.environ:
            return cls(0, 1, torch.device(name))
        if not dist.is_initialized():
            options = {"backend": "gloo", "timeout": TIMEOUT}
            if name.startswith("cuda"):
                options |= {"backend": "nccl", "device_id": torch.device(name)}
            dist.init_process_group(**options)
        return cls(dist.get_rank(), dist.get_world_size(), torch.device(name))

    def leave(self):
        """Ends what `join` began."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, values):
        """Sums a list of numbers over all ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, thing):
        """Every rank's small Python object, in order of ranks."""
        things = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(things, thing)
        return things

    def barrier(self):
        """Waits until all ranks are here."""
        if self.world > 1:
            dist.barrier()


def card_memory(device):
    """GiB that a GPU has in all; None where the device is none."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None


class Stop:
    """Remembers SIGTERM and Ctrl-C until the step is done; a second Ctrl-C ends at once."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        """The signals' handler."""
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def used_memory(device):
    """GiB: on a GPU the most it held, else the most this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource                            # here, because Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ---------------------------------------------------------------------------------------------------------------------
# A training run's folder: checkpoints step-00000500/, and the log, JSON lines with "step", "loss", at times "val"

STEP = re.compile(r"step-(\d{8})$")
RUN_FILES = re.compile(r"(config\.json|tokenizer\.json|model\.safetensors|log\.jsonl|loss\.png|samples-\d{8}\.png)$")


def checkpoints(out):
    """All complete checkpoints of a run, newest first."""
    if not os.path.isdir(out):
        return []
    return [os.path.join(out, name) for name in sorted(os.listdir(out), reverse=True) if STEP.match(name)]


def claim(out, ranks, resume, replace_old=False):
    """Makes sure that a new run finds no other in `out`; with replace_old, a run that is there is removed."""
    used = ranks.sum([bool(checkpoints(out))])[0] > 0 and not resume
    if used and not replace_old:
        raise InputError(f"{out}: holds another run; go on with it by --resume, or choose another --out")
    if ranks.rank == 0:
        for name in sorted(os.listdir(out)) if used else ():
            if STEP.match(name):
                shutil.rmtree(os.path.join(out, name))
            elif RUN_FILES.match(name):
                os.remove(os.path.join(out, name))
        probe(os.path.join(out, "log.jsonl"))
    ranks.barrier()


def trim_log(path, steps):
    """Removes what an interrupted run logged behind its last checkpoint, so that no step stands there twice."""
    if not os.path.exists(path):
        return
    with open(path) as file:
        kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= steps]
    with atomic_file(path) as temporary, open(temporary, "w") as file:
        file.writelines(kept)


def plot_log(path, out):
    """Draws the losses against the steps: training grey, validation in colours."""
    curves = {"train": []}
    with open(path) as file:
        for record in map(json.loads, file):
            curves["train"].append((record["step"], record["loss"]))
            for task, loss in record.get("val", {}).items():
                curves.setdefault(f"val {task}", []).append((record["step"], loss))
    points = np.concatenate(list(curves.values()))                                        # (n, 2): step, loss
    low, high = points.min(axis=0), points.max(axis=0)
    size, margin = np.array([800, 450]), 50
    image = Image.new("RGB", tuple(size.tolist()), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((margin, margin, *(size - margin).tolist()), outline="black")
    pen.text((4, margin), f"{high[1]:.3g}", fill="black")
    pen.text((4, size[1] - margin - 10), f"{low[1]:.3g}", fill="black")
    pen.text((size[0] - 140, size[1] - margin + 4), f"steps {low[0]:.0f} to {high[0]:.0f}", fill="black")
    colours = ["grey", "red", "blue", "green", "orange", "purple", "brown", "teal", "magenta"]
    for i, (name, curve) in enumerate(curves.items()):
        share = (np.array(curve) - low) / np.maximum(high - low, 1e-9)                    # (n, 2) in 0..1
        share[:, 1] = 1 - share[:, 1]                                                     # an image's rows go down
        corners = (margin + share * (size - 2 * margin)).tolist()
        colour = colours[i % len(colours)]
        for x, y in corners[:1]:               # so that a single point can be seen too
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        pen.line([tuple(corner) for corner in corners], fill=colour, width=2)
        pen.text((margin + 10 + 90 * i, margin - 16), name, fill=colour)
    with atomic_file(out) as temporary:
        image.save(temporary)


# ---------------------------------------------------------------------------------------------------------------------
# Images: opening them, sheets to look at

MAX_PIXELS = 180_000_000   # a larger image is taken for a decompression bomb
MIN_SIDE, MAX_ASPECT = 8, 20
Image.MAX_IMAGE_PIXELS = None      # Pillow's own limit; open_image has one whose error names the file


def to_rgb(image):
    """Any Pillow image -> RGB: 16-bit greys reduced to 8, transparency laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image).astype(np.float32)
        if grey.max() > 255:
            grey = grey * (255 / 65535)
        image = Image.fromarray(np.ceil(grey.clip(0, 255)).astype(np.uint8))    # up: what is above 0 stays above 0
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(path):
    """Opens an image of any common kind as RGB, turned as its EXIF tag says, of an animation the first frame.

    Raises InputError that names the file where there is no image, or a damaged, an oversized or a tiny one.
    """
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
        return to_rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Exception as error:         # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ...
        if getattr(error, "errno", None):
            raise InputError(f"{path}: {error.strerror.lower()}; give an image file (no folder) that can be read"
                             ) from None
        raise InputError(f"{path}: not a picture, or a damaged one ({error}); open and save it anew") from None


def contact_sheet(images, columns=None, gap=4):
    """A white sheet with PIL images of one size in rows of `columns` (default: a near-square)."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet


def captioned(images, text, places, side=144, lines=4):
    """PIL images side by side, the last one in a red frame, above a text. places: room for so many. -> PIL RGB"""
    canvas = Image.new("RGB", (places * (side + 4) + 12, side + 14 * lines), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        canvas.paste(image.resize((side, side)), (i * (side + 4), 0))
    left = (len(images) - 1) * (side + 4)
    draw.rectangle((left, 0, left + side - 1, side - 1), outline="red", width=3)
    text = text.encode("ascii", "replace").decode()            # what the font has
    draw.text((2, side), "\n".join(textwrap.wrap(text, canvas.width // 6)[:lines]), "black")
    return canvas


def subject_of(path):
    """What an image's file name says it shows, or else its folder's: boot-03.jpg, boot/03.jpg -> "boot"."""
    folder, name = os.path.split(os.path.abspath(path))
    for text in (os.path.splitext(name)[0], os.path.basename(folder)):
        words = re.sub(r"[\W\d_]+", " ", text).strip().lower()
        if words:
            return words
    return "subject"
