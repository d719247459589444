"""Thirty scenes painted by code, 64 x 64 pixels, for `emoji.py` to put its subjects on.

Twenty places and ten plain colours, each with random geometry and colours and with three phrases that a caption may use
for it. All of them stay recognisable behind a subject that covers half the picture: what makes a scene lies along the
edges too. They are painted at twice the size and reduced, and kept free of fine texture, which a small tokenizer could
not hold.

    image = scenes.paint(np.random.default_rng(0), "snow")           # PIL RGB

`python emoji.py look` shows all of them. Next: `sprites.py`.
"""
import colorsys
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64                # pixels a side
S = 2 * SIZE             # the canvas; all coordinates below are its pixels
SCENES = {}              # name -> (its phrases, function that paints it on a Canvas)


# ---------------------------------------------------------------------------------------------------------------------
# What scenes are painted with

class Canvas:
    """A picture of S x S pixels with its random numbers. Colours are hue, saturation, value in 0..1, a bit varied."""

    def __init__(self, rng):
        self.rng, self.image = rng, Image.new("RGB", (S, S))
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self.turn = rng.uniform(-0.02, 0.02)             # one shift of hue for all of the scene

    def u(self, low, high, n=None):
        """Uniform: a float, or an array of n."""
        return self.rng.uniform(low, high, n)

    def tone(self, hue, saturation, value, alpha=255):
        """-> RGBA tuple near the colour."""
        ds, dv = self.rng.uniform(-0.04, 0.04, 2).tolist()
        saturation = min(max(saturation + ds, 0), 1) if saturation else 0
        rgb = colorsys.hsv_to_rgb((hue + self.turn) % 1, saturation, min(max(value + dv, 0), 1))
        return (*(round(255 * channel) for channel in rgb), alpha)

    def fade(self, *colours, top=0, bottom=S):
        """Rows from one colour to the next, evenly spaced."""
        rows = np.linspace(0, len(colours) - 1, bottom - top)
        rgb = np.stack([np.interp(rows, range(len(colours)), channel) for channel in np.array(colours).T[:3]], -1)
        self.image.paste(Image.fromarray(rgb.astype(np.uint8)[:, None]).resize((S, bottom - top)), (0, top))

    def hills(self, y, height, colour):
        """Ground up to about row y, with a soft random skyline."""
        x = np.linspace(0, S, 17)
        waves = sum(np.sin(x / S * 2 * np.pi * f + self.u(0, 6.3)) / f for f in (1, 1.7, 2.9))
        skyline = np.column_stack([x, y + height / 2 * waves])
        self.draw.polygon([(0, S), *map(tuple, skyline.tolist()), (S, S)], fill=colour)

    def dot(self, x, y, r, colour, ry=None):
        """A disc or ellipse."""
        ry = r if ry is None else ry
        self.draw.ellipse((x - r, y - ry, x + r, y + ry), fill=colour)

    def dots(self, n, y0, y1, r0, r1, *colours):
        """n discs anywhere between the rows, each of one of the colours."""
        for i, (x, y, r) in enumerate(self.rng.uniform((0, y0, r0), (S, y1, r1), (n, 3)).tolist()):
            self.dot(x, y, r, colours[i % len(colours)])

    def leaf(self, x, y, length, angle, colour, rib=None):
        """A pointed leaf from (x, y)."""
        t = np.linspace(0, 1, 7)
        width = length * 0.22 * np.sin(np.pi * t)
        along = np.concatenate([t, t[::-1]]) * length
        across = np.concatenate([width, -width[::-1]])
        c, s = np.cos(angle), np.sin(angle)
        points = np.column_stack([x + c * along - s * across, y + s * along + c * across])
        self.draw.polygon(list(map(tuple, points.tolist())), fill=colour)
        if rib:
            self.draw.line((x, y, x + c * length, y + s * length), fill=rib, width=2)

    def pine(self, x, y, height, colour, snow=None):
        """A conifer that stands at (x, y)."""
        self.draw.rectangle((x - 2, y - height * 0.15, x + 2, y), fill=(80, 55, 40))
        for k in range(3):
            top, half = y - height * (1 - 0.25 * k), height * (0.16 + 0.07 * k)
            self.draw.polygon([(x, top), (x - half, top + height * 0.4), (x + half, top + height * 0.4)], fill=colour)
            if snow:
                self.draw.polygon([(x, top), (x - half / 2, top + height * 0.2), (x + half / 2, top + height * 0.2)],
                                  fill=snow)


