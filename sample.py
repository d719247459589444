"""Samples an image from reference images and a prompt.

    python sample.py                                                     # an example, with the small bundled model
    python sample.py --ref assets/penguin.png --prompt "a penguin in the snow"           # with it too
    python sample.py --ref assets/dog_face.png --ref assets/penguin.png --prompt "a dog face and a penguin on the beach"
    python sample.py --ref assets/penguin.png --task segment             # the subject on black
    python sample.py --prompts assets/prompts.jsonl                      # many; goes on where it stopped
    python sample.py --weights mentor --ref assets/dog.jpg --prompt "a dog in the snow"  # with the public weights
    python sample.py --weights mentor --prompt "a castle at night"       # no reference: text to image

A list is text, a prompt a line, or JSON lines, {"prompt": ..., "refs": ["dog.jpg"], "subjects": ["dog"], "seed": 7,
"n": 2}, all but the prompt optional, paths from the list's folder. Pictures are called 00000-words-of-the-prompt.png,
or, where n is above 1, 00000-words-of-the-prompt-SEED.png. torchrun shares the work. Every PNG carries its settings as
JSON in a text chunk named "mentor". From here on the network in the order in which the data passes it: `data.py`,
`encoder.py`, `rope2d.py`, `model.py`, `vqgan.py`; then `train.py`.
"""
import argparse
import json
import os
import re
import sys
import time
from dataclasses import asdict, replace
from glob import escape, glob

import torch
from PIL import Image

import cli
import data
import weights
from cli import InputError, Ranks, Request
from rope2d import PREFIX_ROPE

VIEW = 256                 # smaller images are saved enlarged to about that many pixels a side
ROOT = os.path.dirname(os.path.abspath(__file__))
EXAMPLE = os.path.join(ROOT, "assets", "dog_face.png"), "a dog face on a meadow"
ABOUT_TINY = ("weights: tiny, a small model that knows nothing but emoji before thirty painted scenes "
              "(tutorial/lab.md); subjects come from --ref, without one it draws the scene; --weights mentor (10 GB) "
              "draws what is in photographs")
MORE_EXAMPLES = """other things to try:
  python sample.py --ref assets/dog_face.png --prompt "a dog face under water" --n 4
  python sample.py --ref assets/penguin.png --prompt "a penguin in the snow"
  python sample.py --ref assets/dog_face.png --ref assets/penguin.png --prompt "a dog face and a penguin on the beach"
  python sample.py --ref assets/penguin.png --task segment
  python sample.py --prompt "a volcano" --n 4
"""


