"""Gathers the pages of the site in one language, under the same names in both: python site/stage.py LANGUAGE FOLDER

A page of docs/ is docs/NAME whatever its language, a lesson is lessons/NAME. What is new in docs/ or among the lessons
comes into the site by itself; ORDER only says what comes first.
"""

import re
import shutil
import sys
from pathlib import Path

SITE = Path(__file__).parent
ROOT = SITE.parent
INTERACTIVE = ROOT / "tutorial" / "interactive"  # pages that are copied as they are, once for both languages
LANGUAGES = ("en", "zh")
# of docs/, without ending; others follow in the order of their names
ORDER = "data training evaluation serving models estimate gpu machines performance scaling flags faq"
DRAWINGS = ("docs/*.png", "docs/*.svg", "benchmarks/results/*.png")
# the lessons whose notebooks have names of their own (tutorial/build.py)
LESSONS = {"code03_build_model_show": "04_build", "code05_infer": "09_infer", "code05_infer_lora": "09_infer_lora"}


def pages(language: str) -> dict[str, Path]:
    """Name on the site, with its ending -> file of the repository."""
    chinese = language == "zh"
    found = {"index.md": SITE / language / "index.md", "api.md": SITE / language / "api.md"}
    found["readme.md"] = ROOT / ("README_zh.md" if chinese else "README.md")
    for path in (ROOT / "docs").glob("*.md"):
        if path.stem.endswith("_zh") == chinese:
            found[f"docs/{path.stem.removesuffix('_zh')}.md"] = path
    notebooks = [*(ROOT / "tutorial" / language).glob("*.ipynb"), *([] if chinese else ROOT.glob("*.ipynb"))]
    return found | {f"lessons/{path.name}": path for path in notebooks}


def without_ending(name: str) -> str:
    """As Sphinx calls a page."""
    return name.rpartition(".")[0]


def lessons_first_to_last(names: list[str]) -> list[str]:
    stems = [Path(name).stem for name in names if name.startswith("lessons/")]
    return [f"lessons/{stem}" for stem in sorted(stems, key=lambda stem: LESSONS.get(stem, stem))]


def docs_in_order(names: list[str]) -> list[str]:
    order = [f"docs/{name}" for name in ORDER.split()]
    docs = sorted(without_ending(name) for name in names if name.startswith("docs/"))
    return [name for name in order if name in docs] + [name for name in docs if name not in order]


def with_contents(text: str, names: list[str]) -> str:
    """The front page, with the lessons and the pages of docs/ in its tables of contents."""
    for word, found in (("LESSONS", lessons_first_to_last(names)), ("DOCS", docs_in_order(names))):
        text = re.sub(rf"^{word}$", "\n".join(found), text, flags=re.M)
    return text


def stage(language: str, folder: Path) -> None:
    """Copies the pages, the drawings to where the pages look for them, and the theme's words."""
    found = pages(language)
    for name, path in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    front = found["index.md"].read_text(encoding="utf-8")
    (folder / "index.md").write_text(with_contents(front, list(found)), encoding="utf-8")
    for pattern in DRAWINGS:
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copytree(SITE / "locales", folder / "locales")


if __name__ == "__main__":
    stage(sys.argv[1], Path(sys.argv[2]))
