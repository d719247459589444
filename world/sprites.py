"""The subjects of the small world: some 900 emoji in two designs as sprites, recoloured and pasted before a background.

The same name looks different in each design, Google's Noto and Microsoft's Fluent, so that it does not tell what to
draw. assets/emoji-*.webp are atlases of both with their transparency; assets/emoji.json holds code points, names,
families and split. A tenth is held out of training in both designs, in whole families of similar ones; of another
tenth the Fluent design is. Every instance of a subject has its own appearance: the hue is turned, the saturation
changed, it may be mirrored.

    python -m world.rows atlas       # draws the atlases again; says which packages they come from

Next: `rules.py`, which changes such pictures in ways that examples show and no prompt names.
"""
import functools
import json
import os
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from cli import InputError, atomic_file
from world import scenes
from world.scenes import SIZE

DESIGNS = ("noto", "fluent")
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"       # Debian's fonts-noto-color-emoji
FLUENT = "node_modules/@lobehub/fluent-emoji-3d/assets"          # npm's @lobehub/fluent-emoji-3d
ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets")


# ---------------------------------------------------------------------------------------------------------------------
# Subjects

CELL, COLUMNS = 64, 32                       # the atlas: pixels a subject, subjects a row
GREY, DYE = 50, (255, 170, 100)              # a subject less colourful than GREY is dyed, so that its hue can be turned
OPAQUE = 127                                 # alpha above this belongs to the subject
NEW_DESIGN = "design"


@dataclass(frozen=True)
class Subject:
    """One emoji in one design."""
    code: str            # its code point
    label: str           # its Unicode name, a few of them shortened
    family: str          # similar subjects share one
    held_out: bool | str # of training: False, True, or NEW_DESIGN where the same emoji is known in another design
    design: str = "noto"
    sprite: Image.Image | None = None        # RGBA, cropped to what is not transparent, the longer side CELL pixels


def atlas_path(design):
    """Where the atlas of a design is."""
    return os.path.join(ASSETS, f"emoji-{design}.webp")


def read_subjects(design):
    """The subjects of assets/emoji.json in one design, without sprites."""
    with open(os.path.join(ASSETS, "emoji.json"), encoding="utf-8") as file:
        rows = json.load(file)["subjects"]
    everyone = []
    for code, label, family, held_out in rows:
        if held_out == NEW_DESIGN and design == DESIGNS[0]:          # the design in which it is known
            held_out = False
        everyone.append(Subject(code, label, family, held_out, design))
    return everyone


@functools.cache
def subjects():
    """All subjects with their sprites, one design after the other. Elsewhere a subject is known by its position in this
    tuple."""
    complete = []
    for design in DESIGNS:
        atlas = Image.open(atlas_path(design)).convert("RGBA")
        for i, subject in enumerate(read_subjects(design)):
            x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
            sprite = atlas.crop((x, y, x + CELL, y + CELL))
            sprite = sprite.crop(sprite.getbbox())
            complete.append(replace(subject, sprite=dyed(sprite)))
    return tuple(complete)


def dyed(sprite):
    """The sprite itself, or a dyed copy if it has little colour of its own."""
    pixels = np.asarray(sprite)
    colourfulness = np.ptp(pixels[..., :3], axis=-1)                                      # (h, w)
    if colourfulness[pixels[..., 3] > OPAQUE].mean() >= GREY:
        return sprite
    copy = ImageChops.multiply(sprite.convert("RGB"), Image.new("RGB", sprite.size, DYE))
    copy.putalpha(sprite.getchannel("A"))
    return copy


# ---------------------------------------------------------------------------------------------------------------------
# Instances of a subject, and where they stand

ALONE, CROWDED = (28, 46), (22, 30)          # longer side of a subject in pixels, alone and beside another


class Crowd(NamedTuple):
    """How several subjects share a picture: each has a cell of its own, in the order of their references. In pixels."""
    sides: tuple         # least and greatest longer side of a subject
    reach: tuple         # how far its centre may lie beside and below or above the cell's
    centres: tuple       # (x, y)
    cells: tuple         # (left, top, right, bottom): all of a subject lies in there, wherever its centre is


CROWDS = {      # by the number of subjects
    2: Crowd(CROWDED, (1, 7), ((16, 34), (48, 34)), ((0, 8, 32, 60), (32, 8, 64, 60))),
    3: Crowd((20, 27), (2, 2), ((16, 16), (48, 16), (32, 48)), ((0, 0, 32, 32), (32, 0, 64, 32), (16, 32, 48, 64))),
    4: Crowd((20, 27), (2, 2), ((16, 16), (48, 16), (16, 48), (48, 48)),
             ((0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64))),
}


@dataclass(frozen=True)
class Appearance:
    """What one instance of a subject looks like: what a prompt never says, and only a reference can show."""
    subject: int
    hue: float = 0.0             # degrees by which its colours are turned
    saturation: float = 1.0      # factor
    flip: bool = False


@dataclass(frozen=True)
class PlacedSprite:
    """An instance at a place: its centre and its longer side in pixels."""
    appearance: Appearance
    x: float
    y: float
    side: float


