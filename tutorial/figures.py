"""Makes the figures of the tutorial, each by the command that stands under it.

    python -m tutorial.figures prefix            # writes tutorial/prefix.webp
    python -m tutorial.figures all               # every one of them: half a minute
    python -m tutorial.figures guidance --weights out/tiny/2 --out out/guidance.webp

They show what the bundled model does, whatever its size; those of what trainings taught are in `trainings.py`. Every
figure is 800 pixels wide, on nothing, in colours that read on white and on black.

Shape letters: S prefix rows, T image tokens, P patches of the reference, L = S + T, C T5's width, H heads, V codes.
"""
import argparse
import colorsys
import os
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import cli
import data
import weights
from cli import InputError
from model import guide, left_pad, make_mask
from rope2d import PREFIX_ROPE, rope_table, token_positions
from tutorial import trainings
from tutorial.drawing import BLUE, FAINT, GREEN, HERE, INK, ORANGE, RED, WIDTH, Sheet, encoded
from tutorial.measure import attention_to_prefix, painted, pictures_of, prefix_of

ROOT = os.path.dirname(HERE)
REFERENCE, SUBJECT, TEXT = os.path.join(ROOT, "assets", "dog_face.png"), "dog face", "a dog face on a meadow"


def example(mentor, task="subject", subject=SUBJECT, text=TEXT):
    """The example's reference with its prompt, or another, as a batch of one."""
    image = data.open_image(REFERENCE)
    return data.collate([mentor.processor(data.prompt_for(task, [subject], text), [image], [subject])])


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 1: what goes in