def scene(*phrases):
    """Enters a painting function under its own name, with the phrases that a caption may use for it."""
    def enter(function):
        SCENES[function.__name__.replace("_", " ")] = phrases, function
        return function
    return enter


# ---------------------------------------------------------------------------------------------------------------------
# The scenes: name = the function's, phrases = what a caption may call it

@scene("in the snow", "on a snowy hill", "in winter")
def snow(c):
    """Snowy hills and flakes, pines at both sides."""
    c.fade(c.tone(0.58, 0.25, 0.8), c.tone(0.58, 0.1, 0.95), bottom=80)
    for x in (*c.u(0, 40, 2), *c.u(88, S, 2)):
        c.pine(x, c.u(72, 90), c.u(40, 60), c.tone(0.42, 0.45, 0.4), c.tone(0.58, 0.03, 0.98))
    c.hills(72, 8, c.tone(0.6, 0.1, 0.93))
    c.hills(92, 8, c.tone(0.58, 0.03, 0.98))
    c.dots(40, 0, S, 1.2, 2.8, (255, 255, 255))


@scene("on the beach", "at the sea", "on the sand under a palm")
def beach(c):
    """Sky, sea and sand, a palm leaning in from one side."""
    c.fade(c.tone(0.56, 0.5, 0.95), c.tone(0.54, 0.2, 1), bottom=48)
    c.fade(c.tone(0.52, 0.75, 0.75), c.tone(0.48, 0.5, 0.85), top=48, bottom=S)
    shore = c.u(70, 82)
    c.hills(shore - 4, 5, (255, 255, 255))
    c.hills(shore, 5, c.tone(0.12, 0.38, 0.95))
    side = c.rng.choice((-1, 1))
    x, y = 64 + side * c.u(38, 48), c.u(20, 30)
    c.draw.line((x + side * 12, 100, x + side * 4, 60, x, y), fill=c.tone(0.08, 0.5, 0.5), width=6)
    for angle in np.linspace(-0.4, 3.6, 7) + c.u(-0.2, 0.2):
        c.leaf(x, y, c.u(28, 38), angle, c.tone(0.36, 0.75, 0.5))


@scene("in the jungle", "among big green leaves", "in a rainforest")
def jungle(c):
    """Large overlapping leaves in every direction."""
    c.fade(c.tone(0.36, 0.6, 0.45), c.tone(0.38, 0.8, 0.15))
    for x, y, length, angle in c.rng.uniform((-20, -20, 36, 0), (148, 148, 64, 6.3), (22, 4)).tolist():
        colour = c.tone(0.3 + 0.0025 * (angle * 7 % 40), 0.7, 0.3 + length / 200)
        c.leaf(x, y, length, angle, colour, rib=c.tone(0.25, 0.5, 0.75, 150))


@scene("in the desert", "among sand dunes and cacti", "in the hot desert")
def desert(c):
    """Dunes under a pale sun, a cactus at each side."""
    c.fade(c.tone(0.1, 0.35, 1), c.tone(0.13, 0.2, 1), bottom=70)
    c.dot(c.u(20, 108), c.u(14, 30), 10, (255, 255, 240))
    c.hills(62, 10, c.tone(0.08, 0.6, 0.85))
    for x, y in ((c.u(8, 26), c.u(84, 100)), (c.u(102, 120), c.u(80, 100))):
        green, tall = c.tone(0.35, 0.6, 0.5), c.u(36, 52)
        for dx, low, high in ((0, 0, tall), (-11, tall * 0.4, tall * 0.75), (11, tall * 0.3, tall * 0.65)):
            c.draw.rounded_rectangle((x + dx - 4, y - high, x + dx + 4, y - low), 4, fill=green)
        c.draw.rectangle((x - 11, y - tall * 0.42, x + 11, y - tall * 0.3), fill=green)
    c.hills(88, 12, c.tone(0.1, 0.6, 0.95))
    c.hills(112, 8, c.tone(0.07, 0.65, 0.85))


