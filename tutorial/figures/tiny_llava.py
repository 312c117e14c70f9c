"""What the lesson with a LLaVA in 60 lines draws: its steps, how well two models agree, what mistakes do."""

from collections.abc import Sequence
from textwrap import shorten

import numpy as np
import PIL.Image
import torch
from IPython.display import Image

from tutorial.figures import canvas, diagrams
from tutorial.figures.diagrams import IMAGE, LANGUAGE, PROJECTOR, TOWER

FILLS = ["#ffffff", TOWER, TOWER, TOWER, PROJECTOR, IMAGE, LANGUAGE, LANGUAGE]


def steps(image: PIL.Image.Image, stations: Sequence[tuple[str, str, Sequence[int]]]) -> Image:
    """Eight steps in two rows: what is done, in which code, and the shape that comes out."""
    figure, axes = diagrams.canvas(30)
    for i, ((name, code, shape), fill) in enumerate(zip(stations, FILLS, strict=True)):
        left, bottom = 1 + 25 * (i % 4), 19 if i < 4 else 3.5
        if i == 0:
            diagrams.picture(axes, (left + 7, bottom, 8, 8), np.asarray(image))
        else:
            diagrams.box(axes, left, bottom, 22, 8, fill, name, code)
            if i % 4:
                diagrams.arrow(axes, (left - (8.7 if i == 1 else 2.7), bottom + 4), (left - 0.2, bottom + 4))
        diagrams.write(axes, left + 11, bottom - 1.6, " x ".join(f"{side:,}" for side in shape), color=canvas.BLUE)
    return canvas.shown(figure, "From pixels to logits in eight steps, with the code and the shape of each")


def agreement(words: Sequence[str], ours: torch.Tensor, theirs: torch.Tensor, apart: torch.Tensor) -> Image:
    """Probabilities of the likeliest next tokens in two models, and how far apart their logits are by position."""
    figure, (left, right) = canvas.panels(2, 3.2)
    places = np.arange(len(words))
    left.bar(places - 0.2, theirs, 0.4, label="transformers", color=canvas.ORANGE)
    left.bar(places + 0.2, ours, 0.4, label="TinyLlava", color=canvas.BLUE)
    left.set_xticks(places, [diagrams.visible(word) for word in words])
    left.set_title("probability of the next token")
    left.legend(frameon=False)
    right.plot(apart.clamp(min=1e-9), ".", color=canvas.BLUE)
    right.axhline(1e-5, color=canvas.ORANGE)
    right.text(0, 1.3e-5, "1e-5", color=canvas.ORANGE)
    title = "largest difference of the logits (0 is drawn at 1e-9)"
    right.set(yscale="log", ylim=(5e-10, 1e-3), title=title, xlabel="position")
    return canvas.shown(figure, "Both models give the same probabilities; no logit differs by more than 1e-5")


def mistakes(change: dict[str, float], said: Sequence[str]) -> Image:
    """How far each mistake moves the next token's logits, and what the model says then; the first is no mistake."""
    figure, (axes,) = canvas.panels(1, 3.6)
    moved = [max(each, 1e-7) for each in change.values()]
    axes.barh(list(change), moved, left=1e-8, color=[canvas.BLUE] + [canvas.ORANGE] * (len(moved) - 1))
    title = "largest difference of the next token's logits (0 is drawn at 1e-7)"
    axes.set(xscale="log", xlim=(1e-8, 1e8), xlabel=title, xticks=[10.0**n for n in range(-7, 3)])
    axes.invert_yaxis()
    for row, (each, words) in enumerate(zip(moved, said, strict=True)):
        axes.text(each * 1.6, row, diagrams.drawable(shorten(words, 45)), va="center", fontsize=9.5)
    return canvas.shown(figure, "Mistakes: how far each moves the logits, and what the model answers")
