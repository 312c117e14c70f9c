"""The parts of the pages in docs/ and of the READMEs: text, headings, tables, links, blocks of code, command lines."""

import re
import shlex

from conftest import ROOT


def text_of(page):
    return (ROOT / page).read_text()


def blocks(text):
    return re.findall(r"```(\w+)\n(.*?)```", text, re.S)


def without_blocks(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


def without_comments(language, body):
    """A block of code without its comments, which are in the language of the page."""
    return re.sub(r"(^|\s+)#.*", "", body) if language in ("bash", "python", "yaml") else body


def levels(text):
    return re.findall(r"^(#+) ", without_blocks(text), re.M)


def anchors(text):
    """As GitHub makes them of the headings, in order."""
    titles = re.findall(r"^#+ (.*)", without_blocks(text), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))


def tables(text):
    """The rows of each table, lists of cells; all of a table have as many."""
    found = re.findall(r"(?:^\|.*\|\n)+", without_blocks(text), re.M)
    split = [[re.split(r"(?<!\\)\|", row)[1:-1] for row in table.splitlines()] for table in found]
    assert all(len({len(cells) for cells in table}) == 1 for table in split)
    return split


def numbers(text):
    return re.findall(r"\d+(?:[.,]\d+)*", text)


def commands(text):
    """Every command line of a page, continued lines joined, comments gone."""
    shell = "\n".join(body for language, body in blocks(text) if language == "bash").replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in shell.splitlines() if line.strip()]
    return [words for words in lines if words]