def draw_reference(mentor):
    """A photograph as CLIP sees it and as the tokenizer writes it at full size: 16 x 16 patches, 32 x 32 tokens."""
    photo = data.open_image(os.path.join(ROOT, "assets", "dog.jpg"))
    sheet, side = Sheet(310), 256
    panels = ((photo, 0, f"the file: {photo.width} x {photo.height} pixels"),
              (data.center_square(photo, 224), 16, "what CLIP reads: 16 x 16 patches"),
              (data.center_square(photo, 512), 32, "what is written: 32 x 32 tokens"))
    for i, (image, cells, caption) in enumerate(panels):
        x = i * (side + 16)
        sheet.paste(data.center_square(image, side), x, 0, side)
        for k in range(1, cells):
            place = k * side // cells
            sheet.pen.line((x + place, 0, x + place, side), fill=(255, 255, 255, 255))
            sheet.pen.line((x, place, x + side, place), fill=(255, 255, 255, 255))
        sheet.text(x + side // 2, side + 12, caption, anchor="ma")
    return sheet.image


def draw_rows(mentor):
    """The example's prompt, row by row: each word, and each patch of the reference where `<image>` stands."""
    config, ids = mentor.config, example(mentor)["ids"][0].tolist()
    side, patch, across, cell = config.vision.grid, config.vision.patch_size, 32, 25
    start, count = ids.index(config.image_id), ids.count(config.image_id)
    below = 62 + cell * -(-count // across)
    sheet = Sheet(below + 86)
    for y, words in ((0, ids[:start]), (below + 24, ids[start + count:])):
        for i, token in enumerate(words):
            word = mentor.processor.tokenizer.decode([token], skip_special_tokens=False)
            word = {" ": "(blank)", "\n": "(line)"}.get(word, word.strip())
            sheet.box(50 * i, y, 49, 40, outline=BLUE)
            sheet.text(50 * i + 24, y + 20, word, BLUE, 11 if len(word) > 5 else 13, "mm")
            sheet.text(50 * i + 24, y + 42, str(token), size=11, anchor="ma")
    picture = data.center_square(data.open_image(REFERENCE), config.vision.image_size)
    for k in range(count):
        left, top = patch * (k % side), patch * (k // side)
        sheet.paste(picture.crop((left, top, left + patch, top + patch)), k % across * cell, 62 + k // across * cell,
                    cell - 3)
    sheet.text(0, below, f"{count} patches, each a row; all have the id {config.image_id}", size=11)
    return sheet.image


def draw_context(mentor):
    """How much T5's rows of the reference's patches change where a word of the prompt does."""
    base, side = example(mentor), 180
    is_image = base["ids"] == mentor.config.image_id
    cells = mentor.config.vision.grid
    sheet = Sheet(side + 70)
    sheet.paste(data.open_image(REFERENCE), 10, 0, side, smooth=True)
    sheet.text(10 + side // 2, side + 8, "the reference", anchor="ma")
    changes = (("on a meadow -> in the snow", {"text": "a dog face in the snow"}),
               ("dog face -> cat face", {"subject": "cat face", "text": "a cat face on a meadow"}),
               ("without the second line", {"task": "segment"}))
    h = mentor.encoder(base["ids"], base["mask"], base["refs"], base.get("words"))[is_image]        # (P * P, C)
    for i, (caption, change) in enumerate(changes):
        batch = example(mentor, **change)
        other = mentor.encoder(batch["ids"], batch["mask"], batch["refs"], batch.get("words"))
        other = other[batch["ids"] == mentor.config.image_id]
        moved = (other - h).norm(dim=-1) / h.norm(dim=-1)                                 # (P * P,)
        x = 10 + (i + 1) * (side + 18)
        sheet.heat(moved.view(cells, cells) / 0.5, x, 0, side)
        sheet.text(x + side // 2, side + 8, caption, anchor="ma", size=13)
        sheet.text(x + side // 2, side + 30, f"moved by {moved.mean():.0%} of its length", anchor="ma", size=13)
    sheet.text(10, side + 52, "full colour: moved by half its length or more", size=12)
    return sheet.image


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 2: the prefix

def draw_prefix(mentor):
    """Two prompts of a batch padded at the right, then at the left, and the unconditional twin of one."""
    subject = mentor.processor(data.prompt_for("subject", [SUBJECT], TEXT), [data.open_image(REFERENCE)], [SUBJECT])
    batch = data.collate([subject, mentor.processor("a volcano at night")])
    ids, mask = batch["ids"], batch["mask"]
    kinds = mask.long() + (ids == mentor.config.image_id)                                 # 0 padding, 1 text, 2 image
    rows = [("as T5 reads them: padded at the right", kinds, 0),
            ("as the decoder reads them: padded at the left, then the image's tokens", left_pad(kinds, mask), 12),
            ("their unconditional twins: same length, same padding, learned rows", 3 * left_pad(mask, mask), 12)]
    sheet, length = Sheet(295), ids.size(1)
    step = (WIDTH - 8) / (length + 12)
    colours = {1: BLUE, 2: ORANGE, 3: RED, 4: GREEN}
    for i, (caption, values, written) in enumerate(rows):
        y = i * 88
        sheet.text(4, y, caption)
        for j, line in enumerate(values.tolist()):
            for k, kind in enumerate(line + [4] * written):
                left, right = round(4 + k * step), round(4 + (k + 1) * step)
                sheet.box(left, y + 22 + 26 * j, right - left - 1, 20, colours.get(kind, FAINT))
    for i, (name, colour) in enumerate((("text", BLUE), ("patch of the reference", ORANGE), ("learned row", RED),
                                        ("image token", GREEN), ("padding", FAINT))):
        x = 4 + i * 158
        sheet.box(x, 270, 14, 14, colour, INK)
        sheet.text(x + 20, 268, name, size=13)
    return sheet.image


def draw_mask(mentor):
    """`make_mask` of a prefix of six rows, the first two of them padding, and four image tokens; the same without the
    open diagonal."""
    valid = torch.tensor([[False] * 2 + [True] * 8])
    open_cells = make_mask(valid)[0, 0] == 0                                              # (L, L)
    sheet, cell, names = Sheet(330), 24, ["pad", "pad", "The", "img", "img", "dot", "t0", "t1", "t2", "t3"]
    for n, (x0, caption) in enumerate(((60, "make_mask"), (470, "causal and padding alone"))):
        for i in range(10):
            sheet.text(x0 - 8, 40 + i * cell + 12, names[i], size=13, anchor="rm")
            sheet.text(x0 + i * cell + 12, 34, names[i], size=11, anchor="mb")
            for j in range(10):
                rescued = i == j and not valid[0, i]
                colour = BLUE if open_cells[i, j] and not rescued else RED if rescued and n == 0 else None
                sheet.box(x0 + j * cell, 40 + i * cell, cell - 2, cell - 2, colour, FAINT)
        if n:
            for i in range(2):
                sheet.text(x0 + 250, 40 + i * cell + 12, "nothing: NaN", RED, 13, "lm")
        sheet.text(x0 + 5 * cell, 4, caption, anchor="ma")
    sheet.text(60, 292, "a line is who reads, a column who is read; red: the diagonal of a padding row", size=13)
    sheet.text(60, 310, "line dot, the last of the prefix, predicts t0; line t0 predicts t1", size=13)
    return sheet.image


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 3: rows and columns

def draw_angles(mentor):
    """A 4 x 4 grid by hand: how far row and column turn the fastest pair of each, and whom a token matches."""
    sheet, cell = Sheet(330), 66
    table = rope_table(token_positions(4), head_dim=8)                                    # (16, 4, 2): cos, sin
    for k, pairs in enumerate(table.tolist()):
        x, y = 20 + (k % 4) * cell, 30 + (k // 4) * cell
        for (cos, sin), dx, colour in ((pairs[0], 17, BLUE), (pairs[2], 47, ORANGE)):
            cx, cy = x + dx, y + 28
            sheet.pen.ellipse((cx - 13, cy - 13, cx + 13, cy + 13), outline=FAINT)
            sheet.pen.line((cx, cy, cx + 13 * cos, cy - 13 * sin), fill=colour, width=3)
        sheet.text(x + 32, y + 46, str(k), size=12, anchor="ma")
    sheet.text(20, 4, "blue: turned by the row, orange: by the column", size=13)
    query = 4 * 1 + 2
    turned = torch.view_as_complex(table.contiguous())                                    # (16, 4)
    scores = (turned[query].conj() * turned).real.sum(dim=-1)                             # (16,), equal contents
    for k, score in enumerate(scores.tolist()):
        x, y = 400 + (k % 4) * cell, 30 + (k // 4) * cell
        sheet.box(x, y, cell - 3, cell - 3, (*GREEN, int(130 * (score / 4)**2)), RED if k == query else INK)
        sheet.text(x + 31, y + 31, f"{score:.2f}", size=14, anchor="mm")
    sheet.text(400, 4, "score of token 6 with a token of equal content", size=13)
    sheet.text(20, 304, "the fast pair turns by 1 radian a step, so 57 degrees; the slow one by 1/100 of that", size=13)
    return sheet.image


def draw_erased(mentor):
    """The attention of one image token to the prefix, one head, the same weights under the three rotations."""
    batch, grid, found = data.collate(painted(mentor, "reconstruct")), mentor.config.grid, {}
    token, is_image = grid * (grid // 2) + grid // 2, prefix_of(mentor, batch).is_image[0]
    for rotation in PREFIX_ROPE:
        found[rotation] = attention_to_prefix(mentor, batch, rotation)[:, 0, :, token]    # (layers, H, S)
    own = found[mentor.config.decoder.prefix_rope]
    share = own / own.sum(dim=-1, keepdim=True)
    layer, head = divmod(share.amax(dim=-1).argmax().item(), share.size(1))               # the head that looks closest
    sheet, height = Sheet(400), 90
    for i, name in enumerate(("zero", "identity", "grid")):
        line = found[name][layer, head]
        line = line / line.sum()
        y = 26 + i * 124
        sheet.text(4, y - 22, f"{name}: the largest of {len(line)} weights is {line.max():.3f}")
        for k, value in enumerate(line.tolist()):
            x, tall = 4 + k * (WIDTH - 8) / len(line), max(1, round(height * value / 0.25))
            colour = ORANGE if is_image[k] else BLUE
            sheet.box(round(x), y + height - min(height, tall), max(2, round((WIDTH - 8) / len(line)) - 2),
                      min(height, tall), colour)
        sheet.pen.line((4, y + height, WIDTH - 4, y + height), fill=INK)
    sheet.text(4, 382, f"layer {layer + 1}, head {head + 1}, token {token}; orange: the reference's patches, "
               "blue: text; higher bars than 0.25 are cut", size=13)
    return sheet.image


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 4: tokens

def draw_tokens(mentor):
    """A picture, its tokens, what the tokenizer makes of them again, and what is lost, four times as strong."""
    sample = painted(mentor, "picture", seed=2)[0]
    tokens = mentor.vqgan.encode(sample["target"][None])                                  # (1, T)
    copy = mentor.vqgan.decode(tokens)[0]
    lost = (4 * (copy - sample["target"]).abs()).clamp(0, 2) - 1
    sheet, side, grid = Sheet(246), 190, mentor.config.grid
    captions = ("the picture", f"its tokens: {grid} x {grid} of {mentor.config.decoder.codes}", "its copy from the "
                "tokens", "the loss, times 4")
    images = [data.to_image(sample["target"]), code_map(mentor, tokens[0]), data.to_image(copy), data.to_image(lost)]
    for i, (image, caption) in enumerate(zip(images, captions)):
        sheet.paste(image, i * (side + 13), 0, side)
        sheet.text(i * (side + 13) + side // 2, side + 8, caption, anchor="ma", size=14)
    error = ((copy - sample["target"]) / 2).square().mean()
    sheet.text(4, side + 32, f"{-10 * error.log10():.1f} dB; the first tokens: "
               + " ".join(map(str, tokens[0, :12].tolist())) + " ...", size=13)
    return sheet.image


def code_map(mentor, tokens):
    """Tokens as colours that tell them apart and mean nothing else. (T,) -> PIL"""
    grid = mentor.config.grid
    colours = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(t * 0.618 % 1, 0.3 + 0.6 * (t * 0.377 % 1), 0.85))
               for t in tokens.tolist()]
    return Image.fromarray(np.uint8(colours).reshape(grid, grid, 3))


def draw_codebook(mentor, most=1024):
    """Every code as what it paints: a picture of that code alone, its middle cut out; in order of colour."""
    codes, factor = min(mentor.config.decoder.codes, most), mentor.vqgan.factor
    grid, tiles = 4, []
    for start in range(0, codes, 128):
        tokens = torch.arange(start, min(start + 128, codes))
        pixels = mentor.vqgan.decode(tokens[:, None].expand(-1, grid * grid))             # (128, 3, 4 f, 4 f)
        tiles += [data.to_image(p[:, factor:3 * factor, factor:3 * factor]) for p in pixels]
    tiles.sort(key=lambda tile: order_of(np.asarray(tile).mean(axis=(0, 1)) / 255))
    across, side = 32, 25
    sheet = Sheet(side * -(-len(tiles) // across))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % across) * side, (i // across) * side, side - 1)
    return sheet.image


def order_of(colour):
    """Greys by brightness, then colours by hue."""
    hue, saturation, value = colorsys.rgb_to_hsv(*colour)
    return (0, value, 0) if saturation < 0.2 else (1, round(12 * hue), value)


def draw_nats(mentor):
    """What every token of a true picture costs: with the picture as reference, with a caption alone."""
    side, sheet = 180, Sheet(474)
    for i, task in enumerate(("reconstruct", "t2i")):
        sample = painted(mentor, task, count=1, seed=6)[0]
        losses = mentor(data.collate([sample]))[0]                                        # (T,)
        y, grid = i * 240, mentor.config.grid
        sheet.paste(data.to_image(sample["target"]), 4, y, side)
        sheet.heat(losses.view(grid, grid) / np.log(mentor.config.decoder.codes), 204, y, side, RED)
        sheet.text(404, y + 6, {"reconstruct": "reconstruction", "t2i": "text to image"}[task], size=17)
        sheet.text(404, y + 34, sample["prompt"].replace("\n", " ")[:52], size=14)
        sheet.text(404, y + 62, f"mean {losses.mean():.2f} nats: as if one of {losses.mean().exp():.1f} were drawn")
        sheet.text(404, y + 86, f"a tenth of the tokens costs less than {losses.quantile(0.1):.2f},")
        sheet.text(404, y + 108, f"a tenth more than {losses.quantile(0.9):.2f}")
        sheet.text(404, y + 132, f"clear: 0; full red: ln {mentor.config.decoder.codes} = "
                   f"{np.log(mentor.config.decoder.codes):.2f}, blind guessing", size=13)
        sheet.text(204 + side // 2, y + side + 8, "loss of each token", anchor="ma", size=13)
        sheet.text(4 + side // 2, y + side + 8, "the true picture", anchor="ma", size=13)
    return sheet.image


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 5: writing a picture

def draw_stages(mentor):
    """A picture as its tokens are written, in sixteen stages."""
    tokens = mentor.generate(prefix_of(mentor, example(mentor)), [0])               # (1, T)
    picture, grid, side = pictures_of(mentor, tokens)[0], mentor.config.grid, 92
    sheet = Sheet(240)
    cell = side / grid
    for i in range(16):
        written = tokens.size(1) * (i + 1) // 16
        x, y = (i % 8) * 101, (i // 8) * 120
        sheet.paste(picture, x, y, side, smooth=True)
        full, rest = divmod(written, grid)
        top, below = round(full * cell), round((full + 1) * cell)
        if written < tokens.size(1):           # the rest of the row that is being written, and the rows below it
            sheet.clear(x + round(rest * cell), y + top, x + side, y + below)
            sheet.clear(x, y + below, x + side, y + side)
        sheet.box(x, y, side, side, outline=INK)
        sheet.text(x + side // 2, y + side + 3, str(written), size=13, anchor="ma")
    return sheet.image


def draw_guidance(mentor, scales=(1, 1.5, 2, 3, 4, 6, 8), seeds=(0, 3)):
    """The same prompt and seeds under guidance from 1 to 8."""
    prefix, side = prefix_of(mentor, example(mentor)).repeat(len(seeds)), 108
    sheet = Sheet(len(seeds) * 116 + 24)
    for i, scale in enumerate(scales):
        tokens = mentor.generate(prefix, seeds, replace(mentor.config.sampling, cfg_scale=scale))
        for j, image in enumerate(pictures_of(mentor, tokens)):
            sheet.paste(image, 2 + i * 115, j * 116, side, smooth=True)
        sheet.text(2 + i * 115 + side // 2, len(seeds) * 116 + 2, f"{scale:g}", anchor="ma")
    return sheet.image


def draw_choice(mentor):
    """The likeliest next tokens at one place of a picture: as they are, cooler, cut by top-k, cut by top-p."""
    batch = example(mentor)
    prefix, grid = prefix_of(mentor, batch), mentor.config.grid
    tokens = mentor.generate(prefix, [0])[:, :grid * grid // 2 + 3]
    both = prefix.join(mentor.unconditional(prefix))
    logits = mentor.decoder(both, tokens.repeat(2, 1), grid)[:, -1]                       # (2, V)
    guided = guide(logits, mentor.config.sampling.cfg_scale)[0]                           # (V,)
    guided = guided.sort(descending=True).values
    p, cool = guided.softmax(dim=0), (guided / 0.5).softmax(dim=0)
    top_k, top_p = p * (torch.arange(len(p)) < 8), p * (p.cumsum(0) - p < 0.8)
    sheet, shown = Sheet(210), 24
    panels = (("as it is", p), ("temperature 0.5", cool), ("top-k 8", top_k / top_k.sum()),
              ("top-p 0.8", top_p / top_p.sum()))
    highest = max(values.max().item() for _, values in panels)
    for i, (caption, values) in enumerate(panels):
        x = i * 201
        for k, value in enumerate(values[:shown].tolist()):
            tall = max(1, round(140 * value / highest))
            sheet.box(x + 4 + 8 * k, 150 - tall, 6, tall, BLUE)
        sheet.pen.line((x + 4, 150, x + 4 + 8 * shown, 150), fill=INK)
        sheet.text(x + 100, 158, caption, anchor="ma")
        sheet.text(x + 100, 180, f"{(values > 1e-3).sum()} above 0.001", size=13, anchor="ma")
    return sheet.image


def draw_cache(mentor):
    """The cache's positions: all of the prefix at once, then one a step; and what they weigh."""
    sheet = Sheet(238)
    for line, (caption, prefix, written) in enumerate((("prefill", 10, 0), ("step 1", 10, 1), ("step 2", 10, 2),
                                                       ("step 9", 10, 9))):
        y = line * 34
        sheet.text(4, y + 5, caption)
        for k in range(26):
            new = k >= prefix + written - (prefix if written == 0 else 1) and k < prefix + written
            colour = (GREEN if written else BLUE) if new else INK if k < prefix + written else None
            sheet.box(80 + 27 * k, y, 23, 24, colour, FAINT)
    sheet.text(80, 138, "colour: computed now; grey: read again; empty: allocated, hidden by the mask", size=13)
    sizes = (("this model", mentor.config.decoder, example(mentor)["ids"].size(1), mentor.config.grid**2),
             ("MENTOR, 512 pixels, one reference", None, 512, 1024))
    for i, (name, config, rows, tokens) in enumerate(sizes):
        layers, heads, channels = (36, 20, 64) if config is None else (config.layers, config.heads, config.head_dim)
        numbers = layers * 2 * 2 * heads * (rows + tokens) * channels
        sheet.text(4, 170 + 32 * i, f"{name}: {layers} layers x (keys, values) x 2 for guidance x {heads} heads x "
                   f"({rows} + {tokens}) x {channels}", size=13)
        sheet.text(24, 186 + 32 * i, f"= {numbers / 1e6:,.1f} million numbers, {4 * numbers / 2**20:,.0f} MiB in fp32",
                   size=13)
    return sheet.image


# ---------------------------------------------------------------------------------------------------------------------
# The command line

FIGURES = {
    "reference": draw_reference,
    "rows": draw_rows,
    "context": draw_context,
    "prefix": draw_prefix,
    "mask": draw_mask,
    "angles": draw_angles,
    "erased": draw_erased,
    "tokens": draw_tokens,
    "codebook": draw_codebook,
    "nats": draw_nats,
    "stages": draw_stages,
    "guidance": draw_guidance,
    "choice": draw_choice,
    "cache": draw_cache,
    "tasks": trainings.draw_tasks,
    "ablation": trainings.draw_ablation,
    "rotations": trainings.draw_rotations,
    "losses": trainings.draw_losses,
}
SMALL = {"guidance": {"scales": (1, 3), "seeds": (0,)}, "codebook": {"most": 64}}         # what --small draws less of


def parse(argv):
    """The command line -> arguments."""
    parser = cli.Parser(prog="python -m tutorial.figures", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*FIGURES, "all"], metavar="NAME", help=f"{', '.join(FIGURES)}, or all")
    parser.add_argument("--weights", default="tiny", help="a small model's folder (default: the bundled one)")
    parser.add_argument("--out", help="a WebP file, of all a folder (default tutorial/NAME.webp)")
    parser.add_argument("--small", action="store_true", help="less of what takes long, for a look or a test")
    args = parser.parse_args(argv)
    if args.out and args.name != "all" and not args.out.endswith(".webp"):
        raise InputError(f"--out {args.out}: figures are written as WebP; give a name that ends in .webp")
    return args


@torch.inference_mode()
def main(argv=None):
    """Draws one figure, or all."""
    args = parse(argv)
    mentor = weights.load(args.weights)
    torch.set_num_threads(1)                   # a small model gains nothing from a second one
    for name in FIGURES if args.name == "all" else [args.name]:
        path = args.out or os.path.join(HERE, f"{name}.webp")
        if args.out and args.name == "all":
            path = os.path.join(args.out, f"{name}.webp")
        image = FIGURES[name](mentor, **SMALL.get(name, {}) if args.small else {})
        with cli.atomic_file(path) as temporary, open(temporary, "wb") as file:
            file.write(encoded(image))
        print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
