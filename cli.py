"""What all command lines share: errors in one sentence, number types for flags, files that appear whole or not at all,
processes and signals, the log of a run, opening images and making sheets of them.

Nothing here is about MENTOR; a reader of the network can skip it. Next: `data.py`, where the images come in.
"""
import argparse
import glob
import hashlib
import json
import math
import os
import platform
import re
import reprlib
import secrets
import shlex
import shutil
import signal
import stat
import sys
import textwrap
import typing
import unicodedata
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from types import UnionType

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from tqdm import tqdm


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


def first_line(error, most=160):
    """How an exception begins, or what kind it is where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED|calculation overflowed",
                           re.IGNORECASE)


@contextmanager
def enough_memory(advice):
    """Turns the machine's or the GPU's running out of memory into an InputError; advice: what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:               # PyTorch's own is a RuntimeError
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            raise InputError(f"out of memory ({first_line(error)}); {advice}") from None
        raise


class Output:
    """A standard stream that outlives its reader (`| head -1`): what nobody can read any more is dropped, and the work
    goes on. Letters that the terminal's encoding lacks are escaped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")          # Python has none where the shell closed it (>&-)
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        """As any stream's."""
        with self.reader_may_leave():
            self.stream.write(text)
        return len(text)

    def flush(self):
        """As any stream's."""
        with self.reader_may_leave():
            self.stream.flush()

    @contextmanager
    def reader_may_leave(self):
        """Points the stream to nowhere once it cannot be written."""
        try:
            yield
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def one_line(message, most=500):
    """A message on one line of at most so many letters; of a longer one the middle goes."""
    line = " ".join(str(message).split())
    return line if len(line) <= most else f"{line[:most - 205]} ... {line[-200:]}"


def bar(iterable=None, **options):
    """A tqdm progress bar; where nobody watches, in a file or a pipe, it writes a line every ten seconds."""
    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 10, **options)


def run(main):
    """Runs a script's main; bad input becomes one line on stderr and exit code 2, an interrupt exit code 130."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    code = 0
    try:
        with enough_memory("close other programs, or ask for less at once"):
            main()
    except InputError as error:
        for shown in list(tqdm._instances):    # a bar still there would share the line
            shown.close()
        if first_to_report():
            print(f"{os.path.basename(sys.argv[0])}: error: {one_line(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code
    if Ranks.group is not None:                # while Python shuts down, a thread of gloo's that lets go of a tensor
        sys.stdout.flush()                     # would abort the process (pytorch pull request 179291)
        sys.stderr.flush()
        os._exit(code or 0)
    if code:
        sys.exit(code)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose usage errors are reported once under torchrun."""

    def error(self, message):
        """One line, then exit code 2."""
        raise InputError(f"{message}; see --help")


# ---------------------------------------------------------------------------------------------------------------------
# Flags: numbers, as their `type=`, and those of sampling

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


def add_fit_flag(group):
    """What becomes of pictures that are no squares."""
    group.add_argument("--fit", choices=["crop", "pad"], default="crop", help="of pictures that are not square the "
                       "centre, as in the published training (default), or all between black bars")


def add_sampling_flags(group):
    """The flags of model.Sampling; `given_sampling` reads them."""
    group.add_argument("--cfg", type=float, dest="cfg_scale", help="classifier-free guidance; 1 = none")
    group.add_argument("--temperature", type=float, help="0 = always the likeliest token")
    group.add_argument("--top-k", type=int, help="sample among the k likeliest tokens")
    group.add_argument("--top-p", type=float, help="sample among the likeliest tokens that together reach p")