@scene("in the city at night", "in front of skyscrapers at night", "in a town by night")
def city_at_night(c):
    """Dark towers with lit windows under the moon."""
    c.fade(c.tone(0.66, 0.75, 0.3), c.tone(0.75, 0.55, 0.55))
    c.dot(c.u(20, 108), c.u(12, 20), 8, c.tone(0.14, 0.2, 1))
    x = -c.u(0, 12)
    while x < S:
        wide, top = c.u(18, 30), c.u(16, 70)
        c.draw.rectangle((x, top, x + wide - 2, S), fill=c.tone(0.64, 0.5, 0.16))
        for y in np.arange(top + 6, S, 12):
            for at in np.arange(x + 4, x + wide - 7, 8):
                if c.rng.random() < 0.6:
                    c.draw.rectangle((at, y, at + 4, y + 5), fill=(255, 215, 90))
        x += wide


@scene("under water", "at the bottom of the sea", "deep in the ocean")
def under_water(c):
    """Light from above, weeds from below, bubbles."""
    c.fade(c.tone(0.5, 0.6, 0.9), c.tone(0.56, 0.85, 0.65), c.tone(0.62, 0.9, 0.35))
    for x in c.u(0, S, 4):
        c.draw.polygon([(x, 0), (x + 14, 0), (x - 20, S), (x - 52, S)], fill=(255, 255, 255, 28))
    c.hills(116, 6, c.tone(0.13, 0.3, 0.6))
    for x in c.rng.permutation([8, 22, 36, 92, 106, 120])[:5]:
        y = np.linspace(S, c.u(60, 95), 9)
        c.draw.line(list(zip((x + 5 * np.sin(y / 7 + x)).tolist(), y.tolist())), fill=c.tone(0.4, 0.8, 0.5), width=6)
    for x, y, r in c.rng.uniform((0, 0, 2.5), (S, 110, 6), (14, 3)).tolist():
        c.draw.ellipse((x - r, y - r, x + r, y + r), outline=(220, 250, 255), width=2)


@scene("in space", "among the stars", "in outer space")
def space(c):
    """Stars, faint nebulae, a ringed planet near the edge."""
    c.fade(c.tone(0.7, 0.7, 0.08), c.tone(0.76, 0.7, 0.16))
    for x, y, r in c.rng.uniform((0, 0, 15), (S, S, 40), (6, 3)).tolist():
        c.dot(x, y, r, c.tone(0.8, 0.8, 0.5, 36), r * 0.6)
    c.dots(60, 0, S, 0.8, 2.2, (255, 255, 255), (255, 240, 190), (190, 210, 255))
    x, y, r, hue = c.rng.choice((18, 110)), c.u(14, 110), c.u(10, 15), c.rng.choice((0.04, 0.12, 0.9))
    c.dot(x, y, r, c.tone(hue, 0.6, 0.85))
    c.draw.ellipse((x - 1.8 * r, y - 0.4 * r, x + 1.8 * r, y + 0.4 * r), outline=c.tone(hue, 0.25, 1), width=3)


@scene("in a wheat field", "in a field of ripe grain", "among golden wheat")
def wheat_field(c):
    """Ears of grain below a blue sky."""
    c.fade(c.tone(0.57, 0.55, 0.95), c.tone(0.55, 0.2, 1), bottom=56)
    c.fade(c.tone(0.13, 0.6, 0.95), c.tone(0.11, 0.75, 0.7), top=48)
    for x, y, lean in sorted(c.rng.uniform((0, 44, -5), (S, 120, 5), (64, 3)).tolist(), key=lambda row: row[1]):
        c.draw.line((x, S, x + lean, y), fill=c.tone(0.12, 0.75, 0.65), width=2)
        c.dot(x + lean, y, 2.6, c.tone(0.125, 0.6, 0.98), 8)


