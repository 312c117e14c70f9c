"""Figures on the pages, in the notebooks and in the README: those of the kept results, word for word."""

import json
import re
import statistics
from importlib import import_module

import pytest
from conftest import ROOT, call
from pages import blocks, commands, text_of

from benchmarks.learning import original, strategies
from benchmarks.speed import packing, train_step, tricks
from demo.questions import KINDS_OF_QUESTION

RESULTS = ROOT / "benchmarks" / "results"


def strategy_rows(kept, originals):
    """The figures of the front pages' table, three for each row: captions with the original's settings, in English and
    in Chinese, and with ours, and all kinds of questions with ours."""
    for name in [*original.ROWS, "projector"]:
        runs, theirs = kept["rows"][name], originals["rows"].get(name)
        captions = statistics.mean(run["exact_percent_of_kinds"]["caption"] for run in runs)
        ours = f"{statistics.mean(run['exact_percent'] for run in runs):.1f}%"
        languages = [f"{value:.0f}%" for value in theirs["exact_percent_of_languages"].values()] if theirs else ["-"]
        yield name.split(",")[0], " / ".join(languages), f"{captions:.0f}%", ours


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_strategies_are_those_of_the_kept_results(page):
    kept, originals = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("strategies", "original"))
    strategy = "`(use_lora|none|freeze_vision|projector)`"
    rows = re.findall(rf"^\| {strategy}.*\| (\d+% / \d+%|-) \| (\d+%) \| ([\d.]+%) \|$", text_of(page), re.M)
    assert rows == list(strategy_rows(kept, originals))


@pytest.mark.parametrize("page", ["docs/training.md", "docs/training_zh.md"])
def test_the_tables_are_those_of_the_kept_results(page):
    """Word for word in English, the same numbers in Chinese."""
    rows = json.loads((RESULTS / "tricks.json").read_text())["rows"]
    kept = {name: (RESULTS / f"{name}.md").read_text() for name in ("strategies", "original", "tricks")}
    assert kept["tricks"] == tricks.both_tables(rows)
    trained = json.loads((RESULTS / "strategies.json").read_text())["rows"]
    two = strategies.comparison(trained), strategies.kinds_table(trained)
    assert kept.pop("strategies") == "\n\n".join(two)
    kept |= dict(zip(("strategies", "kinds"), two, strict=True))
    assert kept["original"] == original.comparison(json.loads((RESULTS / "original.json").read_text())["rows"])
    for table in kept.values():
        numbers = [re.findall(r"\d[\d.,]*", line) for line in table.splitlines() if re.search(r"\d", line)]
        lines = [re.findall(r"\d[\d.,]*", line) for line in text_of(page).splitlines() if line.startswith("|")]
        assert all(line in lines for line in numbers)
        assert page.endswith("_zh.md") or table in text_of(page)


def test_the_step_is_that_of_the_kept_results():
    result = json.loads((RESULTS / "train_step.json").read_text())
    assert train_step.markdown(result) in text_of("docs/performance.md")


def test_packs_are_those_of_the_kept_results():
    result = json.loads((RESULTS / "packing.json").read_text())
    assert packing.markdown(result) in text_of("docs/performance.md")
    useful = {row["way"]: row["useful"] for row in result["data"]["mix665k"]["rows"]}
    lost = [f"{1 - useful[way]:.0%}" for way in ("16 at random", "packs of 8,192")]
    for page in ("docs/training.md", "docs/training_zh.md"):
        assert all(share in text_of(page) for share in lost)


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_what_the_demo_prints_is_what_it_printed(page):
    (printed,) = [body for language, body in blocks(text_of(page)) if language == "text" and "Exactly right" in body]
    kept = (RESULTS / "demo.txt").read_text().splitlines()
    lines = [line for line in printed.splitlines() if line and line != "..."]
    assert len(lines) > 10 and all(line in kept for line in lines)


def test_the_demo_has_reached_what_it_aims_at():
    """95% of all answers, 95% of the captions, and no kind of question below 70%."""
    figures = text_of("benchmarks/results/demo.txt").split("Exactly right, in percent:\n")[1].split("The first")[0]
    percent = {kind: float(value) for kind, value in map(str.split, figures.splitlines())}
    assert percent.keys() == {*KINDS_OF_QUESTION, "all"} and percent["all"] >= 95 and percent["caption"] >= 95
    assert min(percent.values()) >= 70
    seen = [value for kind, value in percent.items() if kind not in ("text", "all")]  # `text` is in the training, too
    assert statistics.mean(seen) >= 95


@pytest.mark.parametrize(("name", "page"), [("turns", "serving"), ("rim", "models")])
def test_the_tables_of_the_demo_are_those_of_the_kept_results(name, page):
    """Word for word in English, the same numbers in Chinese."""
    kept = (RESULTS / f"{name}.md").read_text().split("\n\n")[0]
    assert kept.strip() in text_of(f"docs/{page}.md")
    numbers = [re.findall(r"\d[\d.,]*", line) for line in kept.splitlines()]
    lines = [re.findall(r"\d[\d.,]*", line) for line in text_of(f"docs/{page}_zh.md").splitlines()]
    assert all(line in lines for line in numbers)


@pytest.mark.parametrize("page", ["docs/evaluation.md", "docs/evaluation_zh.md"])
def test_the_three_losses_are_those_of_lesson_11(page):
    notebook = json.loads(text_of("tutorial/en/11_scores.ipynb"))
    told = "".join("".join(out.get("text", "")) for cell in notebook["cells"] for out in cell.get("outputs", []))
    kept = re.findall(r"^\w+: own ([\d.]+), other ([\d.]+), grey ([\d.]+)$", told, re.M)
    rows = re.findall(r"^\| \w+ \| (\d\.\d{3}) \| (\d\.\d{3}) \| (\d\.\d{3}) \| .+ \|$", text_of(page), re.M)
    assert len(kept) == 3 and rows == kept


def test_the_notebook_has_the_answers_of_that_run():
    """One kept run for the front pages and the notebooks."""
    notebook = json.loads(text_of("code05_infer_lora.ipynb"))
    told = "".join("".join(out.get("text", "")) for cell in notebook["cells"] for out in cell.get("outputs", []))
    kept = text_of("benchmarks/results/demo.txt")
    answers = re.findall(r"^  (?:right|WRONG)  (.+?)  (.+?)(?:   \(should be: .*\))?$", kept, re.M)
    assert len(answers) == len(KINDS_OF_QUESTION)
    for question, answer in answers:
        assert f"{question}\n  base " in told and f"\n  adapter  {answer}\n" in told.split(question)[1], question


@pytest.mark.parametrize(("benchmark", "page"), [("kernels", "performance"), ("published", "estimate")])
def test_the_tables_of_the_roofline_are_those_of_the_results(benchmark, page):
    rows = json.loads((RESULTS / f"{benchmark}.json").read_text())["rows"]
    assert import_module(f"benchmarks.full_size.{benchmark}").markdown(rows).strip() in text_of(f"docs/{page}.md")


def test_the_estimate_is_what_the_command_prints():
    configs = ROOT / "benchmarks" / "full_size" / "configs"
    words = next(words for words in commands(text_of("docs/estimate.md")) if "freeze_vision" in words)
    local = {"models/clip": "clip", "models/qwen": "qwen"}
    done = call(import_module(words[2]).main, *[configs / local[word] if word in local else word for word in words[3:]])
    printed = next(body for language, body in blocks(text_of("docs/estimate.md")) if language == "text")
    assert printed.strip() == done.stdout.strip()
