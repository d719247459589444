"""The paper's benchmarks: what a checkpoint can do on photographs, in numbers that can be reproduced.

    python eval.py dreambench --weights W --data FOLDER      # CLIP-I, CLIP-T and DINO: 30 subjects x 25 prompts
    python eval.py dreambench++ --weights W --data FOLDER --judge-url URL --judge-model NAME     # the paper's Table 1
    python eval.py reconstruct --weights W --data FOLDER     # how well a reference image is reproduced
    python eval.py cmmd A B                                  # distance between two folders of images

    benchmark's folder -> Examples -> Mentor.sample -> images --scorers.py--> results.jsonl -> table, summary.json

Each image is written to --out with a line in results.jsonl; the same command started again continues there, and under
torchrun the processes share the work. The networks that score are CLIP ViT-B/32 and DINO ViT-S/16 from the hub, or
those in the folders that --clip and --dino name. FID is left out, since it needs Inception's weights; CMMD
(arXiv 2401.09603), computed from CLIP's embeddings, takes its place.

Next: `bench.py`, which measures speed and memory.
"""
import argparse
import errno
import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from PIL import Image

import cli
import data
import weights
from cli import InputError, Ranks
from scorers import Scorer, VisionJudge, color_distance, published_name

SETTINGS = ("weights", "data", "seed", "samples", "refs", "clip", "dino", "judge_model")    # flags that decide results
COLUMNS = ("clip_i", "clip_t", "dino")


# ---------------------------------------------------------------------------------------------------------------------
# What a benchmark asks for

@dataclass(frozen=True)
class Example:
    """One image to be sampled and scored."""
    key: str                  # unique; also the image's file name
    group: str                # the average it counts towards
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


def read_text(path, what):
    """A small UTF-8 file. what: should be there, for the message"""
    cli.check_file(path, what, most=1 << 20)
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({str(error):.100}); it should hold {what}") from None


def read_dreambench(path):
    """DreamBench's prompts_and_classes.txt -> {subject: class}, prompts for objects, prompts for live subjects.

    In a prompt, {1} stands for the class. https://github.com/google/dreambooth/tree/main/dataset
    """
    text = read_text(path, "DreamBench's prompts; --data takes its folder")
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
                    examples.append(Example(f"{subject}-{r:02}-{p:02}-{i}", subject, class_name,
                                            prompt.replace("{1}", class_name), reference, subject_images,
                                            args.seed + len(examples)))
    return examples, missing


def dreambench_plus_examples(args):
    """DreamBench++'s folder: images/<category>/NN.jpg, captions/<category>/NN.txt (the subject, then nine prompts)."""
    examples, root = [], os.path.join(args.data, "images")
    for folder, _, _ in sorted(os.walk(root)):
        category = os.path.relpath(folder, root)
        for reference in images_in(folder):
            number = os.path.splitext(os.path.basename(reference))[0]
            path = os.path.join(args.data, "captions", category, f"{number}.txt")
            what = f"the subject and the prompts of {reference}, one on each line"
            lines = [line.strip() for line in read_text(path, what).splitlines() if line.strip()]
            if len(lines) < 2:
                raise InputError(f"{path}: has too few lines; it should hold {what}")
            subject, *prompts = lines
            for p, prompt in enumerate(prompts):
                for i in range(args.samples):
                    examples.append(Example(f"{category.replace(os.sep, '-')}-{number}-{p}-{i}", category, subject,
                                            prompt, reference, (reference,), args.seed + len(examples)))
    return examples


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and scoring

@dataclass(frozen=True)
class Row:
    """A line of results.jsonl; cp and pf are the judge's."""
    key: str
    group: str
    subject: str
    prompt: str
    reference: str
    seed: int
    clip_i: float
    clip_t: float
    dino: float
    cp: int | None = None
    cp_answers: list[str] | None = None
    pf: int | None = None
    pf_answers: list[str] | None = None


ROW_LIMITS = {"cp": (0, 4), "pf": (0, 4), "seed": (0, 2**63)} | dict.fromkeys(COLUMNS, (-1.01, 1.01))


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
        for name, value in settings.items():
            if earlier.get(name) != value:
                raise InputError(f"{self.path}: was made with another {name} ({cli.shortly(earlier.get(name))}, not "
                                 f"{cli.shortly(value)}); give the same again or another --out")
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
                elif not isinstance(found[0], dict):
                    raise InputError(f"{self.path}: line 1 is not one that eval.py wrote; choose another --out")
        return found


def load_model(args, ranks):
    """-> model, and all settings that decide the results."""
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    mentor = weights.load(args.weights, device=ranks.device, dtype=dtype)
    settings = {name: value for name, value in vars(args).items() if name in SETTINGS}
    return mentor, settings | {"size": mentor.config.image_size} | asdict(mentor.config.sampling)