@scene("at sunset", "in the evening sun", "in front of the setting sun")
def sunset(c):
    """A large low sun and its reflections on water."""
    y, x = c.u(76, 88), c.u(40, 88)
    c.fade(c.tone(0.75, 0.6, 0.4), c.tone(0.93, 0.6, 0.8), c.tone(0.05, 0.75, 1), c.tone(0.13, 0.7, 1), bottom=int(y))
    c.dot(x, y, c.u(22, 30), c.tone(0.14, 0.45, 1))
    c.fade(c.tone(0.03, 0.6, 0.6), c.tone(0.8, 0.6, 0.25), top=int(y))
    for dy in range(4, 40, 6):
        half, at = c.u(8, 26), x + c.u(-8, 8)
        c.draw.line((at - half, y + dy, at + half, y + dy), fill=c.tone(0.12, 0.6, 1), width=2)


@scene("on a meadow", "in the green grass", "in a meadow full of flowers")
def meadow(c):
    """Green hills with blades of grass and four-petalled flowers."""
    c.fade(c.tone(0.56, 0.5, 0.98), c.tone(0.54, 0.2, 1), bottom=56)
    c.hills(44, 6, c.tone(0.31, 0.6, 0.75))
    c.hills(66, 6, c.tone(0.29, 0.7, 0.65))
    for x, y, lean in c.rng.uniform((0, 60, -5), (S, S, 5), (40, 3)).tolist():
        c.draw.line((x, y, x + lean, y - 10), fill=c.tone(0.33, 0.75, 0.5), width=2)
    for x, y, hue in c.rng.uniform((0, 70, 0), (S, 124, 1), (16, 3)).tolist():
        petal = c.tone((0.0, 0.92, 0.15, 0.75)[int(hue * 4)], 0.75, 1)
        for dx, dy in ((-3, 0), (3, 0), (0, -3), (0, 3)):
            c.dot(x + dx, y + dy, 2.6, petal)
        c.dot(x, y, 1.8, (255, 245, 160))


@scene("in the rain", "on a rainy day", "in a downpour")
def rain(c):
    """Slanting drops from grey clouds, puddles on the ground."""
    c.fade(c.tone(0.6, 0.2, 0.42), c.tone(0.58, 0.12, 0.62), bottom=96)
    c.fade(c.tone(0.6, 0.12, 0.45), c.tone(0.6, 0.15, 0.35), top=96)
    c.dots(10, -8, 12, 14, 24, c.tone(0.62, 0.15, 0.32), c.tone(0.62, 0.12, 0.38))
    for x, y in c.rng.uniform((6, 104), (120, 122), (5, 2)).tolist():
        c.draw.ellipse((x - 14, y - 4, x + 14, y + 4), fill=c.tone(0.58, 0.3, 0.7), outline=(215, 230, 245))
    for x, y in c.rng.uniform((0, 14), (140, 110), (44, 2)).tolist():
        c.draw.line((x, y, x - 5, y + 14), fill=(200, 225, 250), width=2)


@scene("in the mountains", "in front of high peaks", "in the alps")
def mountains(c):
    """Three peaks with snow caps and a shaded side each."""
    c.fade(c.tone(0.58, 0.45, 0.95), c.tone(0.55, 0.15, 1), bottom=100)
    for x, top in ((c.u(52, 76), c.u(14, 24)), (c.u(8, 24), c.u(4, 18)), (c.u(100, 118), c.u(4, 18))):
        half, y, rock = c.u(44, 54), 104, c.tone(0.65, 0.18, 0.5)
        c.draw.polygon([(x, top), (x - half, y), (x + half, y)], fill=rock)
        c.draw.polygon([(x, top), (x + half, y), (x + half * 0.2, y)], fill=c.tone(0.66, 0.25, 0.38))
        k = 0.34
        c.draw.polygon([(x, top), (x - half * k, top + k * (y - top)), (x - half * k / 2, top + 0.8 * k * (y - top)),
                        (x, top + 1.1 * k * (y - top)), (x + half * k / 2, top + 0.8 * k * (y - top)),
                        (x + half * k, top + k * (y - top))], fill=(250, 252, 255))
    c.hills(98, 6, c.tone(0.38, 0.5, 0.45))
    c.hills(112, 6, c.tone(0.33, 0.5, 0.55))


