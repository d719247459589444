"""Thirty scenes painted by code, 64 x 64 pixels: the backgrounds of the small world, and four styles of its pictures.

Twenty places and ten plain colours, each with random geometry and colours, and each with three phrases that a caption
may use for it. All of them can be recognised behind a subject that covers half the picture, because what makes a scene
lies along the edges too. They are painted at twice the size and reduced, and have no fine texture, which a small
tokenizer could not represent.

    image = scenes.paint(np.random.default_rng(0), "snow")           # PIL RGB

`python -m world.rows look` shows all of them. To add a scene, write one more function below: its name is the scene's.
Next: `sprites.py` puts subjects in front of them.
"""
import colorsys
from functools import partial
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64                # pixels a side
CANVAS = 2 * SIZE        # a scene is painted on this many pixels a side; all coordinates below are in these
SCENES = {}              # name -> Entry
STYLES = {}              # name -> Entry


class Entry(NamedTuple):
    """A scene or a style."""
    phrases: tuple       # what a caption may call it; in a style's, {it} stands for the subject
    paint: Callable      # scene: (canvas) -> None; style: (image, cover) -> image


def enter(table, *phrases):
    """Decorator: enters a function into SCENES or STYLES, under its own name."""
    def decorator(function):
        table[function.__name__.replace("_", " ")] = Entry(phrases, function)
        return function
    return decorator


scene = partial(enter, SCENES)
style = partial(enter, STYLES)


# ---------------------------------------------------------------------------------------------------------------------
# What scenes are painted with

class Canvas:
    """An image of CANVAS x CANVAS pixels and its random numbers. HSV colours are hue, saturation and value in 0..1."""

    def __init__(self, rng):
        self.rng = rng
        self.image = Image.new("RGB", (CANVAS, CANVAS))
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self.hue_shift = rng.uniform(-0.02, 0.02)        # the same for all colours of the scene

    def uniform(self, low, high, n=None):
        """A float, or an array of n."""
        return self.rng.uniform(low, high, n)

    def tone(self, hue, saturation, value, alpha=255):
        """HSV -> RGBA in 0..255, slightly varied."""
        more_saturation, more_value = self.rng.uniform(-0.04, 0.04, 2).tolist()
        hue = (hue + self.hue_shift) % 1
        if saturation > 0:                               # grey stays grey
            saturation = min(max(saturation + more_saturation, 0), 1)
        value = min(max(value + more_value, 0), 1)
        red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
        return red, green, blue, alpha

    def fade(self, *colours, top=0, bottom=CANVAS):
        """Fills rows top..bottom with a fade through HSV colours, each slightly varied."""
        self.fade_rgb(*[self.tone(*colour) for colour in colours], top=top, bottom=bottom)

    def fade_rgb(self, *colours, top=0, bottom=CANVAS):
        """The same through RGB colours, as they are."""
        position = np.linspace(0, len(colours) - 1, bottom - top)
        channels = np.array(colours).T[:3]
        rgb = np.stack([np.interp(position, range(len(colours)), channel) for channel in channels], axis=-1)
        column = Image.fromarray(rgb.astype(np.uint8)[:, None])
        self.image.paste(column.resize((CANVAS, bottom - top)), (0, top))

    def hills(self, y, height, colour):
        """Ground up to about row y, with a soft random skyline."""
        x = np.linspace(0, CANVAS, 17)
        waves = sum(np.sin(x / CANVAS * 2 * np.pi * f + self.uniform(0, 6.3)) / f for f in (1, 1.7, 2.9))
        skyline = np.column_stack([x, y + height / 2 * waves]).tolist()
        self.draw.polygon([(0, CANVAS), *map(tuple, skyline), (CANVAS, CANVAS)], fill=colour)

    def disc(self, x, y, radius, colour, radius_y=None):
        """A disc, or an ellipse where radius_y is given."""
        if radius_y is None:
            radius_y = radius
        self.draw.ellipse((x - radius, y - radius_y, x + radius, y + radius_y), fill=colour)

    def discs(self, n, top, bottom, smallest, largest, *colours):
        """n discs anywhere between two rows, of radii between two, which take the colours in turn."""
        positions = self.rng.uniform((0, top, smallest), (CANVAS, bottom, largest), (n, 3)).tolist()
        for i, (x, y, radius) in enumerate(positions):
            self.disc(x, y, radius, colours[i % len(colours)])

    def leaf(self, x, y, length, angle, colour, rib=None):
        """A pointed leaf that grows from (x, y)."""
        t = np.linspace(0, 1, 7)
        width = length * 0.22 * np.sin(np.pi * t)
        along = np.concatenate([t, t[::-1]]) * length
        across = np.concatenate([width, -width[::-1]])
        cosine, sine = np.cos(angle), np.sin(angle)
        outline = np.column_stack([x + cosine * along - sine * across, y + sine * along + cosine * across])
        self.draw.polygon([tuple(point) for point in outline.tolist()], fill=colour)
        if rib:
            self.draw.line((x, y, x + cosine * length, y + sine * length), fill=rib, width=2)

    def pine(self, x, y, height, colour, snow=None):
        """A conifer that stands at (x, y): a trunk and three triangles, with snow on them."""
        self.draw.rectangle((x - 2, y - height * 0.15, x + 2, y), fill=(80, 55, 40))
        for k in range(3):
            top = y - height * (1 - 0.25 * k)
            half = height * (0.16 + 0.07 * k)
            self.draw.polygon([(x, top), (x - half, top + height * 0.4), (x + half, top + height * 0.4)], fill=colour)
            if snow:
                self.draw.polygon([(x, top), (x - half / 2, top + height * 0.2), (x + half / 2, top + height * 0.2)],
                                  fill=snow)


