"""Measures what a checkpoint can do, with numbers that anyone can make again.

    python eval.py judge                          # trains the judge of the emoji world on true pictures, once
    python eval.py world --weights out/tiny/2     # scores a small model on subjects it has never seen

The emoji world (`emoji.py`) needs no downloaded network to be judged: a small CNN, trained on nothing but true
pictures, names the scene, the subject and how far its hue is turned. Its own accuracy on true pictures stands beside
every score, and so does its verdict on the tokenizer's copy of the true target, which no model of tokens can exceed.

Drawn pictures come from `Mentor.generate` with the weights' default settings, prompts and references from EmojiData
with held-out subjects and seeds that no training uses.
"""
import argparse
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import scenes
import sprites
from data import InputError
from emoji import EmojiData
from model import Mentor
from weights import fill_in, read_tensors

TRAIN_SEED, TRUE_SEED, EVAL_SEED = 71, 72, 73     # of the judge's training, its examination, and the evaluation
HUE_TOLERANCE = 45                                # degrees that a right hue may be off
BLACK = 0.12                                      # brightness, of 1, above which a drawn segmentation is not background


# ---------------------------------------------------------------------------------------------------------------------
# The judge

class Judge(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> scene logits (B, 30), subject logits (B, all emoji), hue as a direction (B, 2)"""

    def __init__(self):
        super().__init__()
        layers, c = [], 3
        for width, stride in ((32, 2), (64, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2)):
            layers += [nn.Conv2d(c, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            c = width
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, 512), nn.ReLU(), nn.Dropout(0.2))
        self.scene = nn.Linear(512, len(scenes.SCENES))
        self.subject = nn.Linear(512, len(sprites.subjects()))
        self.hue = nn.Linear(512, 2)

    def forward(self, pixels):
        h = self.trunk(pixels)                                                            # (B, 512)
        return self.scene(h), self.subject(h), self.hue(h)


def plain_prompter():
    """A prompter for samples whose prompts nobody reads."""
    return data.Prompter(data.byte_tokenizer(), patches=1, max_tokens=1 << 12)


def truth(metas):
    """What is to be seen: -> scene (B,), subject (B,), hue in radians (B,)"""
    names = list(scenes.SCENES)
    columns = zip(*((names.index(m["scene"]), m["subject"], math.radians(m["hue"])) for m in metas))
    scene, subject, hue = (torch.tensor(column) for column in columns)
    return scene, subject, hue


def blurred(pixels, generator):
    """Half of the pictures a little out of focus, so that the judge does not live on single pixels."""
    soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.lerp(pixels, soft, torch.rand(len(pixels), 1, 1, 1, generator=generator).mul(2).sub(1).clamp(min=0))


def judge(args):
    """Trains the judge on true pictures of all subjects and examines it on new ones of the held-out subjects."""
    torch.manual_seed(TRAIN_SEED)
    generator, model = torch.Generator().manual_seed(TRAIN_SEED), Judge()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    splits = [EmojiData(plain_prompter(), weights={"t2i": 1}, seed=TRAIN_SEED, held_out=held_out, extras=False)
              for held_out in (False, True)]
    bar = tqdm(range(args.steps), unit="step")
    for step in bar:
        samples = [splits[k % 2][step * args.batch + k] for k in range(args.batch)]
        scene, subject, hue = truth([sample["meta"] for sample in samples])
        out = model(blurred(torch.stack([sample["target"] for sample in samples]), generator))
        direction = torch.stack([hue.cos(), hue.sin()], dim=1)                            # (B, 2)
        loss = (F.cross_entropy(out[0], scene) + F.cross_entropy(out[1], subject)
                + (1 - F.cosine_similarity(out[2], direction)).mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    data.save_file(model.state_dict(), f"{args.out}.part")
    os.replace(f"{args.out}.part", args.out)
    print(f"wrote {args.out}; on true pictures of held-out subjects: " + said(examine(model.eval())))


def load_judge(path):
    """The judge that `python eval.py judge` trained."""
    if not os.path.exists(path):
        raise InputError(f"{path}: there is no judge yet; train it with `python eval.py judge`")
    model = Judge()
    fill_in(model, read_tensors(path), {name: name for name in model.state_dict()}, path)
    return model.eval()


@torch.no_grad()
def verdict(judge, pixels, metas):
    """Scores of pictures (B, 3, 64, 64) that should show what metas say. -> {score: (B,) of 0 and 1}"""
    scene, subject, hue = truth(metas)
    held_out = torch.tensor([i for i, s in enumerate(sprites.subjects()) if s.held_out])
    scenes_seen, subjects_seen, direction = judge(pixels)
    rank = subjects_seen[:, held_out].argsort(dim=1, descending=True)                     # (B, held-out subjects)
    place = (held_out[rank] == subject[:, None]).int().argmax(dim=1)                      # (B,)
    off = torch.atan2(direction[:, 1], direction[:, 0]) - hue
    off = torch.rad2deg(torch.atan2(off.sin(), off.cos()).abs())                          # degrees, 0 to 180
    return {"scene": (scenes_seen.argmax(dim=1) == scene).float(), "subject": (place == 0).float(),
            "subject_top5": (place < 5).float(), "hue": (off <= HUE_TOLERANCE).float()}


def examine(judge, n=1000, seed=TRUE_SEED):
    """The judge's own accuracy on true pictures of held-out subjects. -> {score: share}"""
    samples = EmojiData(plain_prompter(), weights={"t2i": 1}, seed=seed, held_out=True, extras=False)
    parts = []
    for start in range(0, n, 100):
        batch = [samples[k] for k in range(start, start + 100)]
        parts.append(verdict(judge, torch.stack([s["target"] for s in batch]), [s["meta"] for s in batch]))
    return {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}


def said(scores):
    """Scores in one line."""
    return ", ".join(f"{name} {value:.3f}" if value < 10 else f"{name} {value:.1f}" for name, value in scores.items())


# ---------------------------------------------------------------------------------------------------------------------
# The emoji world

def decibels(drawn, true):
    """PSNR of each picture. (B, 3, H, W) twice, in [-1, 1] -> (B,) dB"""
    return -10 * ((drawn.clamp(-1, 1) - true) / 2).square().mean((1, 2, 3)).log10()


@torch.inference_mode()
def draw(mentor, samples, first_seed):
    """Draws what a list of samples ask for, with the weights' default settings. -> (B, 3, H, W)"""
    batch = data.collate(samples)
    longest = int(batch["mask"].sum(dim=1).max())
    prefix = mentor.prefix(batch["ids"][:, :longest], batch["mask"][:, :longest], batch["refs"])
    return mentor.vqgan.decode(mentor.generate(prefix, range(first_seed, first_seed + len(samples)))).clone()


def iou(drawn, metas):
    """Overlap of what is not black in drawn segmentations with the true masks. -> (B,)"""
    object_drawn = ((drawn + 1) / 2).amax(dim=1) > BLACK                                  # (B, H, W)
    mask = torch.from_numpy(np.stack([m["mask"] for m in metas])) > 0
    return (object_drawn & mask).sum((1, 2)) / (object_drawn | mask).sum((1, 2))


def score_task(mentor, judge, task, args):
    """-> {score: (n,)} of one task, and its first samples with what was drawn, for the sheet."""
    config, parts, shown = mentor.config, [], []
    samples = EmojiData(mentor.prompter, config.image_size, config.vision.image_size, {task: 1}, args.seed,
                        held_out=True, extras=False)
    for start in tqdm(range(0, args.n, args.batch), desc=task, leave=False):
        batch = [samples[k] for k in range(start, min(start + args.batch, args.n))]
        metas, true = [s["meta"] for s in batch], torch.stack([s["target"] for s in batch])
        drawn = draw(mentor, batch, args.seed + start)
        copy = mentor.vqgan.decode(mentor.vqgan.encode(true))
        if task == "subject":
            part = verdict(judge, drawn, metas)
            part |= {f"{name}_ceiling": value for name, value in verdict(judge, copy, metas).items()}
        elif task == "segment":
            part = {"iou": iou(drawn, metas), "iou_ceiling": iou(copy, metas)}
        else:
            part = {"psnr": decibels(drawn, true), "psnr_ceiling": decibels(copy, true)}
        parts.append(part)
        shown += list(zip(batch, drawn))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, shown[:args.show]


@torch.no_grad()
def world(args):
    """Scores a small model: subject-driven pictures, segmentation and reconstruction of held-out subjects."""
    mentor, judge = Mentor.from_pretrained(args.weights), load_judge(args.judge)
    if mentor.config.image_size != scenes.SIZE:
        raise InputError(f"{args.weights}: draws {mentor.config.image_size} pixels a side, not the emoji world's "
                         f"{scenes.SIZE}; give a model trained with --model tiny")
    record = {"weights": str(args.weights), "seed": args.seed, "n": args.n, "sampling": vars(mentor.config.sampling),
              "judge_on_true_pictures": examine(judge)}
    print("the judge on true pictures: " + said(record["judge_on_true_pictures"]))
    tiles = []
    for task in ("subject", "segment", "reconstruct"):
        scores, shown = score_task(mentor, judge, task, args)
        record[task] = {name: value.mean().item() for name, value in scores.items()}
        print(f"{task}: " + said(record[task]))
        tiles += [data.tile(data.collate([sample]), 3, picture) for sample, picture in shown]
    os.makedirs(args.out, exist_ok=True)
    data.contact_sheet(tiles, columns=4).save(os.path.join(args.out, "world.png"))
    with open(os.path.join(args.out, "world.json.part"), "w") as file:
        json.dump(record, file, indent=1)
    os.replace(file.name, os.path.join(args.out, "world.json"))
    print(f"wrote {args.out}/world.json and world.png")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("judge", help=judge.__doc__, description=judge.__doc__)
    command.set_defaults(run=judge)
    command.add_argument("--out", default="out/judge.safetensors")
    command.add_argument("--steps", type=int, default=3000)
    command.add_argument("--batch", type=int, default=64)
    command = commands.add_parser("world", help=world.__doc__, description=world.__doc__)
    command.set_defaults(run=world)
    command.add_argument("--weights", required=True, help="a small model's folder")
    command.add_argument("--judge", default="out/judge.safetensors")
    command.add_argument("--out", default="out/eval", help="folder for the record and the sheet")
    command.add_argument("--n", type=int, default=300, help="pictures a task (default 300)")
    command.add_argument("--batch", type=int, default=50)
    command.add_argument("--show", type=int, default=16, help="pictures a task on the sheet")
    command.add_argument("--seed", type=int, default=EVAL_SEED)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    data.run(main)