def given_sampling(args):
    """-> {field of model.Sampling: value} of the flags that were given; all else comes with the weights."""
    given = {name: getattr(args, name) for name in ("cfg_scale", "temperature", "top_k", "top_p")}
    return {name: value for name, value in given.items() if value is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders that appear whole or not at all

NODE = hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()                # this machine


def temporary_name(path):
    """A name beside `path` that nobody can guess, with the same extension; it tells whose it is."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(folder, f".{secrets.token_hex(8)}-{NODE}-{os.getpid()}-{name}")


def alive(process):
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:                            # somebody else's
        pass
    return True


def clean(path):
    """Removes what killed processes of this machine left beside `path`; an older folder that one of them had moved
    out of the way returns. It reads the whole folder, so it is for the start of a command, not for each file."""
    folder = os.path.dirname(os.path.abspath(path))
    pattern = re.compile(rf"\.[0-9a-f]{{16}}-{NODE}-(\d+)-(.+?)(~?)$")
    for left in glob.glob(os.path.join(glob.escape(folder), f".*-{NODE}-*")):
        match = pattern.match(os.path.basename(left))
        if not match or os.name == "nt" or alive(int(match[1])):
            continue
        place = os.path.join(folder, match[2])
        if match[3] and not os.path.exists(place):
            os.rename(left, place)
        elif os.path.isdir(left) and not os.path.islink(left):
            shutil.rmtree(left, ignore_errors=True)
        else:
            os.remove(left)


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
    clean(path)
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
    clean(path)
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
    temporary, old = temporary_name(path), temporary_name(path) + "~"          # ~: `clean` brings it back
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

UNUSABLE, FEW = 0.05, 20   # a larger share that cannot be used stops a command, unless there are few in all


class Problems:
    """Counts what cannot be used, names each problem once through `log`, and stops the run when it is too much.

    What tries a sample counts it in `seen`.
    """

    def __init__(self, log=print, share=UNUSABLE, least=FEW):
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
                             f"data, beginning with {'; '.join(self.named[:3])}")


def pick_device(name=None, choices=("cuda", "mps", "cpu")):
    """The device of that name, by default the first of the choices that this machine has. -> its name; InputError"""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return next(choice for choice in choices if available[choice])
    try:
        torch.empty(1, device=name).item()     # which `meta` cannot
    except Exception as error:                 # each backend raises its own
        raise InputError(f"--device {name} does not work here ({first_line(error)}); try cpu") from None
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
    # of all, once joined; never let go, because its end waits for threads that may be waiting for Python's lock
    group: typing.ClassVar[object] = None

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
            cls.group = dist.group.WORLD
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

    def move(self, batch):
        """The batch with its tensors on this process's device."""
        moved = dict(batch)
        for key, value in batch.items():
            if isinstance(value, torch.Tensor):
                moved[key] = value.to(self.device, non_blocking=True)
        return moved

    def means(self, parts):
        """Loss an element over all ranks. parts: (task, loss, elements) of this rank's samples. -> all, {task: mean}"""
        sums = {}
        for part in self.gather(parts):
            for task, loss, elements in part:
                before = sums.get(task, (0.0, 0))
                sums[task] = before[0] + loss, before[1] + elements
        total, count = (sum(column) for column in zip(*sums.values()))
        return total / count, {task: loss / elements for task, (loss, elements) in sorted(sums.items())}


def card_memory(device):
    """GiB that a GPU has in all; None where the device is none."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


def leave_signals_to_the_trainer(worker):
    """For a DataLoader's workers, which a signal to the whole group reaches too: they end when the trainer ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stop:
    """Remembers the signals that end or announce the end of a run until the step is done: Ctrl-C, SIGTERM, SIGHUP of a
    closed terminal, Slurm's SIGUSR1. A second Ctrl-C ends at once."""

    def __init__(self):
        self.signal = None                     # the first that came
        for number in SIGNALS:
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        """The signals' handler."""
        self.signal = self.signal or number
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


def lock(path):
    """Locks a file as long as it is open and this process alive. -> the file; InputError if another process has it."""
    try:
        import fcntl                           # here, because Windows has none
    except ImportError:
        return open(path, "a")
    while True:
        file = open(path, "a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise InputError(f"{os.path.dirname(path)}: another run is writing there; wait for its end, or choose "
                             f"another --out") from None
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
        file.close()                           # the run before removed it between the two lines


@contextmanager
def claimed(out, ranks, resume, replace_old=False):
    """Within, the folder `out` is this run's alone: it holds no other, or that one is resumed or, with replace_old,
    removed. InputError where that cannot be."""
    held, path = None, os.path.join(out, ".lock")
    if ranks.rank == 0:
        probe(os.path.join(out, "log.jsonl"))
        held = lock(path)
    ranks.barrier()
    try:
        used = ranks.sum([bool(checkpoints(out))])[0] > 0 and not resume
        if used and not replace_old:
            raise InputError(f"{out}: holds another run; go on with it by --resume, or choose another --out")
        if ranks.rank == 0 and used:
            for name in sorted(os.listdir(out)):
                if STEP.match(name):
                    shutil.rmtree(os.path.join(out, name))
                elif RUN_FILES.match(name):
                    os.remove(os.path.join(out, name))
        ranks.barrier()
        yield
    finally:
        if held:
            with suppress(OSError):
                os.remove(path)
            held.close()


def read_log(path):
    """The records of a log, [] where there is none; a line that was torn when its run was killed is left out."""
    records = []
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            with suppress(InputError):
                record = parse_json(line, path)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


def trim_log(path, steps):
    """Removes what an interrupted run logged behind its last checkpoint, that step's validation included, so that
    nothing stands there twice."""
    kept = [record for record in read_log(path) if record["step"] < steps + ("loss" in record)]
    if os.path.exists(path):
        with atomic_file(path) as temporary, open(temporary, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)


def write_log(out, record, ranks):
    """Adds a line to a run's log, if this is rank 0 and there is something to add."""
    if ranks.rank == 0 and record:
        with open(os.path.join(out, "log.jsonl"), "a") as file:
            file.write(json.dumps(record) + "\n")


def plot_log(path, out):
    """Draws the losses against the steps: training grey, validation in colours."""
    curves = {}
    for record in read_log(path):
        for name, loss in {"train": record.get("loss"), **(record.get("val") or {})}.items():
            if isinstance(loss, float):
                curves.setdefault(name, []).append((record["step"], loss))
    if not curves:
        return
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


@contextmanager
def loaded(path):
    """Yields a file's image as it lies there, of an animation the first frame; whatever fails within, and an oversized
    or a tiny image, becomes an InputError that names the file."""
    head = check_file(path, "a picture")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{path}: {width} x {height} pixels are too many (at most {MAX_PIXELS:,}); scale it "
                                 f"down")
            if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
                raise InputError(f"{path}: {width} x {height} pixels show too little; each side needs at least "
                                 f"{MIN_SIDE} pixels and the longer at most {MAX_ASPECT} times the shorter")
            image.seek(0)
            image.load()
            yield image
    except (InputError, MemoryError):
        raise
    except Exception as error:         # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ...
        found = what_begins_so(head) or "a picture"
        reason = f"{str(error):.160}" if found == "a picture" else f"it is {found}"
        raise InputError(f"{path}: not a picture, or a damaged one ({reason}); open and save it anew") from None