def paint(rng, name):
    """A scene without subject. -> PIL RGB, SIZE x SIZE"""
    canvas = Canvas(rng)
    SCENES[name].paint(canvas)
    return canvas.image.reduce(CANVAS // SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# The scenes. A function's name is the scene's, its phrases are what a caption may call it.

@scene("in the snow", "on a snowy hill", "in winter")
def snow(canvas):
    """Snowy hills and flakes, pines on both sides."""
    canvas.fade((0.58, 0.25, 0.8), (0.58, 0.1, 0.95), bottom=80)
    for x in (*canvas.uniform(0, 40, 2), *canvas.uniform(88, CANVAS, 2)):
        y, height = canvas.uniform(72, 90), canvas.uniform(40, 60)
        canvas.pine(x, y, height, canvas.tone(0.42, 0.45, 0.4), canvas.tone(0.58, 0.03, 0.98))
    canvas.hills(72, 8, canvas.tone(0.6, 0.1, 0.93))
    canvas.hills(92, 8, canvas.tone(0.58, 0.03, 0.98))
    canvas.discs(40, 0, CANVAS, 1.2, 2.8, (255, 255, 255))


@scene("on the beach", "at the sea", "on the sand under a palm")
def beach(canvas):
    """Sky, sea and sand, a palm that leans in from one side."""
    canvas.fade((0.56, 0.5, 0.95), (0.54, 0.2, 1), bottom=48)
    canvas.fade((0.52, 0.75, 0.75), (0.48, 0.5, 0.85), top=48)
    shore = canvas.uniform(70, 82)
    canvas.hills(shore - 4, 5, (255, 255, 255))
    canvas.hills(shore, 5, canvas.tone(0.12, 0.38, 0.95))
    side = canvas.rng.choice((-1, 1))
    x, y = 64 + side * canvas.uniform(38, 48), canvas.uniform(20, 30)
    canvas.draw.line((x + side * 12, 100, x + side * 4, 60, x, y), fill=canvas.tone(0.08, 0.5, 0.5), width=6)
    for angle in np.linspace(-0.4, 3.6, 7) + canvas.uniform(-0.2, 0.2):
        canvas.leaf(x, y, canvas.uniform(28, 38), angle, canvas.tone(0.36, 0.75, 0.5))


@scene("in the jungle", "among big green leaves", "in a rainforest")
def jungle(canvas):
    """Large overlapping leaves in every direction."""
    canvas.fade((0.36, 0.6, 0.45), (0.38, 0.8, 0.15))
    for x, y, length, angle in canvas.rng.uniform((-20, -20, 36, 0), (148, 148, 64, 6.3), (22, 4)).tolist():
        green = canvas.tone(0.3 + 0.0025 * (angle * 7 % 40), 0.7, 0.3 + length / 200)
        canvas.leaf(x, y, length, angle, green, rib=canvas.tone(0.25, 0.5, 0.75, 150))


@scene("in the desert", "among sand dunes and cacti", "in the hot desert")
def desert(canvas):
    """Dunes under a pale sun, a cactus on each side."""
    canvas.fade((0.1, 0.35, 1), (0.13, 0.2, 1), bottom=70)
    canvas.disc(canvas.uniform(20, 108), canvas.uniform(14, 30), 10, (255, 255, 240))
    canvas.hills(62, 10, canvas.tone(0.08, 0.6, 0.85))
    left_cactus = canvas.uniform(8, 26), canvas.uniform(84, 100)
    right_cactus = canvas.uniform(102, 120), canvas.uniform(80, 100)
    for x, y in (left_cactus, right_cactus):
        green = canvas.tone(0.35, 0.6, 0.5)
        tall = canvas.uniform(36, 52)
        for dx, low, high in ((0, 0, tall), (-11, tall * 0.4, tall * 0.75), (11, tall * 0.3, tall * 0.65)):
            canvas.draw.rounded_rectangle((x + dx - 4, y - high, x + dx + 4, y - low), 4, fill=green)
        canvas.draw.rectangle((x - 11, y - tall * 0.42, x + 11, y - tall * 0.3), fill=green)
    canvas.hills(88, 12, canvas.tone(0.1, 0.6, 0.95))
    canvas.hills(112, 8, canvas.tone(0.07, 0.65, 0.85))


@scene("in the city at night", "in front of skyscrapers at night", "in a town by night")
def city_at_night(canvas):
    """Dark towers with lit windows under the moon."""
    canvas.fade((0.66, 0.75, 0.3), (0.75, 0.55, 0.55))
    canvas.disc(canvas.uniform(20, 108), canvas.uniform(12, 20), 8, canvas.tone(0.14, 0.2, 1))
    left = -canvas.uniform(0, 12)
    while left < CANVAS:
        width, top = canvas.uniform(18, 30), canvas.uniform(16, 70)
        canvas.draw.rectangle((left, top, left + width - 2, CANVAS), fill=canvas.tone(0.64, 0.5, 0.16))
        for y in np.arange(top + 6, CANVAS, 12):
            for x in np.arange(left + 4, left + width - 7, 8):
                if canvas.rng.random() < 0.6:
                    canvas.draw.rectangle((x, y, x + 4, y + 5), fill=(255, 215, 90))
        left += width


@scene("under water", "at the bottom of the sea", "deep in the ocean")
def under_water(canvas):
    """Light from above, weeds from below, bubbles."""
    canvas.fade((0.5, 0.6, 0.9), (0.56, 0.85, 0.65), (0.62, 0.9, 0.35))
    for x in canvas.uniform(0, CANVAS, 4):
        beam = [(x, 0), (x + 14, 0), (x - 20, CANVAS), (x - 52, CANVAS)]
        canvas.draw.polygon(beam, fill=(255, 255, 255, 28))
    canvas.hills(116, 6, canvas.tone(0.13, 0.3, 0.6))
    for x in canvas.rng.permutation([8, 22, 36, 92, 106, 120])[:5]:
        weed_y = np.linspace(CANVAS, canvas.uniform(60, 95), 9)
        weed_x = x + 5 * np.sin(weed_y / 7 + x)
        canvas.draw.line(list(zip(weed_x.tolist(), weed_y.tolist())), fill=canvas.tone(0.4, 0.8, 0.5), width=6)
    for x, y, radius in canvas.rng.uniform((0, 0, 2.5), (CANVAS, 110, 6), (14, 3)).tolist():
        canvas.draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=(220, 250, 255), width=2)


