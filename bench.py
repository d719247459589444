"""Measures speed and memory against what the machine could do.

    python bench.py decode                   # a token of decoder XL, one image with guidance
    python bench.py decode --compile --dtype fp32 int8         # the same in two ways, in one run
    python bench.py train --size B           # forward, backward and optimizer step of stage 2
    python bench.py encode                   # CLIP and T5: from a prompt to the prefix
    python bench.py prefix --pictures 4      # from reference images to the first token, with an MLP and with queries
    python bench.py vqgan                    # images to tokens and back
    python bench.py loader                   # samples a second that one worker reads from JPEGs
    python bench.py memory                   # what sampling an image at full size takes, by formula

Each row of a table counts bytes or floating-point operations (FLOPs) by formula and compares their rate with a ceiling
measured in the same run: the rate of a large read where memory is the limit, of a large matrix product where
arithmetic is. Weights are random, sizes are real.
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
from torch import nn

import cli
import data
from cli import InputError
from encoder import MultimodalEncoder
from fast import Graphs, compile_blocks, decode_in_int8, use_fast_products
from model import SIZES, Decoder, Mentor, Prefix, Sampling, sample_tokens
from train import STAGES, TokenObjective, freeze, make_optimizers
from vqgan import VQGAN
from weights import DTYPES, byte_tokenizer, usual_dtype

CARDS = (8, 12, 16, 24)          # GB of common graphics cards
TEXT = 64                        # rows of a prompt beside its pictures
DOG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "dog.jpg")


# ---------------------------------------------------------------------------------------------------------------------
# What a step costs, by formula; a multiplication and an addition are two FLOPs

def decoder_weights(config):
    """Numbers in the matrices that every token passes: attention, feed-forward, output."""
    return config.layers * (4 * config.width**2 + 3 * config.width * config.hidden) + config.width * config.codes


def decode_bytes(config, batch, length, itemsize):
    """Bytes that a decoding step must read: every matrix once, and keys and values of `length` positions a sequence."""
    return itemsize * (decoder_weights(config) + batch * config.layers * 2 * length * config.width)


def decoder_flops(config, batch, tokens, keys, outputs):
    """FLOPs of `tokens` new positions a sequence that attend to `keys` positions, with logits for `outputs` of them."""
    output = config.width * config.codes
    blocks = decoder_weights(config) - output
    attention = config.layers * 2 * keys * config.width        # the scores, and the sum of values they weight
    return 2 * batch * (tokens * (blocks + attention) + outputs * output)


def t5_flops(config, batch, tokens):
    """FLOPs of T5's encoder."""
    inner = config.heads * config.head_dim
    block = 4 * config.width * inner + 3 * config.width * config.mlp + 2 * tokens * inner
    return 2 * batch * tokens * config.layers * block


def clip_flops(config, images):
    """FLOPs of CLIP's vision transformer up to the last block but one."""
    tokens = config.grid**2 + 1
    block = 4 * config.width**2 + 2 * config.width * config.mlp + 2 * tokens * config.width
    patches = config.grid**2 * 3 * config.patch_size**2 * config.width
    return 2 * images * (tokens * (config.layers - 1) * block + patches)