def open_image(path):
    """Opens an image of any common kind as RGB, turned as its EXIF tag says, of an animation the first frame.

    Raises InputError that names the file where there is no image, or a damaged, an oversized or a tiny one.
    """
    with loaded(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


LEVELS = 16              # a mask of more grey levels has soft edges
ORIENTATION = 0x0112     # EXIF's tag


def read_mask(path, doubts):
    """A mask as its file has it: what is not transparent; else a palette's entries but the first; else what is not
    black, of soft edges and JPEGs what is above half of the brightest, of GrabCut's 0 to 3 what is odd. -> PIL, white =
    object, and how EXIF says it is to be turned, or None"""
    with loaded(path) as file:
        turn, jpeg, indexed = file.getexif().get(ORIENTATION), file.format in ("JPEG", "MPO"), file.mode == "P"
        values = np.uint8([255])
        if file.has_transparency_data and file.mode[0] not in "IF":
            values = np.asarray(file.convert("RGBA"))[:, :, 3]
        if values.min() == 255:                                                           # nothing is transparent
            values = np.asarray(file if len(file.getbands()) == 1 else file.convert("RGB"))
            values = np.atleast_3d(values).max(axis=-1)                                   # (H, W)
    levels = np.unique(values)
    top, threshold = levels[-1], 0
    if jpeg or len(levels) > LEVELS:
        threshold = top / 2
    if len(levels) > LEVELS and np.mean((values > 0.1 * top) & (values < 0.9 * top)) > 0.5:
        raise InputError(f"{path}: looks like a picture, not like a mask; draw one, white on black")
    if jpeg and top < 16:
        doubts.append(f"{path}: its values reach {top} of 255, which a JPEG does not keep; save such a mask as PNG")
    elif top == 2 and not indexed:
        doubts.append(f"{path}: 2 is taken for an object, as 1 would be; in GrabCut's masks, which go to 3, it is none")
    elif top == 3 and 2 in levels and not indexed:
        values = values % 2
    return Image.fromarray(values > threshold), turn


def open_mask(path, image, source, doubts):
    """The mask of an image that lies in the file `source`: (H, W) bool, True = object. Doubts are added to `doubts`.

    A mask of another size is squeezed to the picture's, as the released loader does. That one turns no photograph by
    its EXIF tag, so a mask without a tag is turned with its picture, unless its shape fits the turned picture alone.
    """
    mask, turn = read_mask(path, doubts)
    if turn is None:
        with Image.open(source) as file:
            turn = file.getexif().get(ORIENTATION)
        alike = (mask.width - mask.height) * (image.width - image.height)    # above 0: both upright or both lying
        if turn in (5, 6, 7, 8) and alike > 0:                 # these exchange the sides
            turn = None
        elif turn in (2, 3, 4) or turn in (5, 6, 7, 8) and alike == 0:
            doubts.append(f"{path}: its picture is turned by an EXIF tag, and the mask is taken as drawn before that; "
                          "if it was not, save the picture without the tag")
    mask.getexif()[ORIENTATION] = turn or 1
    mask = np.asarray(ImageOps.exif_transpose(mask).resize(image.size, Image.NEAREST))    # (H, W)
    if not mask.any():
        raise InputError(f"{path}: the mask is empty, nothing in it is above zero; draw it or remove the row")
    share, edges = mask.mean(), (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    if share > 0.95:
        doubts.append(f"{path}: the mask covers {share:.0%} of its picture")
    elif all(edge.any() for edge in edges) and np.concatenate(edges).mean() > share:
        doubts.append(f"{path}: the mask seems inverted, it covers {share:.0%} of its picture and more of its edges")
    top, left = (mask.shape[0] - min(mask.shape)) // 2, (mask.shape[1] - min(mask.shape)) // 2
    if not mask[top:top + min(mask.shape), left:left + min(mask.shape)].any():
        doubts.append(f"{path}: the object lies outside its picture's central square, which is all that is used")
    return mask


def picture_names(out, prompt, seeds, number=""):
    """Where the images go: --out itself if it ends in .png, else a name in that folder, made of the letters and digits
    of the prompt, without a number a new one (_2, ...). -> a name for each seed, that of all (the sheet)"""
    line = unicodedata.normalize("NFC", prompt.split("\n")[-1].replace("<image>", "").casefold())
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in f"{number} {line}").split()
    stem = "-".join(words).encode(sys.getfilesystemencoding(), "ignore")[:120].decode(errors="ignore") or "picture"
    for i in range(1, sys.maxsize):
        path = out if out.lower().endswith(".png") else os.path.join(out, stem + (f"_{i}" if i > 1 else "") + ".png")
        names = [f"{path[:-4]}-{seed}.png" for seed in seeds] if len(seeds) > 1 else [path]
        if path == out or number or not any(map(os.path.lexists, [path, *names])):
            return names, path


def save_picture(image, path, settings):
    """Writes a PNG that carries its settings."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("mentor", json.dumps(settings))
    with atomic_file(path) as temporary:
        image.save(temporary, "PNG", pnginfo=chunks)


def box_of(mask):
    """(left, top, right, bottom) around a mask."""
    columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def on_black(image, mask):
    """The object of the mask alone, everything else black."""
    return Image.fromarray(np.asarray(image) * mask[:, :, None])


def homography(corners, sources):
    """The eight numbers with which Image.transform shows the points `sources` (4, 2) at `corners` (4, 2)."""
    equations, values = [], []
    for (x, y), (u, v) in zip(corners, sources):
        equations += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(equations, values)


def contact_sheet(images, columns=None, gap=4):
    """A white sheet with PIL images of one size in rows of `columns` (default: a near-square)."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet


def save_all(images, files, settings):
    """Images to the files that `picture_names` gave, each with its seed; of several a sheet. -> files"""
    names, path = files
    for seed, (image, name) in enumerate(zip(images, names), settings["seed"]):
        save_picture(image, name, {**settings, "seed": seed, "n": 1})
    if len(images) > 1:
        save_picture(contact_sheet(images), path, settings)
    print(f"wrote {names[0]}" + (f" to {names[-1]} and the sheet {path}" if len(images) > 1 else ""))
    return files


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


# words of file and folder names that do not say what a picture shows
UNTELLING = set("""
    img imgs image images pic pics picture pictures photo photos my new the of at and copy edited e crop final
    frame scan screenshot untitled unnamed download downloads file files out data dataset datasets train val
    valid test dcim mvimg pxl vid dsc dscn dscf dji gopr gp sam imgp mg p cam camera whatsapp wa wp signal fb
    telegram jpg jpeg png tmp coco voc ade ilsvrc imagenet n sa cc gcc sbu laion flickr lsun ffhq celeba subset
    part shard sample samples sks""".split())


def telling_words(name):
    """The words of a name if they tell what a picture shows, else ""."""
    words = re.sub(r"[\W\d_]+", " ", name).lower().split()
    told = not UNTELLING.issuperset(words) and not re.fullmatch("[0-9a-f-]{16,}", name.lower())
    return " ".join(words) if told else ""


def subject_of(path):
    """What a picture's name says it shows, or its folder's where the name is a short number: dog-00.jpg, vase/00.jpg.
    Of 10_dog/any.jpg the folder's, as kohya's trainers read it, unless its pictures are for regularisation: reg/1_dog.
    None where neither tells, as with the names of cameras and data sets. Folders count as given: "." is no name."""
    stem = os.path.splitext(os.path.basename(path))[0]
    parent, folder = os.path.split(os.path.normpath(os.path.dirname(path)))
    repeated = re.match(r"\d{1,3}_", folder)
    if repeated and re.match(r"reg(ulari[sz]ation)?([-_ ]|$)", os.path.basename(parent), re.IGNORECASE):
        return None
    by_folder = telling_words(folder) if repeated or re.fullmatch(r"\d{1,5}", stem) else ""
    return by_folder or telling_words(stem) or None


# ---------------------------------------------------------------------------------------------------------------------
# Reading JSON

def find_data(args, folder):
    """Takes data, validation data and backgrounds from a folder, as far as it has them and no flag names others."""
    files = {"data": [], "val": [], "backgrounds": []}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.jsonl"))):
        kind = "val" if os.path.basename(path).startswith("val") else "data"
        if os.path.basename(path) == "backgrounds.jsonl":
            kind = "backgrounds"
        files[kind].append(path)
    if files["data"]:
        for kind, paths in files.items():
            setattr(args, kind, getattr(args, kind) or paths)


BEGINNINGS = (   # how files begin that lie where another should, and what they are
    (rb"version https://git-lfs", "a git-LFS pointer in place of the file; run `git lfs pull`, or download the file"),
    (rb"\s*<(!doctype|html|head|\?xml)", "a web page in place of the file; download the file itself"),
    (rb"\s*\{\"error\"", "a server's error message in place of the file; download it again"),
    (rb"\0+$", "nothing but zeros, as a crash or a full disk leaves it; copy it again"),
    (rb"PAR1", "a Parquet table"), (rb"PK\x03\x04", "a zip archive, or a pickle of PyTorch"), (rb"\x1f\x8b", "gzipped"),
    (rb"\x80[\x02-\x05]", "a pickle"), (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", "a picture"), (rb"%PDF", "a PDF"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text; save it as UTF-8"), (rb".{257}ustar", "a tar archive"))


def what_begins_so(head):
    """What a file with these first bytes is: text for a message, None where that is not known."""
    if not head:
        return "empty; copy it again"
    return next((what for pattern, what in BEGINNINGS if re.match(pattern, head, re.IGNORECASE | re.DOTALL)), None)


def check_file(path, what, most=None):
    """Raises InputError unless `path` is a regular file that can be read, of at most so many bytes. Nothing else is
    even opened: a pipe would wait for ever. what: should be there, for the message. -> its first 512 bytes"""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and not (most and status.st_size > most):
            with open(path, "rb") as file:
                return file.read(512)
        reason = f"has {status.st_size:,} bytes, too many for {what} (at most {most or 0:,}); name another file"
        if not stat.S_ISREG(status.st_mode):
            found = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            reason = f"is {found}; name the file that holds {what}"
    except FileNotFoundError:
        found = "a link to a file that is gone" if os.path.islink(path) else "no such file"
        reason = f"{found}; it should hold {what}"
    except (OSError, ValueError) as error:                     # ValueError: a zero byte in the name
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error}); it should hold {what}"
    raise InputError(f"{path}: {reason}")


