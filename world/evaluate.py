"""Measures small models on the emoji world's held-out subjects, which none of them has seen in training.

    python -m world.evaluate judge         # trains the judge of this world, once
    python -m world.evaluate world         # scores a small model: one subject and several, segmentation, reconstruction
    python -m world.evaluate icl           # does it draw what examples show and no prompt names?
    python -m world.evaluate grid          # a sheet of held-out subjects in several scenes
    python -m world.evaluate ablation      # trains and scores the paper's Table 4 in miniature
    python -m world.evaluate architectures # and its comparison of connectors and of training with several images
    python -m world.evaluate copying       # does prompt following need the recovery task where copying pays?

A subject-driven image preserves the concept (CP) where the judge names both its subject and its hue, and follows the
prompt (PF) where the judge names its scene. Of several subjects "all" must stand there, each in its own hue and none
twice. `*_ceiling` is the same score of the tokenizer's copy of the target, which no sampled image can be expected to
exceed. The judge itself is in `judge.py`; `eval.py` has the public benchmarks. The last file of this folder.
"""
import argparse
import os
import subprocess
import sys
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import cli
import data
import weights
from cli import InputError
from scorers import color_distance
from world import rows, scenes, sprites
from world.ablation import ABLATION, ARCHITECTURES, COLUMNS, COPYING
from world.judge import accuracy, accuracy_on_true_images, crowd_accuracy, iou, load_judge, psnr, train_judge
from world.rules import EXAMPLES, RULES

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SEED = 73                                  # of the samples that are scored; no training and no tuning uses it


UNKNOWN = ("blueberries", "cloudberry", "redwood", "goldfinch", "greenfly", "snowplough", "beachball", "roadrunner",
           "skylark", "mountaineer", "stagecoach", "wheatear", "spaceport", "bluebell", "pinkfoot", "rainmaker",
           "fireguard", "sandpiper", "moonstone", "waterwheel", "greyhound", "cityscape", "leafhopper", "sunhat",
           "roadblock", "booklet", "orangery", "whitefish", "purpleheart", "yellowtail", "xylophone", "zeppelin",
           "quilt", "thimble", "walrus", "turnip", "gargoyle", "jackdaw", "bagpipes", "harpsichord")


class Test(NamedTuple):
    """What a model is asked for."""
    task: str
    several: int = 1                       # subjects, of task multi
    held_out: bool | str = True            # as a Subject has it
    moves: tuple = tuple(rows.MOVES)       # how a subject may lie in its reference
    called: tuple = ()                     # names for references in place of their own


TESTS = {
    "subject": Test("subject"),
    "still": Test("subject", moves=("still",)),            # the reference shows the subject where the picture has it
    "far": Test("subject", moves=("far",)),
    "new design": Test("subject", held_out=sprites.NEW_DESIGN),
    "unknown names": Test("subject", called=UNKNOWN),      # words that no training sample holds
    "two subjects": Test("multi", 2),
    "three subjects": Test("multi", 3),
    "four subjects": Test("multi", 4),
    "segment": Test("segment"),
    "reconstruct": Test("reconstruct"),
}


def format_scores(scores):
    """Scores in one line: shares with three decimals, decibels with one."""
    parts = []
    for name, value in scores.items():
        decimals = 1 if value >= 10 else 3
        parts.append(f"{name} {value:.{decimals}f}")
    return ", ".join(parts)


def save_image(image, path):
    """Writes an image in the format its extension names; the file appears whole or not at all."""
    with cli.atomic_file(path) as temporary:
        image.save(temporary)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring a model

def run_judge(args):
    """Trains the judge on true images and tests it on new ones of the held-out subjects."""
    cli.probe(args.out)
    scores = train_judge(args.out, args.steps, args.batch)
    print(f"wrote {args.out}; on true pictures of held-out subjects: {format_scores(scores)}")


def load_small(name, dtype="fp32"):
    """A model that samples images of the emoji world's size or less."""
    mentor = weights.load(name, dtype=weights.DTYPES[dtype])
    if mentor.config.image_size > scenes.SIZE:
        raise InputError(f"{name}: makes images of {mentor.config.image_size} pixels a side, more than the emoji "
                         f"world's {scenes.SIZE}; give a model trained by `python -m world.train`")
    return mentor