def hue_matrix(hue, saturation):
    """Turns colours about the grey axis and stretches them from it. -> twelve numbers, four a channel, as PIL's convert
    takes them"""
    angle = np.radians(hue)
    grey = np.full((3, 3), 1 / 3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    matrix = grey + saturation * (np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * across)
    return tuple(np.column_stack([matrix, np.zeros(3)]).ravel().tolist())


@functools.lru_cache(16)         # `contrast` looks at a sprite before `paste` uses it
def render(placed):
    """A PlacedSprite as pixels. -> PIL RGBA, and its left and top in the picture"""
    appearance = placed.appearance
    sprite = subjects()[appearance.subject].sprite
    scale = placed.side / max(sprite.size)
    sprite = sprite.resize([max(1, round(length * scale)) for length in sprite.size], Image.BILINEAR)
    if appearance.flip:
        sprite = sprite.transpose(Image.FLIP_LEFT_RIGHT)
    turned = sprite.convert("RGB").convert("RGB", hue_matrix(appearance.hue, appearance.saturation))
    turned.putalpha(sprite.getchannel("A"))
    return turned, round(placed.x - sprite.width / 2), round(placed.y - sprite.height / 2)


def inside(placed, room_above=0):
    """The same, moved into the frame, with so many pixels of room above."""
    half = placed.side / 2
    x = min(max(placed.x, half), SIZE - half)
    y = min(max(placed.y, half + room_above), SIZE - half)
    return replace(placed, x=x, y=y)


def hat_on(wearer, hat):
    """A hat on the head of a PlacedSprite: above the middle of its topmost sixth. hat: which subject"""
    sprite, left, top = render(wearer)
    rows, columns = np.nonzero(np.asarray(sprite.getchannel("A")) > OPAQUE)
    head = columns[rows <= rows.min() + sprite.height // 6]
    middle = (head.min() + head.max() + 1) / 2
    return PlacedSprite(Appearance(hat), left + middle, top + 1, 0.55 * wearer.side)


# ---------------------------------------------------------------------------------------------------------------------
# Sprites before a background

SHADOW = [value * 45 // 100 for value in range(256)]     # its darkness for every alpha


def contrast(background, placed):
    """How far the colours along the inside of a sprite's outline are from those it covers: mean distance in RGB."""
    sprite, left, top = render(placed)
    covered = background.crop((left, top, left + sprite.width, top + sprite.height))
    covered = np.asarray(covered, dtype=np.float32)
    pixels = np.asarray(sprite, dtype=np.float32)
    mask = np.pad(pixels[..., 3] > OPAQUE, 2)
    inner = mask[:-4, 2:-2] & mask[4:, 2:-2] & mask[2:-2, :-4] & mask[2:-2, 4:]
    rim = mask[2:-2, 2:-2] & ~inner
    if not rim.any():
        return 0.0
    return float(np.sqrt(((pixels[..., :3] - covered)[rim] ** 2).sum(-1)).mean())


def paste(background, sprites, style=None):
    """Pastes PlacedSprites before a background, one after the other, each with a soft shadow.

    style: one of scenes.STYLES, for the finished picture.
    -> PIL RGB, masks: of what is seen of each sprite (SIZE, SIZE) bool
    """
    image = background.copy()
    masks, covers = [], []
    for placed in sprites:
        sprite, left, top = render(placed)
        cover = Image.new("L", image.size)
        cover.paste(sprite.getchannel("A"), (left, top))
        shadow = ImageChops.offset(cover, 1, 2).filter(ImageFilter.BoxBlur(2)).point(SHADOW)
        image.paste((0, 0, 0), mask=shadow)
        image.paste(sprite, (left, top), sprite)
        mask = np.asarray(cover) > OPAQUE
        masks = [below & ~mask for below in masks] + [mask]
        covers.append(cover)
    if style:
        image = scenes.apply_style(style, image, covers[0])
    return image, masks


# ---------------------------------------------------------------------------------------------------------------------
# The atlases

def noto_glyphs(codes):
    """Yields emoji of Google's Noto Color Emoji, PIL RGBA."""
    try:
        font = ImageFont.truetype(FONT, 109, layout_engine=ImageFont.Layout.BASIC)       # the one size it has
    except OSError:
        raise InputError(f"{FONT}: no such font; install it by `apt-get install fonts-noto-color-emoji`") from None
    for code in codes:
        glyph = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(glyph).text((10, 10), chr(int(code, 16)), font=font, embedded_color=True)
        yield glyph


def fluent_glyphs(codes):
    """Yields emoji of Microsoft's Fluent Emoji, PIL RGBA."""
    for code in codes:
        paths = [os.path.join(FLUENT, f"{code}{variant}.webp") for variant in ("", "-fe0f")]
        found = [path for path in paths if os.path.exists(path)]
        if not found:
            raise InputError(f"{paths[0]}: no such file; install it by `npm install @lobehub/fluent-emoji-3d`")
        yield Image.open(found[0]).convert("RGBA")


def draw_atlas(design):
    """Draws a design's atlas again, with the code points of assets/emoji.json."""
    rows = read_subjects(design)
    glyphs = {"noto": noto_glyphs, "fluent": fluent_glyphs}[design]([subject.code for subject in rows])
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(rows) // COLUMNS) * CELL))
    for i, glyph in enumerate(glyphs):
        glyph = glyph.crop(glyph.getbbox())
        glyph.thumbnail((CELL, CELL), Image.LANCZOS)
        sheet.paste(glyph, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    with atomic_file(atlas_path(design)) as temporary:
        if design == "noto":
            sheet.save(temporary, lossless=True, quality=100, method=6)
        else:                                  # soft shading, which lossless files spend three times the bytes on
            sheet.save(temporary, quality=90, method=6)
    print(f"wrote {atlas_path(design)}: {len(rows)} subjects")