def finite(text):
    """A number as JSON writes it; ValueError for NaN, Infinity and 1e999."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is no finite number")
    return value


def parse_json(text, where):
    """What a JSON text, str or bytes, says; InputError that begins with `where` if it is none."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text, parse_float=finite, parse_constant=finite)
    except UnicodeDecodeError:
        reason = "is not UTF-8 text"
    except RecursionError:
        reason = "is nested too deeply"
    except ValueError as error:
        reason = f"is no JSON ({str(error):.100})"
    raise InputError(f"{where}: {reason}")


def read_json(path, what, most=64 << 20):
    """What a JSON file says; InputError that names it, and what it is instead. what: should be there, for messages"""
    head = check_file(path, what, most)
    with open(path, "rb") as file:
        content = file.read()
    try:
        return parse_json(content, path)
    except InputError as error:
        found = what_begins_so(head)
        raise InputError(f"{path}: is {found}" if found else f"{error}; it should hold {what}") from None


def read_text(path, what):
    """What a small UTF-8 file says. what: should be there, for the message"""
    check_file(path, what, most=1 << 20)
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({str(error):.100}); it should hold {what}") from None


def shortly(value):
    """A value for a message, however long or deep it is."""
    return reprlib.repr(value)[:60]


NOT_LINES = (    # how files begin that are given in place of JSON lines; BEGINNINGS knows more
    (rb"\s*\[\s*(\{|$)", "a JSON array"), (rb"\s*\{\s*\n", "JSON over several lines"), (rb"\{\0|\0\{", "UTF-16 text"),
    (rb"BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "compressed"),
    (rb"[^{\0\n]*[,;\t][^{\0\n]*\n[^{\0\n]*(\n|$)", "a table (CSV, TSV) or other text"))


OURS, HEAD = "MENTOR's JSON lines", 1 << 16
FORMATS = (      # training data that `prepare.py import` reads, and how its first HEAD bytes look
    (OURS, rb'\s*\{.*"(source_image|input_image|image_path|input_text)"\s*:'),
    ("X2I's JSON lines", rb'\s*\{.*"output_image"\s*:'),
    ("LLaVA's JSON array", rb'\s*\[\s*\{.*"conversations"\s*:'),
    ("LLaVA's JSON lines", rb'\s*\{.*"conversations"\s*:'),
    ("COCO's captions", rb'\s*\{.*"(images|annotations)"\s*:\s*\[\s*\{'),
    ("JSON lines of pictures and captions", rb'\s*\{.*"(file_name|filename|image)"\s*:'),
    ("a table (CSV) of pictures and captions", rb'(?=[^\n]*,)([^\n{\[]*,)?"?(file_name|filename|image)"?(,|\r?\n)'),
    ("a Parquet table", rb"PAR1"),
    ("a tar archive, as webdataset has them", rb".{257}ustar"))


def training_format(path):
    """Which of FORMATS a file is, or "a folder"; None where it is none of them, InputError where it cannot be read."""
    if os.path.isdir(path):
        return "a folder"
    check_file(path, "training data")
    with open(path, "rb") as file:
        head = file.read(HEAD).removeprefix(b"\xef\xbb\xbf")
    return next((name for name, pattern in FORMATS if re.match(pattern, head, re.DOTALL)), None)


LONGEST = 1 << 20          # bytes of a line
decode_json = json.JSONDecoder().raw_decode    # json.loads takes longer
half_a_letter = re.compile("[\ud800-\udfff]").search           # of an emoji


def json_object(line):
    """The object on one line (bytes) of a JSONL file. -> dict; InputError says what is wrong with it"""
    if len(line) > LONGEST:
        raise InputError(f"{len(line):,} bytes long; write one object a line")
    try:
        content = line.decode().removeprefix("\ufeff")         # what Windows puts before UTF-8
        record, end = decode_json(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}); write one object a line, in UTF-8") from None
    if not isinstance(record, dict) or end < len(content):
        raise InputError("not a JSON object alone; write one {...} a line")
    return record