def sample_images(mentor, prompts, references, seeds):
    """One image for each prompt, with the weights' own sampling settings. references: PIL, one for each prompt.
    -> (B, 3, H, W)"""
    samples = [mentor.processor(prompt, [reference]) for prompt, reference in zip(prompts, references, strict=True)]
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


def score_by_judge(vision_judge, example, reference, image):
    """Concept preservation (cp) and prompt following (pf), 0 to 4 or None, with the judge's answers."""
    scores = {}
    for rubric, shown in (("cp", [reference, image]), ("pf", [image])):
        scores[rubric], scores[f"{rubric}_answers"] = vision_judge.score(rubric, shown, example.subject, example.prompt)
    return scores


def run_benchmark(args, ranks, examples, vision_judge=None):
    """Samples and scores what --out does not hold yet, this process its share. -> settings, rows of all, in order"""
    if not examples:
        raise InputError(f"{args.data}: holds no subjects with pictures; see `python eval.py {args.command} --help`")
    cli.probe(os.path.join(args.out, "results.jsonl"))
    scorer = Scorer(args.clip, args.dino, ranks.device)
    mentor, settings = load_model(args, ranks)
    results, cache = Results(args.out, settings, ranks), {}
    remaining = [example for example in examples if example.key not in results.done][ranks.rank::ranks.world]
    with cli.bar(range(0, len(remaining), args.batch), unit="batch", disable=ranks.rank > 0) as starts:
        for start in starts:
            chunk = remaining[start:start + args.batch]
            prompts = [data.prompt_for("subject", [example.subject], example.prompt) for example in chunk]
            references = [data.open_image(example.reference) for example in chunk]
            pixels = sample_images(mentor, prompts, references, [example.seed for example in chunk])
            images = [data.to_image(image) for image in pixels]
            scores = score_by_networks(scorer, chunk, images, cache)
            for i, example in enumerate(chunk):
                row = {"key": example.key, "group": example.group, "subject": example.subject, "prompt": prompts[i],
                       "reference": example.reference, "seed": example.seed, **scores[i]}
                if vision_judge:
                    row |= score_by_judge(vision_judge, example, references[i], images[i])
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
# Tables

def mean(rows, name):
    """Over the rows that have a value; nan if none has."""
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) / len(values) if values else float("nan")


def network_means(rows):
    """The columns of both benchmarks."""
    return {name: mean(rows, name) for name in COLUMNS}


def judge_means(rows):
    """With the judge's, as the paper's Table 1 has them: 0 to 1."""
    cp, pf = mean(rows, "cp"), mean(rows, "pf")
    return {**network_means(rows), "CP": cp / 4, "PF": pf / 4, "CP*PF": cp * pf / 16, "CP/PF": cp / max(pf, 1e-9)}


def print_table(groups, means):
    """Prints averages for each group, then over all. groups: {name: rows}. -> {name: {column: number}}"""
    table = {name: means(rows) for name, rows in groups.items()}
    width = max(len(name) for name in groups)
    print(f"{'':{width}}  pictures" + "".join(f"{column:>9}" for column in table["all"]))
    for name, rows in groups.items():
        print(f"{name:{width}}  {len(rows):8}" + "".join(f"{value:9.3f}" for value in table[name].values()))
    return table


def write_report(args, settings, rows, means, **extra):
    """Prints the table; writes summary.json, `extra` in it, and a contact sheet: for each group the reference and some
    images."""
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    table = print_table({**groups, "all": rows}, means)
    scores = {group: {name: None if value != value else value for name, value in columns.items()}      # JSON has no nan
              for group, columns in table.items()}
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
        write_report(args, settings, rows, network_means, missing_subjects=missing)
        if missing:
            print(warning)


def dreambench_plus(args, ranks):
    """DreamBench++: the same scores, and with --judge-url concept preservation (CP) and prompt following (PF)."""
    if bool(args.judge_url) != bool(args.judge_model):
        raise InputError("--judge-url and --judge-model go together; give both or none")
    vision_judge, means = None, network_means
    if args.judge_url:
        vision_judge = VisionJudge(args.judge_url, args.judge_model, os.environ.get("OPENAI_API_KEY"))
        means = judge_means
    settings, rows = run_benchmark(args, ranks, dreambench_plus_examples(args), vision_judge)
    if ranks.rank > 0:
        return
    if vision_judge:
        unread = sum(row[rubric] is None for row in rows for rubric in ("cp", "pf"))
        retries = sum(len(row[f"{rubric}_answers"]) - 1 for row in rows for rubric in ("cp", "pf"))
        print(f"the judge was asked again {retries} times; {unread} answers could not be read and do not count")
    write_report(args, settings, rows, means)


