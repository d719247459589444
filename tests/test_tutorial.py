"""The tutorial: its figures, quotes, links, commands and diffs."""
import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open

import cli
import data
import weights
from tutorial import figures, measure, trainings
from tutorial.drawing import MOST_BYTES, WIDTH, encoded
from world.ablation import ABLATION

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("tutorial/*.md"), *ROOT.glob("assets/*.md")])
CHAPTERS = sorted(ROOT.glob("tutorial/[1-9]-*.md"))
CHANGES = ROOT / "tutorial/8-change-it.md"
DIFFS = re.findall(r"```diff\n(.*?)```\n\n```bash\n(.*?)\n```", CHANGES.read_text(), re.DOTALL)


def blocks(page, language):
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------------
# Figures

@pytest.fixture(scope="module")
def tiny():
    return weights.load("tiny")


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_800_pixels_wide_small_and_not_of_one_colour(tiny, name, tmp_path):
    image = figures.FIGURES[name](tiny, **figures.SMALL.get(name, {}))
    assert image.width == WIDTH and 40 <= image.height <= 1500
    (tmp_path / "figure.webp").write_bytes(encoded(image))
    assert (tmp_path / "figure.webp").stat().st_size < MOST_BYTES
    with Image.open(tmp_path / "figure.webp") as written:
        assert written.mode == "RGBA" and written.getchannel("A").getextrema()[0] == 0    # what is around is not white
        assert len(written.getcolors(1 << 24)) > 3


def test_the_ablation_is_drawn_as_points_in_the_colours_of_their_conditions(tmp_path, monkeypatch):
    conditions, rows = list(trainings.CONDITIONS), []
    for k, name in enumerate(ABLATION.variants):
        pretrain, copies = conditions[k % len(conditions)]
        rows += [{"variant": name, "seed": seed, "pretrain": pretrain, "copies": copies, "subject": {
            "cp": 0.05 * k + 0.02 * seed, "pf": 0.9 - 0.04 * k}, "paper": [0.5, 0.8, 0.4] if k % 2 else None}
            for seed in (0, 1)]
    rows[2]["paper"] = rows[3]["paper"] = [None, 0.8, None]                # a cell that cannot be read
    monkeypatch.setattr(trainings, "ABLATION", str(tmp_path / "ablation.json"))
    (tmp_path / "ablation.json").write_text(json.dumps({"rows": rows}))
    points = trainings.draw_ablation(None)
    assert points.width == WIDTH and len(encoded(points)) < MOST_BYTES
    assert points.getchannel("A").getextrema()[0] == 0
    colours = {colour[:3] for _, colour in points.getcolors(1 << 24)}
    assert colours >= {colour for colour, _ in trainings.CONDITIONS.values()}
    kinds = {(variant.pretrain, variant.copies) for variant in ABLATION.variants.values()}
    assert kinds == set(trainings.CONDITIONS)


def test_the_command_writes_a_figure_and_refuses_another_format(tmp_path):
    figures.main(["mask", "--out", str(tmp_path / "mask.webp")])
    assert Image.open(tmp_path / "mask.webp").width == WIDTH
    with pytest.raises(cli.InputError, match="webp"):
        figures.main(["mask", "--out", str(tmp_path / "mask.gif")])


def test_every_figure_is_there_small_and_shown_above_the_command_that_makes_it():
    text = "\n".join(chapter.read_text() for chapter in CHAPTERS)
    for name in figures.FIGURES:
        assert (ROOT / "tutorial" / f"{name}.webp").stat().st_size < MOST_BYTES
        shown = text.index(f"]({name}.webp)")
        assert f"`python -m tutorial.figures {name}`" in text[shown:shown + 200], name
    assert len(re.findall(r"!\[.+?\]", text)) == len(re.findall(r"!\[", text)), "a picture without words for it"