def texts_of(record, key, several=True):
    """A field that holds nothing, a text or (where `several` may stand) a list of texts. -> tuple"""
    value = record.get(key)
    if value is None or value == "":
        return ()
    values = value if isinstance(value, list) else [value]
    for text in values:
        if not isinstance(text, str) or not text or not text.isascii() and half_a_letter(text):
            raise InputError(f'"{key}" must be text, not {shortly(value)!a}')
    if len(values) > 1 and not several:
        raise InputError(f'"{key}" must be one text, not {len(values)}; write a line for each')
    return tuple(values)


class JsonLines:
    """JSONL files whose lines are found again when they are asked for: 2.5 million of them would fill the memory.

    keep: takes a line (bytes), returns a tuple of what is kept of it, as the numpy `dtype` says; InputError says why
    the line cannot be used. `table` holds what is kept, `problems` names the lines that cannot be used, of `lines`.
    InputError where a file is none of JSON lines.
    """

    def __init__(self, paths, keep, dtype):
        self.paths, self.problems, self.lines = list(paths), [], 0
        dtype = np.dtype([*dtype, ("number", "u4"), ("start", "u8"), ("check", "u4")])
        tables = [np.fromiter(self.index(path, keep), dtype) for path in self.paths]
        self.ends = np.cumsum([len(table) for table in tables])
        self.table = np.concatenate([np.empty(0, dtype), *tables])

    def index(self, path, keep):
        """Yields a row of the table for each usable line of a file."""
        foreign = os.path.exists(path) and training_format(path)
        if foreign and foreign != OURS:
            raise InputError(f"{path}: is {foreign}; make {OURS} of it: "
                             f"python prepare.py import {shlex.quote(str(path))} --out data.jsonl")
        head, start = check_file(path, "JSON lines").removeprefix(b"\xef\xbb\xbf"), 0
        kind = next((what for beginning, what in NOT_LINES if re.match(beginning, head)), None)
        if not kind and not head.lstrip().startswith(b"{"):
            kind = what_begins_so(head)
        if kind:
            raise InputError(f"{path}: is {kind}; make JSON lines of it: unpack it, or use jq -c '.[]', iconv -t UTF-8 "
                             "or pandas' to_json('rows.jsonl', orient='records', lines=True)")
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.strip()
                self.lines += line != b""
                try:
                    if line:
                        yield *keep(line), number, start, zlib.crc32(line)
                except InputError as error:
                    self.problems.append(f"{path}:{number}: {error}")
                    if len(self.problems) == self.lines == 1000:         # a large file of something else
                        raise InputError(f"none of the first 1,000 lines can be used; {self.problems[0]}") from None
                start += len(raw)

    def __len__(self):
        return len(self.table)

    def line(self, i):
        """-> (path, file.jsonl:LINE, the line's bytes); InputError where the file is not what it was."""
        path, entry = self.paths[np.searchsorted(self.ends, i, side="right")], self.table[i]
        name = f"{path}:{entry['number']}"
        check_file(path, "JSON lines")
        with open(path, "rb") as file:
            file.seek(entry["start"])
            line = file.readline().strip()
        if zlib.crc32(line) != entry["check"]:
            raise InputError(f"{name}: has changed since this program read it; start anew")
        return path, name, line


KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "an object of JSON",
         tuple: "a list", list: "a list"}


def from_json(cls, values, where, limits=None, optional=(), inside=""):
    """A dataclass out of a JSON object, checked field by field; InputError names `where` and the field. -> cls

    The annotations say what the fields may hold: whole numbers, finite numbers, texts, truth values, objects, lists
    (`tuple[int, ...]`), dataclasses, or one of several (`int | None`). All fields must be there but those of default
    None and those that `optional` names. limits: {field: (lowest, highest)} for numbers, {field: {text, ...}} for
    texts, of whatever dataclass; in a list they hold for each element. inside: "decoder." for what lies in it.
    """
    known = {f.name: f for f in fields(cls)}
    if not isinstance(values, dict):
        name = inside.rstrip(".") or "what it holds"
        raise InputError(f"{where}: {name} is {shortly(values)} but must be an object with {', '.join(list(known)[:4])}"
                         ", ...")
    unknown = [f"{inside}{name}"[:80] for name in values if name not in known]
    if unknown:
        raise InputError(f"{where}: holds {', '.join(unknown[:4])}, which nothing here knows; another version or "
                         "another program wrote it")
    missing = [inside + name for name, f in known.items()
               if name not in values and f.default is not None and name not in optional]
    if missing:
        raise InputError(f"{where}: lacks {', '.join(missing[:4])}; another version or another program wrote it")
    types = typing.get_type_hints(cls)
    return cls(**{name: checked_value(types[name], value, where, inside + name, limits or {}, optional)
                  for name, value in values.items()})


