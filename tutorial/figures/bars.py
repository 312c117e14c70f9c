"""Bars in groups: some models, each by some kinds."""

from typing import Any

import numpy as np
from IPython.display import Image

from tutorial.figures import canvas

COLOURS = (canvas.BLUE, canvas.ORANGE, "#b9c2cc")


def grouped(values: dict[str, dict[str, float]], what: str, alt: str, most: float | None = None) -> Image:
    """A bar for each name in each group; `values` are those of each name, by group."""
    figure, (axes,) = canvas.panels(1, 2.7)
    groups, width = [*next(iter(values.values()))], 0.8 / len(values)
    for i, ((name, some), colour) in enumerate(zip(values.items(), COLOURS, strict=False)):
        places = np.arange(len(groups)) + (i - (len(values) - 1) / 2) * width
        axes.bar(places, [some[group] for group in groups], 0.95 * width, color=colour, label=name)
    many = len(groups) > 6
    axes.set_xticks(range(len(groups)), groups, rotation=35 * many, ha="right" if many else "center")
    axes.set(ylim=(0, most), ylabel=what)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas.shown(figure, alt)


def percent(rows: list[dict[str, Any]]) -> float:
    """How many answers are exactly right."""
    return 100 * sum(row["exact"] for row in rows) / len(rows)


def exactly_right(rows: dict[str, list[dict[str, Any]]]) -> Image:
    """Rows of `caption_rows` of some models, by category and of all."""
    kinds = list(dict.fromkeys(row.get("category", "(none)") for row in next(iter(rows.values()))))
    values = {
        name: {kind: percent([row for row in some if row.get("category", "(none)") == kind]) for kind in kinds}
        | {"ALL": percent(some)}
        for name, some in rows.items()
    }
    return grouped(values, "exactly right, percent", "By kind of question, how many answers are exactly right", 100)