@scene("in space", "among the stars", "in outer space")
def space(canvas):
    """Stars, faint nebulae, a ringed planet near the edge."""
    canvas.fade((0.7, 0.7, 0.08), (0.76, 0.7, 0.16))
    for x, y, radius in canvas.rng.uniform((0, 0, 15), (CANVAS, CANVAS, 40), (6, 3)).tolist():
        canvas.disc(x, y, radius, canvas.tone(0.8, 0.8, 0.5, 36), radius * 0.6)
    canvas.discs(60, 0, CANVAS, 0.8, 2.2, (255, 255, 255), (255, 240, 190), (190, 210, 255))
    x, y = canvas.rng.choice((18, 110)), canvas.uniform(14, 110)
    radius = canvas.uniform(10, 15)
    hue = canvas.rng.choice((0.04, 0.12, 0.9))
    canvas.disc(x, y, radius, canvas.tone(hue, 0.6, 0.85))
    ring = (x - 1.8 * radius, y - 0.4 * radius, x + 1.8 * radius, y + 0.4 * radius)
    canvas.draw.ellipse(ring, outline=canvas.tone(hue, 0.25, 1), width=3)


@scene("in a wheat field", "in a field of ripe grain", "among golden wheat")
def wheat_field(canvas):
    """Ears of grain below a blue sky."""
    canvas.fade((0.57, 0.55, 0.95), (0.55, 0.2, 1), bottom=56)
    canvas.fade((0.13, 0.6, 0.95), (0.11, 0.75, 0.7), top=48)
    ears = canvas.rng.uniform((0, 44, -5), (CANVAS, 120, 5), (64, 3)).tolist()
    for x, y, lean in sorted(ears, key=lambda ear: ear[1]):          # the near ones last
        canvas.draw.line((x, CANVAS, x + lean, y), fill=canvas.tone(0.12, 0.75, 0.65), width=2)
        canvas.disc(x + lean, y, 2.6, canvas.tone(0.125, 0.6, 0.98), 8)


