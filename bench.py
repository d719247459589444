"""Measures speed against what the machine could do.

    python bench.py decode                   # a token of decoder XL, one picture with guidance
    python bench.py train --size B           # an optimizer step of stage 2
    python bench.py encode                   # CLIP and T5, the prompt's way to the prefix
    python bench.py vqgan                    # pictures to tokens and back
    python bench.py loader                   # samples a second that one worker reads from JPEGs
    python bench.py memory                   # what a picture of the full size takes, by formula

Every table counts bytes or operations by formula and holds them against a ceiling measured in the same run: a large
read for what waits for memory, a large matrix product for what waits for arithmetic. Weights are random, sizes real.

Next: `model.py`, where the comments say what these numbers decided.
"""
import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace

import torch
from PIL import Image

import data
from data import InputError
from encoder import MultimodalEncoder
from model import SIZES, Decoder, Graphs, Mentor, Prefix, Sampling, draw_tokens, size_config
from train import STAGES, TokenObjective, freeze, make_optimizer, used_memory
from vqgan import VQGAN

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---------------------------------------------------------------------------------------------------------------------
# What a step costs, by formula

def decoder_weights(config):
    """Numbers in the matrices that every token passes: attention, feed-forward, output."""
    return config.layers * (4 * config.width**2 + 3 * config.width * config.hidden) + config.width * config.codes


def decode_bytes(config, rows, length, itemsize):
    """Bytes a decoding step must read: every matrix once, and the cache of `rows` sequences up to `length`."""
    return itemsize * (decoder_weights(config) + rows * config.layers * 2 * length * config.width)


def decoder_operations(config, rows, tokens, keys, outputs):
    """Multiplications and additions of `tokens` new positions a sequence that see `keys` positions on average, with
    logits for `outputs` of them."""
    inner = decoder_weights(config) - config.width * config.codes
    attention = config.layers * 2 * keys * config.width        # scores, and their use on the values
    return 2 * rows * (tokens * (inner + attention) + outputs * config.width * config.codes)


def t5_operations(config, rows, tokens):
    """Of T5's encoder."""
    inner = config.heads * config.head_dim
    return 2 * rows * tokens * config.layers * (4 * config.width * inner + 3 * config.width * config.mlp
                                                + 2 * tokens * inner)


def clip_operations(config, pictures):
    """Of CLIP's picture side, up to the last block but one."""
    tokens = config.grid**2 + 1
    block = 4 * config.width**2 + 2 * config.width * config.mlp + 2 * tokens * config.width
    patches = config.grid**2 * 3 * config.patch_size**2 * config.width
    return 2 * pictures * (tokens * (config.layers - 1) * block + patches)


