"""Measures what a checkpoint can do, with numbers that anyone can make again.

    python eval.py dreambench --weights W --data FOLDER      # CLIP-I, CLIP-T and DINO: 30 subjects x 25 prompts
    python eval.py dreambench++ --weights W --data FOLDER --judge-url URL --judge-model NAME     # the paper's Table 1
    python eval.py reconstruct --weights W --data FOLDER     # how well a reference is drawn once more
    python eval.py cmmd A B                                  # distance of two folders of pictures

    python eval.py judge                                     # trains the judge of the emoji world, once
    python eval.py world                                     # scores a small model on subjects it has never seen
    python eval.py grid                                      # a sheet of such subjects in several scenes
    python eval.py ablation                                  # the paper's Table 4 in miniature

The benchmarks write every picture and a line of results.jsonl for it; started again they go on where they were, and
under torchrun the processes share the work. The public networks that score are read like all weights: CLIP ViT-B/32
and DINO ViT-S/16 from the hub, or from folders that --clip and --dino name. FID is left out, it needs Inception's
weights; CMMD (arXiv 2401.09603), made of CLIP's embeddings, is in its place.

`judge.py` holds the judges. Next: `bench.py`, the last file.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import data
import judge as judges
import scenes
from data import InputError
from emoji import EmojiData, Script, World, with_article
from model import Mentor
from sprites import paint
from train import Ranks

EVAL_SEED = 73                                    # of the emoji world's samples; no training and no tuning uses it


# ---------------------------------------------------------------------------------------------------------------------
# What a benchmark asks for

@dataclass(frozen=True)
class Unit:
    """One picture to be drawn and scored."""
    key: str             # tells it from all others; also its file's name
    group: str           # whose average it belongs to
    subject: str         # the name that the network is given
    prompt: str
    reference: str       # path
    truths: tuple        # paths of pictures that show the subject
    seed: int


def pictures_in(folder):
    """Paths of the pictures that lie in a folder, in order of their names."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else ()
    return tuple(os.path.join(folder, name) for name in names
                 if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")))


def dreambench_units(args):
    """DreamBench's folder: a folder of pictures a subject, prompts_and_classes.txt beside them."""
    path = os.path.join(args.data, "prompts_and_classes.txt")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError:
        raise InputError(f"{path}: not readable; --data takes DreamBench's folder, which holds it") from None
    lists = re.split(r"^(?:Object|Live Subject) Prompts$", text, flags=re.MULTILINE)
    if len(lists) != 3:
        raise InputError(f"{path}: has no 'Object Prompts' and 'Live Subject Prompts'; take DreamBench's own file")
    objects, live = ([prompt.replace("{0} ", "") for prompt in re.findall(r"'(.*\{1\}.*)'\.format", part)]
                     for part in lists[1:])
    units = []
    for subject, kind in re.findall(r"^(\w+),([\w ]+)$", lists[0], flags=re.MULTILINE):
        truths = pictures_in(os.path.join(args.data, subject))
        for r, reference in enumerate(truths if args.refs == "all" else truths[:1]):
            for k, prompt in enumerate(live if kind in ("cat", "dog") else objects):
                for i in range(args.samples):
                    units.append(Unit(f"{subject}-{r:02}-{k:02}-{i}", subject, kind, prompt.replace("{1}", kind),
                                      reference, truths, args.seed + len(units)))
    return units


def dreambench_plus_units(args):
    """DreamBench++'s folder: images/<category>/NN.jpg, captions/<category>/NN.txt (the subject, then nine prompts)."""
    units, root = [], os.path.join(args.data, "images")
    for folder, _, _ in sorted(os.walk(root)):
        category = os.path.relpath(folder, root)
        for reference in pictures_in(folder):
            stem = os.path.splitext(os.path.basename(reference))[0]
            path = os.path.join(args.data, "captions", category, f"{stem}.txt")
            try:
                with open(path, encoding="utf-8") as file:
                    subject, *prompts = [line.strip() for line in file if line.strip()]
            except (OSError, ValueError):
                raise InputError(f"{path}: not readable or empty; it should hold the subject and the prompts of "
                                 f"{reference}, a line each") from None
            for k, prompt in enumerate(prompts):
                for i in range(args.samples):
                    units.append(Unit(f"{category.replace(os.sep, '-')}-{stem}-{k}-{i}", category, subject, prompt,
                                      reference, (reference,), args.seed + len(units)))
    return units


class Record:
    """results.jsonl: first the settings, then a line for every picture, written once it is drawn and scored.

    Several processes may append; what a killed one left half-written is cut off at the next start.
    """

    def __init__(self, folder, settings, ranks):
        self.path = os.path.join(folder, "results.jsonl")
        if ranks.rank == 0:
            os.makedirs(folder, exist_ok=True)
            if os.path.exists(self.path):
                with open(self.path, "rb+") as file:
                    whole = file.read().rfind(b"\n") + 1
                    file.truncate(whole)
            if not os.path.exists(self.path) or not os.path.getsize(self.path):
                self.append(settings)
        ranks.barrier()
        with open(self.path, encoding="utf-8") as file:
            found, *rows = map(json.loads, file)
        ranks.barrier()                        # all must see the same rows done, or they would not share what is left
        if differing := [name for name in settings if found.get(name) != settings[name]]:
            raise InputError(f"{self.path}: was made with another {differing[0]} ({found.get(differing[0])}, not "
                             f"{settings[differing[0]]}); give the same again or another --out")
        self.done = {row["key"] for row in rows if os.path.exists(os.path.join(folder, f"{row['key']}.png"))}

    def append(self, row):
        """One line, in one write."""
        with open(self.path, "ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")

    def read(self):
        """{key: row} of all that is done."""
        with open(self.path, encoding="utf-8") as file:
            return {row["key"]: row for row in list(map(json.loads, file))[1:]}


# ---------------------------------------------------------------------------------------------------------------------
# Drawing and scoring

@torch.inference_mode()
def draw(mentor, prompts, references, seeds):
    """A batch of pictures with the weights' default settings. references: of each prompt, PIL. -> (B, 3, H, W)"""
    config = mentor.config
    pairs = [mentor.prompter(prompt, len(refs)) for prompt, refs in zip(prompts, references)]
    ids, mask = (torch.stack(part) for part in zip(*pairs))
    longest = int(mask.sum(dim=1).max())
    pixels = [data.clip_pixels(picture, config.vision.image_size) for refs in references for picture in refs]
    pixels = torch.stack(pixels).to(mentor.device) if pixels else None
    prefix = mentor.prefix(ids[:, :longest].to(mentor.device), mask[:, :longest].to(mentor.device), pixels)
    tokens = mentor.generate(prefix, seeds, config.sampling)
    return torch.cat([mentor.vqgan.decode(row[None]) for row in tokens])


def start(args):
    """-> processes, model, what decides the results."""
    ranks = Ranks.join(args.device)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    mentor = Mentor.from_pretrained(args.weights, device=ranks.device, dtype=dtype)
    decisive = ("weights", "data", "seed", "samples", "refs", "clip", "dino", "judge_model")
    settings = {name: value for name, value in vars(args).items() if name in decisive}
    settings |= {"size": mentor.config.image_size, **vars(mentor.config.sampling)}
    return ranks, mentor, settings


def benchmark(args, units, settings, ranks, mentor, vision_judge=None):
    """Draws and scores all units that the record lacks, this process its share. -> rows of all, in order"""
    if not units:
        raise InputError(f"{args.data}: holds no subjects with pictures; see `python eval.py {args.command} --help`")
    scorer, record = judges.Scorer(args.clip, args.dino, ranks.device), Record(args.out, settings, ranks)
    known = {}                                                 # paths -> embeddings of true pictures
    todo = [unit for unit in units if unit.key not in record.done][ranks.rank::ranks.world]
    for first in tqdm(range(0, len(todo), args.batch), unit="batch", disable=ranks.rank > 0):
        chunk = todo[first:first + args.batch]
        prompts = [data.subject_prompt([unit.subject], unit.prompt) for unit in chunk]
        references = [[data.open_image(unit.reference)] for unit in chunk]
        drawn = [data.to_image(p) for p in draw(mentor, prompts, references, [unit.seed for unit in chunk])]
        seen = scorer.pictures(drawn)
        for i, (unit, picture) in enumerate(zip(chunk, drawn)):
            if unit.truths not in known:
                known[unit.truths] = scorer.pictures([data.open_image(path) for path in unit.truths])
            row = {"key": unit.key, "group": unit.group, "subject": unit.subject, "prompt": prompts[i],
                   "reference": unit.reference, "seed": unit.seed}
            for name, score in (("clip", "clip_i"), ("dino", "dino")):
                row[score] = (known[unit.truths][name] @ seen[name][i]).mean().item()
            row["clip_t"] = (scorer.text(unit.prompt) @ seen["clip"][i]).item()
            if vision_judge:
                shown = {"cp": [references[i][0], picture], "pf": [picture]}
                for rubric, pictures in shown.items():
                    row[rubric], row[f"{rubric}_answers"] = vision_judge.score(rubric, pictures, subject=unit.subject,
                                                                               prompt=unit.prompt)
            path = os.path.join(args.out, f"{unit.key}.png")
            picture.save(f"{path}.part", "PNG")
            os.replace(f"{path}.part", path)
            record.append(row)
    ranks.barrier()
    rows = record.read()
    return [rows[unit.key] for unit in units]


def mean(rows, name):
    """Of the rows that have it; nan where none does."""
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) / len(values) if values else float("nan")