@scene("at sunset", "in the evening sun", "in front of the setting sun")
def sunset(canvas):
    """A large low sun and its reflections on water."""
    y, x = canvas.uniform(76, 88), canvas.uniform(40, 88)
    canvas.fade((0.75, 0.6, 0.4), (0.93, 0.6, 0.8), (0.05, 0.75, 1), (0.13, 0.7, 1), bottom=int(y))
    canvas.disc(x, y, canvas.uniform(22, 30), canvas.tone(0.14, 0.45, 1))
    canvas.fade((0.03, 0.6, 0.6), (0.8, 0.6, 0.25), top=int(y))
    for dy in range(4, 40, 6):
        half = canvas.uniform(8, 26)
        middle = x + canvas.uniform(-8, 8)
        canvas.draw.line((middle - half, y + dy, middle + half, y + dy), fill=canvas.tone(0.12, 0.6, 1), width=2)


@scene("on a meadow", "in the green grass", "in a meadow full of flowers")
def meadow(canvas):
    """Green hills with blades of grass and four-petalled flowers."""
    canvas.fade((0.56, 0.5, 0.98), (0.54, 0.2, 1), bottom=56)
    canvas.hills(44, 6, canvas.tone(0.31, 0.6, 0.75))
    canvas.hills(66, 6, canvas.tone(0.29, 0.7, 0.65))
    for x, y, lean in canvas.rng.uniform((0, 60, -5), (CANVAS, CANVAS, 5), (40, 3)).tolist():
        canvas.draw.line((x, y, x + lean, y - 10), fill=canvas.tone(0.33, 0.75, 0.5), width=2)
    for x, y, kind in canvas.rng.uniform((0, 70, 0), (CANVAS, 124, 1), (16, 3)).tolist():
        petal = canvas.tone((0.0, 0.92, 0.15, 0.75)[int(kind * 4)], 0.75, 1)
        for dx, dy in ((-3, 0), (3, 0), (0, -3), (0, 3)):
            canvas.disc(x + dx, y + dy, 2.6, petal)
        canvas.disc(x, y, 1.8, (255, 245, 160))


