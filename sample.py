"""Samples an image from reference images and a prompt.

    python sample.py                                                     # an example, with the small bundled model
    python sample.py --ref dog.jpg --prompt "a dog in the snow"          # with it too
    python sample.py --weights mentor --ref dog.jpg --prompt "a dog in the snow"     # with the public weights
    python sample.py --weights mentor --prompt "a castle at night"       # no reference: text to image
    python sample.py --ref dog.jpg --task segment                        # the subject on black

Every PNG carries its settings as JSON in a text chunk named "mentor". From here on the network in the order in which
the data passes it: `data.py`, `encoder.py`, `rope2d.py`, `model.py`, `vqgan.py`; then `train.py`.
"""
import argparse
import json
import os
import re
import sys
import time
import unicodedata
from dataclasses import asdict, replace

import torch
from PIL import Image, PngImagePlugin

import cli
import data
import weights
from cli import InputError
from rope2d import PREFIX_ROPE

VIEW = 256                 # smaller images are saved enlarged to about that many pixels a side
ROOT = os.path.dirname(os.path.abspath(__file__))
EXAMPLE = os.path.join(ROOT, "assets", "dog_face.png"), "a dog face on a meadow"
ABOUT_TINY = ("weights: tiny, a small model that knows nothing but emoji before thirty painted scenes (README); "
              "subjects come from --ref, without one it draws the scene; --weights mentor (10 GB) draws what is in "
              "photographs")
MORE_EXAMPLES = """other things to try:
  python sample.py --ref assets/dog_face.png --prompt "a dog face under water" --n 4
  python sample.py --ref assets/penguin.png --prompt "a penguin in the snow"
  python sample.py --ref assets/penguin.png --task segment
  python sample.py --prompt "a volcano" --n 4
"""


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


def parse(argv):
    """The command line -> arguments."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", default="", help="with <image> in it, once for each reference, it is taken as it is")
    what.add_argument("--ref", action="append", default=[], metavar="IMAGE", help="a reference; repeat for several")
    what.add_argument("--subject", action="append", default=[], metavar="NAME",
                      help="what a reference shows, in order of --ref; default: its file's name")
    what.add_argument("--task", choices=["segment", "reconstruct"], help="instead of drawing it anew")
    what.add_argument("--n", type=cli.checked(int, lambda n: 0 < n <= 1000, "a whole number from 1 to 1000"), default=1,
                      help="images (default 1); several get a contact sheet")
    what.add_argument("--size", type=cli.positive_int, help="pixels a side; default: the weights' own")
    how = parser.add_argument_group("how to sample (defaults come with the weights)")
    how.add_argument("--seed", type=cli.natural, default=0, help="default 0; image i of --n has seed + i")
    add_sampling_flags(how)
    where = parser.add_argument_group("with what and where")
    where.add_argument("--weights", default="tiny", help="a folder, a hub repository (owner/name), random, or one of "
                       f"{', '.join([*weights.BUNDLED, *weights.HUB])}; default tiny")
    where.add_argument("--prefix-rope", choices=PREFIX_ROPE, help="rotation of the prefix; default: as trained")
    where.add_argument("--out", default="out", help="a PNG, replaced if there, or a folder, where none is (out/)")
    where.add_argument("--device", help="default: cuda, else mps, else cpu")
    where.add_argument("--dtype", choices=weights.DTYPES, help="default: bf16 on cuda, else fp32")
    where.add_argument("--offload", action="store_true", help="CLIP and T5 make room once they have read the prompt")
    where.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the decoder's blocks: half a "
                       "minute at the first use, then faster; default: for large decoders, on a GPU from 32 images on")
    args = parser.parse_args(argv)
    args.prompt, *args.subject = (text.encode(errors="surrogateescape").decode(errors="replace")
                                  for text in (args.prompt, *args.subject))         # bytes come so in a C locale
    args.example = not (args.prompt or args.ref or args.task)
    if args.example:
        args.ref, args.prompt = [EXAMPLE[0]], EXAMPLE[1]
    if args.task and len(args.ref) != 1:
        raise InputError(f"--task {args.task} takes one --ref but {len(args.ref)} were given")
    if args.subject and len(args.subject) != len(args.ref):
        raise InputError(f"{len(args.subject)} --subject were given for {len(args.ref)} --ref; --subject names a "
                         f"reference picture, so give one for each or none")
    whole = data.IMAGE in args.prompt          # taken as it is
    if args.subject and (whole or args.task == "reconstruct") or args.task == "segment" and args.prompt and not whole:
        raise InputError(f"{'--subject' if args.subject else '--prompt'} would have no effect here; leave it out")
    if re.search(r"\.(jpe?g|jfif|webp|gif|bmp|tiff?|avif|jxl|heic|pdf|svg|ppm)$", args.out.lower()):
        raise InputError(f"--out {args.out}: pictures are written as PNG; give a name that ends in .png, or a folder")
    if not args.task and not args.prompt.strip():
        raise InputError('there is nothing to draw; add --prompt "..."')
    args.task = args.task or ("subject" if args.ref else "t2i")
    args.sampling = given_sampling(args)
    args.subject = args.subject or list(map(cli.subject_of, args.ref))
    return args


def out_names(out, prompt, seeds):
    """Where the images go: --out itself if it ends in .png, else a new name in that folder, made of the letters and
    digits of the prompt, _2 behind it where it is taken, and so on. -> a name for each seed, that of all (the sheet)"""
    line = unicodedata.normalize("NFC", prompt.split("\n")[-1].replace(data.IMAGE, "").casefold())
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in line).split()       # of any script
    stem = "-".join(words).encode(sys.getfilesystemencoding(), "ignore")[:120].decode(errors="ignore") or "picture"
    for i in range(1, sys.maxsize):
        path = out if out.lower().endswith(".png") else os.path.join(out, stem + (f"_{i}" if i > 1 else "") + ".png")
        names = [f"{path[:-4]}-{seed}.png" for seed in seeds] if len(seeds) > 1 else [path]
        if path == out or not any(map(os.path.lexists, [path, *names])):
            return names, path


def save(image, path, settings):
    """Writes a PNG that carries its settings."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("mentor", json.dumps(settings))
    with cli.atomic_file(path) as temporary:
        image.save(temporary, "PNG", pnginfo=chunks)


