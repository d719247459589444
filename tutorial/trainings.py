"""The figures of what training is: its tasks, what the trainings of chapters 3 and 7 taught, and the ablation.

Next: `figures.py`, which has the others and the command line.
"""
import os

import numpy as np
import torch
from PIL import Image

import cli
import data
from tutorial.drawing import BLUE, GREEN, HERE, INK, ORANGE, RED, WIDTH, Sheet
from tutorial.measure import PLACES, ROTATIONS, TEN, painted


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 6: the two stages

TASKS = (("t2i", "text to image"), ("reconstruct", "reconstruction"), ("segment", "segmentation"),
         ("recover", "recovery"), ("subject", "subject-driven"))


def reference_of(sample):
    """What CLIP sees of a sample's first reference, without its normalisation. -> PIL"""
    pixels = sample["refs"][0] * torch.tensor(data.CLIP_STD).view(3, 1, 1) + torch.tensor(data.CLIP_MEAN).view(3, 1, 1)
    return data.to_image(2 * pixels - 1)


def draw_tasks(mentor):
    """One sample of every task: what the network is given, and what it has to write."""
    side, sheet = 120, Sheet(5 * 132)
    for i, (task, name) in enumerate(TASKS):
        sample, y = painted(mentor, task, seed=11)[0], i * 132
        if len(sample["refs"]):
            sheet.paste(reference_of(sample), 4, y, side, smooth=True)
        sheet.text(144, y + 8, name, size=17)
        for j, line in enumerate(sample["prompt"].splitlines()):
            sheet.text(144, y + 36 + 22 * j, line, BLUE, 14)
        sheet.paste(data.to_image(sample["target"]), WIDTH - side - 6, y, side, smooth=True)
        sheet.box(WIDTH - side - 6, y, side, side, outline=RED)
    return sheet.image


ABLATION = os.path.join(HERE, "ablation.json")             # as `python -m world.evaluate ablation` wrote it
CONDITIONS = {                                             # pretrain, copies: colour, name
    ("captioned", 0.5): (BLUE, "copying pays in half of the pairs"),
    ("captioned", 0.0): (GREEN, "never"),
    ("captioned", 0.9): (ORANGE, "in 0.9"),
    ("aligned", 0.5): (RED, "aligned before, in half"),
}


