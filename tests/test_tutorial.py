"""The lessons: one source for two languages, notebooks that are those of their source, a shape that all share."""

import itertools
import re
import sys
from contextlib import nullcontext

import nbformat
import pytest
from conftest import ROOT, call, run
from core_time import a_minute_of_one_core
from markdown_it import MarkdownIt
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from tutorial import build

LESSONS = build.lessons()
BOTH = [(lesson, language) for lesson in LESSONS for language in build.LANGUAGES]
# Headings that every lesson has, in this order; others stand between the first two
SECTIONS = {
    "en": ["What you will know", "What we see", "Common questions", "Exercises", "Solutions"],
    "zh": ["你会学到", "我们看到", "常见问题", "练习", "答案"],
}
LENGTHS = {"en": (r"[A-Za-z][\w'-]*", 600, 1200), "zh": (r"[\u4e00-\u9fff]", 900, 2400)}
NEXT = {"en": "Next lesson", "zh": "下一课"}


def kept(lesson, language="en"):
    return nbformat.read(build.notebook_path(lesson, language), as_version=4)


def markdown(lesson, language):
    return "\n\n".join(cell.source for cell in build.notebook(lesson, language).cells if cell.cell_type == "markdown")


def headings(lesson, language):
    """Pairs of level and title."""
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.*)", markdown(lesson, language), re.M)]


def figures(cell):
    return [kind for out in cell.outputs for kind in out.get("data", {}) if kind.startswith("image/")]


def tagged(cell, tag):
    return tag in cell.metadata.get("tags", [])


@pytest.mark.parametrize(("lesson", "language"), BOTH)
def test_a_notebook_is_that_of_its_source(lesson, language):
    assert build.is_current(lesson, language), "type: python -m tutorial.build"


def test_there_is_no_other_notebook():
    known = {build.notebook_path(*which) for which in BOTH}
    assert {path for language in build.LANGUAGES for path in (ROOT / "tutorial" / language).iterdir()} <= known


@pytest.mark.parametrize("lesson", LESSONS)
def test_both_languages_have_the_same_code_and_outputs(lesson):
    english, chinese = (build.code_cells(kept(lesson, language)) for language in build.LANGUAGES)
    assert [(cell.source, cell.outputs) for cell in english] == [(cell.source, cell.outputs) for cell in chinese]
    assert not [cell.source for cell in english if re.search(r"[\u4e00-\u9fff]", cell.source)]


@pytest.mark.parametrize("lesson", LESSONS)
def test_both_languages_have_the_same_sections(lesson):
    english, chinese = (headings(lesson, language) for language in build.LANGUAGES)
    assert [level for level, _ in english] == [level for level, _ in chinese]
    assert [level for level, _ in english].count(1) == 1 and english[0][0] == 1
    for language, found in zip(build.LANGUAGES, (english, chinese), strict=True):
        assert [title for _, title in found if title in SECTIONS[language]] == SECTIONS[language]
        assert found[1] == (2, SECTIONS[language][0])


@pytest.mark.parametrize(("lesson", "language"), BOTH)
def test_the_length_of_a_lesson(lesson, language):
    pattern, least, most = LENGTHS[language]
    text = re.sub(r"<summary>.*?</summary>|</?details>", "", markdown(lesson, language))
    assert least <= len(re.findall(pattern, text)) <= most


@pytest.mark.parametrize(("lesson", "language"), BOTH)
def test_exercises_have_solutions(lesson, language):
    *_, exercises, solutions = re.split(r"^## ", markdown(lesson, language), flags=re.M)
    levels = [*build.LEVELS[language].items()]
    assert re.findall(r"^([🐢🐕🦁]) \*\*(\w+)", exercises, re.M) == levels
    assert re.findall(r"^<details><summary>([🐢🐕🦁]) (\w+)</summary>$", solutions, re.M) == levels
    assert solutions.count("<details>") == solutions.count("</details>") == 3 and "<details>" not in exercises
    assert sum(tagged(cell, "solution") for cell in kept(lesson).cells) >= 3


@pytest.mark.parametrize(("lesson", "language"), BOTH)
def test_links_lead_somewhere(lesson, language):
    folder = build.notebook_path(lesson, language).parent
    links = re.findall(r"\]\(([^)\s]+)\)", markdown(lesson, language))
    for link in links:
        assert link.startswith("https://") or (folder / link.partition("#")[0]).is_file(), link
    last = markdown(lesson, language).split("\n\n")[-1]
    assert last.startswith(NEXT[language]) and (".ipynb)" in last or lesson == LESSONS[-1] != LESSONS[0])


@pytest.mark.parametrize("language", build.LANGUAGES)
def test_bold_is_bold(language):
    """Not so in Chinese where it ends with a bracket or a mark, and no space follows."""
    for lesson in LESSONS:
        shown = re.sub(r"<(code|pre)>.*?</\1>", "", MarkdownIt().render(markdown(lesson, language)), flags=re.S)
        assert not re.search(r".{9}\*\*.{9}", shown), lesson


@pytest.mark.parametrize("lesson", LESSONS)
def test_figures_come_from_cells_and_before_code(lesson):
    cells = build.code_cells(kept(lesson))
    drawn = [cell for cell in cells if figures(cell) and not tagged(cell, "solution")]
    assert 3 <= sum(len(figures(cell)) for cell in drawn) <= 6
    first = next(i for i, cell in enumerate(cells) if figures(cell))
    shown = [cell for cell in cells[: first + 1] if not tagged(cell, "figure") and not tagged(cell, "start")]
    assert sum(len(cell.source.splitlines()) for cell in shown) <= 12, "the first thing to see is a figure"
    assert not any(cell.outputs for cell in cells[:first])
    assert all(figures(cell) for cell in cells if tagged(cell, "figure"))
    assert not any(cell.get("attachments") for cell in kept(lesson).cells)
    assert not re.search(r"!\[|<img", markdown(lesson, "en") + markdown(lesson, "zh"))