def checked_value(kind, value, where, name, limits, optional):
    """A value of a JSON object as the annotation `kind` has it, a field's or an element's; see from_json."""
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    form, limit = typing.get_origin(kind) or kind, limits.get(name.split(".")[-1])
    if form in (UnionType, typing.Union):
        if value is None and len(options) < len(typing.get_args(kind)):
            return None
        fitting = [option for option in options if isinstance(value, typing.get_origin(option) or option)]
        return checked_value((fitting or options)[0], value, where, name, limits, optional)
    if is_dataclass(form):
        return from_json(form, value, where, limits, optional, f"{name}.")
    if form in (tuple, list) and isinstance(value, (tuple, list)):
        if options:
            value = [checked_value(options[0], element, where, name, limits, optional) for element in value]
        return form(value)
    wanted, fits = KINDS[form], type(value) is form or form is float and type(value) is int
    if fits and isinstance(limit, tuple):
        wanted, fits = f"{wanted} from {limit[0]} to {limit[1]}", limit[0] <= value <= limit[1]
    elif fits and limit:
        wanted, fits = f"one of {', '.join(sorted(limit))}", value in limit
    if not fits or form is float and not abs(value) < 1e300:
        raise InputError(f"{where}: {name} is {shortly(value)} but must be {wanted}")
    return form(value)