def save_all(images, out, settings):
    """Images to the files that `out_names` gives, each with its seed; of several a contact sheet."""
    seeds = range(settings["seed"], settings["seed"] + len(images))
    names, path = out_names(out, settings["prompt"], seeds)
    factor = max(1, VIEW // images[0].width)
    images = [image.resize((factor * image.width, factor * image.height), Image.BICUBIC) for image in images]
    for image, name, seed in zip(images, names, seeds):
        save(image, name, {**settings, "seed": seed, "n": 1})
    if len(images) > 1:
        save(cli.contact_sheet(images), path, settings)
    print(f"wrote {names[0]}" + (f" to {names[-1]} and the sheet {path}" if len(images) > 1 else ""))


@cli.enough_memory("try --offload, --dtype bf16, or a smaller --n or --size")
def main(argv=None):
    """The command line: prompt and references, model, images, files."""
    args = parse(argv)
    images = list(map(data.open_image, args.ref))
    device = cli.pick_device(args.device)
    cli.probe(args.out if args.out.lower().endswith(".png") else os.path.join(args.out, "picture.png"))
    dtype = args.dtype or ("bf16" if device.startswith("cuda") else "fp32")

    # the model
    mentor = weights.load(args.weights, device, weights.DTYPES[dtype], prefix_rope=args.prefix_rope,
                          offload=args.offload)
    if args.weights == "tiny":
        print(ABOUT_TINY)
    if args.weights.startswith("random"):
        print("weights: random, so the image will be noise; for real images use --weights tiny, mentor or a folder")
    large = sum(p.numel() for p in mentor.decoder.parameters()) >= 10**8
    if not large and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)               # a small model gains nothing from two, which wait for each other
    if args.compile is None:
        args.compile = large and (device == "cpu" or args.n >= 32)     # on a GPU: a minute, to save 2 s an image
    if args.compile:
        weights.compile_blocks(mentor.decoder)

    # the images
    prompt = args.prompt
    if data.IMAGE not in prompt:               # else it is taken as it is
        prompt = data.prompt_for(args.task, args.subject, prompt)
    print(f"prompt: {prompt!r}\ndevice: {device}, {dtype}")
    if args.size and args.size < mentor.config.image_size:
        print(f"size: below the weights' own {mentor.config.image_size} pixels it is a cut-out, as if zoomed in")
    start, sampling = time.perf_counter(), replace(mentor.config.sampling, **args.sampling)
    batch = data.collate([mentor.processor(prompt, images)])
    pixels = mentor.sample(batch, range(args.seed, args.seed + args.n), sampling, args.size, progress=True,
                           offload=args.offload)                                          # (n, 3, size, size)
    seconds, size = time.perf_counter() - start, pixels.size(-1)
    settings = {"prompt": prompt, "refs": args.ref, "seed": args.seed, "n": args.n, "size": size, "dtype": dtype,
                "weights": args.weights, "prefix_rope": mentor.config.decoder.prefix_rope, **asdict(sampling)}
    save_all(list(map(data.to_image, pixels)), args.out, settings)
    print(f"{seconds / args.n:.1f} s a picture of {size} x {size} pixels")
    if args.example:
        print(MORE_EXAMPLES)


if __name__ == "__main__":
    cli.run(main)