@scene("in the rain", "on a rainy day", "in a downpour")
def rain(canvas):
    """Slanting drops from grey clouds, puddles on the ground."""
    canvas.fade((0.6, 0.2, 0.42), (0.58, 0.12, 0.62), bottom=96)
    canvas.fade((0.6, 0.12, 0.45), (0.6, 0.15, 0.35), top=96)
    canvas.discs(10, -8, 12, 14, 24, canvas.tone(0.62, 0.15, 0.32), canvas.tone(0.62, 0.12, 0.38))
    for x, y in canvas.rng.uniform((6, 104), (120, 122), (5, 2)).tolist():
        puddle = (x - 14, y - 4, x + 14, y + 4)
        canvas.draw.ellipse(puddle, fill=canvas.tone(0.58, 0.3, 0.7), outline=(215, 230, 245))
    for x, y in canvas.rng.uniform((0, 14), (140, 110), (44, 2)).tolist():
        canvas.draw.line((x, y, x - 5, y + 14), fill=(200, 225, 250), width=2)


@scene("in the mountains", "in front of high peaks", "in the alps")
def mountains(canvas):
    """Three peaks with snow caps and a shaded side each."""
    canvas.fade((0.58, 0.45, 0.95), (0.55, 0.15, 1), bottom=100)
    middle_peak = canvas.uniform(52, 76), canvas.uniform(14, 24)
    left_peak = canvas.uniform(8, 24), canvas.uniform(4, 18)
    right_peak = canvas.uniform(100, 118), canvas.uniform(4, 18)
    for x, top in (middle_peak, left_peak, right_peak):
        half, foot = canvas.uniform(44, 54), 104
        rock, shade = canvas.tone(0.65, 0.18, 0.5), canvas.tone(0.66, 0.25, 0.38)
        canvas.draw.polygon([(x, top), (x - half, foot), (x + half, foot)], fill=rock)
        canvas.draw.polygon([(x, top), (x + half, foot), (x + half * 0.2, foot)], fill=shade)
        k, height = 0.34, foot - top                     # the snow comes down k of the height, in three teeth
        cap = [(x, top), (x - half * k, top + k * height), (x - half * k / 2, top + 0.8 * k * height),
               (x, top + 1.1 * k * height), (x + half * k / 2, top + 0.8 * k * height),
               (x + half * k, top + k * height)]
        canvas.draw.polygon(cap, fill=(250, 252, 255))
    canvas.hills(98, 6, canvas.tone(0.38, 0.5, 0.45))
    canvas.hills(112, 6, canvas.tone(0.33, 0.5, 0.55))


@scene("on a volcano", "next to a volcano full of lava", "among hot lava")
def volcano(canvas):
    """A glowing crater with five streams of lava, and sparks."""
    canvas.fade((0.98, 0.7, 0.18), (0.01, 0.85, 0.5), (0.05, 0.9, 0.9), bottom=110)
    x, top = canvas.uniform(50, 78), canvas.uniform(28, 36)
    canvas.discs(9, 0, 14, 8, 16, canvas.tone(0.0, 0.3, 0.25, 200))
    cone = [(x - 16, top), (x + 16, top), (150, CANVAS), (-22, CANVAS)]
    canvas.draw.polygon(cone, fill=canvas.tone(0.0, 0.35, 0.17))
    canvas.disc(x, top, 16, (255, 190, 40), 5)
    for slope in (-1.4, -0.7, 0.1, 0.8, 1.5):
        stream = [(x + slope * dy * 0.7 + 5 * np.sin(dy / 9 + slope) + slope * 8, top + dy) for dy in range(0, 96, 12)]
        canvas.draw.line(stream, fill=canvas.tone(0.05, 0.95, 1), width=6)
    canvas.hills(116, 5, canvas.tone(0.06, 0.95, 1))
    canvas.discs(26, 0, 110, 1, 2.4, (255, 200, 60), (255, 120, 30))