@scene("on a volcano", "next to a volcano full of lava", "among hot lava")
def volcano(c):
    """A glowing crater with five streams of lava, and sparks."""
    c.fade(c.tone(0.98, 0.7, 0.18), c.tone(0.01, 0.85, 0.5), c.tone(0.05, 0.9, 0.9), bottom=110)
    x, top = c.u(50, 78), c.u(28, 36)
    c.dots(9, 0, 14, 8, 16, c.tone(0.0, 0.3, 0.25, 200))
    c.draw.polygon([(x - 16, top), (x + 16, top), (150, S), (-22, S)], fill=c.tone(0.0, 0.35, 0.17))
    c.dot(x, top, 16, (255, 190, 40), 5)
    for slope in (-1.4, -0.7, 0.1, 0.8, 1.5):
        points = [(x + slope * dy * 0.7 + 5 * np.sin(dy / 9 + slope) + slope * 8, top + dy) for dy in range(0, 96, 12)]
        c.draw.line(points, fill=c.tone(0.05, 0.95, 1), width=6)
    c.hills(116, 5, c.tone(0.06, 0.95, 1))
    c.dots(26, 0, 110, 1, 2.4, (255, 200, 60), (255, 120, 30))


@scene("in an autumn forest", "among autumn trees", "under red and golden leaves")
def autumn_forest(c):
    """Trunks at both sides under red and golden leaves."""
    c.fade(c.tone(0.12, 0.4, 0.98), c.tone(0.1, 0.45, 0.85), bottom=100)
    c.hills(96, 5, c.tone(0.07, 0.7, 0.55))
    for x in (*c.u(4, 40, 2), *c.u(88, 124, 2)):
        c.draw.polygon([(x - 4, 0), (x + 4, 0), (x + 6, c.u(100, 112)), (x - 6, 106)], fill=c.tone(0.06, 0.5, 0.3))
    leaves = [c.tone(hue, 0.85, value) for hue, value in ((0.0, 0.75), (0.04, 0.9), (0.08, 0.95), (0.12, 0.98))]
    c.dots(40, -6, 40, 6, 12, *leaves)
    c.dots(40, 40, S, 2, 4, *leaves)


@scene("on the road", "in the middle of a street", "on a highway")
def road(c):
    """A road that narrows to the horizon, with its markings."""
    c.fade(c.tone(0.56, 0.4, 0.95), c.tone(0.55, 0.15, 1), bottom=48)
    c.fade(c.tone(0.27, 0.5, 0.6), c.tone(0.28, 0.6, 0.5), top=44)
    x = c.u(52, 76)
    c.draw.polygon([(x - 7, 44), (x + 7, 44), (S + 6, S), (-6, S)], fill=c.tone(0.62, 0.06, 0.35))
    for end in (-6, S + 6):
        edge = 1 if end > 0 else -1
        c.draw.polygon([(x + edge * 5, 44), (x + edge * 7, 44), (end, S), (end - edge * 12, S)], fill=(250, 205, 50))
    for t0, t1 in ((0.05, 0.15), (0.25, 0.4), (0.55, 0.74), (0.88, 1.0)):
        (xa, ya), (xb, yb) = ((x + (64 - x) * t, 44 + 84 * t) for t in (t0, t1))
        c.draw.polygon([(xa - 1 - 4 * t0, ya), (xa + 1 + 4 * t0, ya), (xb + 1 + 4 * t1, yb), (xb - 1 - 4 * t1, yb)],
                       fill=(255, 255, 255))


