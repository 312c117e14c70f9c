"""The figures of the lesson about strategies: what each one trains, and what measured trainings of the demo reached."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.path import Path as Outline

from tutorial.figures import canvas

# A flame: its tip, then three corners for each curve of its border
CORNERS = """10,100 15,45 65,25 60,-35 55,-105 -55,-105 -60,-35 -62,-5 -45,20 -40,45
-30,15 -20,10 -10,15 -5,50 -5,80 10,100"""
FLAME = Outline(
    np.array([corner.split(",") for corner in CORNERS.split()], dtype=float),
    [Outline.MOVETO] + [Outline.CURVE4] * (len(CORNERS.split()) - 1),
)
GREEN = "#3a9d5d"
Counts = dict[str, dict[str, tuple[int, int]]]


def parts(counts: Counts) -> Image:
    """A row of boxes for each strategy; `counts` has all and trained weights of each part."""
    with plt.rc_context(canvas.STYLE):
        figure, (axes,) = canvas.panels(1, 2.9)
        for y, (name, weights) in enumerate(counts.items()):
            for x, (part, (every, trained)) in enumerate(weights.items()):
                if not y:
                    axes.text(x, -0.72, part, ha="center", weight="bold")
                if every:
                    draw_part(axes, x, y, every, trained)
            total = sum(trained for _, trained in weights.values())
            axes.text(-0.62, y, f"{name}\n{total:,} trained", ha="right", va="center")
    axes.set(xlim=(-1.75, 4.5), ylim=(3.5, -1))
    axes.axis("off")
    return canvas.shown(figure, "What each strategy trains, and how many weights that is")


def draw_part(axes: Axes, x: float, y: float, every: int, trained: int) -> None:
    """A box with a flame or a snowflake, and how many weights are trained."""
    middle = {"ha": "center", "va": "center"}
    colour = "#fde3d0" if trained else "#e3edfb"
    axes.add_patch(plt.Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, color=colour))
    if not trained:
        axes.text(x - 0.32, y, "❄", size=15, color=canvas.BLUE, **middle)
        axes.text(x + 0.1, y, "frozen", size=9, **middle)
        return
    axes.scatter(x - 0.32, y, s=210, marker=FLAME, color=canvas.ORANGE)
    of_all = f"\nof {every:,}" if trained < every else ""
    axes.text(x + 0.1, y, f"{trained:,}{of_all}", size=9, **middle)


def beside(sides: dict[str, Sequence[Sequence[float]]], names: Sequence[str]) -> Image:
    """Exact answers of some rows on each side, in percent: bars of the means, a dot for each training."""
    figure, axes = canvas.panels(len(sides), 3.2, sharey=True)
    for each, (title, values) in zip(axes, sides.items(), strict=True):
        for y, dots in enumerate(values):
            if dots:
                each.barh(y, mean(dots), color=canvas.BLUE, alpha=0.35, height=0.6)
            each.plot(dots, [y] * len(dots), "o", color=canvas.BLUE, markersize=5)
        each.set(title=title, xlim=(0, 100), xlabel="held-out answers exactly right, %")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return canvas.shown(figure, "Answers exactly right by strategy, and the author's words")


def rates(curves: dict[str, dict[str, list[dict[str, Any]]]]) -> Image:
    """Exact captions in each language over the learning rate, of four curves; each has its runs at each rate."""
    figure, axes = canvas.panels(2, 3.4, sharey=True)
    looks = ((canvas.BLUE, "-"), (canvas.BLUE, ":"), (GREEN, "--"), (canvas.ORANGE, "--"))
    ticks = [float(rate) for rate in max(curves.values(), key=len)]
    for axis, language in zip(axes, ("English", "Chinese"), strict=True):
        for (name, runs), (colour, style) in zip(curves.items(), looks, strict=True):
            exact = [mean(run["exact_percent_of_languages"][language] for run in some) for some in runs.values()]
            axis.plot([*map(float, runs)], exact, style, color=colour, marker=".", label=name)
        axis.axvline(4e-4, color=canvas.INK, linewidth=0.6)
        axis.set(xscale="log", ylim=(-4, 104), title=f"asked for {language} captions")
        axis.set_xlabel("learning rate; thin line: the original's, 4e-4")
        axis.set_xticks(ticks, [f"{rate:.0e}".replace("e-0", "e-") for rate in ticks])
        axis.minorticks_off()
    axes[0].set_ylabel("exactly right, %")
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    return canvas.shown(figure, "Right captions over learning rate: English stays right, Chinese is forgotten")


def stages(values: dict[str, Sequence[float]]) -> Image:
    """Exact answers in percent of strategies in one stage and in two; the projector alone in another colour."""
    figure, (axes,) = canvas.panels(1, 2.4)
    for x, (name, dots) in enumerate(values.items()):
        colour = canvas.ORANGE if name.startswith("projector") else canvas.BLUE
        axes.bar(x, mean(dots), color=colour, alpha=0.35, width=0.55)
        axes.plot([x] * len(dots), dots, "o", color=canvas.INK, markersize=4)
    axes.set_xticks(range(len(values)), values)
    axes.set(ylim=(0, 100), ylabel="exactly right, %")
    return canvas.shown(figure, "Answers exactly right: projector alone, one stage, two")