@scene("in an autumn forest", "among autumn trees", "under red and golden leaves")
def autumn_forest(canvas):
    """Trunks on both sides under red and golden leaves."""
    canvas.fade((0.12, 0.4, 0.98), (0.1, 0.45, 0.85), bottom=100)
    canvas.hills(96, 5, canvas.tone(0.07, 0.7, 0.55))
    for x in (*canvas.uniform(4, 40, 2), *canvas.uniform(88, 124, 2)):
        trunk = [(x - 4, 0), (x + 4, 0), (x + 6, canvas.uniform(100, 112)), (x - 6, 106)]
        canvas.draw.polygon(trunk, fill=canvas.tone(0.06, 0.5, 0.3))
    leaves = [canvas.tone(hue, 0.85, value) for hue, value in ((0.0, 0.75), (0.04, 0.9), (0.08, 0.95), (0.12, 0.98))]
    canvas.discs(40, -6, 40, 6, 12, *leaves)
    canvas.discs(40, 40, CANVAS, 2, 4, *leaves)


@scene("on the road", "in the middle of a street", "on a highway")
def road(canvas):
    """A road that narrows to the horizon, with its markings."""
    canvas.fade((0.56, 0.4, 0.95), (0.55, 0.15, 1), bottom=48)
    canvas.fade((0.27, 0.5, 0.6), (0.28, 0.6, 0.5), top=44)
    x = canvas.uniform(52, 76)                           # where it meets the horizon, at row 44
    asphalt = [(x - 7, 44), (x + 7, 44), (CANVAS + 6, CANVAS), (-6, CANVAS)]
    canvas.draw.polygon(asphalt, fill=canvas.tone(0.62, 0.06, 0.35))
    for side, end in ((-1, -6), (1, CANVAS + 6)):
        line = [(x + side * 5, 44), (x + side * 7, 44), (end, CANVAS), (end - side * 12, CANVAS)]
        canvas.draw.polygon(line, fill=(250, 205, 50))
    for far, near in ((0.05, 0.15), (0.25, 0.4), (0.55, 0.74), (0.88, 1.0)):      # shares of the way to the viewer
        far_x, far_y = x + (64 - x) * far, 44 + 84 * far
        near_x, near_y = x + (64 - x) * near, 44 + 84 * near
        dash = [(far_x - 1 - 4 * far, far_y), (far_x + 1 + 4 * far, far_y),
                (near_x + 1 + 4 * near, near_y), (near_x - 1 - 4 * near, near_y)]
        canvas.draw.polygon(dash, fill=(255, 255, 255))


@scene("in the living room", "at home in front of the sofa", "in a cosy room")
def living_room(canvas):
    """A sofa between a lamp and a window, striped wallpaper."""
    wall = canvas.tone(canvas.uniform(0.08, 0.16), 0.18, 0.92)
    sofa = canvas.tone(canvas.rng.choice((0.0, 0.5, 0.62, 0.83)), 0.5, 0.65)
    arms = tuple(int(channel * 0.8) for channel in sofa[:3])
    seat = tuple(int(channel * 0.9) for channel in sofa[:3])
    canvas.fade_rgb(wall, wall, bottom=90)
    for x in np.arange(canvas.uniform(0, 16), CANVAS, 16):
        canvas.draw.rectangle((x, 0, x + 6, 90), fill=(160, 110, 60, 40))
    canvas.fade((0.07, 0.5, 0.55), (0.07, 0.55, 0.45), top=90)
    canvas.draw.line((0, 90, CANVAS, 90), fill=(255, 255, 255), width=4)
    lamp = canvas.rng.choice((14, 114))
    canvas.draw.line((lamp, 30, lamp, 96), fill=(90, 70, 50), width=3)
    canvas.draw.polygon([(lamp - 7, 10), (lamp + 7, 10), (lamp + 13, 32), (lamp - 13, 32)], fill=(255, 225, 120))
    x = CANVAS - lamp
    canvas.draw.rectangle((x - 14, 8, x + 14, 38), fill=canvas.tone(0.55, 0.4, 0.9), outline=(120, 80, 40), width=4)
    canvas.draw.rounded_rectangle((18, 54, 110, 104), 10, fill=sofa)
    for left in (6, 100):
        canvas.draw.rounded_rectangle((left, 68, left + 22, 112), 8, fill=arms)
    canvas.draw.rectangle((26, 86, 102, 110), fill=seat)


