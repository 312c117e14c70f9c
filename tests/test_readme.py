"""The pages in two languages: the same structure and commands, and nothing in them that does not exist."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, call
from pages import anchors, blocks, commands, levels, links, numbers, tables, text_of, without_comments

from docs import draw_llava

PAGES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
ENGLISH = [page for page in PAGES if "_zh" not in page]
COMMANDED = ("README.md", *(f"docs/{name}.md" for name in ("training", "data", "from_zero_nlp", "contributing")))
RESULTS = ROOT / "benchmarks" / "results"


def twin_of(page):
    """The same page in Chinese."""
    return page.replace(".md", "_zh.md")


def code(text):
    """Language and content of each block; of the repository's tree the names alone, the rest is in words."""
    found = [(language, without_comments(language, body)) for language, body in blocks(text)]
    return [(language, names_in_tree(body) if is_tree(body) else body) for language, body in found]


def is_tree(body):
    return body.startswith("run_zero2.sh, ")


def names_in_tree(tree):
    return re.findall(r"[\w*/]+\.\w+|\w+/", tree.replace("_zh.", "."))


def shapes(text):
    """Rows and columns of each table."""
    return [(len(table), len(table[0])) for table in tables(text)]


def figures(text):
    """The numbers in each row of each table, in any order: languages differ in theirs."""
    return [[sorted(numbers("|".join(row))) for row in table] for table in tables(text)]


def in_english(path):
    """The path of the same page or lesson in English; three English lessons lie at the top of the repository."""
    return path.replace("_zh.", ".").replace("tutorial/zh/code", "code").replace("tutorial/zh/", "tutorial/en/")