def enlarge(images):
    """Images as large as the judge looks at. (B, 3, H, W) -> (B, 3, 64, 64)"""
    if images.size(-1) == scenes.SIZE:
        return images
    return F.interpolate(images, (scenes.SIZE, scenes.SIZE), mode="bicubic")


def batch_scores(judge, task, images, targets, metas):
    """The scores of a task. images, targets: (B, 3, 64, 64) in [-1, 1] -> {score: (B,)}"""
    if task == "subject":
        scores = accuracy(judge, images, metas)
        return scores | {"cp": scores["subject"] * scores["hue"], "pf": scores["scene"]}
    if task == "multi":
        return crowd_accuracy(judge, images, metas)
    if task == "segment":
        return {"iou": iou(images, metas)}
    return {"psnr": psnr(images, targets), "l2": color_distance(images, targets)}


@torch.inference_mode()
def score_test(mentor, judge, name, args):
    """One of TESTS. -> {score: (args.samples,)}, and the first args.show samples, each with the image made for it"""
    test = TESTS[name]
    dataset = rows.EmojiData(mentor.processor, mentor.config.image_size, {test.task: 1}, args.seed,
                             held_out=test.held_out, extras=False, several=(test.several,), moves=test.moves,
                             called=test.called)
    parts, shown = [], []
    for start in cli.bar(range(0, args.samples, args.batch), desc=name, leave=False):
        stop = min(start + args.batch, args.samples)
        samples = [dataset[i] for i in range(start, stop)]
        batch = data.collate(samples)
        images = mentor.sample(batch, range(args.seed + start, args.seed + stop))         # (B, 3, H, W)
        copies = mentor.vqgan.decode(mentor.vqgan.encode(batch["target"]))                # (B, 3, H, W)
        images, copies, targets = map(enlarge, (images, copies, batch["target"]))         # (B, 3, 64, 64) each
        scores = batch_scores(judge, test.task, images, targets, batch["meta"])
        ceiling = batch_scores(judge, test.task, copies, targets, batch["meta"])
        parts.append(scores | {f"{name}_ceiling": value for name, value in ceiling.items()})
        shown += zip(samples, images)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, shown[:args.show]


def score_world(mentor, judge, args):
    """-> {test: {score: mean}} on held-out subjects, and a contact sheet of the first samples of each test"""
    results, tiles = {}, []
    places = 2 + max(TESTS[name].several for name in args.tests)
    for name in args.tests:
        scores, shown = score_test(mentor, judge, name, args)
        results[name] = {score: values.mean().item() for score, values in scores.items()}
        tiles += [data.tile(sample, places, image) for sample, image in shown]
    for scores in results.values():
        if "cp" in scores:
            scores |= {"cp*pf": scores["cp"] * scores["pf"], "cp/pf": scores["cp"] / max(scores["pf"], 1e-9)}
    return results, cli.contact_sheet(tiles, columns=4)


def tests_that_fit(mentor):
    """The tests for whose references and some text the prefix has room."""
    room = mentor.config.prefix_tokens // mentor.processor.image_tokens
    return [name for name, test in TESTS.items() if test.several < room]


def run_world(args):
    """Scores a small model on held-out subjects: one and several in an image, segmentation, reconstruction."""
    judge, mentor = load_judge(args.judge), load_small(args.weights, args.dtype)
    cli.probe(os.path.join(args.out, "world.json"))
    if not args.tests:
        args.tests = tests_that_fit(mentor)
        if len(args.tests) < len(TESTS):
            print(f"left out, for {args.weights} has only {mentor.config.prefix_tokens} prefix rows: "
                  + ", ".join(name for name in TESTS if name not in args.tests))
    results, sheet = score_world(mentor, judge, args)
    record = {
        "weights": str(args.weights),
        "dtype": args.dtype,
        "seed": args.seed,
        "samples": args.samples,
        "sampling": asdict(mentor.config.sampling),
        "judge_on_true_pictures": accuracy_on_true_images(judge),
        **results,
    }
    print(f"the judge on true pictures: {format_scores(record['judge_on_true_pictures'])}")
    for name, scores in results.items():
        print(f"{name}: {format_scores(scores)}")
    save_image(sheet, os.path.join(args.out, "world.png"))
    cli.write_json(os.path.join(args.out, "world.json"), record)
    print(f"wrote {args.out}/world.json and world.png")


