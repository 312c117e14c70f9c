"""Both READMEs: the same headings and commands, and nothing in them that does not exist."""

import json
import re
import shlex
from importlib import import_module

import pytest
from conftest import ROOT, call

from benchmarks import train_step, tricks

READMES = {name: (ROOT / name).read_text() for name in ("README.md", "README_zh.md")}


def blocks(text):
    return re.findall(r"```(\w+)\n(.*?)```", text, re.S)


def commands(text):
    """Every command line of a README, continued lines joined, comments gone."""
    shell = "\n".join(body for language, body in blocks(text) if language == "bash").replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in shell.splitlines() if line.strip()]


def test_same_headings_and_blocks():
    levels = [re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.S), re.M) for text in READMES.values()]
    assert levels[0] == levels[1] and len(levels[0]) > 5
    assert commands(READMES["README.md"]) == commands(READMES["README_zh.md"])
    others = [[block for block in blocks(text) if block[0] != "bash"] for text in READMES.values()]
    assert others[0] == others[1]


@pytest.mark.parametrize("name", READMES)
def test_paths_exist(name):
    paths = re.findall(r"`([\w./-]+\.(?:py|sh|json|ipynb|jinja|txt|md)|[a-z_]+/)`", READMES[name])
    paths += re.findall(r"\]\(([\w./-]+)\)", READMES[name])
    made_by_users = {"chat.json", "images/"}
    assert len(paths) > 20
    for path in set(paths) - made_by_users:
        assert (ROOT / path).exists(), path


def test_commands_exist_and_know_their_flags():
    helps = {}
    variables = (ROOT / "run_zero2.sh").read_text()
    for words in commands(READMES["README.md"]):
        while "=" in words[0]:
            assert f"\n{words[0].split('=')[0]}=${{" in variables, words[0]
            words = words[1:]
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file()
            module, flags = "train_llava.train", words[2:]
        elif words[:2] == ["python", "-m"]:
            module, flags = words[2], words[3:]
        else:
            assert words[0] in ("source", "hf", "unzip")
            continue
        flags = [flag for flag in flags if flag.startswith("--")]
        if flags and module not in helps:
            helps[module] = call(import_module(module).main, "--help").stdout
        assert all(flag in helps[module] for flag in flags)
        if "." in module:
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


@pytest.mark.parametrize("name", READMES)
def test_the_strategies_are_those_of_the_kept_results(name):
    rows = (ROOT / "benchmarks" / "results" / "strategies.md").read_text().splitlines()[2:]
    assert len(rows) == 8
    assert all(row in READMES[name] for row in rows)


@pytest.mark.parametrize("name", [*READMES, "docs/performance.md"])
def test_the_step_is_that_of_the_kept_results(name):
    result = json.loads((ROOT / "benchmarks" / "results" / "train_step.json").read_text())
    assert train_step.markdown(result) in (ROOT / name).read_text()


def test_the_tricks_are_those_of_the_kept_results():
    results = ROOT / "benchmarks" / "results"
    tables = (results / "tricks.md").read_text()
    assert tables in (ROOT / "docs" / "training.md").read_text()
    rows = json.loads((results / "tricks.json").read_text())["rows"]
    assert tables == tricks.both_tables(rows)