def parse(argv):
    """The command line -> arguments."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", default="", help="with <image> in it, once for each reference, it is taken as it is")
    what.add_argument("--ref", action="append", default=[], metavar="IMAGE", help="a reference; repeat for several")
    what.add_argument("--subject", action="append", default=[], metavar="NAME",
                      help="what a reference shows, in order of --ref; default: its file's name")
    cli.add_fit_flag(what)
    what.add_argument("--task", choices=["segment", "reconstruct"], help="instead of drawing it anew")
    what.add_argument("--n", type=cli.checked(int, lambda n: 0 < n <= 1000, "a whole number from 1 to 1000"),
                      help="images (default 1, for GenEval 4); several of one --prompt get a contact sheet")
    what.add_argument("--size", type=cli.positive_int, help="pixels a side; default: the weights' own")
    many = parser.add_argument_group("a list of prompts, for each of which all other flags hold")
    many.add_argument("--prompts", metavar="FILE", help="text or JSON lines, in place of --prompt")
    many.add_argument("--batch", type=cli.positive_int, help="pictures drawn at once (default 8)")
    many.add_argument("--layout", choices=["plain", "geneval"], help="a folder for FID (default), or GenEval's folders")
    how = parser.add_argument_group("how to sample (defaults come with the weights)")
    how.add_argument("--seed", type=cli.natural, default=0, help="default 0; image i of --n has seed + i")
    cli.add_sampling_flags(how)
    where = parser.add_argument_group("with what and where")
    where.add_argument("--weights", default="tiny", help="a folder, a hub repository (owner/name), random, or one of "
                       f"{', '.join([*weights.BUNDLED, *weights.HUB])}; default tiny")
    where.add_argument("--lora", metavar="FOLDER", help="what `train.py --lora` wrote, added to the weights")
    where.add_argument("--prefix-rope", choices=PREFIX_ROPE, help="rotation of the prefix; default: as trained")
    where.add_argument("--out", help="a PNG, replaced if there, or a folder (default out/, of a list out/ITS-NAME/)")
    where.add_argument("--watch", action="store_true", help="write the PNG again and again while it grows")
    where.add_argument("--device", help="default: cuda, else mps, else cpu")
    where.add_argument("--dtype", choices=weights.DTYPES, help="default: bf16 on cuda, else fp32")
    where.add_argument("--offload", action="store_true", help="CLIP and T5 make room once they have read the prompt")
    where.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the decoder's blocks: half a "
                       "minute at the first use, then faster; default: for large decoders, on a GPU from 32 images on")
    args = parser.parse_args(argv)
    for flag in ("prompt", "ref", "subject", "task", "offload", "watch") if args.prompts else ("batch", "layout"):
        if getattr(args, flag):
            raise InputError(f"--{flag} does not go {'with' if args.prompts else 'without'} --prompts; leave it out")
    args.n, args.batch = args.n or (4 if args.layout == "geneval" else 1), args.batch or 8
    args.out = args.out or os.path.join("out", os.path.splitext(os.path.basename(args.prompts or ""))[0])
    if args.prompts and args.out.lower().endswith(".png"):
        raise InputError(f"--out {args.out}: the pictures of a list need a folder; give the name of one")
    args.prompt, *args.subject = (text.encode(errors="surrogateescape").decode(errors="replace")
                                  for text in (args.prompt, *args.subject))         # bytes come so in a C locale
    args.example = not (args.prompt or args.ref or args.task or args.prompts)
    if args.example:
        args.ref, args.prompt = [EXAMPLE[0]], EXAMPLE[1]
    if args.task and len(args.ref) != 1:
        raise InputError(f"--task {args.task} takes one --ref but {len(args.ref)} were given")
    if args.subject and len(args.subject) != len(args.ref):
        raise InputError(f"{len(args.subject)} --subject were given for {len(args.ref)} --ref; --subject names a "
                         f"reference picture, so give one for each or none")
    whole = data.IMAGE in args.prompt          # taken as it is
    if args.subject and args.task == "reconstruct" or args.task == "segment" and args.prompt and not whole:
        raise InputError(f"{'--subject' if args.subject else '--prompt'} would have no effect here; leave it out")
    if re.search(r"\.(jpe?g|jfif|webp|gif|bmp|tiff?|avif|jxl|heic|pdf|svg|ppm)$", args.out.lower()):
        raise InputError(f"--out {args.out}: pictures are written as PNG; give a name that ends in .png, or a folder")
    if not args.task and not args.prompt.strip() and not args.prompts:
        raise InputError('there is nothing to draw; add --prompt "..."')
    args.task = args.task or ("subject" if args.ref else "t2i")
    args.sampling = cli.given_sampling(args)
    return args


def read(processor, request, log=None):
    """A request and its references -> what the network reads; InputError names a list's line. log: is told of crops"""
    try:
        images = list(map(data.open_image, request.refs))
        for path, image in zip(request.refs, images if log and processor.fit == "crop" else ()):
            if data.cut_off(image) > 1 / 3:
                log(f"{path}: the central square leaves out {data.cut_off(image):.0%} of it; --fit pad shows all")
        return processor(request.prompt, images, request.subjects)
    except InputError as error:
        raise InputError(f"{request.where}{error}") from None


