"""The figures of what training is: its tasks, what the trainings of chapters 3 and 7 taught, and the ablation.

Next: `figures.py`, which has the others and the command line.
"""
import os
import re

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


def table_of(path, heading):
    """The first Markdown table under a heading, without its head. -> list of rows, each a list of cells"""
    with open(path, encoding="utf-8") as file:
        section = file.read().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.search(r"(^\|.*\|\n)+", section, flags=re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


def draw_ablation(mentor):
    """CP and PF of lab.md's ablation, and of the paper's Table 4 where it has the row."""
    rows = table_of(os.path.join(HERE, "lab.md"), "The ablation")
    sheet = Sheet(44 * len(rows) + 30)
    for x, caption in ((255, "the small model"), (545, "the paper")):
        sheet.text(x, 2, caption)
    sheet.text(4, 2, "blue: CP", BLUE)
    sheet.text(90, 2, "orange: PF", ORANGE)
    for i, (name, cp, pf, *_, published) in enumerate(rows):
        y = 32 + 44 * i
        sheet.text(4, y + 6, name, size=13)
        pairs = [(255, (cp.split()[0], pf.split()[0]))]
        if published != "-":
            pairs.append((545, published.split(" / ")[:2]))
        for x, values in pairs:
            for k, (value, colour) in enumerate(zip(values, (BLUE, ORANGE))):
                sheet.bar(x, y + 15 * k, 200, float(value), colour)
    return sheet.image


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