def draw_ablation(mentor):
    """PF over CP, a point for each variant in ABLATION, mean of its seeds and their range: the small model's, each
    condition in its colour, and those of the paper's Table 4."""
    variants, small, paper = {}, {}, {}
    for row in cli.read_json(ABLATION, "an ablation")["rows"]:
        variants.setdefault(row["variant"], []).append(row)
    conditions = {name: (found[0]["pretrain"], found[0]["copies"]) for name, found in variants.items()}
    for number, (name, found) in enumerate(variants.items(), start=1):
        colour, _ = CONDITIONS[conditions[name]]
        small[number] = colour, np.array([[row["subject"]["cp"], row["subject"]["pf"]] for row in found])
        if found[0]["paper"] and None not in found[0]["paper"][:2]:
            paper[number] = INK, np.array([found[0]["paper"][:2]])
    lines = -(-len(variants) // 2)
    sheet = Sheet(410 + 20 * (lines + 1))
    for x, name, points in ((44, "the small model", small), (446, "the paper", paper)):
        sheet.text(x, 4, f"{name}: PF over CP")
        if points:
            scatter(sheet, points, (x, 28, 340, 340))
    x = 4
    for colour, name in (CONDITIONS[kind] for kind in CONDITIONS if kind in conditions.values()):
        sheet.pen.ellipse((x, 396, x + 8, 404), fill=colour)
        sheet.text(x + 14, 400, name, colour, 13, "lm")
        x += 30 + 7 * len(name)
    for i, (number, name) in enumerate(enumerate(variants, start=1)):
        sheet.text(4 + 400 * (i // lines), 416 + 20 * (i % lines), f"{number}  {name}", small[number][0], 14)
    return sheet.image


# from a point to its number, the first that is free
DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (0.8, -0.8), (-0.8, 0.8), (0.8, 0.8), (-0.8, -0.8))


def scatter(sheet, points, frame):
    """Points in a frame, whose axes are as long as they need to be. points: {number: (colour, (n, 2) x and y of its
    trainings)}; frame: x, y, width, height"""
    left, top, width, height = frame
    every = np.concatenate([values for _, values in points.values()])
    low = np.floor(10 * every.min(axis=0) - 0.3).clip(0) / 10
    high = np.ceil(10 * every.max(axis=0) + 0.3).clip(max=10) / 10

    def place(values):
        share = (np.asarray(values) - low) / (high - low)
        return (left + width * share[0], top + height * (1 - share[1]))

    sheet.box(*frame, outline=INK)
    for axis in (0, 1):
        for value in np.arange(low[axis], high[axis] + 0.01, 0.1):
            x, y = place((value, low[1]) if axis == 0 else (low[0], value))
            x, y, anchor = (x, y + 5, "ma") if axis == 0 else (x - 5, y, "rm")
            sheet.text(x, y, f"{value:.1f}", size=12, anchor=anchor)
    taken = []                                             # by bars, dots and numbers: no number is written there
    for colour, values in points.values():
        mean, least, most = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
        x, y = place(mean)
        for axis in (0, 1):
            bar = np.tile(mean, (12, 1))
            bar[:, axis] = np.linspace(least[axis], most[axis], len(bar))
            bar = [place(point) for point in bar]
            sheet.pen.line((*bar[0], *bar[-1]), fill=colour)
            taken += bar
        sheet.pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    for number, (colour, values) in points.items():
        x, y = place(values.mean(axis=0))
        sides = [(x + distance * dx, y + distance * dy) for distance in (13, 20, 27) for dx, dy in DIRECTIONS]
        free = [side for side in sides if all(np.hypot(*np.subtract(side, other)) > 12 for other in taken)]
        taken.append((free or sides)[0])
        sheet.text(*taken[-1], str(number), colour, 13, "mm")


# ---------------------------------------------------------------------------------------------------------------------
# Chapters 3 and 7: what trainings taught

def draw_rotations(mentor):
    """Three small models trained alike but for the prefix's rotation: where in the reference the head that looks
    closest looks, and what they draw when told to copy."""
    with np.load(os.path.join(HERE, "rotations.npz")) as found:
        maps, shares, losses, targets, drawn = (found[name] for name in ("maps", "shares", "losses", "targets",
                                                                         "drawn"))
    side, sheet = 88, Sheet(4 * 118 + 10)
    for k, target in enumerate(targets):
        sheet.paste(Image.fromarray(target), 490 + 104 * k, 24, side, smooth=True)
    sheet.text(4, 50, "where the token lies,", size=13)
    sheet.text(4, 68, "and the pictures to copy", size=13)
    patches = maps.shape[-1]
    for j, (row, column) in enumerate(PLACES):
        place = np.zeros((patches, patches))
        place[int(row * patches), int(column * patches)] = 1
        sheet.heat(place, 170 + 96 * j, 24, side, GREEN)
    for i, name in enumerate(ROTATIONS):
        y = 24 + 118 * (i + 1)
        sheet.text(4, y + 8, name, size=17)
        sheet.text(4, y + 34, f"{shares[i]:.0%} on the patch", size=13)
        sheet.text(4, y + 52, f"loss {losses[i]:.2f} nats", size=13)
        for j in range(3):
            sheet.heat(maps[i, j] / maps[i, j].max(), 170 + 96 * j, y, side)
        for k, image in enumerate(drawn[i]):
            sheet.paste(Image.fromarray(image), 490 + 104 * k, y, side, smooth=True)
    return sheet.image


def draw_losses(mentor):
    """The losses of the ten-minute model's stages, each task's, averaged over thirty steps."""
    stages = cli.read_json(TEN, "losses")
    colours = {"t2i": BLUE, "reconstruct": ORANGE, "segment": GREEN, "picture": RED}
    names = dict(TASKS) | {"picture": "the tokenizer's own"}
    sheet, width = Sheet(300), 215
    for i, (stage, curves) in enumerate(stages.items()):
        x = 40 + i * 262
        points = [point for curve in curves.values() for point in curve]
        last, top = max(step for step, _ in points), max(loss for _, loss in points)
        sheet.box(x, 30, width, 210, outline=INK)
        sheet.text(x + width // 2, 8, f"{stage}, {last} steps", anchor="ma")
        for share in (0, 0.5, 1):
            sheet.text(x - 5, 240 - 210 * share, f"{top * share:.3g}", size=12, anchor="rm")
        for task, curve in curves.items():
            sheet.curve(curve, (x, 30, width, 210), (0, last, 0, top), colours[task])
    for i, (task, colour) in enumerate(colours.items()):
        sheet.text(40 + 190 * i, 262, names[task], colour, 14)
    return sheet.image
