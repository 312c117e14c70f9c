"""What the lessons draw beside images and tables of numbers: boxes, arrows, and texts as rows of tokens.

A canvas is 100 units wide, whatever its height, and y goes up.
"""

import re
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from tutorial.figures.canvas import INK, STYLE, WIDTH, draw

TEMPLATE, TEXT, ANSWER, IMAGE, PLAIN = "#e3e8ee", "#cfe0f7", "#d3efdc", "#fbd9bd", "#f7f9fb"
TOWER, PROJECTOR, LANGUAGE = "#d3efdc", "#f6e3a9", "#f9dcd5"
EDGE = "#8794a3"
UNIT = 100 / WIDTH  # of a canvas in an inch
LACKING = re.compile(r"[^ -\u2e7f]+")  # what the figures' font does not have


def canvas(height: float) -> tuple[Figure, Axes]:
    """An empty figure of so many units of height, without axes."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH, height / UNIT))
        axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def write(axes: Axes, x: float, y: float, text: str, size: float = 10, **options) -> None:
    """A line of text, its middle at (x, y) unless `options` say otherwise."""
    with plt.rc_context(STYLE):
        axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": size, **options})


def box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, *lines: str, size: float = 10
) -> None:
    """A box with its lower left corner at (x, y): its name in bold, and lines about it."""
    style = "round,pad=0,rounding_size=1"
    axes.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=colour, edgecolor=EDGE))
    step = 0.19 * size
    top = y + height / 2 + step * (len(lines) - 1) / 2
    for i, line in enumerate(lines):
        weight = "bold" if i == 0 else "normal"
        write(axes, x + width / 2, top - step * i, line, size if i == 0 else size - 1.5, weight=weight)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 0})


def picture(axes: Axes, place: tuple[float, float, float, float], pixels: np.ndarray, **options) -> Axes:
    """Pixels at a place: left, bottom, width, height. `options` go to matplotlib's `imshow`; returns their axes."""
    inset = axes.inset_axes(place, transform=axes.transData)
    draw(inset, pixels, aspect="auto", **options)
    return inset


def drawable(text: str) -> str:
    """A text with … for what the figures' font lacks, such as Chinese; $ would begin a formula."""
    return LACKING.sub("…", text).replace("$", r"\$")


def visible(token: str) -> str:
    """A token as it can be seen, with signs for a blank and for the end of a line.

    The figures' font has no Chinese, and many a token is a part of a letter: such tokens are only named.
    """
    shown = token.replace("\n", "↵").replace(" ", "␣")
    return "(Chinese)" if LACKING.search(shown) else shown


def tokens(
    axes: Axes, top: float, texts: Sequence[str], colours: Sequence[str], notes: Sequence[object], size: float = 8
) -> float:
    """Tokens in rows, each in a box of its colour with a note under it, from y = `top` down; returns where it ends."""
    letter, height, x = 0.602 * size / 72 * UNIT, 2.6, 1.0
    for token, colour, note in zip(map(visible, texts), colours, notes, strict=True):
        width = letter * max(len(token), 0.8 * len(str(note))) + 1
        if x + width > 99.5:
            x, top = 1.0, top - 5.6
        axes.add_patch(
            FancyBboxPatch((x, top - height), width - 0.25, height, "round,pad=0,rounding_size=0.5", fc=colour, ec=EDGE)
        )
        write(axes, x + width / 2, top - height / 2, token, size, family="DejaVu Sans Mono")
        write(axes, x + width / 2, top - height - 1.1, str(note), 0.8 * size, color="#5b6875")
        x += width
    return top - 5.6


def legend(axes: Axes, y: float, colours: dict[str, str]) -> None:
    """What the colours mean, in a line."""
    x = 1.0
    for name, colour in colours.items():
        axes.add_patch(FancyBboxPatch((x, y), 2, 2, "round,pad=0,rounding_size=0.5", fc=colour, ec=EDGE))
        write(axes, x + 2.8, y + 1, name, 9, ha="left")
        x += 6.5 + 0.8 * len(name)
