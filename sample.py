"""Draws a picture from reference pictures and a prompt.

    python sample.py                                                     # an example, with the small bundled model
    python sample.py --weights mentor --ref dog.jpg --prompt "a dog in the snow"
    python sample.py --ref dog.jpg --ref hat.jpg --subject dog --subject "red hat" --prompt "a dog wearing a red hat"
    python sample.py --prompt "a castle at night"                        # no reference: text to image
    python sample.py --ref dog.jpg --task segment                        # the subject on black
    python sample.py --like out/a-dog-in-the-snow.png --cfg 3            # again, with one setting changed

Every PNG carries its settings and its reference pictures, so `--like picture.png` needs nothing but the weights.
`Mentor.draw` in `model.py` does the work. Next: `train.py`.
"""
import argparse
import base64
import io
import json
import os
import re
import time

import torch
from PIL import Image, PngImagePlugin

import data
from data import InputError
from model import Mentor
from rope2d import PREFIX_ROPE
from weights import BUNDLED, HUB

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLING = ("cfg_scale", "temperature", "top_k", "top_p")
ASKED = ("text", "task", "subjects", "refs", "seed", "n")      # settings that do not come from the weights
KEY, REF_KEY = "mentor", "mentor-ref-"         # names of the PNG's text chunks
VIEW = 256                                     # smaller pictures are saved enlarged to about that many pixels a side
ROOT = os.path.dirname(os.path.abspath(__file__))
EXAMPLE = os.path.join(ROOT, "assets", "dog_face.png"), "a dog face on a meadow"
TINY_NEWS = ("weights: tiny, a small model that knows nothing but emoji before painted scenes; --weights mentor "
             "(10 GB, downloaded once) draws what is in photographs")
TRY = """other things to try:
  python sample.py --ref assets/dog_face.png --prompt "a dog face under water" --n 4
  python sample.py --ref assets/penguin.png --prompt "a penguin in the snow"
  python sample.py --ref assets/penguin.png --task segment
  python sample.py --prompt "a pencil sketch of a tropical fish in the snow"
"""


def parse(argv):
    """The command line; a flag that was not given is None, so that `--like` can tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", help="what to draw; with <image> in it, once per reference, it is taken as it stands")
    what.add_argument("--ref", action="append", metavar="PICTURE", help="a reference picture; repeat for several")
    what.add_argument("--subject", action="append", metavar="NAME",
                      help="what a reference shows, in order of --ref; default: its file's name")
    what.add_argument("--task", choices=["segment", "reconstruct"], help="instead of drawing it anew")
    what.add_argument("--n", type=int, help="how many pictures (default 1); from two on with a contact sheet")
    what.add_argument("--size", type=int, help="pixels a side; default: the weights' own")
    what.add_argument("--like", metavar="PNG", help="take all settings from a picture made earlier")
    how = parser.add_argument_group("how to draw (defaults come with the weights)")
    how.add_argument("--seed", type=int, help="default 0; picture i of --n has seed + i")
    how.add_argument("--cfg", type=float, dest="cfg_scale", help="classifier-free guidance; 1 = none")
    how.add_argument("--temperature", type=float, help="0 = always the likeliest token")
    how.add_argument("--top-k", type=int, help="draw among the k likeliest tokens")
    how.add_argument("--top-p", type=float, help="draw among the likeliest tokens that together reach p")
    where = parser.add_argument_group("with what and where")
    where.add_argument("--weights", help=f"a folder, a hub repository (owner/name), random, or one of "
                                         f"{', '.join([*BUNDLED, *HUB])}; default tiny")
    where.add_argument("--prefix-rope", choices=PREFIX_ROPE, help="rotation of the prefix; default: as trained")
    where.add_argument("--out", help="a PNG's name, or a folder; default out/")
    where.add_argument("--device", help="default: cuda, else mps, else cpu")
    where.add_argument("--dtype", choices=DTYPES, help="default: bf16 on cuda, else fp32")
    where.add_argument("--offload", action="store_true", help="CLIP and T5 make room once they have read the prompt")
    where.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the decoder's blocks: half a "
                       "minute at the first use, then faster; default: for decoders of 100 M parameters and more")
    return parser.parse_args(argv)


def read_like(path):
    """Settings and reference pictures of a PNG that this script wrote. -> dict, list of PIL pictures"""
    data.open_image(path)                      # says what is wrong with the file, if anything
    with Image.open(path) as image:
        image.load()
        chunks = image.info
    try:
        settings = json.loads(chunks[KEY])
        refs = [Image.open(io.BytesIO(base64.b64decode(chunks[f"{REF_KEY}{i}"]))).convert("RGB")
                for i in range(settings["refs"])]
    except (KeyError, TypeError, ValueError, OSError):
        raise InputError(f"{path}: carries no settings; only a PNG that sample.py wrote and nothing has changed can "
                         f"be drawn again") from None
    return settings, refs


def settle(args):
    """Command line -> (settings, reference pictures): everything that decides what the picture will be."""
    settings, refs = read_like(args.like) if args.like else ({}, [])
    if args.weights not in (None, settings.get("weights")):    # what came with the other weights stays with them
        settings = {name: value for name, value in settings.items() if name in ASKED}
    if args.ref:
        refs = [data.open_image(path) for path in args.ref]
        settings["subjects"] = [data.subject_of(path) for path in args.ref]
    if args.subject:
        if len(args.subject) != len(refs):
            raise InputError(f"{len(args.subject)} --subject were given for {len(refs)} --ref; --subject names a "
                             f"reference picture, so give one for each or none")
        settings["subjects"] = args.subject
    if args.prompt or args.task:
        settings |= {"text": args.prompt or "", "task": args.task}
    settings["prompt"] = prompt_for(settings, len(refs))
    for name in ("seed", "n", "size", "weights", "prefix_rope", "dtype") + SAMPLING:
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    for name, value in {"weights": "tiny", "seed": 0, "n": 1}.items():
        settings.setdefault(name, value)
    if settings["n"] < 1:
        raise InputError(f"--n is {settings['n']} but at least one picture must be drawn")
    if not 0 <= settings["seed"] < 2**63 - settings["n"]:
        raise InputError(f"--seed is {settings['seed']} but must be 0 or above and fit 63 bits")
    return settings, refs


def prompt_for(settings, n_refs):
    """The prompt the network reads: the text as it stands where it says <image>, else by the template of the task."""
    task, text = settings.get("task"), settings.get("text", "")
    subjects = settings.get("subjects") or ["subject"] * n_refs
    if task and n_refs != 1:
        raise InputError(f"--task {task} takes one --ref but {n_refs} were given")
    if data.IMAGE in text:
        return text
    if task == "segment":
        return data.segment_prompt(subjects[0])
    if task == "reconstruct":
        return data.reconstruct_prompt(text)
    if not text.strip():
        raise InputError('there is nothing to draw; add --prompt "..."')
    return data.subject_prompt(subjects, text) if n_refs else text


def pick_device(name):
    """The device to use; raises InputError for one this machine lacks."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except Exception as error:
        raise InputError(f"--device {name} does not work here ({str(error).splitlines()[0]}); try cpu") from None
    return name