@scene("in the kitchen", "on the kitchen counter", "next to the stove")
def kitchen(canvas):
    """Tiles below cupboards, hanging pans, a stove in the counter."""
    tile = canvas.tone(canvas.rng.choice((0.3, 0.5, 0.58)), 0.14, 0.95)
    wood = canvas.tone(0.08, 0.5, 0.62)
    canvas.fade_rgb(tile, tile)
    for position in range(0, CANVAS, 14):
        canvas.draw.line((position, 0, position, 96), fill=(170, 185, 195), width=1)
        canvas.draw.line((0, position, CANVAS, position), fill=(170, 185, 195), width=1)
    for left in (0, 44, 88):
        canvas.draw.rectangle((left, 0, left + 41, 24), fill=canvas.tone(0.08, 0.5, 0.7), outline=(90, 60, 30))
        canvas.disc(left + 36, 18, 2, (240, 230, 200))
    for x in canvas.uniform(10, 118, 2):
        canvas.draw.line((x, 24, x, 40), fill=(60, 60, 70), width=3)
        canvas.disc(x, 48, 10, canvas.tone(0.04, 0.6, 0.6))
    canvas.draw.rectangle((0, 92, CANVAS, 100), fill=(235, 225, 210))
    canvas.draw.rectangle((0, 100, CANVAS, CANVAS), fill=wood)
    stove = canvas.rng.choice((6, 78))
    canvas.draw.rectangle((stove, 94, stove + 44, CANVAS), fill=(70, 72, 80))
    canvas.draw.rectangle((stove + 6, 108, stove + 38, CANVAS), fill=(255, 150, 50))


@scene("in the clouds", "high up in the sky", "among white clouds")
def clouds(canvas):
    """White clouds all over a blue sky."""
    canvas.fade((0.6, 0.65, 0.9), (0.55, 0.35, 1))
    middles = [(14, 18), (70, 8), (116, 34), (6, 70), (122, 84), (30, 116), (84, 120)]
    for x, y in canvas.rng.permutation(middles)[:6]:
        x, y = x + canvas.uniform(-10, 10), y + canvas.uniform(-8, 8)
        for dx, dy, radius in ((-14, 3, 9), (0, -3, 13), (14, 2, 10), (0, 6, 11)):
            canvas.disc(x + dx, y + dy, radius + canvas.uniform(-1, 2), (255, 255, 255))


@scene("on a stage", "in the spotlight on a stage", "in front of red curtains")
def stage(canvas):
    """Red curtains around a beam of light."""
    canvas.fade((0.75, 0.5, 0.12), (0.8, 0.5, 0.22), bottom=100)
    canvas.fade((0.07, 0.6, 0.55), (0.07, 0.65, 0.4), top=100)
    x = canvas.uniform(50, 78)
    canvas.draw.polygon([(x - 6, 0), (x + 6, 0), (104, 112), (24, 112)], fill=(255, 245, 190, 90))
    canvas.disc(64, 112, 40, (255, 240, 180, 150), 9)
    hue = canvas.uniform(-0.02, 0.0)
    for i, value in enumerate((0.5, 0.75, 0.5, 0.75)):                # folds at both sides
        for left in (i * 8 - 2, CANVAS - 6 - i * 8):
            canvas.draw.rectangle((left, 0, left + 8, 108 - 2 * i), fill=canvas.tone(hue, 0.85, value))
    for i, value in enumerate((0.6, 0.8) * 4):                        # and at the top
        canvas.draw.pieslice((i * 16, -14, i * 16 + 16, 18), 0, 180, fill=canvas.tone(hue, 0.85, value))