def test_the_attention_that_is_drawn_is_what_the_decoder_computes(tiny):
    layer, seen = tiny.decoder.layers[0].attention, []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    batch = data.collate(measure.painted(tiny, "reconstruct", 2))
    prefix = measure.prefix_of(tiny, batch)
    tiny.decoder(prefix, tiny.target_tokens(batch)[:, :-1], tiny.config.grid)
    hook.remove()
    (x, rope, mask, *_), output = seen[0]
    values = layer.wqkv(x).unflatten(-1, (3, layer.heads, -1))[:, :, 2].transpose(1, 2)          # (B, H, L, hd)
    read = measure.attention(layer, x, rope, mask) @ values
    torch.testing.assert_close(layer.wo(read.transpose(1, 2).flatten(-2)), output, atol=1e-4, rtol=1e-4)


def test_only_under_zero_all_prefix_rows_get_the_same_attention(tiny):
    batch = data.collate(measure.painted(tiny, "reconstruct"))
    spread = {}
    for rotation in measure.ROTATIONS:
        found = measure.attention_to_prefix(tiny, batch, rotation)                        # (layers, 1, H, T, S)
        spread[rotation] = (found.amax(dim=-1) / found.amin(dim=-1).clamp(min=1e-12)).median().item()
    assert abs(spread["zero"] - 1) < 1e-4
    assert min(spread["identity"], spread["grid"]) > 2


# ---------------------------------------------------------------------------------------------------------------------
# Quotes and links

QUOTES = [(chapter.name, *found) for chapter in CHAPTERS for found in re.findall(
    r"<!-- ([\w/.]+\.py):?(\w*) -->\n```python\n(.*?)```", chapter.read_text(), flags=re.DOTALL)]


def source_of(file, name):
    """The text of a file's class or function, of a whole file without a name."""
    text = (ROOT / file).read_text()
    if not name:
        return text
    nodes = [node for node in ast.parse(text).body if getattr(node, "name", None) == name]
    assert len(nodes) == 1, f"{file} has no {name}"
    return "\n".join(text.splitlines()[nodes[0].lineno - 1:nodes[0].end_lineno]) + "\n"


@pytest.mark.parametrize("chapter, file, name, code", QUOTES, ids=[f"{q[0]}-{q[2] or q[1]}" for q in QUOTES])
def test_code_stands_in_its_file_as_it_is_quoted(chapter, file, name, code):
    source = source_of(file, name)
    assert any(textwrap.indent(code, " " * depth) in source for depth in (0, 4, 8, 12))


def test_every_chapter_quotes_code_and_opens_with_its_question():
    assert len(CHAPTERS) == 8
    for chapter in CHAPTERS:
        title, _, question = chapter.read_text().splitlines()[:3]
        assert title.startswith(f"# {chapter.name[0]}. ") and question.startswith("*"), chapter
        assert any(quote[0] == chapter.name for quote in QUOTES) or blocks(chapter, "diff"), chapter


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


# ---------------------------------------------------------------------------------------------------------------------
# Commands

# bash expands variables and loops; all programs are functions, and those that would start Python note what with
STUBS = """PATH=
note() { printf '%s\\0' "$@"; printf '\\036'; } >&3
python() { note "$@"; }
torchrun() { note "$@"; }
ls() { builtin echo rows.jsonl; }
grep() { builtin echo rows.jsonl; }
"""


class Parsed(Exception):
    """The command line was understood."""


def commands(block):
    """The command lines of our scripts in a block. -> [(module, arguments)]"""
    reader, writer = os.pipe()
    subprocess.run(["/bin/bash", "-c", f"exec 3>&{writer}\n{STUBS}{block}"], pass_fds=[writer], cwd="/",
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        lines = [line.split("\0")[:-1] for line in pipe.read().split("\x1e")[:-1]]
    found = []
    for words in lines:
        start = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
        if words[start] == "-m":
            start += 1
        module = words[start].removesuffix(".py")
        if (ROOT / (module.replace(".", "/") + ".py")).exists():
            found.append((module, words[start + 1:]))
    return found


COMMANDS = [(page.name, *command) for page in PAGES for block in blocks(page, "bash") for command in commands(block)]


def test_commands_are_found():
    assert ("prepare", ["folder", "out/mine"]) in [command[1:] for command in COMMANDS]
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("page", sorted({command[0] for command in COMMANDS}))
def test_the_scripts_understand_the_commands_of(page, monkeypatch):
    parse_args = cli.Parser.parse_args

    def parse_and_stop(parser, *given, **named):
        parse_args(parser, *given, **named)
        raise Parsed

    monkeypatch.setattr(cli.Parser, "parse_args", parse_and_stop)
    for module, arguments in [command[1:] for command in COMMANDS if command[0] == page]:
        if not {"mirror", "place", "wide"} & set(arguments):   # test_a_change_applies_and_trains has these
            with pytest.raises(Parsed):
                importlib.import_module(module).main(arguments)


# ---------------------------------------------------------------------------------------------------------------------
# What is run in a copy of the repository

@pytest.fixture
def copy(tmp_path):
    """A copy of the repository, without what was trained in it."""
    shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns("out", ".git", "__pycache__", ".*", "data"))
    return tmp_path / "copy"


