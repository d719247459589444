"""The house itself: who imports whom, and what the README says of the files."""
import ast
import re

import pytest
from conftest import ROOT

SEVEN = ("model", "encoder", "vqgan", "rope2d", "train", "sample", "data")
FLOORS = [("rope2d", "vqgan", "cli"), ("data", "encoder", "lora"), ("model",), ("fast",), ("weights",),
          ("sample", "train", "prepare", "scorers"), ("eval", "bench", "construct", "app"), ("world",)]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("world/*.py")])


def imports(path):
    """The first names of all modules of ours that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & FLOOR_OF.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_stands_below_it(path):
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    above = {other for other in imports(path) if FLOOR_OF[other] >= FLOOR_OF[name] and other != "world"}
    assert not above or name in ("data", "encoder") and not above - {"data", "encoder"}
    if name in SEVEN:
        assert imports(path) <= {*SEVEN, "cli", "weights"}


def test_the_files_of_the_world_import_each_other_in_no_circle():
    below = {path.stem: set(re.findall(r"from world\.(\w+) import", path.read_text())) for path in FILES
             if path.parent.name == "world"}
    for name, found in re.findall(r"(\w+): from world import ([\w, ]+)", "\n".join(
            f"{path.stem}: {line}" for path in FILES if path.parent.name == "world"
            for line in path.read_text().splitlines() if line.startswith("from world import"))):
        below[name] |= set(found.replace(" ", "").split(","))
    while below:
        free = [name for name, used in below.items() if not used & below.keys()]
        assert free, f"a circle among {', '.join(below)}"
        for name in free:
            del below[name]


def test_the_readmes_map_has_the_files_lines():
    """Within a few lines: a map, not an inventory."""
    lines = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    lines["world/"] = sum(len(path.read_text().splitlines()) for path in ROOT.glob("world/*.py"))
    rows = re.findall(r"^\| (\[`.*?) \| ([\d, ]+) \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    told = {}
    for names, numbers in rows:
        for name, number in zip(re.findall(r"\[`(.*?)`\]", names), re.split(", ", numbers)):
            told[name] = int(number.replace(",", ""))
    assert told.keys() == lines.keys()
    for name, number in told.items():
        assert abs(number - lines[name]) <= 5 + 0.02 * lines[name], (name, number, lines[name])
