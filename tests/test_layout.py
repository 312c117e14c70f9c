"""Where things stand: imports go one way, what tests share is in helpers, and no file is too long to read."""

import ast

import pytest
from conftest import ROOT
from mutants import read_list

from train_llava import COMMANDS

PACKAGE = ROOT / "train_llava"
# Each may import those before it, and its own folder
ORDER = ["cli", "ingest", "processing", "data", "model", "pages", "planning", "training", "commands"]
FILES = sorted(PACKAGE.rglob("*.py"))


def layer(module):
    """Of a module's name without `train_llava.`."""
    first = module.split(".")[0]
    return "commands" if first in COMMANDS else first


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    own = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("train_llava"):
            theirs = node.module.removeprefix("train_llava").lstrip(".")
            assert (PACKAGE / theirs.replace(".", "/")).with_suffix(".py").is_file(), (
                f"import what it defines: {theirs}"
            )
            same = layer(theirs) == layer(own) and layer(own) != "commands"
            assert same or ORDER.index(layer(theirs)) < ORDER.index(layer(own)), f"{own} imports {theirs}"


TESTS = {path.stem: path for path in sorted((ROOT / "tests").glob("test_*.py"))}


@pytest.mark.parametrize("name", TESTS)
def test_a_test_file_imports_no_other(name):
    """At its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(TESTS[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
    assert not found & TESTS.keys()


def test_the_top_is_what_people_type_and_import():
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    folders = {name for name in ORDER if (PACKAGE / name).is_dir()}
    files = {f"{name}.py" for name in [*COMMANDS, "data", "cli", "__init__"]} | {"py.typed"}
    assert entries == folders | files and len(entries) <= 20
    assert not folders & {path.stem for path in FILES}  # no folder is named like a file


def test_every_fault_of_mutants_can_still_be_made():
    assert not [f"{each.number}: {each.file}" for each in read_list() if each.places() != 1]


def test_no_file_is_too_long():
    """But a lesson, which holds both its languages: test_tutorial.py counts its words."""
    folders = ("tests", "benchmarks", "demo", "tutorial", "site")
    found = [
        *FILES,
        *(path for name in folders for path in (ROOT / name).rglob("*.py") if path.parent.name != "lessons"),
    ]
    assert [path for path in found if len(path.read_text().splitlines()) > 300] == []