def requests_of(args):
    """What the flags or each line of --prompts ask for, all filled in, the prompt as the network reads it."""
    requests = cli.read_prompts(args.prompts) if args.prompts else [Request(args.prompt, args.ref, args.subject)]
    processor = data.Processor(weights.byte_tokenizer(), image_tokens=1, max_tokens=1 << 16, image_size=32)
    processor.fit = args.fit
    for i, request in enumerate(requests):
        prompt, seed = request.prompt, request.seed
        task = "subject" if args.prompts and request.refs else args.task
        subjects = request.subjects or [cli.subject_of(os.path.abspath(path)) or "subject" for path in request.refs]
        if data.IMAGE not in prompt:           # else it is taken as it is
            prompt = data.prompt_for(task, subjects, prompt)
        requests[i] = replace(request, prompt=prompt, seed=args.seed if seed is None else seed, n=request.n or args.n,
                              subjects=() if task == "reconstruct" else subjects)
        read(processor, requests[i], print)    # finds all problems but too many tokens, before the model is loaded
    return requests


def to_view(pixels):
    """(B, 3, H, W) in [-1, 1] -> PIL, small ones enlarged"""
    side = max(1, VIEW // pixels.size(-1)) * pixels.size(-1)
    return [data.to_image(image).resize((side, side), Image.BICUBIC) for image in pixels]


def as_it_grows(mentor, show, size=None):
    """A function for `Mentor.sample` to call after each token. It hands `show` the pictures so far, PIL, grey where
    tokens are missing, whenever a row is complete, and less often if that took more than a fifth of the time."""
    grid = (size or mentor.config.image_size) // mentor.vqgan.factor
    due = 0.0

    def progress(tokens):
        """tokens: all so far, [(B,), ...]"""
        nonlocal due
        began, missing = time.perf_counter(), grid * grid - len(tokens)
        if 0 < missing and missing % grid == 0 and began >= due:
            filled = torch.stack(tokens + tokens[-1:] * missing, dim=1)                   # (B, T)
            pixels = torch.cat([*map(mentor.vqgan.decode, filled.split(1))])              # (B, 3, H, W)
            pixels[:, :, len(tokens) // grid * mentor.vqgan.factor:] = 0                  # grey
            show(to_view(pixels))
            due = 5 * time.perf_counter() - 4 * began
    return progress


def draw(mentor, args, requests, seeds, progress=False):
    """A picture for each seed: one of each request, or all of a single one. -> PIL, small ones enlarged"""
    batch = data.collate([read(mentor.processor, request) for request in requests])
    sampling = replace(mentor.config.sampling, **args.sampling)
    pixels = mentor.sample(batch, seeds, sampling, args.size, progress, args.offload)
    return to_view(pixels)


def draw_list(mentor, args, requests, common, ranks):
    """Draws the pictures of a list that --out lacks, this process its share. common: settings of all of them"""
    wanted = {}                                # path of a picture: its request, its settings
    for i, request in enumerate(requests):
        read(mentor.processor, request)        # is the prompt too long?
        seeds = range(request.seed, request.seed + request.n)
        paths, _ = cli.picture_names(args.out, request.prompt, seeds, f"{i:05}")
        if args.layout == "geneval":
            paths = [os.path.join(args.out, f"{i:05}", "samples", f"{k:04}.png") for k in range(request.n)]
        for seed, path in zip(seeds, paths):
            wanted[path] = request, {"prompt": request.prompt, "refs": request.refs, "seed": seed, "n": 1, **common}
    there = sorted(glob(os.path.join(escape(args.out), "*/samples" if args.layout == "geneval" else "", "*.png")))
    for path in there:
        with cli.loaded(path) as image:
            if path not in wanted or image.info.get("mentor") != json.dumps(wanted[path][1]):
                raise InputError(f"{path}: is of other settings or of another list; remove it or choose another --out")
    ranks.barrier()                            # nobody draws before all have looked
    for i, request in enumerate(requests if args.layout == "geneval" and ranks.rank == 0 else ()):
        with cli.atomic_file(os.path.join(args.out, f"{i:05}", "metadata.jsonl")) as path, open(path, "wb") as file:
            file.write(request.line.encode() + b"\n")
    share = sorted(wanted.keys() - set(there))[ranks.rank::ranks.world]
    for start in cli.bar(range(0, len(share), args.batch), unit="batch", disable=ranks.rank > 0):
        paths = share[start:start + args.batch]
        chunk, settings = zip(*(wanted[path] for path in paths))
        for path, image, its in zip(paths, draw(mentor, args, chunk, [its["seed"] for its in settings]), settings):
            cli.save_picture(image, path, its)
    ranks.barrier()
    print(f"wrote {len(wanted) - len(there)} picture(s) to {args.out}, which held {len(there)}")


@cli.enough_memory("try --offload, --dtype bf16, or a smaller --n or --size (of a list --batch or --size)")
def main(argv=None):
    """The command line: prompt and references, model, images, files."""
    args = parse(argv)
    requests = requests_of(args)
    ranks = Ranks.join(args.device or cli.pick_device())
    device, dtype = ranks.device, args.dtype or weights.usual_dtype(ranks.device)
    sys.stdout = cli.Output(None) if ranks.rank else sys.stdout              # one process speaks for all
    if ranks.rank == 0:
        cli.probe(args.out if args.out.lower().endswith(".png") else os.path.join(args.out, "picture.png"))

    # the model
    mentor = weights.load(args.weights, device, weights.DTYPES[dtype], prefix_rope=args.prefix_rope,
                          offload=args.offload, lora=args.lora)
    mentor.processor.fit = args.fit
    if args.subject and data.IMAGE in args.prompt and not mentor.processor.words:
        raise InputError("--subject would have no effect here, because only a query connector reads it; leave it out")
    if args.weights == "tiny":
        print(ABOUT_TINY)
    if args.weights.startswith("random"):
        print("weights: random, so the image will be noise; for real images use --weights tiny, mentor or a folder")
    if not weights.is_large(mentor.config) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)               # a small model gains nothing from two, which wait for each other
    weights.compile_decoder(mentor, sum(request.n for request in requests), args.compile)

    # the images
    print(f"prompt: {args.prompts or requests[0].prompt!r}\ndevice: {device}, {dtype}")
    if args.size and args.size < mentor.config.image_size:
        print(f"size: below the weights' own {mentor.config.image_size} pixels it is a cut-out, as if zoomed in")
    start, size = time.perf_counter(), mentor.check_size(args.size or mentor.config.image_size)
    common = {"size": size, "dtype": dtype, "weights": args.weights, **asdict(mentor.config.sampling),
              "prefix_rope": mentor.config.decoder.prefix_rope, **args.sampling}
    common |= {name: getattr(args, name) for name, usual in (("lora", None), ("fit", "crop"))
               if getattr(args, name) != usual}
    if args.prompts:
        draw_list(mentor, args, requests, common, ranks)
        return ranks.leave()
    settings = {"prompt": requests[0].prompt, "refs": args.ref, "seed": args.seed, "n": args.n, **common}
    seeds = range(args.seed, args.seed + args.n)
    # without --watch only when all is drawn: another command may have taken a name meanwhile
    names = args.watch and cli.picture_names(args.out, requests[0].prompt, seeds)

    def show(images):
        for image, name, seed in zip(images, names[0], seeds):
            cli.save_picture(image, name, {**settings, "seed": seed, "n": 1, "unfinished": True})

    images = draw(mentor, args, requests, seeds, as_it_grows(mentor, show, size) if args.watch else True)
    seconds = time.perf_counter() - start
    cli.save_all(images, names or cli.picture_names(args.out, requests[0].prompt, seeds), settings)
    print(f"{seconds / args.n:.1f} s a picture of {size} x {size} pixels")
    if args.example:
        print(MORE_EXAMPLES)


if __name__ == "__main__":
    cli.run(main)