def out_name(out, prompt):
    """Where the picture goes: --out itself if it ends in .png, else a name made from the prompt in that folder."""
    if (out or "").lower().endswith(".png"):
        return out
    words = re.sub(r"[^a-z0-9]+", "-", prompt.split("\n")[-1].replace(data.IMAGE, "").lower()).strip("-")
    return os.path.join(out or "out", (words[:60].rstrip("-") or "picture") + ".png")


def probe_folder(path):
    """Makes the folder the picture goes to and tries whether it can be written, before any time is spent."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(f"{path}.part", "wb"):
            pass
        os.remove(f"{path}.part")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None


def enlarged(picture):
    """A small picture at a size that one can look at, by a whole factor."""
    factor = max(1, VIEW // picture.width)
    return picture.resize((factor * picture.width, factor * picture.height), Image.BICUBIC)


def save(image, path, settings, refs):
    """Writes a PNG with its settings and references; the file appears complete or not at all."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(KEY, json.dumps({**settings, "refs": len(refs)}))
    for i, ref in enumerate(refs):
        buffer = io.BytesIO()
        ref.save(buffer, "PNG")
        chunks.add_text(f"{REF_KEY}{i}", base64.b64encode(buffer.getvalue()).decode())
    try:
        image.save(f"{path}.part", "PNG", pnginfo=chunks)
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None


def write(pictures, path, settings, refs):
    """One picture to `path`; several beside it, each with its own seed, and a contact sheet to `path`."""
    if len(pictures) > 1:
        names = []
        for seed, picture in enumerate(pictures, settings["seed"]):
            names.append(f"{path[:-4]}-{seed}.png")
            save(picture, names[-1], {**settings, "seed": seed, "n": 1}, refs)
        save(data.contact_sheet(pictures), path, settings, refs)
        print(f"wrote {names[0]} to {names[-1]} and the sheet {path}")
    else:
        save(pictures[0], path, settings, refs)
        print(f"wrote {path}")


def main(argv=None):
    """The command line: settings, model, pictures, files."""
    args = parse(argv)

    # what to draw, checked before anything slow begins
    example = not (args.prompt or args.ref or args.subject or args.task or args.like)
    if example:
        args.ref, args.prompt = [EXAMPLE[0]], EXAMPLE[1]
    settings, refs = settle(args)
    path = out_name(args.out, settings["prompt"])
    probe_folder(path)
    device = pick_device(args.device)
    settings.setdefault("dtype", "bf16" if device.startswith("cuda") else "fp32")

    # the model
    mentor = Mentor.from_pretrained(settings["weights"], device=device, dtype=DTYPES[settings["dtype"]],
                                    prefix_rope=settings.get("prefix_rope"), offload=args.offload)
    if settings["weights"].startswith("random"):
        print("weights: random, so the picture will be noise; --weights tiny or mentor (or a folder) draw in earnest")
    if settings["weights"] == "tiny":
        print(TINY_NEWS)
    large = sum(p.numel() for p in mentor.decoder.parameters()) >= 10**8
    if args.compile or args.compile is None and large:
        mentor.decoder.compile_blocks()
    settings["prefix_rope"] = mentor.config.decoder.prefix_rope
    settings["size"] = mentor.check_size(settings.get("size") or mentor.config.image_size)
    for name in SAMPLING:
        settings.setdefault(name, getattr(mentor.config.sampling, name))
    # what CLIP will see is all that matters of a reference, and all that the PNG needs to carry
    refs = [data.center_square(ref, mentor.config.vision.image_size, rounding=int) for ref in refs]

    # the pictures
    print(f"prompt: {settings['prompt']!r}\ndevice: {device}, {settings['dtype']}")
    start = time.perf_counter()
    pictures = mentor.draw(settings["prompt"], refs, settings["seed"], settings["n"], settings["size"], progress=True,
                           offload=args.offload, **{name: settings[name] for name in SAMPLING})
    seconds = time.perf_counter() - start
    write([enlarged(picture) for picture in pictures], path, settings, refs)
    print(f"{seconds / settings['n']:.1f} s a picture of {settings['size']} x {settings['size']} pixels")
    if example:
        print(TRY)


if __name__ == "__main__":
    data.run(main)