def run(copy, module, *arguments):
    """Runs a script of the copy to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=copy, env=environment, text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def apply(copy, diff):
    """Applies a diff, as a reader does."""
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=copy, check=True,
                   env={**os.environ, "GIT_DIR": str(copy / "none"), "GIT_CEILING_DIRECTORIES": str(copy.parent)})


@pytest.mark.full
@pytest.mark.parametrize("diff, command", DIFFS, ids=["task", "connector", "reference"])
def test_a_change_applies_and_trains(diff, command, copy):
    apply(copy, diff)
    (module, arguments), = commands(command)
    stage = arguments[arguments.index("--stage") + 1]
    alone = ("t2i", "reconstruct", "segment", "recover")
    if stage != "2":
        alone += ("subject",)
    leave_out = [word for task in alone for word in ("--without", task)]
    run(copy, module, *arguments, *leave_out, "--steps", "1", "--global-batch", "2", "--out", "out/changed")
    log = (copy / "out/changed/log.jsonl").read_text().splitlines()
    losses = json.loads(log[0])["losses"]
    assert losses.keys() == {"subject" if stage == "2" else stage}
    config = json.loads((copy / "out/changed/config.json").read_text())
    if stage == "2":
        with safe_open(copy / "out/changed/model.safetensors", "pt") as file:
            assert config["connector"] == "wide"
            assert file.get_slice("encoder.connector.0.weight").get_shape()[0] == 4 * config["t5"]["width"]


def test_every_diff_is_tested():
    assert len(DIFFS) == len(blocks(CHANGES, "diff")) == 3


@pytest.mark.full
def test_the_python_of_the_pages_runs(copy):
    pieces = [block for page in (ROOT / "tutorial" / "drawing.md", *CHAPTERS)
              for block in re.findall(r"(?<!-->\n)^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)]
    assert len(pieces) >= 2
    (copy / "out").mkdir()
    for i, piece in enumerate(pieces):
        (copy / f"piece{i}.py").write_text(piece)
        run(copy, f"piece{i}")


@pytest.mark.full
def test_sampling_with_the_bundled_weights_runs_as_it_stands(copy):
    pages = {"README.md", "drawing.md", *(chapter.name for chapter in CHAPTERS)}
    lines = [arguments for page, module, arguments in COMMANDS
             if module == "sample" and page in pages and not {"--weights", "--prompts"} & set(arguments)]
    assert len(lines) >= 8
    for arguments in lines:
        run(copy, "sample", *arguments)
    assert len(list((copy / "out").glob("*.png"))) > len(lines)


@pytest.mark.full
@pytest.mark.parametrize("chapter", ["3-rows-and-columns.md", "7-train-it-yourself.md"])
def test_the_trainings_of_a_chapter_follow_from_each_other(chapter, copy):
    """With two steps each, of two samples."""
    lines = [command[2] for command in COMMANDS if command[:2] == (chapter, "world.train")]
    assert len(lines) >= 3
    for arguments in lines:
        run(copy, "world.train", *arguments, "--steps", "2", "--global-batch", "2")


@pytest.mark.full
def test_own_pictures_become_an_adapter_that_draws(copy):
    lines = [command[1:] for command in COMMANDS if command[0] == "README.md" and "out/mine" in " ".join(command[2])]
    assert [module for module, _ in lines] == ["world.rows", "prepare", "train", "sample"]
    for module, arguments in lines:
        run(copy, module, *arguments, *(["--steps", "2", "--global-batch", "2"] if module == "train" else []))
    assert (copy / "out/blueberries-in-the-snow-3.png").exists()
