"""The paper's benchmarks: what a checkpoint can do on photographs, in numbers that can be reproduced.

    python eval.py dreambench --weights W --data FOLDER      # CLIP-I, CLIP-T and DINO: 30 subjects x 25 prompts
    python eval.py dreambench++ --weights W --data FOLDER --judge-url URL --judge-model NAME     # the paper's Table 1
    python eval.py dreambench++ --weights W --data FOLDER --layout official     # pictures for that benchmark's scripts
    python eval.py segment --weights W --data rows.jsonl     # IoU of drawn objects with their masks
    python eval.py reconstruct --weights W --data FOLDER     # how well a reference image is reproduced
    python eval.py cmmd A B                                  # distance between two folders of images
    python eval.py rounding --weights W --data rows.jsonl    # what --dtype int8 costs: tokens, cross entropy

    benchmark's folder -> Examples -> Mentor.sample -> images --scorers.py--> results.jsonl -> table, summary.json

The first three write each image to --out as soon as it is scored, and the same command started again continues there;
under torchrun the processes share the work. MENTOR's release evaluates with --cfg 7.5 --top-k 16384. The networks that
score are CLIP ViT-B/32 and DINO ViT-S/16 from the hub, or those in the folders that --clip and --dino name. FID is left
out, since it needs Inception's weights; CMMD (arXiv 2401.09603), computed from CLIP's embeddings, takes its place.

Next: `bench.py`, which measures speed and memory.
"""
import argparse
import errno
import json
import os
import re
import statistics
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import cli
import data
import weights
from cli import InputError, Ranks
from scorers import (BLACK, CATEGORIES, PROMPT_GROUPS, Scorer, VisionJudge, color_distance, judge_table, mask_iou,
                     published_name)

SAMPLING = ("weights", "data", "seed", "samples", "refs")          # flags that decide which images there are,
SCORING = ("clip", "dino", "judge_model", "passes")                # and how they are scored
COLUMNS = ("clip_i", "clip_t", "dino")
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}         # of the official layout: close to lossless


# ---------------------------------------------------------------------------------------------------------------------
# What a benchmark asks for

@dataclass(frozen=True)
class Example:
    """One image to be sampled and scored."""
    key: str                  # unique; also the image's file name
    group: str                # the average it counts towards
    prompt_group: str | None  # that of its prompt, where prompts have groups
    subject: str              # what the network is told that the reference shows
    prompt: str
    reference: str            # path
    subject_images: tuple     # paths of all images of the subject, which CLIP-I and DINO compare with
    seed: int


def images_in(folder):
    """Paths of the images in a folder, sorted by name; none if there is no such folder."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else ()
    return tuple(os.path.join(folder, name) for name in names
                 if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")))


def read_dreambench(path):
    """DreamBench's prompts_and_classes.txt -> {subject: class}, prompts for objects, prompts for live subjects.

    In a prompt, {1} stands for the class. https://github.com/google/dreambooth/tree/main/dataset
    """
    text = cli.read_text(path, "DreamBench's prompts; --data takes its folder")
    sections = re.split(r"^(?:Object|Live Subject) Prompts$", text, flags=re.MULTILINE)
    if len(sections) != 3:
        raise InputError(f"{path}: has no 'Object Prompts' and 'Live Subject Prompts'; use DreamBench's own file")
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", sections[0], flags=re.MULTILINE))
    classes.pop("subject_name", None)                          # the table's header
    prompts = []
    for section in sections[1:]:
        lines = re.findall(r"'(.*\{1\}.*)'\.format", section)
        prompts.append([line.replace("{0} ", "") for line in lines])
    return classes, *prompts


def check_examples(args, examples):
    """Raises InputError where the benchmark's folder holds nothing of it."""
    if not examples:
        raise InputError(f"{args.data}: holds no subjects with pictures; see `python eval.py {args.command} --help`")


def dreambench_examples(args):
    """DreamBench's folder: a folder of images for each subject beside prompts_and_classes.txt.
    -> examples, names of subjects without images"""
    classes, object_prompts, live_prompts = read_dreambench(os.path.join(args.data, "prompts_and_classes.txt"))
    examples, missing = [], []
    for subject, class_name in classes.items():
        subject_images = images_in(os.path.join(args.data, subject))
        if not subject_images:
            missing.append(subject)
        references = subject_images if args.refs == "all" else subject_images[:1]
        prompts = live_prompts if class_name in ("cat", "dog") else object_prompts
        for r, reference in enumerate(references):
            for p, prompt in enumerate(prompts):
                for i in range(args.samples):
                    examples.append(Example(f"{subject}-{r:02}-{p:02}-{i}", subject, None, class_name,
                                            prompt.replace("{1}", class_name), reference, subject_images,
                                            args.seed + len(examples)))
    check_examples(args, examples)
    return examples, missing


