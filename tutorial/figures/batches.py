"""What the lesson about data draws: tokens as boxes with ids and labels, the causal mask, a batch.

A colour says what a token is: read alone, of an image, or to be learned. A blank is drawn as an open box, a line break
as an arrow.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from transformers import PreTrainedTokenizerBase

from train_llava.processing.chat import IGNORE_INDEX
from tutorial.figures import canvas, diagrams
from tutorial.figures.canvas import INK, ORANGE, STYLE
from tutorial.figures.diagrams import ANSWER, EDGE, IMAGE, TEMPLATE, TEXT

KINDS = {"special": TEMPLATE, "text": TEXT, "image": IMAGE, "answer": ANSWER, "padding": "#ffffff"}
NAMES = {"special": "special token", "text": "text, only read", "image": "image", "answer": "answer, to be learned"}
READ, LEARNED, IGNORED = "#5b6673", "#1d6b2c", "#7c8896"


def kinds_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> list[str]:
    """The key of KINDS of each token of a conversation."""
    special, image = {*tokenizer.all_special_ids}, tokenizer.convert_tokens_to_ids("<image>")
    read = ["image" if each == image else "special" if each in special else "text" for each in ids]
    return ["answer" if label != IGNORE_INDEX else kind for kind, label in zip(read, labels, strict=True)]


def written(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token as it is drawn."""
    return [diagrams.visible(tokenizer.decode([each])) for each in ids]


def box(axes: Axes, x: float, y: float, lines: Sequence[str], kind: str) -> None:
    """One token: its text, and if there are more lines its id and its label."""
    size = 0.94, len(lines)
    axes.add_patch(plt.Rectangle((x + 0.03, y), *size, facecolor=KINDS[kind], edgecolor=EDGE, linewidth=0.6))
    colours = (INK, READ, LEARNED if kind == "answer" else IGNORED)
    for i, (text, colour) in enumerate(zip(lines, colours, strict=False)):
        axes.text(x + 0.5, y + i + 0.5, text, ha="center", va="center", size=7 if i else 6.4, color=colour)


def key(place: Axes | Figure, **where) -> None:
    """What the colours stand for."""
    patches = [Patch(facecolor=KINDS[kind], edgecolor=EDGE, label=name) for kind, name in NAMES.items()]
    place.legend(handles=patches, frameon=False, ncols=len(patches), fontsize=9, **where)


def record(
    tokenizer: PreTrainedTokenizerBase, image: PIL.Image.Image, ids: Sequence[int], labels: Sequence[int]
) -> Image:
    """An image, and all tokens of its conversation."""
    columns, kinds = 12, kinds_of(tokenizer, ids, labels)
    figure, (left, right) = canvas.panels(2, 5.0, width_ratios=[1, 4.6])
    canvas.draw(left, np.asarray(image), "the image")
    with plt.rc_context(STYLE):
        for i, lines in enumerate(zip(written(tokenizer, ids), map(str, ids), map(str, labels), strict=True)):
            box(right, i % columns, i // columns * 3.7, lines, kinds[i])
    right.set(xlim=(0, columns), ylim=(-(-len(ids) // columns) * 3.7, -0.3), title="token | id | label")
    right.axis("off")
    key(figure, loc="outside lower center")
    return canvas.shown(figure, "An image, and its conversation as tokens: each with its id and its label")


def shift(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int], start: int) -> Image:
    """Eleven tokens from `start` on, and below each the next one."""
    words, kinds = written(tokenizer, ids), kinds_of(tokenizer, ids, labels)
    figure, (axes,) = canvas.panels(1, 1.7)
    with plt.rc_context(STYLE):
        for i in range(11):
            box(axes, i, 0, [words[start + i]], kinds[start + i])
            box(axes, i, 2.2, [words[start + i + 1]], kinds[start + i + 1])
            axes.annotate("", (i + 0.5, 2.1), (i + 0.5, 1.1), arrowprops={"arrowstyle": "->", "color": INK})
        for y, name in ((0.5, "it reads"), (2.7, "next token")):
            axes.text(-0.08, y, name, ha="right", va="center")
    axes.set(xlim=(-1, 11), ylim=(3.3, -0.1))
    axes.axis("off")
    return canvas.shown(figure, "A row of tokens, and below each of them the next one")


def pixels(rows: Sequence[Sequence[str]]) -> np.ndarray:
    """Rows of kinds as an image, of one pixel for each token."""
    return np.array([[plt.matplotlib.colors.to_rgb(KINDS[kind]) for kind in row] for row in rows])


def causal_mask(kinds: Sequence[str], attention: torch.Tensor, first: int) -> Image:
    """Who may look at whom, and who does; `first` is the position of the answer's first token."""
    n = len(kinds)
    may_see = np.tril(np.ones((n, n)))[..., None]
    figure, axes = canvas.panels(2, 4.7)
    canvas.draw(axes[0], may_see * pixels([kinds]) + (1 - may_see), "who may look at whom")
    canvas.draw(axes[1], attention[:n, :n].sqrt(), "attention, first layer: darker is more", cmap="Greys")
    with plt.rc_context(STYLE):
        for each in axes:
            each.axhline(first - 1, color=ORANGE, linewidth=1.2)
            options = {"arrowprops": {"arrowstyle": "->", "color": ORANGE}, "color": ORANGE, "ha": "right"}
            each.annotate("here it says the\nanswer's first token", (first, first - 1), (n - 1, n * 0.3), **options)
            each.set_xlabel("looks at")
    axes[0].set_ylabel("position, from the top")
    key(figure, loc="outside lower center")
    return canvas.shown(figure, "The causal mask, and the attention of a model: each row looks only to the left")


def ends(curves: dict[str, Sequence[float]]) -> Image:
    """How probable the end of an answer is, step by step."""
    figure, (axes,) = canvas.panels(1, 2.4)
    with plt.rc_context(STYLE):
        for (name, curve), colour in zip(curves.items(), (canvas.BLUE, ORANGE), strict=True):
            axes.plot(curve, color=colour, linewidth=2, label=name)
        axes.set(xlabel="step", ylabel="probability of the end\nbehind the answer")
        axes.legend(frameon=False)
    return canvas.shown(figure, "How probable the end is behind an answer, with and without it among the labels")


def batch(tokenizer: PreTrainedTokenizerBase, tensors: dict[str, torch.Tensor]) -> Image:
    """A batch as rows of colours."""
    columns = (tensors[name].tolist() for name in ("input_ids", "labels", "attention_mask"))
    rows = [
        [kind if seen else "padding" for kind, seen in zip(kinds_of(tokenizer, ids, labels), mask, strict=True)]
        for ids, labels, mask in zip(*columns, strict=True)
    ]
    figure, (axes,) = canvas.panels(1, 2.3)
    canvas.draw(axes, pixels(rows), aspect="auto")
    for i in range(1, len(rows)):
        axes.axhline(i - 0.5, color=EDGE, linewidth=0.6)
    key(figure, loc="outside lower center")
    return canvas.shown(figure, "A batch: conversations as rows of one length, white where they are filled up")
