"""The parts of the pages in docs/ and of the READMEs: text, blocks of code, command lines."""

import re
import shlex

from conftest import ROOT


def text_of(page):
    return (ROOT / page).read_text()


def blocks(text):
    return re.findall(r"```(\w+)\n(.*?)```", text, re.S)


def without_blocks(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


def commands(text):
    """Every command line of a page, continued lines joined, comments gone."""
    shell = "\n".join(body for language, body in blocks(text) if language == "bash").replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in shell.splitlines() if line.strip()]
    return [words for words in lines if words]