def collection_id(category, number, subject):
    """What DreamBench++'s scripts call a picture and its prompts: live_subject_animal_00_kitten."""
    live = "live_subject_" if category in ("animal", "human") else ""
    return live + re.sub(r"[ /\\\0]", "_", f"{category}_{number}_{subject.lower()}")


def read_captions(path, reference):
    """DreamBench++'s text file of a picture. -> subject, list of up to nine prompts"""
    what = f"the subject and the nine prompts of {reference}, one on each line"
    lines = [line.strip() for line in cli.read_text(path, what).splitlines() if line.strip()]
    if not 2 <= len(lines) <= 10:
        raise InputError(f"{path}: has {len(lines)} lines; it should hold {what}")
    return lines[0], lines[1:]


def dreambench_plus_examples(args):
    """DreamBench++'s folder: images/**/<category>/NN.jpg and captions/**/<category>/NN.txt."""
    examples, root, paths = [], os.path.join(args.data, "images"), {}
    for folder, _, _ in sorted(os.walk(root)):
        place = os.path.relpath(folder, root)
        for reference in images_in(folder):
            category = next((name for name in reversed(place.split(os.sep)) if name in CATEGORIES), None)
            if not category:
                raise InputError(f"{reference}: lies in no folder called {', '.join(CATEGORIES)}, by which scores are "
                                 "averaged; move it into one of them, and its captions too")
            number = os.path.splitext(os.path.basename(reference))[0]
            subject, prompts = read_captions(os.path.join(args.data, "captions", place, f"{number}.txt"), reference)
            collection = collection_id(category, number, subject)
            if paths.setdefault(collection, reference) != reference:
                raise InputError(f"{reference}: {paths[collection]} has the same category, number and subject; rename "
                                 "one of them, and its captions too")
            for p, prompt in enumerate(prompts):
                prompt_group = next(name for name, numbers in PROMPT_GROUPS.items() if p in numbers)
                for i in range(args.samples):
                    examples.append(Example(f"{collection}-{p}_{i}", category, prompt_group, subject, prompt, reference,
                                            (reference,), args.seed + i))
    check_examples(args, examples)
    return examples


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and scoring

@dataclass(frozen=True)
class Row:
    """A line of results.jsonl; cp and pf are the judge's: for each pass a score and all its answers until then."""
    key: str
    group: str
    prompt_group: str | None
    subject: str
    prompt: str
    reference: str
    seed: int
    clip_i: float
    clip_t: float
    dino: float
    cp: list[int | None] | None = None
    cp_answers: list[list[str]] | None = None
    pf: list[int | None] | None = None
    pf_answers: list[list[str]] | None = None


ROW_LIMITS = {"cp": (0, 4), "pf": (0, 4), "seed": (0, 2**63)} | dict.fromkeys(COLUMNS, (-1.01, 1.01))


def check_settings(path, earlier, settings):
    """Raises InputError unless the results in that file were made with the same settings."""
    if not isinstance(earlier, dict):
        raise InputError(f"{path}: holds no settings, so eval.py did not write it; choose another --out")
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise InputError(f"{path}: was made with another {name} ({cli.shortly(earlier.get(name))}, not "
                             f"{cli.shortly(value)}); give the same again or another --out")