@scene("in the living room", "at home in front of the sofa", "in a cosy room")
def living_room(c):
    """A sofa between a lamp and a window, striped wallpaper."""
    wall, sofa = c.tone(c.u(0.08, 0.16), 0.18, 0.92), c.tone(c.rng.choice((0.0, 0.5, 0.62, 0.83)), 0.5, 0.65)
    c.fade(wall, wall, bottom=90)
    for x in np.arange(c.u(0, 16), S, 16):
        c.draw.rectangle((x, 0, x + 6, 90), fill=(160, 110, 60, 40))
    c.fade(c.tone(0.07, 0.5, 0.55), c.tone(0.07, 0.55, 0.45), top=90)
    c.draw.line((0, 90, S, 90), fill=(255, 255, 255), width=4)
    lamp = c.rng.choice((14, 114))
    c.draw.line((lamp, 30, lamp, 96), fill=(90, 70, 50), width=3)
    c.draw.polygon([(lamp - 7, 10), (lamp + 7, 10), (lamp + 13, 32), (lamp - 13, 32)], fill=(255, 225, 120))
    x = S - lamp
    c.draw.rectangle((x - 14, 8, x + 14, 38), fill=c.tone(0.55, 0.4, 0.9), outline=(120, 80, 40), width=4)
    c.draw.rounded_rectangle((18, 54, 110, 104), 10, fill=sofa)
    for left in (6, 100):
        c.draw.rounded_rectangle((left, 68, left + 22, 112), 8, fill=tuple(int(v * 0.8) for v in sofa[:3]))
    c.draw.rectangle((26, 86, 102, 110), fill=tuple(int(v * 0.9) for v in sofa[:3]))


@scene("in the kitchen", "on the kitchen counter", "next to the stove")
def kitchen(c):
    """Tiles below cupboards, hanging pans, a stove in the counter."""
    tile, wood = c.tone(c.rng.choice((0.3, 0.5, 0.58)), 0.14, 0.95), c.tone(0.08, 0.5, 0.62)
    c.fade(tile, tile)
    for at in range(0, S, 14):
        c.draw.line((at, 0, at, 96), fill=(170, 185, 195), width=1)
        c.draw.line((0, at, S, at), fill=(170, 185, 195), width=1)
    for left in (0, 44, 88):
        c.draw.rectangle((left, 0, left + 41, 24), fill=c.tone(0.08, 0.5, 0.7), outline=(90, 60, 30))
        c.dot(left + 36, 18, 2, (240, 230, 200))
    for x in c.u(10, 118, 2):
        c.draw.line((x, 24, x, 40), fill=(60, 60, 70), width=3)
        c.dot(x, 48, 10, c.tone(0.04, 0.6, 0.6))
    c.draw.rectangle((0, 92, S, 100), fill=(235, 225, 210))
    c.draw.rectangle((0, 100, S, S), fill=wood)
    x = c.rng.choice((6, 78))
    c.draw.rectangle((x, 94, x + 44, S), fill=(70, 72, 80))
    c.draw.rectangle((x + 6, 108, x + 38, S), fill=(255, 150, 50))


@scene("in the clouds", "high up in the sky", "among white clouds")
def clouds(c):
    """White clouds all over a blue sky."""
    c.fade(c.tone(0.6, 0.65, 0.9), c.tone(0.55, 0.35, 1))
    for x, y in c.rng.permutation([(14, 18), (70, 8), (116, 34), (6, 70), (122, 84), (30, 116), (84, 120)])[:6]:
        x, y = x + c.u(-10, 10), y + c.u(-8, 8)
        for dx, dy, r in ((-14, 3, 9), (0, -3, 13), (14, 2, 10), (0, 6, 11)):
            c.dot(x + dx, y + dy, r + c.u(-1, 2), (255, 255, 255))


@scene("on a stage", "in the spotlight on a stage", "in front of red curtains")
def stage(c):
    """Red curtains around a beam of light."""
    c.fade(c.tone(0.75, 0.5, 0.12), c.tone(0.8, 0.5, 0.22), bottom=100)
    c.fade(c.tone(0.07, 0.6, 0.55), c.tone(0.07, 0.65, 0.4), top=100)
    x = c.u(50, 78)
    c.draw.polygon([(x - 6, 0), (x + 6, 0), (104, 112), (24, 112)], fill=(255, 245, 190, 90))
    c.dot(64, 112, 40, (255, 240, 180, 150), 9)
    hue = c.u(-0.02, 0.0)
    for i in range(4):
        for left in (i * 8 - 2, S - 6 - i * 8):
            c.draw.rectangle((left, 0, left + 8, 108 - 2 * i), fill=c.tone(hue, 0.85, 0.75 if i % 2 else 0.5))
    for i in range(8):
        c.draw.pieslice((i * 16, -14, i * 16 + 16, 18), 0, 180, fill=c.tone(hue, 0.85, 0.8 if i % 2 else 0.6))