SCORES = {name: partial(mean, name=name) for name in ("clip_i", "clip_t", "dino")}       # rows -> number


def table(rows, scores):
    """Averages per group and over all, printed. scores: {column: rows -> number}. -> {group: {column: number}}"""
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    groups["all"] = rows
    found = {name: {column: score(part) for column, score in scores.items()} for name, part in groups.items()}
    wide = max(map(len, groups))
    print(f"{'':{wide}}  pictures" + "".join(f"{column:>9}" for column in scores))
    for name, part in groups.items():
        print(f"{name:{wide}}  {len(part):8}" + "".join(f"{value:9.3f}" for value in found[name].values()))
    return found


def conclude(args, rows, scores, settings):
    """Prints the table; writes summary.json and a contact sheet: of each group a reference and some pictures."""
    found = table(rows, scores)
    write_json(os.path.join(args.out, "summary.json"), {**settings, "scores": found})
    tiles, places = [], 5
    for group in list(found)[:-1]:
        part = [row for row in rows if row["group"] == group]
        step = max(1, len(part) // (places - 1))
        drawn = [os.path.join(args.out, f"{row['key']}.png") for row in part[::step][:places - 1]]
        shown = [data.center_square(data.open_image(path), 256) for path in [part[0]["reference"], *drawn]]
        tiles += shown + [Image.new("RGB", (256, 256), "white")] * (places - len(shown))
    data.contact_sheet(tiles, places).save(os.path.join(args.out, "sheet.png"))
    print(f"wrote {args.out}/results.jsonl, summary.json, sheet.png and the pictures")


def write_json(path, content):
    """The file appears complete or not at all."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(f"{path}.part", path)


def dreambench(args):
    """DreamBench: CLIP-I and DINO against all pictures of the subject, CLIP-T against the prompt."""
    ranks, mentor, settings = start(args)
    rows = benchmark(args, dreambench_units(args), settings, ranks, mentor)
    if ranks.rank == 0:
        conclude(args, rows, SCORES, settings)


def dreambench_plus(args):
    """DreamBench++: the same scores, and with --judge-url concept preservation (CP) and prompt following (PF)."""
    ranks, mentor, settings = start(args)
    vision_judge = None
    if args.judge_url:
        vision_judge = judges.VisionJudge(args.judge_url, args.judge_model, os.environ.get("OPENAI_API_KEY"))
    rows = benchmark(args, dreambench_plus_units(args), settings, ranks, mentor, vision_judge)
    if ranks.rank == 0:
        scores = dict(SCORES)
        if vision_judge:
            scores |= {"CP": lambda rows: mean(rows, "cp") / 4, "PF": lambda rows: mean(rows, "pf") / 4,
                       "CP*PF": lambda rows: mean(rows, "cp") * mean(rows, "pf") / 16,
                       "CP/PF": lambda rows: mean(rows, "cp") / max(mean(rows, "pf"), 1e-9)}
            unread = sum(row[name] is None for row in rows for name in ("cp", "pf"))
            again = sum(len(row[f"{name}_answers"]) - 1 for row in rows for name in ("cp", "pf"))
            print(f"the judge was asked again {again} times; {unread} answers could not be read and do not count")
        conclude(args, rows, scores, settings)


def reconstruct(args):
    """Draws every picture of a folder once more. L2 is the mean over pixels of the distance of two colours, as
    vectors of R, G, B in [0, 1]; beside it stands that of the tokenizer's own copy, which no drawing can go below."""
    ranks, mentor, settings = start(args)
    names = [path for folder, _, _ in sorted(os.walk(args.data)) for path in pictures_in(folder)]
    if not names:
        raise InputError(f"{args.data}: no folder with pictures; name one")
    rows, shares = [], range(ranks.rank * args.batch, len(names), ranks.world * args.batch)
    for first in tqdm(shares, unit="batch", disable=ranks.rank > 0):
        chunk = names[first:first + args.batch]
        pictures = [data.open_image(path) for path in chunk]
        true = torch.stack([data.target_pixels(picture, mentor.config.image_size) for picture in pictures])
        drawn = draw(mentor, [data.reconstruct_prompt()] * len(chunk), [[picture] for picture in pictures],
                     range(args.seed + first, args.seed + first + len(chunk))).cpu()
        with torch.inference_mode():
            copy = mentor.vqgan.decode(mentor.vqgan.encode(true.to(mentor.device))).cpu()
        rows += [{"picture": path, "l2": one, "l2_ceiling": other} for path, one, other in
                 zip(chunk, judges.distance(drawn, true).tolist(), judges.distance(copy, true).tolist())]
    rows = sorted(sum(ranks.gather(rows), []), key=lambda row: names.index(row["picture"]))
    if ranks.rank > 0:
        return
    found = {name: mean(rows, name) for name in ("l2", "l2_ceiling")}
    os.makedirs(args.out, exist_ok=True)
    write_json(os.path.join(args.out, "reconstruct.json"), {**settings, **found, "pictures": rows})
    print(f"{len(rows)} pictures: mean L2 {found['l2']:.4f}, the tokenizer's copy {found['l2_ceiling']:.4f}; wrote "
          f"{args.out}/reconstruct.json")


def mmd(a, b, bandwidth=10.0):
    """Squared maximum mean discrepancy of two sets of embeddings, (N, C) and (M, C), with a Gaussian kernel."""
    def kernel(x, y):
        return torch.exp(-torch.cdist(x.double(), y.double()).square() / (2 * bandwidth**2)).mean()
    return (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).item()


def cmmd(args):
    """Distance of two folders of pictures by CLIP's embeddings (arXiv 2401.09603), times 1000; 0 = alike."""
    scorer = judges.Scorer(args.clip, False, Ranks.join(args.device).device)
    sets = []
    for folder in (args.a, args.b):
        if not (paths := pictures_in(folder)):
            raise InputError(f"{folder}: no folder with pictures; name two")
        sets.append(torch.cat([scorer.pictures([data.open_image(path)])["clip"] for path in tqdm(paths, desc=folder)]))
    print(f"CMMD {1000 * mmd(*sets):.3f} of {len(sets[0])} and {len(sets[1])} pictures")


# ---------------------------------------------------------------------------------------------------------------------
# The emoji world

def judge(args):
    """Trains the judge of the emoji world on true pictures and examines it on new ones of the held-out subjects."""
    scores = judges.train_judge(args.out, args.steps, args.batch)
    print(f"wrote {args.out}; on true pictures of held-out subjects: {said(scores)}")


def said(scores):
    """Scores in one line."""
    return ", ".join(f"{name} {value:.3f}" if value < 10 else f"{name} {value:.1f}" for name, value in scores.items())


def score_task(mentor, network, task, args):
    """-> {score: (n,)} of one task, and its first samples with what was drawn, for the sheet."""
    config, parts, shown = mentor.config, [], []
    samples = EmojiData(mentor.prompter, config.image_size, config.vision.image_size, {task: 1}, args.seed,
                        held_out=True, extras=False)
    for first in tqdm(range(0, args.samples, args.batch), desc=task, leave=False):
        chunk = [samples[k] for k in range(first, min(first + args.batch, args.samples))]
        metas, true, batch = [s["meta"] for s in chunk], torch.stack([s["target"] for s in chunk]), data.collate(chunk)
        with torch.inference_mode():
            prefix = mentor.prefix(batch["ids"], batch["mask"], batch["refs"])
            tokens = mentor.generate(prefix, range(args.seed + first, args.seed + first + len(chunk)))
            drawn = mentor.vqgan.decode(tokens)
        copy = mentor.vqgan.decode(mentor.vqgan.encode(true))
        scores = {}
        for name, pictures in (("", drawn), ("_ceiling", copy)):
            if task == "subject":
                part = judges.verdict(network, pictures, metas)
                part["cp"], part["pf"] = part["subject"] * part["hue"], part["scene"]
            elif task == "segment":
                part = {"iou": judges.iou(pictures, metas)}
            else:
                part = {"psnr": judges.decibels(pictures, true), "l2": judges.distance(pictures, true)}
            scores |= {score + name: value for score, value in part.items()}
        parts.append(scores)
        shown += list(zip(chunk, drawn))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, shown[:args.show]


def load_small(weights):
    """A model that draws pictures of the emoji world's size."""
    mentor = Mentor.from_pretrained(weights)
    if mentor.config.image_size != scenes.SIZE:
        raise InputError(f"{weights}: draws {mentor.config.image_size} pixels a side, not the emoji world's "
                         f"{scenes.SIZE}; give a model trained with --model tiny")
    return mentor


@torch.no_grad()
def score_world(mentor, network, args):
    """-> {task: {score: number}} of held-out subjects, and tiles for a sheet."""
    found, tiles = {}, []
    for task in ("subject", "segment", "reconstruct"):
        scores, shown = score_task(mentor, network, task, args)
        found[task] = {name: value.mean().item() for name, value in scores.items()}
        tiles += [data.tile(data.collate([sample]), 3, picture) for sample, picture in shown]
    cp, pf = found["subject"]["cp"], found["subject"]["pf"]
    found["subject"] |= {"cp*pf": cp * pf, "cp/pf": cp / max(pf, 1e-9)}
    return found, tiles


def world(args):
    """Scores a small model: subject-driven pictures, segmentation and reconstruction of held-out subjects."""
    network, mentor = judges.load_judge(args.judge), load_small(args.weights)
    found, tiles = score_world(mentor, network, args)
    record = {"weights": str(args.weights), "seed": args.seed, "samples": args.samples,
              "sampling": vars(mentor.config.sampling), "judge_on_true_pictures": judges.examine(network), **found}
    print(f"the judge on true pictures: {said(record['judge_on_true_pictures'])}")
    for task, scores in found.items():
        print(f"{task}: {said(scores)}")
    os.makedirs(args.out, exist_ok=True)
    data.contact_sheet(tiles, columns=4).save(os.path.join(args.out, "world.png"))
    write_json(os.path.join(args.out, "world.json"), record)
    print(f"wrote {args.out}/world.json and world.png")


def grid(args):
    """Draws held-out subjects in several scenes: a row each, the reference first, a column a scene."""
    mentor, rng, kept, tiles = load_small(args.weights), np.random.default_rng(args.seed), World(True), []
    for k, index in enumerate(rng.choice(kept.subjects, args.rows, replace=False).tolist()):
        script = Script((index,), str(rng.choice(list(scenes.PLAIN))))
        ground = scenes.paint(rng, script.scene)
        reference, _ = paint(ground, kept.cast(rng, script, [ground])[0])
        label, = script.labels
        prompts = [data.subject_prompt([label], f"{with_article(label)} {scenes.SCENES[name][0][0]}")
                   for name in args.scenes]
        seeds = range(args.seed + k * len(prompts), args.seed + (k + 1) * len(prompts))
        drawn = draw(mentor, prompts, [[reference]] * len(prompts), seeds)
        tiles += [picture.resize((128, 128), Image.BICUBIC) for picture in (reference, *map(data.to_image, drawn))]
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    data.contact_sheet(tiles, 1 + len(args.scenes)).save(args.out)
    print(f"wrote {args.out}")


VARIANTS = {     # the paper's Table 4: tasks left out of stage 1 (None: no stage 1) and of stage 2, its CP, PF, CP*PF
    "full": ((), (), (.555, .839, .466)),
    "without stage 1": (None, (), (.179, .673, .120)),
    "without segmentation in stage 1": (("segment",), (), None),
    "without recovery": ((), ("recover",), (.661, .284, .188)),
    "without segmentation in stage 2": ((), ("segment",), (.412, .918, .378)),
    "without text to image": ((), ("t2i",), None),
}


def train_variant(args, name):
    """Trains one row of VARIANTS, as far as that is not done, all seeds side by side. -> {seed: folder of weights}"""
    first, second, _ = VARIANTS[name]
    stages = [("1", first, args.steps // 3), ("2", second, args.steps - args.steps // 3)]
    if first is None:                                          # the same budget, all of it for stage 2
        stages = [("2", second, args.steps)]
    inits, threads = dict.fromkeys(range(args.seeds), args.init), max(1, (os.cpu_count() or 1) // args.seeds)
    for stage, without, steps in stages:
        running = {}
        for seed, init in inits.items():
            words = [f"seed{seed}", "none" if first is None else "-".join(["1", *first])]
            words += ["-".join(["2", *second])] if stage == "2" else []
            inits[seed] = out = os.path.join(args.out, "_".join(words))      # variants with the same stage 1 share it
            if os.path.exists(os.path.join(out, f"step-{steps:08}")):
                continue
            script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
            command = [sys.executable, script, "--model", "tiny", "--stage", stage, "--init", init, "--out", out,
                       "--seed", str(seed), "--steps", str(steps), "--global-batch", str(args.global_batch),
                       "--sample-every", str(steps), "--save-every", "50", "--keep", "1", "--workers", "0"]
            command += [flag for task in without for flag in ("--without", task)]
            command += ["--resume"] if os.path.exists(os.path.join(out, "model.safetensors")) else []
            print(f"{name}, seed {seed}: stage {stage}, {steps} steps -> {out}", flush=True)
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if args.seeds > 1 else None
            running[out] = subprocess.Popen(command, env=environment)
        if failed := [out for out, process in running.items() if process.wait()]:
            raise InputError(f"{failed[0]}: the training stopped; give the same command again to go on")
    return inits


ABLATION_COLUMNS = {"CP": ("subject", "cp"), "PF": ("subject", "pf"), "CP*PF": ("subject", "cp*pf"),
                    "CP/PF": ("subject", "cp/pf"), "hue": ("subject", "hue"), "IoU": ("segment", "iou"),
                    "L2": ("reconstruct", "l2")}


def print_ablation(rows):
    """The table: of every variant the mean over the seeds and half their range, and the paper's numbers."""
    print(f"{'mean, half the range over seeds':32}" + "".join(f"{column:>13}" for column in ABLATION_COLUMNS)
          + "   paper: CP, PF, CP*PF")
    for name, (_, _, paper) in VARIANTS.items():
        part, cells = [row for row in rows if row["variant"] == name], ""
        for task, score in ABLATION_COLUMNS.values():
            values = [row[task][score] for row in part]
            cells += f"{np.mean(values):7.3f} {np.ptp(values) / 2:.3f}"
        print(f"{name:32}{cells}   {', '.join(f'{value:.3f}' for value in paper) if paper else '-'}")


def ablation(args):
    """Trains the small model's variants of the paper's Table 4 with equal budgets and prints the table beside it."""
    network, rows = judges.load_judge(args.judge), []
    load_small(args.init)                      # says at once what would be wrong with it
    budget = {"init": args.init, "steps": args.steps, "global_batch": args.global_batch}
    path = os.path.join(args.out, "budget.json")
    if not os.path.exists(path):
        os.makedirs(args.out, exist_ok=True)
        write_json(path, budget)
    with open(path, encoding="utf-8") as file:
        if (begun := json.load(file)) != budget:
            raise InputError(f"{path}: was begun with {begun}, not {budget}; give the same or another --out")
    for name, (_, _, paper) in VARIANTS.items():
        for seed, folder in train_variant(args, name).items():
            path = os.path.join(folder, f"world-{args.samples}-{args.seed}.json")
            if not os.path.exists(path):
                found, tiles = score_world(Mentor.from_pretrained(folder), network, args)
                data.contact_sheet(tiles, columns=4).save(os.path.join(folder, "world.png"))
                write_json(path, found)
            with open(path, encoding="utf-8") as file:
                rows.append({"variant": name, "seed": seed, "paper": paper, **json.load(file)})
    print(f"judge on true pictures: {said(judges.examine(network))}")
    print_ablation(rows)
    path = os.path.join(args.out, "ablation.json")
    write_json(path, {**budget, "samples": args.samples, "seed": args.seed, "rows": rows})
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------

def add_benchmark_flags(name, add):
    """Flags of the commands that measure on photographs."""
    if name != "cmmd":
        add("--weights", default="tiny", help="as for sample.py (default tiny)")
        add("--data", required=True, metavar="FOLDER")
    add("--device", help="default: cuda, else cpu")
    if name != "reconstruct":
        add("--clip", metavar="FOLDER", help="CLIP's weights, vocab.json and merges.txt; default: from the hub")
    if name in ("dreambench", "dreambench++"):
        add("--dino", metavar="FOLDER", help="DINO's weights; default: from the hub")
        add("--samples", type=int, default=4, help="pictures a prompt (default 4)")
    if name == "dreambench":
        add("--refs", choices=["first", "all"], default="first", help="which pictures serve as reference")
    if name == "dreambench++":
        add("--judge-url", help="OpenAI-compatible endpoint, up to /v1; the key is read from OPENAI_API_KEY")
        add("--judge-model", help="its model's name")
    if name == "cmmd":
        add("a", help="a folder of pictures")
        add("b", help="another")
    else:
        add("--out", default=f"out/eval/{name}")
        add("--batch", type=int, default=8)
        add("--seed", type=int, default=0)


def add_world_flags(name, add):
    """Flags of the commands about the emoji world."""
    if name in ("world", "grid"):
        add("--weights", default="tiny", help="a small model's folder (default: the bundled one)")
    if name == "grid":
        add("--rows", type=int, default=8, help="subjects (default 8)")
        add("--scenes", nargs="+", choices=scenes.SCENES, metavar="SCENE", default=[
            "snow", "beach", "under water", "city at night", "space", "kitchen", "volcano", "yellow"])
    if name == "ablation":
        add("--init", default="out/tiny/pretrain", help="what all variants start from")
        add("--steps", type=int, default=800, help="optimizer steps of both stages together (default 800)")
        add("--global-batch", type=int, default=16, help="samples a step (default 16)")
        add("--seeds", type=int, default=2)
    if name in ("world", "ablation"):
        add("--judge", default="out/judge.safetensors")
        add("--samples", type=int, default=300, help="pictures a task (default 300)")
        add("--show", type=int, default=16, help="pictures a task on the sheet")
    if name == "judge":
        add("--steps", type=int, default=3000)
    else:
        add("--seed", type=int, default=EVAL_SEED)
    if name != "grid":
        add("--batch", type=int, default=64 if name == "judge" else 50)
    add("--out", default={"judge": "out/judge.safetensors", "grid": "out/eval/grid.png"}.get(name, f"out/eval/{name}"))


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    benchmarks = {"dreambench": dreambench, "dreambench++": dreambench_plus, "reconstruct": reconstruct, "cmmd": cmmd}
    small = {"judge": judge, "world": world, "grid": grid, "ablation": ablation}
    for name, function in (benchmarks | small).items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(run=function)
        add_flags = add_benchmark_flags if name in benchmarks else add_world_flags
        add_flags(name, command.add_argument)
    args = parser.parse_args(argv)
    data.check_numbers(args)
    if args.command == "dreambench++" and bool(args.judge_url) != bool(args.judge_model):
        raise InputError("--judge-url and --judge-model go together; give both or none")
    return args


def main(argv=None):
    """The command line."""
    args = parse(argv)
    args.run(args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run(main)