class Results:
    """results.jsonl: first the settings, then one line for each image, written once it is sampled and scored.

    Several processes may append. A line that a killed process left unfinished is cut off at the next start; where
    another process had written on behind it, both are lost, and their pictures are made again.
    """

    def __init__(self, folder, settings, ranks):
        self.path = os.path.join(folder, "results.jsonl")
        if os.path.lexists(self.path):
            cli.check_file(self.path, "results of eval.py", most=4 << 30)
        if ranks.rank == 0:
            self.begin(settings)
        ranks.barrier()
        earlier, *rows = self.read()
        ranks.barrier()                        # all see the same rows before any appends, so they share what is left
        check_settings(f"{self.path}: line 1", earlier, settings)
        self.done = {row["key"] for row in rows if os.path.exists(os.path.join(folder, f"{row['key']}.png"))}

    @contextmanager
    def open(self, mode, **options):
        """The file; an OSError in the block becomes an InputError."""
        try:
            with open(self.path, mode, **options) as file:
                yield file
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read or written ({error.strerror}); make room or choose another "
                             f"--out, then give the same command again") from None

    def begin(self, settings):
        """Cuts off an unfinished line; writes the settings if nothing is left."""
        with self.open("ab+") as file:
            file.seek(0)
            finished = file.read().rfind(b"\n") + 1
            file.truncate(finished)
        if not finished:
            self.append(settings)

    def append(self, row):
        """Adds a line in a single write, so that lines of several processes do not mix."""
        line = json.dumps(row).encode() + b"\n"
        with self.open("ab", buffering=0) as file:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, "disk full")

    def read(self):
        """-> settings, then the rows in order; raises InputError for lines that are something else."""
        found = []
        with self.open("rb") as file:
            for number, line in enumerate(file, 1):
                torn = number > 1 and (line.startswith(b'{"key": ') or b"\0" in line)         # a crash leaves zeros
                try:
                    found.append(cli.parse_json(line, self.path))
                except InputError:
                    if torn:
                        continue
                    raise InputError(f"{self.path}: line {number} is not one that eval.py wrote; remove it or choose "
                                     f"another --out") from None
                if number > 1:
                    cli.from_json(Row, found[-1], f"{self.path}: line {number}", ROW_LIMITS)
        return found


def load_model(args, ranks, count):
    """count: of the images that it is to draw -> model whose sampling settings are its own but for the flags given, and
    all that decides what it draws."""
    dtype = args.dtype or weights.usual_dtype(ranks.device)
    mentor = weights.load(args.weights, device=ranks.device, dtype=weights.DTYPES[dtype])
    sampling = replace(mentor.config.sampling, **cli.given_sampling(args))
    sampling.check(mentor.config.decoder.codes)
    mentor.config = replace(mentor.config, sampling=sampling)
    weights.compile_decoder(mentor, count)
    settings = {name: value for name, value in vars(args).items() if name in SAMPLING}
    if args.dtype:
        settings["dtype"] = dtype
    return mentor, settings | {"size": mentor.config.image_size} | asdict(sampling)


def sample_images(mentor, prompts, references, subjects, seeds):
    """One image for each prompt. references: PIL, one for each prompt; subjects: what they show -> (B, 3, H, W)"""
    samples = [mentor.processor(prompt, [reference], [subject])
               for prompt, reference, subject in zip(prompts, references, subjects, strict=True)]
    return mentor.sample(data.collate(samples), seeds)


def score_by_networks(scorer, examples, images, cache):
    """CLIP-I and DINO against all images of the subject, CLIP-T against the prompt. -> a dict for each image

    cache: {paths of a subject's images: their embeddings}, filled as subjects come up.
    """
    embeddings, scores = scorer.embed_images(images), []
    for i, example in enumerate(examples):
        if example.subject_images not in cache:
            cache[example.subject_images] = scorer.embed_images(
                [data.open_image(path) for path in example.subject_images])
        subject = cache[example.subject_images]
        scores.append({"clip_i": (subject["clip"] @ embeddings["clip"][i]).mean().item(),
                       "dino": (subject["dino"] @ embeddings["dino"][i]).mean().item(),
                       "clip_t": (scorer.embed_text(example.prompt) @ embeddings["clip"][i]).item()})
    return scores


def score_by_judge(vision_judge, example, reference, image, passes):
    """Concept preservation (cp) and prompt following (pf) of each pass, 0 to 4 or None, with the judge's answers."""
    scores = {"cp": [], "cp_answers": [], "pf": [], "pf_answers": []}
    concept = "cp_style" if example.group == "style" else "cp"
    for _ in range(passes):
        for name, rubric, shown in (("cp", concept, [reference, image]), ("pf", "pf", [image])):
            score, answers = vision_judge.score(rubric, shown, example.subject, example.prompt)
            scores[name].append(score)
            scores[f"{name}_answers"].append(answers)
    return scores


def chunks(args, ranks, n):
    """Yields ranges of at most args.batch of n items, this process's share of them."""
    starts = range(ranks.rank * args.batch, n, ranks.world * args.batch)
    with cli.bar(starts, unit="batch", disable=ranks.rank > 0) as starts:
        for start in starts:
            yield range(start, min(start + args.batch, n))


def draw(args, ranks, mentor, examples):
    """Samples this process's share in batches. Yields some examples, their prompts, PIL references and PIL images."""
    for numbers in chunks(args, ranks, len(examples)):
        chunk = [examples[i] for i in numbers]
        prompts = [data.prompt_for("subject", [example.subject], example.prompt) for example in chunk]
        references = [data.open_image(example.reference) for example in chunk]
        pixels = sample_images(mentor, prompts, references, [example.subject for example in chunk],
                               [example.seed for example in chunk])
        yield chunk, prompts, references, [data.to_image(image) for image in pixels]