@scene("in a library", "in front of bookshelves", "among many books")
def library(c):
    """Four shelves of books."""
    c.fade(c.tone(0.07, 0.6, 0.35), c.tone(0.07, 0.6, 0.28))
    for y in (2, 34, 66, 98):
        x = 3
        while x < S - 6:
            wide, top = int(c.u(6, 12)), y + c.u(0, 7)
            hue = c.rng.choice((0.0, 0.08, 0.14, 0.35, 0.55, 0.62, 0.8))
            c.draw.rectangle((x, top, x + wide - 1, y + 26), fill=c.tone(hue, 0.55, 0.55))
            x += wide + 1
        c.draw.rectangle((0, y + 27, S, y + 31), fill=c.tone(0.07, 0.55, 0.55))


PLAIN = {"red": (0.0, 0.85, 0.85), "orange": (0.075, 0.9, 0.98), "yellow": (0.15, 0.75, 0.98),
         "green": (0.36, 0.7, 0.65), "turquoise": (0.48, 0.6, 0.85), "blue": (0.62, 0.8, 0.8),
         "purple": (0.77, 0.65, 0.6), "pink": (0.91, 0.4, 0.98), "grey": (0.0, 0.0, 0.55), "white": (0.0, 0.0, 0.95)}


def plain(colour, c):
    """One colour, a little darker towards the bottom."""
    c.fade(c.tone(*colour), tuple(int(0.88 * channel) for channel in c.tone(*colour)))


for _name, _colour in PLAIN.items():
    _a = "an" if _name == "orange" else "a"
    SCENES[_name] = ((f"on {_a} {_name} background", f"in front of {_a} {_name} wall", f"on plain {_name}"),
                     partial(plain, _colour))


def paint(rng, name):
    """A scene without subject."""
    canvas = Canvas(rng)
    SCENES[name][1](canvas)
    return canvas.image.reduce(S // SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# Styles of a finished picture

STYLES = {"pencil sketch": ("a pencil sketch of {it}", "{it} drawn with a pencil"),
          "pixel mosaic": ("a pixel mosaic of {it}", "{it} made of big pixels"),
          "silhouette": ("the silhouette of {it}", "{it} as a black silhouette"),
          "night light": ("{it} in the light of a lamp", "{it} lit by a night light")}
PAPER, NIGHT, LAMP = (252, 247, 236), (0.2, 0.25, 0.5), (1.0, 0.85, 0.55)


def in_style(style, picture, cover):
    """The finished picture in one of STYLES. cover: where the subject is, a grey picture."""
    if style == "pixel mosaic":
        return picture.reduce(4).resize(picture.size, Image.NEAREST)
    if style == "silhouette":                                        # against the light
        light = Image.blend(picture, Image.new("RGB", picture.size, (255, 250, 235)), 0.5)
        light.paste((25, 20, 35), mask=cover)
        return light
    if style == "pencil sketch":                                     # dark where a pixel is darker than around it
        grey = picture.convert("L")
        around = np.asarray(grey.filter(ImageFilter.GaussianBlur(2)), dtype=np.float32)
        lines = np.clip((np.asarray(grey) + 8) / (around + 8), 0, 1) ** 3 * (0.8 + around / 1275)
        return Image.fromarray((lines[..., None] * PAPER).astype(np.uint8))
    left, top, right, bottom = cover.getbbox()                       # a lamp's light falls on the subject's middle
    y, x = np.mgrid[:SIZE, :SIZE]
    glow = np.exp(-((x - (left + right) / 2) ** 2 + (y - (top + bottom) / 2) ** 2) / (2 * 15 ** 2))[..., None]
    light = np.array(NIGHT) * (1 - glow) + np.array(LAMP) * glow
    return Image.fromarray((np.asarray(picture) * light).astype(np.uint8))