def run_grid(args):
    """Samples held-out subjects in several scenes: a row for each subject, its reference first, a column a scene."""
    if not args.out.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
        raise InputError(f"--out {args.out}: end the name in .png, .jpg or .webp")
    cli.probe(args.out)
    mentor = load_small(args.weights)
    rng, world = np.random.default_rng(args.seed), rows.World(held_out=True)
    if args.rows > len(world.subjects):
        raise InputError(f"--rows is {args.rows} but there are {len(world.subjects)} held-out subjects; give fewer")
    tiles = []
    for row, subject in enumerate(rng.choice(world.subjects, args.rows, replace=False).tolist()):
        description = rows.Description((subject,), str(rng.choice(list(scenes.PLAIN))))
        background = scenes.paint(rng, description.scene)
        reference, _ = sprites.paste(background, world.place(rng, description, background)[0])
        label = description.labels[0]
        texts = [f"{rows.with_article(label)} {scenes.SCENES[name].phrases[0]}" for name in args.scenes]
        prompts = [data.prompt_for("subject", [label], text) for text in texts]
        batch = data.collate([mentor.processor(prompt, [reference], [label]) for prompt in prompts])
        first_seed = args.seed + row * len(prompts)
        images = mentor.sample(batch, range(first_seed, first_seed + len(prompts)))       # (B, 3, 64, 64)
        for image in [reference] + [data.to_image(pixels) for pixels in images]:
            tiles.append(image.resize((128, 128), Image.BICUBIC))
    save_image(cli.contact_sheet(tiles, columns=1 + len(args.scenes)), args.out)
    print(f"wrote {args.out}")


# ---------------------------------------------------------------------------------------------------------------------
# Learning in context

UNCHANGED = "none"         # in place of a rule: the query as it was


def nearest_rule(image, lesson):
    """The rule whose true output of the query is nearest to an image, (3, 64, 64), by squared error; or UNCHANGED, if
    the query itself is nearer still."""
    candidates = {rule: lesson.output(EXAMPLES, rule) for rule in RULES} | {UNCHANGED: lesson.input(EXAMPLES)}
    errors = {rule: (image.clamp(-1, 1) - data.target_pixels(candidate, scenes.SIZE)).square().mean().item()
              for rule, candidate in candidates.items()}
    return min(errors, key=errors.get)


@torch.inference_mode()
def score_lessons(mentor, args):
    """Draws lessons of held-out subjects twice: with their own examples and with those of a rule drawn anew, all six
    alike. -> [{"rule", "drawn": with its own examples, "copied": by the tokenizer, "drawn_shuffled"}], tiles"""
    world, records, tiles = rows.World(held_out=True), [], []
    processor, size = mentor.processor, mentor.config.image_size
    for start in cli.bar(range(0, args.samples, args.batch), desc="icl", leave=False):
        numbers = range(start, min(start + args.batch, args.samples))
        lessons = [world.lesson(np.random.default_rng((args.seed, k))) for k in numbers]
        others = [rows.pick(np.random.default_rng((args.seed, k, 1)), list(RULES)) for k in numbers]
        images = {}
        for name, shown in (("drawn", [lesson.rule for lesson in lessons]), ("drawn_shuffled", others)):
            composed = [lesson.compose(rule) for lesson, rule in zip(lessons, shown)]
            samples = [{"task": "icl", "target": data.target_pixels(target, size)} | processor(prompt, references)
                       for prompt, references, target in composed]
            images[name] = mentor.sample(data.collate(samples), [args.seed + k for k in numbers])
            if name == "drawn":
                targets = torch.stack([sample["target"] for sample in samples])           # (B, 3, 64, 64)
                images["copied"] = mentor.vqgan.decode(mentor.vqgan.encode(targets))
                tiles += [data.tile(sample, 7, image) for sample, image in zip(samples, images[name])]
        for i, lesson in enumerate(lessons):
            found = {name: nearest_rule(drawn[i], lesson) for name, drawn in images.items()}
            records.append({"rule": lesson.rule, **found})
    return records, tiles[:args.show]