def reconstruction_errors(mentor, references, first_seed):
    """L2 of the samples of PIL images, and of the tokenizer's copies. -> (B,), (B,)"""
    targets = torch.stack([data.target_pixels(image, mentor.config.image_size) for image in references])
    prompts = [data.prompt_for("reconstruct")] * len(references)
    images = sample_images(mentor, prompts, references, range(first_seed, first_seed + len(references)))
    with torch.inference_mode():
        copies = mentor.vqgan.decode(mentor.vqgan.encode(targets.to(mentor.device)))      # (B, 3, H, W)
    return color_distance(images.cpu(), targets), color_distance(copies.cpu(), targets)


def reconstruct(args, ranks):
    """Reconstructs every image of a folder. L2 is the mean over pixels of the distance between two colours, as vectors
    of R, G, B in [0, 1]; beside it stands that of the tokenizer's own copy, which no sample can go below."""
    paths = [path for folder, _, _ in sorted(os.walk(args.data)) for path in images_in(folder)]
    if not paths:
        raise InputError(f"{args.data}: no folder with pictures; name one")
    out = os.path.join(args.out, "reconstruct.json")
    cli.probe(out)
    mentor, settings = load_model(args, ranks)
    rows, starts = {}, range(ranks.rank * args.batch, len(paths), ranks.world * args.batch)
    with cli.bar(starts, unit="batch", disable=ranks.rank > 0) as starts:
        for start in starts:
            chunk = paths[start:start + args.batch]
            l2, l2_ceiling = reconstruction_errors(mentor, [data.open_image(path) for path in chunk], args.seed + start)
            for i, path in enumerate(chunk):
                rows[path] = {"picture": path, "l2": l2[i].item(), "l2_ceiling": l2_ceiling[i].item()}
    for part in ranks.gather(rows):
        rows |= part
    if ranks.rank > 0:
        return
    rows = [rows[path] for path in paths]
    means = {name: mean(rows, name) for name in ("l2", "l2_ceiling")}
    cli.write_json(out, {**settings, **means, "pictures": rows})
    print(f"{len(rows)} pictures: mean L2 {means['l2']:.4f}, the tokenizer's copy {means['l2_ceiling']:.4f}; wrote "
          f"{out}")


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


def parse(argv):
    """The command line: what several commands take, then each command with its own."""
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", help="default: cuda, else cpu")
    clip = argparse.ArgumentParser(add_help=False)
    clip.add_argument("--clip", metavar="FOLDER", help="CLIP's weights, vocab.json and merges.txt; default: the hub's")
    sampling = argparse.ArgumentParser(add_help=False)
    sampling.add_argument("--weights", default="tiny", help="as for sample.py (default tiny)")
    sampling.add_argument("--data", required=True, metavar="FOLDER", help="the benchmark's folder, or one of images")
    sampling.add_argument("--out", metavar="FOLDER", help="default out/eval/COMMAND")
    sampling.add_argument("--batch", type=cli.positive_int, default=8, help="images sampled together (default 8)")
    sampling.add_argument("--seed", type=cli.natural, default=0, help="of the first image, counted up (default 0)")
    scoring = argparse.ArgumentParser(add_help=False)
    scoring.add_argument("--dino", metavar="FOLDER", help="DINO's weights; default: the hub's")
    scoring.add_argument("--samples", type=cli.positive_int, default=4, help="images for each prompt (default 4)")

    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def add_command(name, run, *parents):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__, parents=parents)
        command.set_defaults(run=run)
        return command

    command = add_command("dreambench", dreambench, sampling, clip, scoring, device)
    command.add_argument("--refs", choices=["first", "all"], default="first", help="which images serve as reference")

    command = add_command("dreambench++", dreambench_plus, sampling, clip, scoring, device)
    command.add_argument("--judge-url", metavar="URL",
                         help="OpenAI-compatible endpoint, up to and including /v1; its key is read from the "
                              "environment variable OPENAI_API_KEY")
    command.add_argument("--judge-model", metavar="NAME", help="name of the model there")

    add_command("reconstruct", reconstruct, sampling, device)

    command = add_command("cmmd", cmmd, clip, device)
    command.add_argument("a", metavar="A", help="a folder of images")
    command.add_argument("b", metavar="B", help="another")

    args = parser.parse_args(argv)
    if args.command != "cmmd":
        args.out = args.out or f"out/eval/{args.command}"
    return args


def main(argv=None):
    """The command line."""
    args = parse(argv)
    ranks = Ranks.join(args.device)
    args.run(args, ranks)
    ranks.leave()


if __name__ == "__main__":
    cli.run(main)
