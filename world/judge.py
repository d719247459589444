"""The judge of the emoji world: a small classifier that scores what a small model samples.

It names the scene, the held-out subject and the subject's hue in an image. Of several subjects it looks at the cell of
each. It is trained on true images alone, and its own accuracy on new true images is printed beside every score it
gives. PSNR and IoU are here too.

    python -m world.evaluate judge        # trains it, once: out/judge.safetensors

Next: `ablation.py`, the rows of three tables, then `evaluate.py`, which samples the images and prints the tables.
"""
import functools
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import cli
import data
from cli import InputError
from fast import has_bf16_products
from scorers import mask_iou
from weights import fill_in, read_tensors, write_tensors
from world import scenes, sprites
from world.rows import World

TRAIN_SEED, TEST_SEED = 71, 72        # of the judge's training images and of the ones it is tested on
HUE_TOLERANCE = 45                    # degrees by which a hue may differ and still count as right


# ---------------------------------------------------------------------------------------------------------------------
# The network

@functools.cache
def held_out():
    """Indices of the subjects that no model has seen in training, or not in this design."""
    return [i for i, subject in enumerate(sprites.subjects()) if subject.held_out]


class Judge(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> scene logits (B, 30), held-out subject logits (B, 258), hue as a direction (B, 2)"""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width, stride in ((32, 2), (64, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, 512), nn.ReLU(), nn.Dropout(0.2))
        self.scene = nn.Linear(512, len(scenes.SCENES))
        self.subject = nn.Linear(512, len(held_out()))
        self.hue = nn.Linear(512, 2)

    def forward(self, images):
        h = self.trunk(images)                                                            # (B, 512)
        return self.scene(h), self.subject(h), self.hue(h)


def cells(images, n):
    """Where each of n subjects stands, as large as a picture. (B, 3, 64, 64) -> n times (B, 3, 64, 64)"""
    parts = [images[:, :, top:bottom, left:right] for left, top, right, bottom in sprites.CROWDS[n].cells]
    return [F.interpolate(part, (scenes.SIZE, scenes.SIZE), mode="bilinear") for part in parts]


@functools.cache
def natural_hue(subject):
    """The hue, in radians, of a subject's mean colour before any instance of it is recoloured."""
    pixels = np.asarray(sprites.subjects()[subject].sprite)
    red, green, blue = pixels[pixels[..., 3] > 127, :3].mean(axis=0)
    return math.atan2((green - blue) * 3**0.5, 2 * red - green - blue)


def labels(metas, place=0):
    """What the images of a batch should show, of several subjects the one at a place: -> scene (B,), subject (B,) as an
    index into `held_out`, hue (B,) in radians"""
    names, appearances = list(scenes.SCENES), [meta["appearances"][place] for meta in metas]
    scene = torch.tensor([names.index(meta["scene"]) for meta in metas])
    subject = torch.tensor([held_out().index(one.subject) for one in appearances])
    hue = torch.tensor([natural_hue(one.subject) + math.radians(one.hue) for one in appearances])
    return scene, subject, hue


# ---------------------------------------------------------------------------------------------------------------------
# Training

def true_images(seed, start, count, several=1):
    """True images of so many held-out subjects each; a function of seed and number.

    -> images start, start + 1, ... (count, 3, 64, 64), [meta as of EmojiData's samples]
    """
    worlds, images, metas = [World(True), World(True), World(sprites.NEW_DESIGN)], [], []
    for k in range(start, start + count):
        rng, world = np.random.default_rng((seed, several, k)), worlds[k % 3]
        description = world.describe(rng, "multi" if several > 1 else "t2i", extras=False, several=several)
        background = scenes.paint(rng, description.scene)
        placed, _ = world.place(rng, description, background)        # without the references, which nobody looks at
        image, _ = sprites.paste(background, placed)
        images.append(data.target_pixels(image, scenes.SIZE))
        metas.append({"scene": description.scene, "appearances": [sprite.appearance for sprite in placed]})
    return torch.stack(images), metas


def training_batch(step, batch_size):
    """Half of it pictures of one subject, half cells of pictures of several, whose number changes with the step.

    -> images (B, 3, 64, 64), scene (B,), subject (B,), hue (B,)
    """
    several = list(sprites.CROWDS)[step % len(sprites.CROWDS)]
    crowds = batch_size // (2 * several)
    alone = batch_size - several * crowds
    images, metas = true_images(TRAIN_SEED, step * batch_size, alone)
    parts = [labels(metas)]
    if crowds:
        crowd_images, metas = true_images(TRAIN_SEED, step * batch_size, crowds, several)
        images = torch.cat([images, *cells(crowd_images, several)])
        parts += [labels(metas, place) for place in range(several)]
    return images, *(torch.cat(part) for part in zip(*parts))


def blur_half(images, generator):
    """Blurs about half of the images a little, so that the judge does not rely on single pixels. (B, 3, H, W)"""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    strength = torch.rand(len(images), 1, 1, 1, generator=generator).mul(2).sub(1).clamp(min=0)
    return torch.lerp(images, blurred, strength)


def train_judge(path, steps, batch_size):
    """Trains the judge on true images and writes it to `path`. -> its accuracy on new ones (accuracy_on_true_images)"""
    torch.manual_seed(TRAIN_SEED)
    generator = torch.Generator().manual_seed(TRAIN_SEED)
    model = Judge().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    bar = cli.bar(range(steps), unit="step")
    for step in bar:
        images, scene, subject, hue = training_batch(step, batch_size)
        images = blur_half(images, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_products()):       # three times as fast
            scene_logits, subject_logits, direction = [answer.float() for answer in model(images)]
        true_direction = torch.stack([hue.cos(), hue.sin()], dim=1)                       # (B, 2)
        loss = F.cross_entropy(scene_logits, scene) + F.cross_entropy(subject_logits, subject)
        loss = loss + (1 - F.cosine_similarity(direction, true_direction)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    with cli.atomic_file(path) as temporary:
        write_tensors(model.state_dict(), temporary)
    return accuracy_on_true_images(model.eval())


def load_judge(path):
    """The judge that `python -m world.evaluate judge` trained."""
    if not os.path.exists(path):
        raise InputError(f"{path}: there is no judge yet; train it with `python -m world.evaluate judge`")
    model = Judge()
    fill_in(model, read_tensors(path), {name: name for name in model.state_dict()}, path)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def hue_is_right(direction, hue):
    """direction: (B, 2) as the judge gives it; hue: (B,) radians. -> (B,) bool"""
    difference = torch.atan2(direction[:, 1], direction[:, 0]) - hue
    degrees = torch.rad2deg(torch.atan2(difference.sin(), difference.cos()).abs())        # (B,), 0 to 180
    return degrees <= HUE_TOLERANCE


@torch.no_grad()
def accuracy(judge, images, metas):
    """Whether each image shows what its meta says. (B, 3, 64, 64) -> {score: (B,), 1 = right, 0 = wrong}"""
    scene, subject, hue = labels(metas)
    scene_logits, subject_logits, direction = judge(images)
    rank = (subject_logits > subject_logits.gather(1, subject[:, None])).sum(dim=1)       # (B,), 0 = the top one
    return {
        "scene": (scene_logits.argmax(dim=1) == scene).float(),
        "subject": (rank == 0).float(),
        "subject_top5": (rank < 5).float(),
        "hue": hue_is_right(direction, hue).float(),
    }


@torch.no_grad()
def crowd_accuracy(judge, images, metas):
    """The same for several subjects, in whichever order they stand. (B, 3, 64, 64) -> {score: (B,)}

    "all": each subject stands in one cell, in its own hue; "share": how many of them do; "twice": one stands in several
    cells; "missing": one stands in none. metas: all of the same number of subjects.
    """
    n = len(metas[0]["appearances"])
    answers = [judge(cell) for cell in cells(images, n)]
    found = torch.zeros(n, n, len(metas), dtype=torch.bool)    # (cell, subject, B): it is the one that stands there
    right = torch.zeros_like(found)                                                       # and in its own hue
    for place in range(n):
        scene, subject, hue = labels(metas, place)
        for cell, (_, subject_logits, direction) in enumerate(answers):
            found[cell, place] = subject_logits.argmax(dim=1) == subject
            right[cell, place] = found[cell, place] & hue_is_right(direction, hue)
    right, times = right.any(dim=0), found.sum(dim=0)                                     # (subject, B)
    scene_logits = sum(scene_logits for scene_logits, _, _ in answers)                    # (B, 30)
    return {
        "scene": (scene_logits.argmax(dim=1) == scene).float(),
        "all": right.all(dim=0).float(),       # as many cells as subjects: then none stands in two
        "share": right.float().mean(dim=0),
        "twice": (times > 1).any(dim=0).float(),
        "missing": (times == 0).any(dim=0).float(),
    }


def accuracy_on_true_images(judge, n=1000, seed=TEST_SEED, batch_size=100):
    """The judge's own accuracy on n true images of one held-out subject, and on as many of two, of three and of four:
    "2: all" and so on. -> {score: mean}"""
    scores = {}
    for several in (1, *sprites.CROWDS):
        score = crowd_accuracy if several > 1 else accuracy
        parts = [score(judge, *true_images(seed, k, batch_size, several)) for k in range(0, n, batch_size)]
        for name in parts[0]:
            key = f"{several}: {name}" if several > 1 else name
            scores[key] = torch.cat([part[name] for part in parts]).mean().item()
    return scores


def psnr(images, targets):
    """Peak signal-to-noise ratio. (B, 3, H, W) twice, in [-1, 1] -> (B,) dB"""
    return -10 * ((images.clamp(-1, 1) - targets) / 2).square().mean((1, 2, 3)).log10()


def iou(images, metas):
    """Overlap of what is not black in sampled segmentations with the true masks. (B, 3, H, W) -> (B,)"""
    return mask_iou(images, torch.from_numpy(np.stack([meta["mask"] for meta in metas])) > 0)