def run_benchmark(args, ranks, examples, vision_judge=None):
    """Samples and scores what --out does not hold yet, this process its share. -> settings, rows of all, in order"""
    cli.probe(os.path.join(args.out, "results.jsonl"))
    scorer = Scorer(args.clip, args.dino, ranks.device)
    mentor, settings = load_model(args, ranks, len(examples))
    settings |= {name: value for name, value in vars(args).items() if name in SCORING}
    results, cache = Results(args.out, settings, ranks), {}
    remaining = [example for example in examples if example.key not in results.done]
    for chunk, prompts, references, images in draw(args, ranks, mentor, remaining):
        scores = score_by_networks(scorer, chunk, images, cache)
        for i, example in enumerate(chunk):
            row = {"key": example.key, "group": example.group, "prompt_group": example.prompt_group,
                   "subject": example.subject, "prompt": prompts[i], "reference": example.reference,
                   "seed": example.seed, **scores[i]}
            if vision_judge:
                row |= score_by_judge(vision_judge, example, references[i], images[i], args.passes)
            with cli.atomic_file(os.path.join(args.out, f"{example.key}.png")) as path:
                images[i].save(path, "PNG")
            results.append(row)
    ranks.barrier()
    rows = {row["key"]: row for row in results.read()[1:]}
    if lost := [example.key for example in examples if example.key not in rows]:
        raise InputError(f"{results.path}: {len(lost)} lines are torn, the first of {lost[0]}; give the same command "
                         "again, which makes what is missing")
    return settings, [rows[example.key] for example in examples]


# ---------------------------------------------------------------------------------------------------------------------
# The folders that DreamBench++'s own scripts read. https://github.com/yuangpeng/dreambench_plus

def official_paths(folder, example):
    """Where those scripts look for an example's reference, prompt and image."""
    collection, name = example.key.rsplit("-", 1)
    return (os.path.join(folder, "src_image", collection, f"{name}.jpg"),
            os.path.join(folder, "text", collection, f"{name}.txt"),
            os.path.join(folder, "tgt_image", collection, f"{name}.jpg"))


def begin_official(folder, examples, settings):
    """Writes what stands beside the pictures, and removes what killed processes left among them."""
    for place in {os.path.dirname(path) for example in examples for path in official_paths(folder, example)}:
        cli.clean(os.path.join(place, "any"))
    if not os.path.exists(os.path.join(folder, "settings.json")):
        cli.write_json(os.path.join(folder, "settings.json"), settings)
    with cli.atomic_file(os.path.join(folder, "negative_prompt.txt")) as path:
        open(path, "w").close()                # MENTOR has none


def write_official(args, ranks, examples):
    """Samples what --out does not hold yet, this process its share, and writes it with reference and prompt."""
    settings_path = os.path.join(args.out, "settings.json")
    cli.probe(settings_path)
    mentor, settings = load_model(args, ranks, len(examples))
    if ranks.rank == 0:
        begin_official(args.out, examples, settings)
    ranks.barrier()
    check_settings(settings_path, cli.read_json(settings_path, "settings of eval.py"), settings)
    remaining = [example for example in examples if not os.path.exists(official_paths(args.out, example)[-1])]
    ranks.barrier()                            # all see the same images before any is added, so they share what is left
    for chunk, _, references, images in draw(args, ranks, mentor, remaining):
        for example, reference, image in zip(chunk, references, images):
            reference_path, text_path, image_path = official_paths(args.out, example)
            with cli.atomic_file(reference_path) as path:
                reference.save(path, **JPEG)
            with cli.atomic_file(text_path) as path, open(path, "w", encoding="utf-8") as file:
                file.write(example.prompt)
            with cli.atomic_file(image_path) as path:          # the last: where it is, all is there
                image.save(path, **JPEG)
    ranks.barrier()
    if ranks.rank == 0:
        print(f"wrote {args.out}: {len(examples)} pictures in the folders that DreamBench++'s scripts read, JPEG of "
              f"quality {JPEG['quality']} with full colour resolution")


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def mean(rows, name):
    """Of a column."""
    return statistics.fmean(row[name] for row in rows)


