"""Emoji as sprites: the atlas, the look of an instance, and figures pasted before a background; for `emoji.py`.

assets/emoji.webp holds some 900 emoji of Google's Noto font with their transparency, assets/emoji.json their code
points, names, families and split: a tenth is held out, in whole families of similar ones. Every instance of an emoji
has its own look: the hue is turned, the saturation changed, it may be mirrored.

    python emoji.py atlas    # draws assets/emoji.webp anew; needs Debian's fonts-noto-color-emoji

Next: `judge.py`.
"""
import functools
import json
import os
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

import scenes
from data import InputError
from scenes import SIZE

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")


# ---------------------------------------------------------------------------------------------------------------------
# Subjects, and the look of an instance

CELL, COLUMNS = 64, 32                       # the atlas: pixels a subject, subjects a row
GREY, DYE = 50, (255, 170, 100)              # a subject of less colour is dyed, so that it has a hue to be turned
ALONE, CROWDED = (28, 46), (22, 30)          # longer side of a subject in pixels, alone and beside another


@dataclass(frozen=True)
class Subject:
    """One emoji."""
    code: str            # its code point
    label: str           # its Unicode name, a few of them made shorter
    family: str          # similar ones have the same
    held_out: bool
    sprite: Image.Image | None = None        # RGBA, cut to the opaque part, the longer side CELL pixels


@dataclass(frozen=True)
class Look:
    """An instance of a subject. hue: degrees."""
    subject: int
    hue: float = 0.0
    saturation: float = 1.0
    flip: bool = False


@dataclass(frozen=True)
class Figure:
    """An instance at a place: its centre and its longer side in pixels."""
    look: Look
    x: float
    y: float
    side: float


def listed():
    """The subjects of assets/emoji.json, without sprites."""
    with open(os.path.join(ASSETS, "emoji.json"), encoding="utf-8") as file:
        return [Subject(*row) for row in json.load(file)["subjects"]]


@functools.cache
def subjects():
    """All subjects; they are named by their position in this tuple."""
    atlas, found = Image.open(os.path.join(ASSETS, "emoji.webp")).convert("RGBA"), []
    for i, subject in enumerate(listed()):
        x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
        sprite = atlas.crop((x, y, x + CELL, y + CELL))
        sprite = sprite.crop(sprite.getbbox())
        pixels = np.asarray(sprite)
        if np.ptp(pixels[..., :3], axis=-1)[pixels[..., 3] > 127].mean() < GREY:
            dyed = ImageChops.multiply(sprite.convert("RGB"), Image.new("RGB", sprite.size, DYE))
            dyed.putalpha(sprite.getchannel("A"))
            sprite = dyed
        found.append(replace(subject, sprite=sprite))
    return tuple(found)


def hue_matrix(hue, saturation):
    """Colours turned about the grey axis, for Image.convert: twelve numbers, a row of four a channel."""
    angle, grey = np.radians(hue), np.full((3, 3), 1 / 3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    matrix = grey + saturation * (np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * across)
    return tuple(np.column_stack([matrix, np.zeros(3)]).ravel().tolist())


@functools.lru_cache(16)         # a figure is looked at, then painted
def cut(figure):
    """-> sprite (RGBA) as the figure looks, left, top"""
    look, sprite = figure.look, subjects()[figure.look.subject].sprite
    scale = figure.side / max(sprite.size)
    sprite = sprite.resize([max(1, round(length * scale)) for length in sprite.size], Image.BILINEAR)
    sprite = sprite.transpose(Image.FLIP_LEFT_RIGHT) if look.flip else sprite
    turned = sprite.convert("RGB").convert("RGB", hue_matrix(look.hue, look.saturation))
    turned.putalpha(sprite.getchannel("A"))
    return turned, round(figure.x - sprite.width / 2), round(figure.y - sprite.height / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: figures before a background

SHADOW = [value * 45 // 100 for value in range(256)]     # its darkness for every cover


def contrast(ground, figure):
    """How far a figure's colours are from those under it, along the inside of its outline."""
    sprite, left, top = cut(figure)
    under = np.asarray(ground.crop((left, top, left + sprite.width, top + sprite.height)), dtype=np.float32)
    pixels = np.asarray(sprite, dtype=np.float32)
    mask = np.pad(pixels[..., 3] > 127, 2)
    inner = mask[:-4, 2:-2] & mask[4:, 2:-2] & mask[2:-2, :-4] & mask[2:-2, 4:]
    rim = mask[2:-2, 2:-2] & ~inner
    return float(np.sqrt(((pixels[..., :3] - under)[rim] ** 2).sum(-1)).mean()) if rim.any() else 0.0


def inside(figure, head=0):
    """The figure moved into the frame, with `head` pixels of room above."""
    half = figure.side / 2
    return replace(figure, x=min(max(figure.x, half), SIZE - half), y=min(max(figure.y, half + head), SIZE - half))


def hat_on(figure, hat):
    """The figure of a hat on another one's head."""
    sprite, left, top = cut(figure)
    rows, columns = np.nonzero(np.asarray(sprite.getchannel("A")) > 127)
    head = columns[rows <= rows.min() + sprite.height // 6]
    return Figure(Look(hat), left + (head.min() + head.max() + 1) / 2, top + 1, 0.55 * figure.side)


def paint(ground, figures, style=None):
    """Figures before a background, each with a soft shadow. -> picture, masks: of each figure (SIZE, SIZE) bool"""
    picture, masks, subject = ground.copy(), [], None
    for figure in figures:
        sprite, left, top = cut(figure)
        cover = Image.new("L", picture.size)
        cover.paste(sprite.getchannel("A"), (left, top))
        shadow = ImageChops.offset(cover, 1, 2).filter(ImageFilter.BoxBlur(2)).point(SHADOW)
        picture.paste((0, 0, 0), mask=shadow)
        picture.paste(sprite, (left, top), sprite)
        mask = np.asarray(cover) > 127
        masks, subject = [other & ~mask for other in masks] + [mask], subject or cover       # the first
    return (scenes.in_style(style, picture, subject) if style else picture), masks


# ---------------------------------------------------------------------------------------------------------------------
# The atlas

def draw_atlas():
    """Draws assets/emoji.webp anew: the code points of assets/emoji.json in Google's Noto Color Emoji."""
    try:
        font = ImageFont.truetype(FONT, 109, layout_engine=ImageFont.Layout.BASIC)       # the one size it has
    except OSError:
        raise InputError(f"{FONT}: no such font; install it by `apt-get install fonts-noto-color-emoji`") from None
    rows, path = listed(), os.path.join(ASSETS, "emoji.webp")
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(rows) // COLUMNS) * CELL))
    for i, row in enumerate(rows):
        glyph = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(glyph).text((10, 10), chr(int(row.code, 16)), font=font, embedded_color=True)
        glyph = glyph.crop(glyph.getbbox())
        glyph.thumbnail((CELL, CELL), Image.LANCZOS)
        sheet.paste(glyph, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    sheet.save(path, lossless=True, quality=100, method=6)
    print(f"wrote {path}: {len(rows)} subjects")