def lesson_scores(records):
    """How often the drawn rule is the lesson's. -> {"accuracy", "shuffled", "ceiling", each rule's accuracy}"""
    share = lambda name, chosen: float(np.mean([record[name] == record["rule"] for record in chosen]))
    scores = {"accuracy": share("drawn", records), "shuffled": share("drawn_shuffled", records),
              "ceiling": share("copied", records)}
    for rule in RULES:
        chosen = [record for record in records if record["rule"] == rule]
        if chosen:
            scores[rule] = share("drawn", chosen)
    return scores


def run_icl(args):
    """Scores what a small model learns from two examples of a rule that no prompt names, on held-out subjects."""
    mentor = load_small(args.weights)
    cli.probe(os.path.join(args.out, "icl.json"))
    records, tiles = score_lessons(mentor, args)
    scores = lesson_scores(records)
    print(f"the rule that the examples show is drawn: {format_scores(scores)}; chance {1 / len(RULES):.3f}")
    save_image(cli.contact_sheet(tiles, columns=2), os.path.join(args.out, "icl.png"))
    cli.write_json(os.path.join(args.out, "icl.json"), {
        "weights": str(args.weights),
        "seed": args.seed,
        "samples": args.samples,
        "sampling": asdict(mentor.config.sampling),
        "scores": scores,
        "lessons": records,
    })
    print(f"wrote {args.out}/icl.json and icl.png")


# ---------------------------------------------------------------------------------------------------------------------
# Variants of the training, as `ablation.py` has them

def start_training(args, run, steps, seed, init, out):
    """Starts `world.train` in a process of its own. -> subprocess.Popen"""
    init = os.path.abspath(init) if os.path.exists(init) else init          # else a name such as "tiny"
    command = [sys.executable, "-m", "world.train", "--stage", run.stage, "--init", init, "--out", os.path.abspath(out),
               "--steps", str(steps), "--global-batch", str(args.global_batch), "--seed", str(seed),
               "--sample-every", str(steps), "--save-every", "50", "--keep", "1", "--workers", "0", *run.flags]
    if args.bf16:
        command.append("--bf16")
    if cli.checkpoints(out):
        command.append("--resume")
    environment = dict(os.environ)
    if args.seeds > 1:                         # the seeds train side by side, so they share the cores
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.seeds))
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def start_of(args, variant):
    """The weights that a variant starts from."""
    return args.aligned if variant.pretrain == "aligned" else args.init


def train_variant(args, name, variant):
    """Trains a variant with all seeds side by side, as far as that is not done yet. -> {seed: folder of weights}"""
    kind = "-aligned" if variant.pretrain == "aligned" else ""
    names = {seed: f"seed{seed}{kind}" for seed in range(args.seeds)}
    weights_of = dict.fromkeys(names, start_of(args, variant))
    for run in variant.runs:
        running, steps = {}, run.steps(args.steps)
        for seed, init in weights_of.items():
            names[seed] += f"_{run.name}"                              # variants that begin alike share folders
            weights_of[seed] = out = os.path.join(args.out, names[seed])
            if os.path.join(out, f"step-{steps:08}") not in cli.checkpoints(out):
                print(f"{name}, seed {seed}: stage {run.stage}, {steps} steps -> {out}", flush=True)
                running[out] = start_training(args, run, steps, seed, init, out)
        failed = [out for out, process in running.items() if process.wait() != 0]
        if failed:
            raise InputError(f"{failed[0]}: the training stopped; give the same command again to continue it")
    return weights_of


def score_variant(folder, judge, args):
    """Scores the weights in a folder, unless their scores are there already. -> {task: {score: mean}}"""
    path = os.path.join(folder, f"world-{args.samples}-{args.seed}.json")
    if not os.path.exists(path):
        results, sheet = score_world(weights.load(folder), judge, args)
        save_image(sheet, os.path.join(folder, "world.png"))
        cli.write_json(path, results)
    return cli.read_json(path, "scores; remove it, and the same command makes them anew")


