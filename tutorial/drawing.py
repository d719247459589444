"""What all figures are drawn with: a transparent sheet, colours that read on white and on black, a small file.

Next: `measure.py`, `trainings.py`, `figures.py`.
"""
import io
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = os.path.dirname(os.path.abspath(__file__))
WIDTH = 800
MOST_BYTES = 150_000
INK = (128, 128, 128)                      # reads on white and on black alike
BLUE, ORANGE, GREEN, RED = (66, 133, 214), (217, 128, 38), (52, 158, 92), (214, 76, 70)
FAINT = (128, 128, 128, 60)


class Sheet:
    """A transparent picture of WIDTH pixels to draw on."""

    def __init__(self, height):
        self.image = Image.new("RGBA", (WIDTH, height))
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, text, colour=INK, size=15, anchor="la"):
        """anchor: Pillow's, "la" = x, y is the upper left corner, "mm" = the middle."""
        self.pen.text((x, y), text, fill=colour, font=ImageFont.load_default(size=size), anchor=anchor)

    def box(self, x, y, width, height, fill=None, outline=None):
        """A rectangle."""
        self.pen.rectangle((x, y, x + width - 1, y + height - 1), fill=fill, outline=outline)

    def paste(self, image, x, y, side, smooth=False):
        """A square picture, its pixels enlarged as they are or smoothly."""
        resample = Image.BICUBIC if smooth else Image.NEAREST
        self.image.paste(image.convert("RGB").resize((side, side), resample), (x, y))

    def heat(self, values, x, y, side, colour=ORANGE):
        """A map, (n, n) from 0 to 1, in cells from clear to the full colour."""
        alpha = Image.fromarray((255 * np.asarray(values).clip(0, 1)).astype(np.uint8)).resize((side, side), 0)
        layer = Image.new("RGBA", (side, side), (*colour, 255))
        layer.putalpha(alpha)
        self.image.alpha_composite(layer, (x, y))
        self.box(x, y, side, side, outline=INK)

    def clear(self, left, top, right, bottom):
        """Makes a rectangle transparent again."""
        self.image.paste((0, 0, 0, 0), (left, top, right, bottom))

    def curve(self, points, frame, limits, colour):
        """A line through points [(x, y), ...]; frame: x, y, width, height on the sheet; limits: x0, x1, y0, y1."""
        x, y, width, height = frame
        x0, x1, y0, y1 = limits
        places = [(x + width * (px - x0) / (x1 - x0), y + height * (y1 - py) / (y1 - y0)) for px, py in points]
        self.pen.line(places, fill=colour, width=2)


def encoded(image):
    """A picture as the bytes of a WebP file: without loss, or, where that is too large, with little. -> bytes"""
    for options in ({"lossless": True}, {"quality": 90}, {"quality": 75}):
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", **options)
        if buffer.tell() < MOST_BYTES:
            break
    return buffer.getvalue()