def print_judge_table(table):
    """Prints what `judge_table` returns."""
    def number(value):
        return "-" if value is None else f"{value:.3f}"

    print(f"\n{'':26}  pictures{'score':>9}{'+-':>9}  (standard deviation over the passes)")
    for name, title in (("CP", "concept preservation"), ("PF", "prompt following")):
        print(f"{title} ({name})")
        for group, row in table[name].items():
            print(f"  {group:24}  {row['pictures']:8}{number(row['score']):>9}{number(row['spread']):>9}")
    print(f"CP*PF {number(table['CP*PF'])}, CP/PF {number(table['CP/PF'])}\nThe judge was asked by this project's own "
          "rubrics, so these scores cannot be compared with published ones; for those --layout official writes the "
          "pictures and DreamBench++'s own scripts score them")


def print_table(groups):
    """Prints averages for each group, then over all. groups: {name: rows}. -> {name: {column: number}}"""
    table = {name: {column: mean(rows, column) for column in COLUMNS} for name, rows in groups.items()}
    width = max(len(name) for name in groups)
    print(f"{'':{width}}  pictures" + "".join(f"{column:>9}" for column in table["all"]))
    for name, rows in groups.items():
        print(f"{name:{width}}  {len(rows):8}" + "".join(f"{value:9.3f}" for value in table[name].values()))
    return table