def print_table(variants, columns, scored):
    """Of every variant the conditions, the mean over the seeds and half their range, and the paper's numbers."""
    header = "".join(f"{column:>13}" for column in columns)
    print(f"{'mean, half the range over seeds':32}{'pretrain':>10}{'copies':>8}{header}   paper: CP, PF, CP*PF")
    for name, variant in variants.items():
        cells = f"{variant.pretrain or '-':>10}{'-' if variant.copies is None else variant.copies:>8}"
        for task, score in (COLUMNS[column] for column in columns):
            values = [row[task][score] for row in scored if row["variant"] == name]
            cells += f"{np.mean(values):7.3f} {np.ptp(values) / 2:.3f}"
        paper = ", ".join("-" if value is None else f"{value:.3f}" for value in variant.paper or (None,))
        print(f"{name:32}{cells}   {paper}")


def check_budget(args, table, chosen):
    """Raises InputError where the chosen variants cannot be trained, or an earlier command gave --out another budget.
    -> the budget"""
    starts = {start_of(args, variant) for variant in chosen.values()}
    for start in sorted(starts):
        load_small(start)                      # so that an error in it is reported before anything is trained
    if args.steps < 3 and any(run.part != "all" for variant in chosen.values() for run in variant.runs):
        raise InputError(f"--steps is {args.steps} but two stages share them, a third for the first; give 3 or more")
    budget = {"init": args.init, "steps": args.steps, "global_batch": args.global_batch, "bf16": args.bf16}
    if any(variant.pretrain for variant in table.variants.values()):
        budget["aligned"] = args.aligned
    path = os.path.join(args.out, "budget.json")
    if not os.path.exists(path):
        cli.write_json(path, budget)
    earlier = cli.read_json(path, "the budget of these trainings; remove it if they shall begin anew")
    if earlier != budget:
        raise InputError(f"{path}: was begun with {earlier}, not {budget}; give the same or another --out")
    return budget


def run_table(name, table, args):
    """Trains and scores the variants of a table, or those of --rows, prints it and writes it to args.out/name.json."""
    judge, chosen = load_judge(args.judge), {row: table.variants[row] for row in args.rows or table.variants}
    budget = check_budget(args, table, chosen)
    args.tests = list(dict.fromkeys(COLUMNS[column][0] for column in table.columns))
    scored = []
    for row, variant in chosen.items():
        runs = [{"stage": run.stage, "flags": run.flags, "steps": run.steps(args.steps)} for run in variant.runs]
        facts = {"pretrain": variant.pretrain, "copies": variant.copies, "runs": runs, "paper": variant.paper}
        for seed, folder in train_variant(args, row, variant).items():
            scored.append({"variant": row, "seed": seed, **facts, **score_variant(folder, judge, args)})
    print(f"judge on true pictures: {format_scores(accuracy_on_true_images(judge))}")
    print_table(chosen, table.columns, scored)
    path = os.path.join(args.out, f"{name}.json")
    cli.write_json(path, {**budget, "samples": args.samples, "seed": args.seed, "rows": scored})
    print(f"wrote {path}")


def run_ablation(args):
    """Trains the small model's variants of the paper's Table 4 and prints the table beside it."""
    run_table("ablation", ABLATION, args)


def run_architectures(args):
    """Trains new connectors with equal budgets: MLP, query, MLP with several images, MLP without rotation."""
    run_table("architectures", ARCHITECTURES, args)


def run_copying(args):
    """Trains a small model further with and without recovery, where copying the reference pays and where not."""
    run_table("copying", COPYING, args)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def add_command(commands, name, function):
    """A subcommand that runs `function`. -> what adds a flag to it"""
    parser = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
    parser.set_defaults(run=function)
    return parser.add_argument


def add_table_flags(flag, name, table, steps):
    """The flags of a command that trains and scores a table."""
    flag("--rows", nargs="+", choices=table.variants, metavar="NAME", help="only these: " + "; ".join(table.variants))
    flag("--steps", type=cli.positive_int, default=steps, help=f"optimizer steps of a variant; where it has stage 1, a "
         f"third is for that (default {steps})")
    flag("--global-batch", type=cli.positive_int, default=16, help="samples a step (default 16)")
    flag("--bf16", action="store_true", help="train by bf16 products over fp32 weights")
    flag("--seeds", type=cli.positive_int, default=2, help="trainings of each variant (default 2)")
    flag("--judge", default="out/judge.safetensors", help="written by `judge` (default out/judge.safetensors)")
    flag("--samples", type=cli.positive_int, default=300, help="images a test (default 300)")
    flag("--show", type=cli.positive_int, default=16, help="images a test on the sheets (default 16)")
    flag("--batch", type=cli.positive_int, default=50, help="images sampled at once (default 50)")
    flag("--seed", type=cli.natural, default=SEED, help=f"of the samples that are scored (default {SEED})")
    flag("--out", default=f"out/eval/{name}", help=f"folder for trainings and results (default out/eval/{name})")