def train_flops(config, batch, prefix, stage):
    """FLOPs of a training step. A backward pass costs twice its forward pass; CLIP has none, T5 has one in stage 2."""
    length = prefix + config.grid**2 - 1
    decoder = decoder_flops(config.decoder, batch, length, length, config.grid**2)
    t5 = t5_flops(config.t5, batch, prefix)
    if stage == "2":
        t5 = 3 * t5
    return 3 * decoder + t5 + clip_flops(config.vision, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def clock(function, device, most=50):
    """Median seconds of a call: two calls to warm up, then calls until a second has passed, `most` at most."""
    times = []
    while len(times) < 3 or sum(times[2:]) < 1 and len(times) < 2 + most:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def timed(what, function, device, most=50, **counts):
    """A row of the table. counts: the bytes, flops, tokens or samples of a call."""
    return {"what": what, "seconds": clock(function, device, most), **counts}


def read_rate(device):
    """Bytes a second of a large read: 1 GiB, more than any cache holds, in pieces as large as a matrix; on a GPU in one
    piece of 4 GiB, because launching small ones would take longer than reading them."""
    count, size = (1, 2**30) if device.type == "cuda" else (64, 2**22)
    pieces = [torch.rand(size, device=device) for _ in range(count)]
    return 4 * count * size / clock(lambda: [piece.sum() for piece in pieces], device)


def product_rate(device, dtype):
    """FLOPs a second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / clock(lambda: a @ b, device)


def computed_in(dtype):
    """What activations are in where weights are of this type."""
    return torch.float32 if dtype == torch.int8 else dtype


def build(make, device, dtype):
    """A network with small random weights, much faster than by its own initialisation."""
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.uniform_(-0.02, 0.02)
        else:
            parameter.fill_(1.0)
    return module


def random_prefix(config, batch, length, device, dtype):
    """A prefix without padding, the first half of it a reference image's rows."""
    rows = torch.randn(batch, length, config.width, device=device).to(dtype)              # (B, S, D)
    valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    is_image = torch.arange(length, device=device) < length // 2
    return Prefix(rows, valid, is_image.expand(batch, -1))


def random_prompts(config, batch, length, device):
    """A reference image and text up to `length` for each sample; the last id of T5's vocabulary stands for <image>.
    -> batch of ids, mask and refs"""
    ids = torch.full((batch, length), 5, device=device)                                   # (B, S)
    ids[:, :config.vision.grid**2] = config.image_id
    side = config.vision.image_size
    return {"ids": ids, "mask": ids > 0, "refs": torch.randn(batch, 3, side, side, device=device)}


# ---------------------------------------------------------------------------------------------------------------------
# The measurements: -> rows of the table

def step_at(length, decoder, token, cache, rope):
    """A decoding step that is always at the same position, so that it can be repeated. -> function"""
    def step():
        cache.at.fill_(length)
        return decoder.decode_step(token, cache, rope)
    repeated = Graphs(step, cache) if token.is_cuda else step

    def call():
        cache.length = length
        repeated()
    return call


@torch.inference_mode()
def bench_decode(config, args, device, dtype):
    """Prefill, then decoding steps at several positions; guidance doubles the sequences."""
    itemsize, dtype, int8 = dtype.itemsize, computed_in(dtype), dtype == torch.int8
    decoder = build(lambda: Decoder(config.decoder, config.vision.grid), device, dtype)
    if int8:
        decode_in_int8(decoder)
    else:
        use_fast_products(decoder)
    if args.compile:
        compile_blocks(decoder)
    sequences = args.batch * (2 if args.guidance else 1)
    prefix = random_prefix(config.decoder, sequences, args.prefix, device, dtype)
    rows = [timed(f"prefill of {args.prefix} rows", lambda: decoder.prefill(prefix, config.grid), device, most=3,
                  flops=decoder_flops(config.decoder, sequences, args.prefix, args.prefix, 1))]
    _, cache, rope = decoder.prefill(prefix, config.grid)
    token = torch.zeros(sequences, dtype=torch.long, device=device)
    last = args.prefix + config.grid**2 - 1
    for length in sorted({args.prefix, (args.prefix + last + 1) // 2, last}):
        step = step_at(length, decoder, token, cache, rope)
        rows.append(timed(f"token at position {length}", step, device, tokens=args.batch,
                          bytes=decode_bytes(config.decoder, sequences, length + 1, itemsize),
                          flops=decoder_flops(config.decoder, sequences, 1, length + 1, 1)))
    logits = torch.randn(args.batch, config.decoder.codes, device=device)                 # (B, V)
    uniform = torch.rand(args.batch, device=device)
    sampling = Sampling(top_k=min(1000, config.decoder.codes), top_p=0.9)
    rows.append(timed("sampling from the logits", lambda: sample_tokens(logits, uniform, sampling), device,
                      tokens=args.batch))
    return rows


def bench_train(config, args, device, dtype):
    """An optimizer step of a stage, from ready image tokens."""
    config = replace(config, prefix_tokens=args.prefix)
    mentor = build(lambda: Mentor(config), device, torch.float32)
    objective = TokenObjective(mentor)
    freeze(objective, STAGES[args.stage].trains)
    optimizers = make_optimizers(objective, STAGES[args.stage])
    batch = random_prompts(config, args.batch, args.prefix, device)
    batch["tokens"] = torch.randint(config.decoder.codes, (args.batch, config.grid**2), device=device)
    if args.compile:
        compile_blocks(mentor.decoder)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = objective(batch)
        losses.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return [timed(f"stage {args.stage}, {args.batch} samples, {args.pixels} px", step, device, most=5,
                  samples=args.batch, flops=train_flops(config, args.batch, args.prefix, args.stage))]


@torch.inference_mode()
def bench_encode(config, args, device, dtype):
    """CLIP and T5: one reference image a sample, and text up to the prefix's length."""
    encoder = build(lambda: MultimodalEncoder(config.vision, config.t5, image_id=config.image_id), device, dtype)
    ids, mask, refs = random_prompts(config, args.batch, args.prefix, device).values()
    refs = refs.to(dtype)
    clip = clip_flops(config.vision, args.batch)
    t5 = t5_flops(config.t5, args.batch, args.prefix)
    return [timed("CLIP", lambda: encoder.clip(refs), device, most=5, samples=args.batch, flops=clip),
            timed(f"CLIP and T5, {args.prefix} rows", lambda: encoder(ids, mask, refs), device, most=5,
                  samples=args.batch, flops=clip + t5)]


@torch.inference_mode()
def bench_prefix(config, args, device, dtype):
    """From reference images to the first token with an MLP and with the query connector, which makes the prefix
    shorter: CLIP and connector, T5, the decoder's prefill for one image with guidance."""
    decoder, rows = build(lambda: Decoder(config.decoder, config.vision.grid), device, dtype), []
    use_fast_products(decoder)
    side, sequences = config.vision.image_size, 2 if args.guidance else 1
    refs = torch.randn(args.pictures, 3, side, side, device=device).to(dtype)
    words = torch.full((args.pictures, 4), 5, device=device)
    for name, form in (("MLP", "released"), ("query", "query")):
        encoder = build(lambda: MultimodalEncoder(config.vision, config.t5, form, query=config.query), device, dtype)
        length = args.pictures * encoder.image_tokens + TEXT
        x = torch.randn(1, length, config.t5.width, device=device).to(dtype)              # (1, S, C)
        mask = torch.ones(1, length, dtype=torch.bool, device=device)
        prefix = random_prefix(config.decoder, sequences, length, device, dtype)
        cache = decode_bytes(config.decoder, sequences, length + config.grid**2, dtype.itemsize)
        cache -= decode_bytes(config.decoder, 0, 0, dtype.itemsize)
        rows += [timed(f"{name}: CLIP and connector", lambda: encoder.connector(encoder.clip(refs), words), device, 3),
                 timed(f"{name}: T5, {length} rows", lambda: encoder.t5.encode(x, mask), device, 3,
                       flops=t5_flops(config.t5, 1, length)),
                 timed(f"{name}: prefill, cache {cache / 2**30:.2f} GiB", lambda: decoder.prefill(prefix, config.grid),
                       device, 3, flops=decoder_flops(config.decoder, sequences, length, length, 1))]
    return rows


@torch.inference_mode()
def bench_vqgan(config, args, device, dtype):
    """The image tokenizer, always in fp32: images to tokens and back."""
    network = build(lambda: VQGAN(config.vqgan), device, torch.float32)
    pixels = torch.rand(args.batch, 3, args.pixels, args.pixels, device=device)           # (B, 3, H, W)
    tokens = network.encode(pixels)                                                       # (B, T)
    return [timed(f"encode {args.pixels} px", lambda: network.encode(pixels), device, most=5, samples=args.batch),
            timed(f"decode {args.pixels} px", lambda: network.decode(tokens), device, most=5, samples=args.batch)]


def write_jpegs(folder, count=64):
    """JPEGs of 640 pixels, a mask, and a JSONL with four rows of stage 2 for each of them. -> its path"""
    image = data.open_image(DOG).resize((640, 640), Image.BICUBIC)
    mask = Image.new("L", (640, 640))
    mask.paste(255, (150, 100, 500, 600))
    mask.save(os.path.join(folder, "mask.png"))
    rows = []
    for i in range(count):
        image.rotate(i).save(os.path.join(folder, f"{i}.jpg"), quality=90)
        row = {"source_image": f"{i}.jpg", "input_text": "a dog in the snow", "objects": "dog"}
        rows += [row | {"generation_only": True},
                 row | {"image_path": "mask.png", "do_mask": True},
                 row | {"image_path": "mask.png", "do_replace": True},
                 row | {"image_path": f"{(i + 1) % count}.jpg"}]
    path = os.path.join(folder, "rows.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def bench_loader(config, args, device, dtype):
    """Stage 2's samples from JPEGs, on one thread as a worker has it: reading, cropping, masks, prompts."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        dataset = data.TaskData([write_jpegs(folder)], data.Processor(byte_tokenizer()), args.pixels)
        torch.set_num_threads(1)
        start = time.perf_counter()
        for _ in data.batches(dataset, 0, args.samples, args.batch):
            pass
        seconds = time.perf_counter() - start
        torch.set_num_threads(threads)
    return [{"what": f"{args.samples} samples of {args.pixels} px", "seconds": seconds, "samples": args.samples}]


def print_memory(config, args):
    """GiB that sampling an image takes, by formula: weights and cache; activations add a few hundred MiB."""
    with torch.device("meta"):
        mentor = Mentor(config)
    numbers = {name: sum(p.numel() for p in part.parameters()) for name, part in mentor.named_children()}
    rounded = {name: sum(module.weight.numel() for module in part.modules() if isinstance(module, nn.Linear))
               for name, part in mentor.named_children()}                   # what int8 is for; all else stays in fp32
    positions = args.prefix + config.grid**2
    sequences = args.batch * (2 if args.guidance else 1)
    cache = 2 * config.decoder.layers * positions * config.decoder.width * sequences
    for name, dtype in DTYPES.items():
        encoder_itemsize = 4 if name == "fp16" else dtype.itemsize                        # T5 overflows in fp16
        encoder = numbers["encoder"] * encoder_itemsize
        rest = (numbers["decoder"] + numbers["projector"] + cache) * dtype.itemsize + 4 * numbers["vqgan"]
        if name == "int8":
            encoder = 4 * numbers["encoder"] - 3 * rounded["encoder"]
            rest += 3 * sum(numbers[part] - rounded[part] for part in ("decoder", "projector"))
        for flag, total in (("", encoder + rest), (" --offload", max(encoder, rest))):
            cards = [f"{card} GB" for card in CARDS if total + 0.75 * 2**30 < card * 1e9]
            what = "CPUs" if name == "int8" else "cards"
            print(f"--dtype {name}{flag}".ljust(22) + f"{total / 2**30:6.1f} GiB   {what}: " + (
                      ", ".join(cards) or f"none of up to {CARDS[-1]} GB"))


# ---------------------------------------------------------------------------------------------------------------------
# The table

def add_shares(row, ceilings):
    """row["share"]: what part of each ceiling the row reaches, of each where its count is known."""
    row["share"] = {}
    for ceiling, count in (("read", "bytes"), ("product", "flops")):
        if count in row:
            row["share"][ceiling] = row[count] / row["seconds"] / ceilings[ceiling]


def format_row(row):
    """A row's time, its rates, and its share of the ceiling that it comes nearer to."""
    seconds, per_second, gigabytes, gigaflops, share = row["seconds"], "", "", "", ""
    for unit in ("tokens", "samples"):
        if unit in row:
            per_second = f"{row[unit] / seconds:,.1f} {unit}"
    if "bytes" in row:
        gigabytes = f"{row['bytes'] / seconds / 1e9:,.1f}"
    if "flops" in row:
        gigaflops = f"{row['flops'] / seconds / 1e9:,.1f}"
    if row["share"]:
        ceiling = max(row["share"], key=row["share"].get)
        share = f"{row['share'][ceiling]:12.0%} of {ceiling}"
    line = f"{row['what']:34}{1000 * seconds:8,.1f} ms{per_second:>18}{gigabytes:>8}{gigaflops:>9}{share}"
    return line.rstrip()


moderate = cli.checked(int, lambda value: 0 < value <= 1 << 16, "a whole number from 1 to 65,536")
COMMANDS = {    # what measures it (None: nothing does, a formula is printed); default size, batch, pixels a side
    "decode": (bench_decode, "XL", 1, 512),
    "train": (bench_train, "B", 4, 256),
    "encode": (bench_encode, "XL", 1, 512),
    "prefix": (bench_prefix, "XL", 1, 512),
    "vqgan": (bench_vqgan, "XL", 1, 256),
    "loader": (bench_loader, "XL", 16, 512),
    "memory": (None, "XL", 1, 512),
}


def parse(argv):
    """The command line -> arguments, defaults filled in."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--size", choices=SIZES, help="default: B for train, else XL")
    parser.add_argument("--batch", type=moderate, help="images; default: 4 for train, 16 for loader, else 1")
    parser.add_argument("--prefix", type=moderate, default=512, help="rows of the prefix (default 512)")
    parser.add_argument("--pictures", type=moderate, default=1, help="reference images of prefix (default 1)")
    parser.add_argument("--pixels", type=moderate, help="a side; default: 256 for train and vqgan, else 512")
    parser.add_argument("--guidance", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="the decoder's blocks; default: only for decode on cuda")
    parser.add_argument("--stage", choices=["1", "2"], default="2", help="of train (default 2)")
    parser.add_argument("--samples", type=cli.positive_int, default=256, help="of loader (default 256)")
    parser.add_argument("--device", help="default: cuda, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", help="one after the other; default: bf16 on cuda, else "
                        "fp32; int8 is for decode")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args(argv)
    _, size, batch, pixels = COMMANDS[args.command]
    args.size = args.size or size
    args.batch = args.batch or batch
    args.pixels = args.pixels or pixels
    args.device = cli.pick_device(args.device, ("cuda", "cpu"))
    on_cuda = args.device.startswith("cuda")
    args.dtype = args.dtype or [usual_dtype(args.device)]
    if "int8" in args.dtype and (args.command != "decode" or on_cuda):
        raise InputError("--dtype int8 is for decode on a CPU; take another one")
    if args.compile is None:
        args.compile = args.command == "decode" and on_cuda
    return args


def config_for(args):
    """The network asked for: one of SIZES, with images of --pixels."""
    config = SIZES[args.size]
    patches, factor = config.vision.grid**2, config.vqgan.factor
    if args.prefix < patches:
        raise InputError(f"--prefix is {args.prefix}, but a reference picture alone takes {patches} rows; give more")
    if args.pixels % factor:
        raise InputError(f"--pixels is {args.pixels}, but a token covers {factor} pixels a side; give a multiple")
    return replace(config, image_size=args.pixels, image_id=config.t5.vocab_size - 1)


def main(argv=None):
    """Measures, and prints the table or a JSON object."""
    args = parse(argv)
    config, device = config_for(args), torch.device(args.device)
    if args.command == "memory":
        print_memory(config, args)
        return
    rows, ceilings = [], {}
    for name in args.dtype:
        dtype = DTYPES[name]
        ceilings[name] = {"read": read_rate(device), "product": product_rate(device, computed_in(dtype))}
        for row in COMMANDS[args.command][0](config, args, device, dtype):
            add_shares(row, ceilings[name])
            rows.append(row | {"what": f"{name}: {row['what']}" if len(args.dtype) > 1 else row["what"]})
    peak = cli.used_memory(device)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    if args.json:
        print(json.dumps({**vars(args), "machine": machine, "torch": torch.__version__, "ceilings": ceilings,
                          "rows": rows, "peak_gib": peak}))
        return
    print(f"{args.command}: size {args.size}, batch {args.batch}, {machine}, torch {torch.__version__}")
    for name, ceiling in ceilings.items():
        read, product = ceiling["read"] / 1e9, ceiling["product"] / 1e9
        print(f"ceilings of {name}: read {read:.1f} GB/s, product {product:,.0f} GFLOP/s")
    print(f"{'':34}{'time':>11}{'a second':>18}{'GB/s':>8}{'GFLOP/s':>9}{'of the ceiling':>21}")
    for row in rows:
        print(format_row(row))
    print(f"peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    cli.run(main)