@pytest.mark.parametrize("lesson", LESSONS)
def test_outputs_are_alike_on_every_machine(lesson):
    """No warnings, paths, addresses or times."""
    for cell in build.code_cells(kept(lesson)):
        for out in cell.outputs:
            assert out.output_type != "error" and out.get("name") != "stderr"
            told = "".join(out.get("text", "")) + str(out.get("data", {}).get("text/plain", ""))
            assert not re.search(r"/(home|root|tmp|work|usr)/| at 0x[0-9a-f]{6}", told), told
        assert cell.metadata.get("execution") is None


def test_padding_on_the_right_goes_wrong_where_the_lesson_says_so():
    told = "".join(out.get("text", "") for cell in kept("09_infer").cells for out in cell.get("outputs", []))
    answers = re.findall(r"^  alone +(.*)\n  padded left +(.*)\n  padded right +(.*)$", told, re.M)
    assert len(answers) == 3 and all(alone == left for alone, left, _ in answers)
    assert [alone == right for alone, _, right in answers] == [False, False, True]  # the last is the longest


def test_lessons_settle_how_threads_wait_before_torch_is_loaded():
    """OpenMP reads what `tutorial/__init__.py` sets when torch is loaded, and never again."""
    early = []
    for lesson in LESSONS:
        source = "\n".join(cell.source for cell in build.code_cells(build.notebook(lesson, "en")))
        imports = re.findall(r"^(?:from|import) .*", source, re.M)
        early += itertools.takewhile(lambda line: not line.startswith("from tutorial"), imports)
    check = "import os, sys, tutorial; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    done = run("env", "-u", "OMP_WAIT_POLICY", sys.executable, "-c", "\n".join([*early, check]))
    assert done.stdout == "False PASSIVE\n", done.stderr


@pytest.mark.parametrize("lesson", LESSONS)
def test_folded_cells_are_folded_everywhere(lesson):
    for cell in build.code_cells(kept(lesson)):
        if tagged(cell, "figure"):
            assert tagged(cell, "hide-input") and cell.metadata.jupyter == {"source_hidden": True}
        elif tagged(cell, "solution"):
            assert tagged(cell, "hide-cell") and cell.metadata.jupyter.source_hidden and "outputs_hidden" in str(cell)
        elif tagged(cell, "start"):
            assert tagged(cell, "remove-cell") and cell.metadata.jupyter == {"source_hidden": True}
        else:
            assert "jupyter" not in cell.metadata


def test_lessons_find_the_repository_from_their_folders(monkeypatch, tmp_path):
    """Jupyter and VS Code start a notebook in its own folder."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for folder in (build.TUTORIAL / "en", ROOT, tmp_path):
        start, *_ = build.code_cells(build.notebook("00_map", "zh"))
        asked = new_code_cell("import os, train_llava, tutorial; print(os.getcwd())")
        notebook = new_notebook(cells=[start, asked], metadata=build.METADATA)
        with pytest.raises(CellExecutionError, match="clone it") if folder == tmp_path else nullcontext():
            build.execute(notebook, folder)
            assert asked.outputs[0].text.strip() == str(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(("lesson", "language"), [each for each in BOTH if each[0] not in build.PLACES])
def test_a_lesson_runs_in_a_minute(lesson, language):
    """As it is built. Those of PLACES: test_notebooks."""
    notebook = build.notebook(lesson, language)
    with a_minute_of_one_core():
        build.execute(notebook, build.notebook_path(lesson, language).parent)
    kinds = [[out.output_type for out in cell.outputs] for cell in build.code_cells(notebook)]
    assert kinds == [[out.output_type for out in cell.outputs] for cell in build.code_cells(kept(lesson))]


SOURCE = """\
# %% [markdown] lang="en"
# # One

# %% [markdown] lang="zh"
# # 一

# %% tags=["solution"]
print("a")
print("b")
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A tutorial of one small lesson, with a notebook at the top."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "TUTORIAL", tmp_path / "tutorial")
    monkeypatch.setattr(build, "PLACES", {"09_last": "known"})
    (tmp_path / "train_llava").mkdir()
    source = tmp_path / "tutorial" / "lessons" / "09_last.py"
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE)
    return source


def test_the_same_source_gives_the_same_bytes(small, tmp_path, monkeypatch):
    executed = []
    execute = NotebookClient.execute
    monkeypatch.setattr(NotebookClient, "execute", lambda self, **more: executed.append(self) or execute(self, **more))
    written = []
    for _ in range(2):
        done = call(build.main)
        assert done.returncode == 0, done.stderr
        written.append([(tmp_path / name).read_bytes() for name in ("known.ipynb", "tutorial/zh/known.ipynb")])
    assert written[0] == written[1] and len(executed) == 2  # once for both languages
    chinese = nbformat.reads(written[0][1].decode(), as_version=4)
    assert [cell.source for cell in chinese.cells] == ["# 一", build.START, 'print("a")\nprint("b")']
    assert [out.text for out in chinese.cells[2].outputs] == ["a\nb\n"]
    assert call(build.main, "--check").returncode == 0


def test_what_is_not_built_or_not_whole_is_refused(small):
    done = call(build.main, "--check")
    assert done.returncode == 2 and "known.ipynb, tutorial/zh/known.ipynb" in done.stderr
    assert call(build.main, "01_none").stderr.startswith("error: 01_none is no lesson")
    small.write_text(SOURCE.replace(' lang="zh"', ""))
    done = call(build.main)
    assert done.returncode == 2 and "# 一" in done.stderr