def parse(argv):
    """The command line -> arguments, `run` among them."""
    parser = cli.Parser(prog="python -m world.evaluate", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    flag = add_command(commands, "judge", run_judge)
    flag("--steps", type=cli.positive_int, default=3000, help="optimizer steps (default 3000)")
    flag("--batch", type=cli.positive_int, default=64, help="images a step (default 64)")
    flag("--out", default="out/judge.safetensors", help="the judge's weights (default out/judge.safetensors)")

    flag = add_command(commands, "world", run_world)
    flag("--weights", default="tiny", help="a small model's folder (default: the bundled one)")
    flag("--dtype", choices=weights.DTYPES, default="fp32", help="of the weights (default fp32)")
    flag("--judge", default="out/judge.safetensors", help="written by `judge` (default out/judge.safetensors)")
    flag("--tests", nargs="+", choices=TESTS, metavar="TEST", help="default: those of "
         + "; ".join(TESTS) + " for which the weights have enough prefix rows")
    flag("--samples", type=cli.positive_int, default=300, help="images a test (default 300)")
    flag("--show", type=cli.positive_int, default=16, help="images a test on the sheet (default 16)")
    flag("--batch", type=cli.positive_int, default=50, help="images sampled at once (default 50)")
    flag("--seed", type=cli.natural, default=SEED, help=f"of the samples (default {SEED})")
    flag("--out", default="out/eval/world", help="folder for world.json and world.png (default out/eval/world)")

    flag = add_command(commands, "icl", run_icl)
    flag("--weights", default="out/tiny/icl", help="a small model's folder (default out/tiny/icl)")
    flag("--samples", type=cli.positive_int, default=300, help="lessons, each drawn twice (default 300)")
    flag("--show", type=cli.positive_int, default=16, help="lessons on the sheet (default 16)")
    flag("--batch", type=cli.positive_int, default=50, help="images sampled at once (default 50)")
    flag("--seed", type=cli.natural, default=SEED, help=f"of the lessons (default {SEED})")
    flag("--out", default="out/eval/icl", help="folder for icl.json and icl.png (default out/eval/icl)")

    flag = add_command(commands, "grid", run_grid)
    flag("--weights", default="tiny", help="a small model's folder (default: the bundled one)")
    flag("--rows", type=cli.positive_int, default=8, help="subjects (default 8)")
    flag("--scenes", nargs="+", choices=scenes.SCENES, metavar="SCENE", help="columns (default: eight of them)",
         default=["snow", "beach", "under water", "city at night", "space", "kitchen", "volcano", "yellow"])
    flag("--seed", type=cli.natural, default=SEED, help=f"of subjects and samples (default {SEED})")
    flag("--out", default="out/eval/grid.png", help="the sheet (default out/eval/grid.png)")

    flag = add_command(commands, "ablation", run_ablation)
    flag("--init", default="out/tiny/connector", help="weights after stages parts and connector, from which all rows "
         "start that do not say aligned (default out/tiny/connector)")
    flag("--aligned", default="out/tiny/pretrain", help="weights after stage pretrain, for the rows that do (default "
         "out/tiny/pretrain)")
    add_table_flags(flag, "ablation", ABLATION, 800)

    flag = add_command(commands, "architectures", run_architectures)
    flag("--init", default="tiny", help="weights all variants start from (default tiny)")
    add_table_flags(flag, "architectures", ARCHITECTURES, 400)

    flag = add_command(commands, "copying", run_copying)
    flag("--init", default="tiny", help="weights all variants start from (default tiny)")
    add_table_flags(flag, "copying", COPYING, 200)
    return parser.parse_args(argv)


def main(argv=None):
    """Runs one command."""
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