def write_report(args, settings, rows, **extra):
    """Prints the table; writes summary.json, `extra` in it, and a contact sheet: for each group the reference and some
    images."""
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    scores = print_table({**groups, "all": rows})
    cli.write_json(os.path.join(args.out, "summary.json"), {**settings, **extra, "scores": scores})
    tiles, columns = [], 5
    for group in groups.values():
        step = max(1, len(group) // (columns - 1))
        paths = [os.path.join(args.out, f"{row['key']}.png") for row in group[::step][:columns - 1]]
        tiles += [data.center_square(data.open_image(path), 256) for path in [group[0]["reference"], *paths]]
        tiles += [Image.new("RGB", (256, 256), "white")] * (columns - 1 - len(paths))
    with cli.atomic_file(os.path.join(args.out, "sheet.png")) as path:
        cli.contact_sheet(tiles, columns).save(path)
    print(f"wrote {args.out}/results.jsonl, summary.json, sheet.png and the pictures")


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def dreambench(args, ranks):
    """DreamBench: CLIP-I and DINO against all images of the subject, CLIP-T against the prompt."""
    examples, missing = dreambench_examples(args)
    warning = (f"{args.data} holds no pictures of {len(missing)} of DreamBench's subjects ({', '.join(missing)}), so "
               "the averages cannot be compared with published ones")
    if missing and ranks.rank == 0:            # before the hours of work and behind them
        print(warning)
    settings, rows = run_benchmark(args, ranks, examples)
    if ranks.rank == 0:
        write_report(args, settings, rows, missing_subjects=missing)
        if missing:
            print(warning)


def dreambench_plus(args, ranks):
    """DreamBench++: the same scores, and with --judge-url concept preservation (CP) and prompt following (PF). With
    --layout official only the pictures, in the folders that the benchmark's own scripts read."""
    if bool(args.judge_url) != bool(args.judge_model):
        raise InputError("--judge-url and --judge-model go together; give both or none")
    official, vision_judge = args.layout == "official", None
    if official and (args.judge_url or args.clip or args.dino):
        raise InputError("--layout official scores nothing; leave out --judge-url, --judge-model, --clip and --dino")
    if args.judge_url:
        vision_judge = VisionJudge(args.judge_url, args.judge_model, os.environ.get("OPENAI_API_KEY"))
    examples = dreambench_plus_examples(args)
    if official:
        return write_official(args, ranks, examples)
    settings, rows = run_benchmark(args, ranks, examples, vision_judge)
    if ranks.rank > 0:
        return
    if not vision_judge:
        return write_report(args, settings, rows)
    table = judge_table(rows)
    write_report(args, settings, rows, judge=table)
    print_judge_table(table)
    unread = sum(score is None for row in rows for name in ("cp", "pf") for score in row[name])
    retries = sum(len(answers) - 1 for row in rows for name in ("cp", "pf") for answers in row[f"{name}_answers"])
    print(f"the judge was asked again {retries} times; {unread} answers could not be read and do not count")


def in_order(parts):
    """Rows of several processes, {number: row} each, by their numbers. -> list"""
    rows = {number: row for part in parts for number, row in part.items()}
    return [rows[number] for number in sorted(rows)]


@torch.inference_mode()
def tokenizer_copies(mentor, targets):
    """What is left of targets that the tokenizer encodes and decodes. (B, 3, H, W) in [-1, 1] -> the same, on the CPU
    """
    return mentor.vqgan.decode(mentor.vqgan.encode(targets.to(mentor.device))).cpu()


def segmentation_sample(mentor, row):
    """What the network reads of a segmentation row, with "target" (3, H, W) in [-1, 1] and "object" (H, W) bool, the
    row's own mask, both of the size that is drawn. InputError says why a row cannot be used."""
    image, size, doubts = data.open_image(row.source), mentor.config.image_size, []
    mask = np.logical_or.reduce([data.open_mask(path, image, row.source, doubts) for path in row.images])
    sample = mentor.processor(data.prompt_for("segment", row.objects), [image] * len(row.objects), row.objects)
    sample["target"] = data.target_pixels(data.on_black(image, mask), size)               # (3, H, W)
    sample["object"] = data.target_pixels(Image.fromarray(mask).convert("RGB"), size)[0] > 0          # (H, W)
    if not sample["object"].any():
        raise InputError(f"nothing of the mask is left in the picture's central square of {size} pixels; crop the "
                         "picture around the object")
    for doubt in doubts:
        tqdm.write(f"suspicious: {doubt}")
    return sample


def segmentation_scores(mentor, samples):
    """IoU of the images that are drawn of samples, and of the tokenizer's copies. -> a dict for each sample"""
    batch = data.collate(samples)
    images = mentor.sample(batch, batch["seed"]).cpu()                                    # (B, 3, H, W)
    iou = mask_iou(images, batch["object"]).tolist()
    ceiling = mask_iou(tokenizer_copies(mentor, batch["target"]), batch["object"]).tolist()
    return [{"row": sample["row"], "prompt": sample["prompt"], "seed": sample["seed"], "iou": iou[i],
             "iou_ceiling": ceiling[i]} for i, sample in enumerate(samples)]


def segment(args, ranks):
    """Draws the objects of all segmentation rows of a JSONL on black. IoU is the overlap of what is not black there
    with the row's own mask; beside it stands that of the tokenizer's own copy of the target, hard to exceed."""
    jsonl, out = data.Rows([args.data]), os.path.join(args.out, "segment.json")
    numbers = np.flatnonzero(jsonl.table["task"] == data.KINDS["segment"])
    if not len(numbers):
        raise InputError(f'{args.data}: has no row of an object, its mask and "do_mask": true; add some'
                         + "".join(f"; first problem: {problem}" for problem in jsonl.problems[:1]))
    cli.probe(out)
    mentor, settings = load_model(args, ranks, len(numbers))
    rows, problems = {}, cli.Problems(tqdm.write)
    for chunk in chunks(args, ranks, len(numbers)):
        samples = {}
        for i in chunk:
            row = jsonl[numbers[i]]
            problems.seen += 1
            try:
                samples[i] = {**segmentation_sample(mentor, row), "row": row.name, "seed": args.seed + i}
            except InputError as error:
                problems.add(f"{row.name}: {error}")
        if samples:
            rows |= zip(samples, segmentation_scores(mentor, list(samples.values())))
    unusable = jsonl.problems + sum(ranks.gather(problems.named), [])
    rows = in_order(ranks.gather(rows))
    if not rows:
        raise InputError(f"{args.data}: no row can be used; fix the data, beginning with {unusable[0]}")
    if ranks.rank == 0:
        means = {name: mean(rows, name) for name in ("iou", "iou_ceiling")}
        cli.write_json(out, {**settings, "black": BLACK, **means, "rows": rows, "unusable": unusable})
        print(f"{len(rows)} rows: mean IoU {means['iou']:.3f}, of the tokenizer's own copies "
              f"{means['iou_ceiling']:.3f}; {len(unusable)} lines could not be used; wrote {out}, which names them")


def reconstruction_errors(mentor, references, first_seed):
    """L2 of the samples of PIL images, and of the tokenizer's copies. -> (B,), (B,)"""
    targets = torch.stack([data.target_pixels(image, mentor.config.image_size) for image in references])
    prompts = [data.prompt_for("reconstruct")] * len(references)
    images = sample_images(mentor, prompts, references, [data.WHOLE] * len(references),
                           range(first_seed, first_seed + len(references)))
    return color_distance(images.cpu(), targets), color_distance(tokenizer_copies(mentor, targets), targets)


def reconstruct(args, ranks):
    """Reconstructs every image of a folder. L2 is the mean over pixels of the distance between two colours, as vectors
    of R, G, B in [0, 1]; beside it stands that of the tokenizer's own copy, which no sample can go below."""
    paths = [path for folder, _, _ in sorted(os.walk(args.data)) for path in images_in(folder)]
    if not paths:
        raise InputError(f"{args.data}: no folder with pictures; name one")
    out = os.path.join(args.out, "reconstruct.json")
    cli.probe(out)
    mentor, settings = load_model(args, ranks, len(paths))
    rows = {}
    for chunk in chunks(args, ranks, len(paths)):
        references = [data.open_image(paths[i]) for i in chunk]
        l2, l2_ceiling = reconstruction_errors(mentor, references, args.seed + chunk[0])
        for k, i in enumerate(chunk):
            rows[i] = {"picture": paths[i], "l2": l2[k].item(), "l2_ceiling": l2_ceiling[k].item()}
    rows = in_order(ranks.gather(rows))
    if ranks.rank == 0:
        means = {name: mean(rows, name) for name in ("l2", "l2_ceiling")}
        cli.write_json(out, {**settings, **means, "pictures": rows})
        print(f"{len(rows)} pictures: mean L2 of the samples {means['l2']:.4f}, of the tokenizer's own copies "
              f"{means['l2_ceiling']:.4f}; wrote {out}")


def mmd(a, b, bandwidth=10.0):
    """Squared maximum mean discrepancy of two sets of embeddings, (M, C) and (N, C), with a Gaussian kernel."""
    def kernel(x, y):
        return torch.exp(-torch.cdist(x.double(), y.double()).square() / (2 * bandwidth**2)).mean()
    return (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).item()


def cmmd(args, ranks):
    """Distance between two folders of images by CLIP's embeddings (arXiv 2401.09603), times 1000; 0 = alike. Published
    figures use ViT-L/14-336: name a folder of it with --clip to compare with them, the default ViT-B/32 does not."""
    scorer = Scorer(args.clip, None, ranks.device, use_dino=False)
    sets = []
    for folder in (args.a, args.b):
        paths = images_in(folder)
        if not paths:
            raise InputError(f"{folder}: no folder with pictures; name two")
        with cli.bar(paths, desc=folder, disable=ranks.rank > 0) as progress:
            rows = [scorer.embed_images([data.open_image(path)])["clip"] for path in progress]
        sets.append(torch.cat(rows))                                                      # (M or N, C)
    if ranks.rank == 0:
        name, comparable = published_name(scorer.clip.vision.config)
        note = "" if comparable else ", not comparable with published figures, which use ViT-L/14 at 336 pixels"
        print(f"CMMD {1000 * mmd(*sets):.3f} of {len(sets[0])} and {len(sets[1])} pictures, by CLIP {name}{note}")


def cross_entropy(mentor, prefix, tokens):
    """Of given tokens, predicted one by one over the cache, as drawing does. tokens: (B, T) -> (B, T)"""
    logits, cache, rope = mentor.decoder.prefill(prefix, mentor.config.grid)
    losses = [F.cross_entropy(logits.float(), tokens[:, 0], reduction="none")]
    for k in range(1, tokens.size(1)):
        logits = mentor.decoder.decode_step(tokens[:, k - 1], cache, rope)                # (B, V)
        losses.append(F.cross_entropy(logits.float(), tokens[:, k], reduction="none"))
    return torch.stack(losses, dim=1)


@torch.inference_mode()
def rounding(args, ranks):
    """Compares weights in --dtype with the same ones in fp32, on a JSONL's rows: the cross entropy of their pictures'
    tokens, and the tokens that either takes for the likeliest, with guidance."""
    exact, other = (weights.load(args.weights, ranks.device, weights.DTYPES[dtype]) for dtype in ("fp32", args.dtype))
    config = exact.config
    dataset = data.TaskData([args.data], exact.processor, config.image_size, seed=args.seed, unusable=1)
    count, losses, same = min(args.n, len(dataset)), [], []
    for mentor in (exact, other):
        weights.compile_decoder(mentor, count)
    greedy = replace(config.sampling, temperature=0)
    for start in cli.bar(range(0, count, args.batch), unit="batch"):
        batch = ranks.move(data.collate([dataset[k] for k in range(start, min(start + args.batch, count))]))
        tokens, drawn = exact.target_tokens(batch), []                                    # (B, T)
        for mentor in (exact, other):
            prefix = mentor.prefix(batch["ids"], batch["mask"], batch["refs"], words=batch.get("words"))
            losses.append(cross_entropy(mentor, prefix, tokens).mean(dim=1))              # (B,)
            drawn.append(mentor.generate(prefix, [0] * len(tokens), greedy))              # (B, T)
        same.append(drawn[0] == drawn[1])
    before, after = (torch.cat(losses[i::2]).mean().item() for i in (0, 1))
    same = torch.cat(same)                                                                # (count, T)
    first = same.int().cumprod(dim=1).sum(dim=1)               # tokens before the first that differs
    whole = (first == same.size(1)).float().mean()
    print(f"{count} pictures: cross entropy {before:.4f} nats a token in fp32, {after:.4f} in {args.dtype}\n"
          f"likeliest tokens: {same.float().mean():.1%} the same; the first that differs is number "
          f"{first.median().item():.0f} of {same.size(1)} (median); {whole:.0%} of the pictures the same to the end")


def add_drawing(command, what, seed=0, each="the first image, counted up"):
    """Flags of what samples images. what: is in --data; each: what the seed is of"""
    command.add_argument("--weights", default="tiny", help="as for sample.py (default tiny)")
    command.add_argument("--data", required=True, metavar="PATH", help=what)
    command.add_argument("--out", metavar="FOLDER", help="default out/eval/COMMAND")
    command.add_argument("--batch", type=cli.positive_int, default=8, help="images sampled together (default 8)")
    command.add_argument("--seed", type=cli.natural, default=seed, help=f"of {each} (default {seed})")
    command.add_argument("--dtype", choices=weights.DTYPES, help="of the weights; default: bf16 on cuda, else fp32")
    cli.add_sampling_flags(command.add_argument_group(
        "how to sample", "Defaults come with the weights; MENTOR's release evaluates with --cfg 7.5 --top-k 16384."))


def add_networks(command, dino=True):
    """Flags of where the networks that score lie."""
    command.add_argument("--clip", metavar="FOLDER", help="CLIP's weights, vocab.json, merges.txt; default: the hub's")
    if dino:
        command.add_argument("--dino", metavar="FOLDER", help="DINO's weights; default: the hub's")


def parse(argv):
    """The command line -> arguments, `run` among them."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def add_command(name, run):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--device", help="default: cuda, else cpu")
        return command

    command = add_command("dreambench", dreambench)
    add_drawing(command, "the benchmark's folder")
    add_networks(command)
    command.add_argument("--samples", type=cli.positive_int, default=4, help="images for each prompt (default 4)")
    command.add_argument("--refs", choices=["first", "all"], default="first", help="which images serve as reference")

    command = add_command("dreambench++", dreambench_plus)
    add_drawing(command, "the benchmark's folder, with images/ and captions/ in it", 42, "every prompt's first image")
    add_networks(command)
    command.add_argument("--samples", type=cli.positive_int, default=1, help="images for each prompt (default 1)")
    command.add_argument("--layout", choices=["results", "official"], default="results",
                         help="results: scored here; official: pictures for the benchmark's own scripts, default "
                              "--out out/eval/dreambench++-official")
    command.add_argument("--judge-url", metavar="URL",
                         help="OpenAI-compatible endpoint, up to and including /v1; its key is read from the "
                              "environment variable OPENAI_API_KEY")
    command.add_argument("--judge-model", metavar="NAME", help="name of the model there")
    command.add_argument("--passes", type=cli.positive_int, default=3,
                         help="how often the judge is asked about each image (default 3)")

    add_drawing(add_command("segment", segment), "a JSONL with segmentation rows, as for train.py")
    add_drawing(add_command("reconstruct", reconstruct), "a folder of images")

    command = add_command("cmmd", cmmd)
    add_networks(command, dino=False)
    command.add_argument("a", metavar="A", help="a folder of images")
    command.add_argument("b", metavar="B", help="another")

    command = add_command("rounding", rounding)
    command.add_argument("--weights", default="tiny", help="as for sample.py (default tiny)")
    command.add_argument("--data", required=True, metavar="PATH", help="a JSONL as for train.py")
    command.add_argument("--dtype", choices=weights.DTYPES, default="int8", help="default int8")
    command.add_argument("--n", type=cli.positive_int, default=64, help="pictures (default 64)")
    command.add_argument("--batch", type=cli.positive_int, default=8, help="pictures at once (default 8)")
    command.add_argument("--seed", type=cli.natural, default=0, help="which ones (default 0)")

    args = parser.parse_args(argv)
    if args.command not in ("cmmd", "rounding"):
        layout = "-official" if getattr(args, "layout", None) == "official" else ""
        args.out = args.out or f"out/eval/{args.command}{layout}"
    return args


def main(argv=None):
    """The command line."""
    args = parse(argv)
    ranks = Ranks.join(args.device)
    args.run(args, ranks)
    ranks.leave()


if __name__ == "__main__":
    cli.run(main)