def train_operations(config, batch, prefix, stage):
    """Of a step: CLIP forward, the decoder forward and, twice as dear, backward, T5 so only in stage 2."""
    length = prefix + config.grid**2 - 1
    decoder = decoder_operations(config.decoder, batch, length, length, config.grid**2)
    t5 = t5_operations(config.t5, batch, prefix)
    return 3 * decoder + (3 if stage == "2" else 1) * t5 + clip_operations(config.vision, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def clock(function, device, least=1.0, most=50):
    """Median seconds of a call, after two calls to warm up; repeated for `least` seconds and at most `most` times."""
    def once():
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun
    once(), once()
    times = []
    while sum(times) < least and len(times) < most:
        times.append(once())
    return statistics.median(times)


def read_rate(device):
    """Bytes a second of a large read: 1 GiB, more than any cache holds, in pieces of a matrix's size."""
    pieces = [torch.rand(2**22, device=device) for _ in range(64)]
    return 2**30 / clock(lambda: [piece.sum() for piece in pieces], device)


def product_rate(device, dtype):
    """Operations a second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / clock(lambda: a @ b, device)


def fill(module):
    """Small random numbers in all parameters, quickly."""
    for parameter in module.parameters():
        parameter.data.uniform_(-0.02, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1.0)
    return module.eval().requires_grad_(False)


def built(make, device, dtype):
    """A network in the right place and type from the start."""
    with torch.device("meta"):
        module = make()
    return fill(module.to(dtype).to_empty(device=device))


def config_of(args):
    """The size asked for; the last id of its vocabulary stands for a picture's rows."""
    config = size_config(args.size)
    return replace(config, image_id=config.t5.vocab_size - 1)


def some_prefix(config, batch, length, device, dtype):
    """Random rows, no padding, half of them a picture's."""
    rows = torch.randn(batch, length, config.width, device=device).to(dtype)
    valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    return Prefix(rows, valid, (torch.arange(length, device=device) < length // 2).expand(batch, -1))


# ---------------------------------------------------------------------------------------------------------------------
# The measurements: -> rows of the table, each {"what", "seconds", and what it is held against}

@torch.inference_mode()
def decode(args, device, dtype):
    """Prefill, then decoding steps at several lengths; guidance doubles the sequences."""
    config, rows = size_config(args.size).decoder, []
    decoder, grid = built(lambda: Decoder(config), device, dtype), args.pixels // size_config(args.size).vqgan.factor
    if args.compile:
        decoder.compile_blocks()
    sequences = args.batch * (2 if args.guidance else 1)
    prefix = some_prefix(config, sequences, args.prefix, device, dtype)
    seconds = clock(lambda: decoder.prefill(prefix, grid), device, most=3)
    rows.append({"what": f"prefill of {args.prefix} rows", "seconds": seconds,
                 "operations": decoder_operations(config, sequences, args.prefix, args.prefix, 1)})
    _, cache, rope = decoder.prefill(prefix, grid)
    token, total = torch.zeros(sequences, dtype=torch.long, device=device), args.prefix + grid**2
    for length in sorted({args.prefix, (args.prefix + total) // 2, total - 1}):
        def step():
            cache.at.fill_(length)
            decoder.decode_step(token, cache, rope)
        run = Graphs(step, cache) if device.type == "cuda" else step

        def once():
            cache.length = length
            run()
        rows.append({"what": f"token at position {length}", "seconds": clock(once, device), "tokens": args.batch,
                     "bytes": decode_bytes(config, sequences, length + 1, dtype.itemsize),
                     "operations": decoder_operations(config, sequences, 1, length + 1, 1)})
    logits, uniform = torch.randn(args.batch, config.codes, device=device), torch.rand(args.batch, device=device)
    sampling = Sampling(top_k=min(1000, config.codes), top_p=0.9)
    rows.append({"what": "drawing from the logits", "tokens": args.batch,
                 "seconds": clock(lambda: draw_tokens(logits, uniform, sampling), device)})
    return rows


def train(args, device, dtype):
    """An optimizer step of a stage, from ready tokens."""
    config = replace(config_of(args), image_size=args.pixels, prefix_tokens=args.prefix)
    with torch.device("meta"):
        mentor = Mentor(config)
    objective = TokenObjective(fill(mentor.to_empty(device=device)), args)
    freeze(objective, STAGES[args.stage].trains)
    optimizer = make_optimizer(objective, 1e-4)
    patches = config.vision.grid**2
    ids = torch.full((args.batch, args.prefix), 5, device=device)
    ids[:, :patches] = config.image_id
    batch = {"ids": ids, "mask": ids > 0, "tokens": torch.randint(config.decoder.codes, (args.batch, config.grid**2),
                                                                   device=device),
             "refs": torch.randn(args.batch, 3, config.vision.image_size, config.vision.image_size, device=device)}
    if args.compile:
        mentor.decoder.compile_blocks()

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = objective(batch)
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [{"what": f"stage {args.stage}, {args.batch} samples, {args.pixels} px", "samples": args.batch,
             "seconds": clock(step, device, most=5),
             "operations": train_operations(config, args.batch, args.prefix, args.stage)}]


@torch.inference_mode()
def encode(args, device, dtype):
    """CLIP and T5: one reference picture and text up to the prefix's length."""
    config = config_of(args)
    encoder = built(lambda: MultimodalEncoder(config.vision, config.t5, image_id=config.image_id), device, dtype)
    ids = torch.full((args.batch, args.prefix), 5, device=device)
    ids[:, :config.vision.grid**2] = config.image_id
    refs = torch.randn(args.batch, 3, config.vision.image_size, config.vision.image_size, device=device).to(dtype)
    clip, t5 = clip_operations(config.vision, args.batch), t5_operations(config.t5, args.batch, args.prefix)
    return [{"what": "CLIP", "seconds": clock(lambda: encoder.clip(refs), device, most=5), "samples": args.batch,
             "operations": clip},
            {"what": f"CLIP and T5, {args.prefix} rows", "samples": args.batch, "operations": clip + t5,
             "seconds": clock(lambda: encoder(ids, ids > 0, refs), device, most=5)}]


@torch.inference_mode()
def vqgan(args, device, dtype):
    """The tokenizer, always in fp32: pictures to tokens and back."""
    network = built(lambda: VQGAN(size_config(args.size).vqgan), device, torch.float32)
    pixels = torch.rand(args.batch, 3, args.pixels, args.pixels, device=device)
    tokens = network.encode(pixels)
    return [{"what": f"encode {args.pixels} px", "seconds": clock(lambda: network.encode(pixels), device, most=5),
             "samples": args.batch},
            {"what": f"decode {args.pixels} px", "seconds": clock(lambda: network.decode(tokens), device, most=5),
             "samples": args.batch}]


def loader(args, device, dtype):
    """Rows of stage 2 from JPEGs of 640 pixels, one worker: reading, cropping, masks, prompts."""
    with tempfile.TemporaryDirectory() as folder:
        picture = data.open_image(os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "dog.jpg"))
        picture, rows = picture.resize((640, 640), Image.BICUBIC), []
        mask = Image.new("L", (640, 640))
        mask.paste(255, (150, 100, 500, 600))
        mask.save(os.path.join(folder, "mask.png"))
        for k in range(64):
            picture.rotate(k).save(os.path.join(folder, f"{k}.jpg"), quality=90)
            row = {"source_image": f"{k}.jpg", "input_text": "a dog in the snow", "objects": "dog"}
            rows += [row | {"generation_only": True}, row | {"image_path": "mask.png", "do_mask": True},
                     row | {"image_path": "mask.png", "do_replace": True}, row | {"image_path": f"{(k + 1) % 64}.jpg"}]
        path = os.path.join(folder, "rows.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        dataset = data.TaskData([path], data.Prompter(data.byte_tokenizer()), args.pixels, 224)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)                               # as every worker has
        begun = time.perf_counter()
        for _ in data.batches(dataset, 0, args.samples, args.batch):
            pass
        seconds = time.perf_counter() - begun
        torch.set_num_threads(threads)
    return [{"what": f"{args.samples} samples of {args.pixels} px", "seconds": seconds, "samples": args.samples}]


def memory(args, device, dtype):
    """GiB that one picture takes, by formula: weights and cache; activations come on top, a few hundred MiB."""
    config, rows = size_config(args.size), []
    with torch.device("meta"):
        mentor = Mentor(config)
    def count(module):
        return sum(p.numel() for p in module.parameters())
    positions = args.prefix + (args.pixels // config.vqgan.factor)**2
    cache = 2 * config.decoder.layers * positions * config.decoder.width * args.batch * (2 if args.guidance else 1)
    for name, kind in DTYPES.items():
        encoder = count(mentor.encoder) * (4 if name == "fp16" else kind.itemsize)         # T5 overflows in fp16
        drawing = (count(mentor.decoder) + count(mentor.projector) + cache) * kind.itemsize + 4 * count(mentor.vqgan)
        for what, total in (("", encoder + drawing), (" --offload", max(encoder, drawing))):
            fits = [f"{card} GB" for card in (8, 12, 16, 24) if total + 0.75 * 2**30 < card * 1e9]
            rows.append({"what": f"--dtype {name}{what}", "gib": total / 2**30, "fits": fits})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The table

def report(rows, ceilings):
    """Adds to every row its rate and its share of the ceiling, the nearer of the two, and prints all as a table."""
    print(f"{'':34}{'time':>11}{'a second':>18}{'GB/s':>8}{'GFLOP/s':>9}{'of the ceiling':>21}")
    for row in rows:
        row["share"] = {kind: row[counted] / row["seconds"] / ceilings[kind]
                        for kind, counted in (("read", "bytes"), ("product", "operations")) if counted in row}
        unit = next((name for name in ("tokens", "samples") if name in row), None)
        rate = f"{row[unit] / row['seconds']:,.1f} {unit}" if unit else ""
        limit = max(row["share"], key=row["share"].get, default=None)
        print(f"{row['what']:34}{1000 * row['seconds']:8,.1f} ms{rate:>18}"
              + "".join(f"{row[name] / row['seconds'] / 1e9:{w},.1f}" if name in row else " " * w
                        for name, w in (("bytes", 8), ("operations", 9)))
              + (f"{row['share'][limit]:12.0%} of {limit}" if limit else ""))


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["decode", "train", "encode", "vqgan", "loader", "memory"])
    parser.add_argument("--size", choices=SIZES, help="default: B for train, else XL")
    parser.add_argument("--batch", type=int, help="pictures; default: 4 for train, 16 for loader, else 1")
    parser.add_argument("--prefix", type=int, default=512, help="rows of the prefix (default 512)")
    parser.add_argument("--pixels", type=int, help="a side; default: 256 for train and vqgan, else 512")
    parser.add_argument("--guidance", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the decoder's blocks; default: to "
                                                                                 "decode on cuda")
    parser.add_argument("--stage", choices=["1", "2"], default="2", help="of train (default 2)")
    parser.add_argument("--samples", type=int, default=256, help="of loader (default 256)")
    parser.add_argument("--device", help="default: cuda, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on cuda, else fp32")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args(argv)
    data.check_numbers(args)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    if args.compile is None:
        args.compile = args.command == "decode" and args.device.startswith("cuda")
    args.size = args.size or ("B" if args.command == "train" else "XL")
    args.batch = args.batch or {"train": 4, "loader": 16}.get(args.command, 1)
    args.pixels = args.pixels or (256 if args.command in ("train", "vqgan") else 512)
    if args.prefix < size_config(args.size).vision.grid**2:
        raise InputError(f"--prefix is {args.prefix}, but a reference picture alone takes "
                         f"{size_config(args.size).vision.grid**2} rows; give more")
    return args


def main(argv=None):
    """The command line."""
    args = parse(argv)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    if args.command == "memory":
        for row in memory(args, device, dtype):
            print(f"{row['what']:22}{row['gib']:6.1f} GiB   cards: {', '.join(row['fits']) or 'none of up to 24 GB'}")
        return
    ceilings = {"read": read_rate(device), "product": product_rate(device, dtype)}
    rows = globals()[args.command](args, device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    record = {**vars(args), "machine": name, "torch": torch.__version__, "ceilings": ceilings, "rows": rows,
              "peak_gib": used_memory(device)}
    if args.json:
        print(json.dumps(record))
        return
    print(f"{args.command}: size {args.size}, batch {args.batch}, {args.dtype}, {name}, torch {torch.__version__}\n"
          f"ceilings: read {ceilings['read'] / 1e9:.1f} GB/s, product {ceilings['product'] / 1e9:,.0f} GFLOP/s")
    report(rows, ceilings)
    print(f"peak memory {record['peak_gib']:.1f} GiB")


if __name__ == "__main__":
    data.run(main)
