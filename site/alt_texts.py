"""Figures of the lessons say what they show (tutorial/figures/canvas.py); the site takes that from another place."""

import json
from typing import Any


def describe_figures(app: Any, docname: str, source: list[str]) -> None:
    """Called by Sphinx with the text of each page; changes notebooks alone."""
    if not docname.startswith("lessons/"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        for out in cell.get("outputs", []):
            for kind in out.get("metadata", {}).values():
                if "alt" in kind:
                    cell["metadata"]["mystnb"] = {"image": {"alt": kind["alt"]}}
    source[0] = json.dumps(notebook, ensure_ascii=False)
