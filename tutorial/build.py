"""Builds the notebooks of the tutorial from their sources, one file per lesson.

    python -m tutorial.build [LESSON ...]     all lessons, or those named, such as 01_image
    python -m tutorial.build --check          executes nothing; fails if a notebook is not what its source says

The source is tutorial/lessons/NN_name.py in jupytext's percent format. Both languages stand in it: a markdown cell
begins with `# %% [markdown] lang="en"` or `lang="zh"`, and all share the code cells. They are executed once, and
written with their outputs to tutorial/en/ and tutorial/zh/.

Three lessons have the names of the tutorial that this repository rebuilds (PLACES). Their English notebooks stay where
people know them, at the top of the repository; the Chinese ones have the same names in tutorial/zh/.

Two tags fold a code cell: `figure`, which only draws, and `solution`. The words of a solution are folded, too. GitHub
folds no code, so solutions come last. The cell that leads to the folder of the repository (START) is folded as well.
"""

import argparse
import os
import re
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from train_llava.cli import InputError, command, command_parser, write_whole

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "tutorial"
LANGUAGES = ("en", "zh")
PLACES = {
    "04_build": "code03_build_model_show",
    "09_infer": "code05_infer",
    "09_infer_lora": "code05_infer_lora",
}
SOLUTIONS = {"en": "## Solutions", "zh": "## 答案"}
LEVELS = {  # not every machine has a font with the animals
    "en": {"🐢": "Easy", "🐕": "Middle", "🦁": "Hard"},
    "zh": {"🐢": "简单", "🐕": "中等", "🦁": "困难"},
}
# What a notebook says about itself; a kernel would add the version of its Python.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
START = """\
# Jupyter starts in the folder of the notebook; a lesson runs in that of the repository.
import os
import sys
from pathlib import Path

above = [Path.cwd(), *Path.cwd().parents]
root = next((folder for folder in above if (folder / "train_llava").is_dir()), None)
assert root, "this notebook needs the repository around it: clone it, and open the notebook there"
os.chdir(root)
sys.path.insert(0, str(root))"""
# `jupyter` is read by JupyterLab, the tag by the site.
FOLDED = {
    "start": {"tags": ["start", "remove-cell"], "jupyter": {"source_hidden": True}},
    "figure": {"tags": ["figure", "hide-input"], "jupyter": {"source_hidden": True}},
    "solution": {"tags": ["solution", "hide-cell"], "jupyter": {"source_hidden": True, "outputs_hidden": True}},
}


def lessons() -> list[str]:
    """All lessons, in order."""
    return sorted(path.stem for path in (TUTORIAL / "lessons").glob("*.py"))


def notebook_path(lesson: str, language: str) -> Path:
    at_the_top = language == "en" and lesson in PLACES
    return (ROOT if at_the_top else TUTORIAL / language) / f"{PLACES.get(lesson, lesson)}.ipynb"


def read_cells(lesson: str) -> list[NotebookNode]:
    """The cells of a source, of both languages, and START in front of its code.

    Raises:
        InputError: there is no such lesson, or a markdown cell has no language.
    """
    if lesson not in lessons():
        raise InputError(f"{lesson} is no lesson. These are: {', '.join(lessons())}.")
    cells = jupytext.read(TUTORIAL / "lessons" / f"{lesson}.py", fmt="py:percent").cells
    for cell in cells:
        if cell.cell_type == "markdown" and cell.metadata.get("lang") not in LANGUAGES:
            raise InputError(f'{lesson}: which language is this cell in? {cell.source[:60]!r} Say lang="en" or "zh".')
    first = next(i for i, cell in enumerate(cells) if cell.cell_type == "code")
    cells.insert(first, new_code_cell(START, metadata={"tags": ["start"]}))
    return cells


def folded(words: str, language: str) -> str:
    """Each solution in words behind its level: a click opens it, in Jupyter, on GitHub and on the site."""

    def fold(found: re.Match[str]) -> str:
        animal, solution = found.groups()
        level = f"{animal} {LEVELS[language][animal]}"
        return f"<details><summary>{level}</summary>\n\n{solution}\n\n</details>"

    return re.sub(r"^([🐢🐕🦁]) (.+?)(?=\n\n[🐢🐕🦁]|\Z)", fold, words, flags=re.M | re.S)


def cell_metadata(cell: NotebookNode) -> dict:
    tags = cell.metadata.get("tags", [])
    return next((FOLDED[tag] for tag in tags if tag in FOLDED), {"tags": tags} if tags else {})


def notebook(lesson: str, language: str) -> NotebookNode:
    """A lesson in one language, not executed. Its cells are numbered, so that the same source gives the same file."""
    cells, solutions = [], False
    for cell in read_cells(lesson):
        name = f"cell-{len(cells):02}"
        if cell.cell_type == "code":
            cells.append(new_code_cell(cell.source, id=name, metadata=cell_metadata(cell)))
        elif cell.metadata["lang"] == language:
            before, heading, answers = "", "", cell.source
            if not solutions:
                before, heading, answers = cell.source.partition(SOLUTIONS[language])
                solutions = bool(heading)
            cells.append(new_markdown_cell(before + heading + folded(answers, language), id=name))
    return new_notebook(cells=cells, metadata=METADATA)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Runs all cells without the hub, as Jupyter would in that folder; what is printed in pieces becomes one text."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, whichever cell imports it first
    options = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **options).execute(env=environment)
    notebook.metadata = METADATA


def build(lesson: str) -> None:
    """Executes a lesson, and writes its notebook in each language."""
    first, *others = notebooks = [notebook(lesson, language) for language in LANGUAGES]
    execute(first, notebook_path(lesson, LANGUAGES[0]).parent)
    for other in others:
        for cell, executed in zip(code_cells(other), code_cells(first), strict=True):
            cell.outputs, cell.execution_count = executed.outputs, executed.execution_count
    for language, built in zip(LANGUAGES, notebooks, strict=True):
        write_whole(notebook_path(lesson, language), nbformat.writes(built) + "\n")


def without_outputs(notebook: NotebookNode) -> NotebookNode:
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    return notebook


def is_current(lesson: str, language: str) -> bool:
    """Whether the notebook is there, and is that of its source but for the outputs."""
    path = notebook_path(lesson, language)
    return path.is_file() and without_outputs(nbformat.read(path, as_version=4)) == notebook(lesson, language)


def check(names: list[str]) -> None:
    """Refuses notebooks that are not those of their sources.

    Raises:
        InputError: see there.
    """
    paths = {notebook_path(name, language): (name, language) for name in names for language in LANGUAGES}
    old = [path.relative_to(ROOT) for path, which in paths.items() if not is_current(*which)]
    if old:
        raise InputError(f"not built from their sources: {', '.join(map(str, old))}. Type: python -m tutorial.build")


def read_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("lessons", nargs="*", metavar="LESSON", help="those to build (default: all)")
    parser.add_argument("--check", action="store_true", help="only compare the notebooks with their sources")
    return parser.parse_args()


@command
def main() -> None:
    arguments = read_arguments()
    names = arguments.lessons or lessons()
    if arguments.check:
        check(names)
        return
    for name in names:
        build(name)
        print(f"{name}: {', '.join(str(notebook_path(name, each).relative_to(ROOT)) for each in LANGUAGES)}")


if __name__ == "__main__":
    main()
