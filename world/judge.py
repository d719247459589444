"""The judge of the emoji world: a small classifier that scores what a small model samples.

It names the scene, the held-out subject and the subject's hue in an image. It is trained on true images alone, and its
own accuracy on new true images is printed beside every score it gives. PSNR and IoU are here too.

    python -m world.evaluate judge        # trains it, once: out/judge.safetensors

Next: `evaluate.py`, which samples the images and prints the tables.
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
from scorers import mask_iou
from weights import byte_tokenizer, fill_in, read_tensors, write_tensors
from world import scenes, sprites
from world.rows import EmojiData

TRAIN_SEED, TEST_SEED = 71, 72        # of the judge's training images and of the ones it is tested on
HUE_TOLERANCE = 45                    # degrees by which a hue may differ and still count as right


# ---------------------------------------------------------------------------------------------------------------------
# The network

@functools.cache
def held_out():
    """Indices of the subjects that no model has seen in training."""
    return [i for i, subject in enumerate(sprites.subjects()) if subject.held_out]


class Judge(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> scene logits (B, 30), held-out subject logits (B, 89), hue as a direction (B, 2)"""

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


@functools.cache
def natural_hue(subject):
    """The hue, in radians, of a subject's mean colour before any instance of it is recoloured."""
    pixels = np.asarray(sprites.subjects()[subject].sprite)
    red, green, blue = pixels[pixels[..., 3] > 127, :3].mean(axis=0)
    return math.atan2((green - blue) * 3**0.5, 2 * red - green - blue)


def labels(metas):
    """What the images of a batch should show: -> scene (B,), subject (B,) as an index into `held_out`, hue (B,) in
    radians"""
    names, subjects = list(scenes.SCENES), held_out()
    scene = torch.tensor([names.index(meta["scene"]) for meta in metas])
    subject = torch.tensor([subjects.index(meta["subject"]) for meta in metas])
    hue = torch.tensor([natural_hue(meta["subject"]) + math.radians(meta["hue"]) for meta in metas])
    return scene, subject, hue


# ---------------------------------------------------------------------------------------------------------------------
# Training

def true_images(seed):
    """True images of held-out subjects. The judge never reads a prompt, so any tokenizer will do."""
    processor = data.Processor(byte_tokenizer(), image_tokens=1, max_tokens=1 << 12, image_size=scenes.SIZE)
    return EmojiData(processor, weights={"t2i": 1}, seed=seed, held_out=True, extras=False)


def blur_half(images, generator):
    """Blurs about half of the images a little, so that the judge does not rely on single pixels. (B, 3, H, W)"""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    strength = torch.rand(len(images), 1, 1, 1, generator=generator).mul(2).sub(1).clamp(min=0)
    return torch.lerp(images, blurred, strength)


def train_judge(path, steps, batch_size):
    """Trains the judge on true images and writes it to `path`. -> its accuracy on new ones (accuracy_on_true_images)"""
    torch.manual_seed(TRAIN_SEED)
    generator = torch.Generator().manual_seed(TRAIN_SEED)
    model = Judge()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    dataset = true_images(TRAIN_SEED)
    bar = cli.bar(range(steps), unit="step")
    for step in bar:
        samples = [dataset[step * batch_size + i] for i in range(batch_size)]
        images = torch.stack([sample["target"] for sample in samples])                    # (B, 3, 64, 64)
        scene, subject, hue = labels([sample["meta"] for sample in samples])
        scene_logits, subject_logits, direction = model(blur_half(images, generator))
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

@torch.no_grad()
def accuracy(judge, images, metas):
    """Whether each image shows what its meta says. (B, 3, 64, 64) -> {score: (B,), 1 = right, 0 = wrong}"""
    scene, subject, hue = labels(metas)
    scene_logits, subject_logits, direction = judge(images)
    rank = (subject_logits > subject_logits.gather(1, subject[:, None])).sum(dim=1)       # (B,), 0 = the top one
    difference = torch.atan2(direction[:, 1], direction[:, 0]) - hue
    degrees = torch.rad2deg(torch.atan2(difference.sin(), difference.cos()).abs())        # (B,), 0 to 180
    return {
        "scene": (scene_logits.argmax(dim=1) == scene).float(),
        "subject": (rank == 0).float(),
        "subject_top5": (rank < 5).float(),
        "hue": (degrees <= HUE_TOLERANCE).float(),
    }


def accuracy_on_true_images(judge, n=1000, seed=TEST_SEED, batch_size=100):
    """The judge's own accuracy on n true images of held-out subjects. -> {score: mean}"""
    dataset = true_images(seed)
    parts = []
    for start in range(0, n, batch_size):
        samples = [dataset[i] for i in range(start, start + batch_size)]
        images = torch.stack([sample["target"] for sample in samples])                    # (B, 3, 64, 64)
        parts.append(accuracy(judge, images, [sample["meta"] for sample in samples]))
    return {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}


def psnr(images, targets):
    """Peak signal-to-noise ratio. (B, 3, H, W) twice, in [-1, 1] -> (B,) dB"""
    return -10 * ((images.clamp(-1, 1) - targets) / 2).square().mean((1, 2, 3)).log10()


def iou(images, metas):
    """Overlap of what is not black in sampled segmentations with the true masks. (B, 3, H, W) -> (B,)"""
    return mask_iou(images, torch.from_numpy(np.stack([meta["mask"] for meta in metas])) > 0)
