"""Docstrings, which are plain text -> what Sphinx reads."""

import re


def marked_up(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Called by autodoc. Commands, which stand four columns in, are blocks of code; stars and bars are not markup."""
    text = re.sub(r"([*|])", r"\\\1", "\n".join(lines))
    text = re.sub(r"^(\S.*\n)\n(?=    \S)", r"\1\n::\n\n", text, flags=re.M)
    lines[:] = text.split("\n")