@scene("in a library", "in front of bookshelves", "among many books")
def library(canvas):
    """Four shelves of books."""
    canvas.fade((0.07, 0.6, 0.35), (0.07, 0.6, 0.28))
    for y in (2, 34, 66, 98):
        left = 3
        while left < CANVAS - 6:
            width = int(canvas.uniform(6, 12))
            top = y + canvas.uniform(0, 7)
            hue = canvas.rng.choice((0.0, 0.08, 0.14, 0.35, 0.55, 0.62, 0.8))
            canvas.draw.rectangle((left, top, left + width - 1, y + 26), fill=canvas.tone(hue, 0.55, 0.55))
            left += width + 1
        canvas.draw.rectangle((0, y + 27, CANVAS, y + 31), fill=canvas.tone(0.07, 0.55, 0.55))


PLAIN = {"red": (0.0, 0.85, 0.85), "orange": (0.075, 0.9, 0.98), "yellow": (0.15, 0.75, 0.98),
         "green": (0.36, 0.7, 0.65), "turquoise": (0.48, 0.6, 0.85), "blue": (0.62, 0.8, 0.8),
         "purple": (0.77, 0.65, 0.6), "pink": (0.91, 0.4, 0.98), "grey": (0.0, 0.0, 0.55), "white": (0.0, 0.0, 0.95)}


def plain(colour, canvas):
    """One HSV colour, a little darker towards the bottom."""
    top = canvas.tone(*colour)
    bottom = tuple(int(0.88 * channel) for channel in canvas.tone(*colour))
    canvas.fade_rgb(top, bottom)


for name, colour in PLAIN.items():
    article = "an" if name == "orange" else "a"
    phrases = f"on {article} {name} background", f"in front of {article} {name} wall", f"on plain {name}"
    SCENES[name] = Entry(phrases, partial(plain, colour))


# ---------------------------------------------------------------------------------------------------------------------
# Styles of a finished picture

PAPER = (252, 247, 236)                                  # RGB in 0..255
NIGHT, LAMP = (0.2, 0.25, 0.5), (1.0, 0.85, 0.55)        # RGB of the light, in 0..1
GLOW = 15                                                # how far the lamp shines: standard deviation in pixels


@style("a pencil sketch of {it}", "{it} drawn with a pencil")
def pencil_sketch(image, cover):
    """Dark where a pixel is darker than its surroundings."""
    grey = image.convert("L")
    around = np.asarray(grey.filter(ImageFilter.GaussianBlur(2)), dtype=np.float32)
    lines = np.clip((np.asarray(grey) + 8) / (around + 8), 0, 1) ** 3 * (0.8 + around / 1275)
    return Image.fromarray((lines[..., None] * PAPER).astype(np.uint8))


@style("a pixel mosaic of {it}", "{it} made of big pixels")
def pixel_mosaic(image, cover):
    """Squares of 4 x 4 pixels."""
    return image.reduce(4).resize(image.size, Image.NEAREST)


@style("the silhouette of {it}", "{it} as a black silhouette")
def silhouette(image, cover):
    """Against the light."""
    light = Image.blend(image, Image.new("RGB", image.size, (255, 250, 235)), 0.5)
    light.paste((25, 20, 35), mask=cover)
    return light


@style("{it} in the light of a lamp", "{it} lit by a night light")
def night_light(image, cover):
    """Dark, but for a lamp that shines on the subject."""
    left, top, right, bottom = cover.getbbox()
    y, x = np.mgrid[:SIZE, :SIZE]
    squared_distance = (x - (left + right) / 2) ** 2 + (y - (top + bottom) / 2) ** 2
    glow = np.exp(-squared_distance / (2 * GLOW ** 2))[..., None]                         # (SIZE, SIZE, 1)
    light = np.array(NIGHT) * (1 - glow) + np.array(LAMP) * glow                          # (SIZE, SIZE, 3)
    return Image.fromarray((np.asarray(image) * light).astype(np.uint8))


def apply_style(name, image, cover):
    """A finished picture in one of STYLES. cover: where the subject is, a grey PIL image."""
    return STYLES[name].paint(image, cover)