# ---------------------------------------------------------------------------------------------------------------------
# A list of prompts

@dataclass(frozen=True)
class Request:
    """What is to be drawn; a line of JSON may leave out all but the prompt."""
    prompt: str
    refs: str | list[str] | None = None        # paths of reference pictures
    subjects: str | list[str] | None = None    # what each of them shows
    seed: int | None = None                    # of the first of n pictures; the next has seed + 1
    n: int | None = None
    where: str = ""                            # "list.jsonl:LINE: "
    line: str = ""                             # what stands there, as JSON


def read_request(line, where, folder):
    """A line of JSON -> Request whose refs, from `folder` on, and subjects are lists."""
    record = parse_json(line, where)
    known = {name: record.pop(name) for name in ("prompt", "refs", "subjects", "seed", "n") if name in record}
    for name in record:                        # all others are somebody else's, but for slips of the pen
        meant = [ours for ours in ("prompt", "refs", "subjects", "seed") if name.lower().strip("s") == ours.strip("s")]
        if meant:
            raise InputError(f'{where}: "{name}" is not known; write "{meant[0]}"')
    if not str(known.setdefault("prompt", "")).strip():
        raise InputError(f'{where}: has no prompt; add "prompt": "..."')
    request = from_json(Request, known, where, {"seed": (0, 2**53 - 1), "n": (1, 1000)}, ("where", "line"))
    refs, subjects = ([texts] if isinstance(texts, str) else texts or [] for texts in (request.refs, request.subjects))
    if half_a_letter("".join([request.prompt, *subjects])):
        raise InputError(f"{where}: holds half of a letter (a lone surrogate); write the whole one")
    if subjects and len(subjects) != len(refs):
        raise InputError(f"{where}: has {len(subjects)} subject(s) for {len(refs)} ref(s); give one for each, or none")
    return replace(request, subjects=subjects, refs=[os.path.abspath(os.path.join(folder, path)) for path in refs])


def read_prompts(path):
    """A list, text with a prompt a line or, as soon as a line begins with {, JSON lines. -> [Request]; InputError names
    the line that cannot be used."""
    head = check_file(path, "a list of prompts", most=1 << 30)
    kind = "a JSON array" if re.match(rb'\s*\[\s*(["{]|$)', head) else what_begins_so(head or b"-")
    if kind or path.lower().endswith((".csv", ".tsv")):
        raise InputError(f"{path}: is {kind or 'a table'}; give text with one prompt a line, or JSON lines")
    with open(path, "rb") as file:
        lines = file.read().removeprefix(b"\xef\xbb\xbf").splitlines()
    as_json, requests = any(line.lstrip().startswith(b"{") for line in lines), []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            line = line.decode().strip()
        except ValueError:
            raise InputError(f"{where}: is not UTF-8 text; save the list as UTF-8") from None
        if as_json and line and not line.startswith("{") or not as_json and re.search("[\0\t]", line):
            raise InputError(f"{where}: is neither a prompt nor an object of JSON like the other lines; write it so")
        if line:
            line = line if as_json else json.dumps({"prompt": line}, ensure_ascii=False)
            requests.append(replace(read_request(line, where, os.path.dirname(path)), where=f"{where}: ", line=line))
    if not requests:
        raise InputError(f"{path}: holds no prompt; write one a line")
    return requests