def headings_of(path):
    """The anchors of a page or a notebook, whose headings are in its cells of text."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return anchors(text)


def targets(page):
    """Where the links of a page lead: a page by its English name, and there to which of its headings."""
    found = []
    for link in links(text_of(page))[1:]:  # the first leads to the twin
        path, _, anchor = link.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        heading = headings_of(there).index(anchor) if anchor and "//" not in path else None
        found.append((in_english(path), heading))
    return sorted(found, key=str)


@pytest.mark.parametrize("page", ENGLISH)
def test_pages_and_their_twins_are_level(page):
    texts = english, chinese = text_of(page), text_of(twin_of(page))
    assert levels(english) == levels(chinese)
    assert code(english) == code(chinese)
    assert shapes(english) == shapes(chinese)
    assert page == "README.md" or figures(english) == figures(chinese)  # there each in its reader's own money
    assert targets(page) == targets(twin_of(page))
    assert [links(text)[0] for text in texts] == [Path(twin_of(page)).name, Path(page).name]
    for text, own in zip(texts, (False, True), strict=True):  # each language leads to its own pages
        assert all(("_zh." in link) == own for link in links(text)[1:] if re.match(r"(?!http)[^#]+\.md", link))


@pytest.mark.parametrize(("page", "lesson"), [("faq", r"(tutorial/en/\d|code0)"), ("faq_zh", r"tutorial/zh/")])
def test_each_question_leads_to_a_section_of_a_lesson(page, lesson):
    """In the language of the page. GitHub does not jump inside notebooks, so the words of a link name the section."""
    questions = re.split(r"^### ", text_of(f"docs/{page}.md"), flags=re.M)[1:]
    assert len(questions) == 25
    for question in questions:
        found = re.findall(r"\[([^\[\]]*)\]\(\.\./([^)]*\.ipynb)#?([^)]*)\)", question)
        assert found, question
        for words, path, anchor in found:
            section = re.search(r", \*(.+)\*$|课“(.+)”$", words)
            assert section and re.match(lesson, path), words
            assert anchors(f"# {section[1] or section[2]}") == [anchor], words
        assert any(shows(ROOT / path, section) for _, path, section in found), question


def shows(notebook, anchor):
    """Whether a cell below this heading, and above the next of its kind, has an output."""
    cells, inside = json.loads(notebook.read_text())["cells"], False
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for heading in re.findall(r"^##? .*", text, re.M):
                inside = anchors(heading) == [anchor]
        elif inside and cell["outputs"]:
            return True
    return False


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_front_pages_are_short(page):
    assert len(text_of(page).splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for link in links(text_of(page)):
        if link.startswith("http"):
            assert re.match(r"https://[\w.-]+\.\w+(/|$)", link), link
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in headings_of(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if "from_zero_nlp" not in page])  # which names the original's
def test_paths_exist(page):
    folders = "train_llava|docs|benchmarks|tests|recipes|demo|ds_configs|scripts"
    paths = re.findall(rf"`((?:{folders})/[\w./-]*)`", text_of(page))
    if page.startswith("README"):
        paths += re.findall(r"`([\w-]+\.(?:py|sh|ipynb|txt))`", text_of(page))
        assert len(paths) > 8
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_tree_is_that_of_the_repository(page):
    (tree,) = [body for language, body in blocks(text_of(page)) if is_tree(body)]
    assert len(tree.splitlines()) <= 25
    for line in tree.splitlines():
        folder = ROOT / "train_llava" if line.startswith(" ") else ROOT
        inside = re.match(r" +(\w+)/", line)
        folder = folder / inside[1] if inside else folder
        for name in re.findall(r"[\w*/]+\.(?:py|sh|json|ipynb|md)|\w+/(?=[\s,]|$)", line):
            within = folder.parent if inside and name == f"{inside[1]}/" else ROOT if "/" in name else folder
            assert list(within.glob(name.rstrip("/"))), name


@pytest.mark.parametrize("page", ["docs/from_zero_nlp.md", "docs/from_zero_nlp_zh.md"])
def test_names_to_import_are_where_the_page_says(page):
    (line,) = [line for line in text_of(page).splitlines() if "`LlavaDataset`" in line and "`train_llava.data`" in line]
    names, found = [], 0
    for word in re.findall(r"`([\w.]+)`", line):
        if word.startswith("train_llava."):
            assert all(hasattr(import_module(word), name) for name in names), word
            names, found = [], found + len(names)
        else:
            names.append(word)
    assert found == 6


def test_the_files_that_the_move_names_exist():
    rows = re.findall(r"^\| `.*` \| (.*) \|$", text_of("docs/from_zero_nlp.md").split("## Name to name")[0], re.M)
    paths = [path for row in rows for path in re.findall(r"`([\w./]+\.(?:py|sh|json))`", row)]
    assert len(paths) > 8 and all((ROOT / path).exists() for path in paths)


@pytest.mark.parametrize("page", COMMANDED)
def test_commands_exist_and_know_their_flags(page):
    helps = {}
    variables = text_of("run_zero2.sh")
    for words in commands(text_of(page)):
        while "=" in words[0]:
            assert f"\n{words[0].split('=')[0]}=${{" in variables, words[0]
            words = words[1:]
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file()
            module, flags = "train_llava.train", words[2:]
        elif words[:2] == ["python", "-m"]:
            module, flags = words[2], words[3:]
        else:
            assert words[0] in ("source", "hf", "git", "cd") or words[0].startswith("--")
            if not words[0].startswith("--"):
                continue
            module, flags = "train_llava.train", words
        flags = [flag for flag in flags if flag.startswith("--")]
        if flags and module not in helps:
            helps[module] = set(re.findall(r"--\w+", call(import_module(module).main, "--help").stdout))
        assert all(flag in helps[module] for flag in flags)
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


def test_named_benchmarks_exist():
    """On the pages, in the result files and in their own docstrings."""
    scripts = [path for path in ROOT.glob("benchmarks/**/*.py") if "def main()" in path.read_text()]
    assert len(scripts) > 10
    for path in scripts:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert re.search(r"^    python -m ([\w.]+)", path.read_text(), re.M)[1] == module
    for path in [*(ROOT / page for page in PAGES), *RESULTS.glob("*.json")]:
        for module in re.findall(r"python -m (benchmarks\.[\w.]+)", path.read_text()):
            assert (ROOT / (module.replace(".", "/") + ".py")) in scripts, (path, module)


@pytest.mark.parametrize("name", draw_llava.WORDS)
def test_the_drawings_are_those_of_their_script(name):
    """But for the image in them, whose bytes are Pillow's."""
    drawn = draw_llava.drawing(draw_llava.WORDS[name])
    kept = text_of(f"docs/{name}.svg")
    assert re.sub(r'href="[^"]*"', "", drawn) == re.sub(r'href="[^"]*"', "", kept)
