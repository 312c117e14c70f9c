"""What the lesson about text draws: a chat as tokens, the rows of a vocabulary, vectors before and after the image."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import PIL.Image
import torch
from IPython.display import Image
from transformers import PreTrainedTokenizerBase

from train_llava.processing.chat import IGNORE_INDEX
from tutorial.figures import canvas, diagrams
from tutorial.figures.diagrams import ANSWER, IMAGE, PLAIN, TEMPLATE, TEXT

KINDS = {
    "written by the template": TEMPLATE,
    "the image": IMAGE,
    "the question": TEXT,
    "the answer and its end": ANSWER,
}


def colours(ids: Sequence[int], labels: Sequence[int], image_id: int, start: int, end: int) -> list[str]:
    """Of each token of a chat with one question; `start` and `end` are the ids that begin and end a message."""
    turn = [i for i, each in enumerate(ids) if each == start][1]
    question = range(turn + 3, next(i for i, each in enumerate(ids) if i > turn and each == end))  # behind "user\n"
    found = [TEXT if i in question else TEMPLATE for i in range(len(ids))]
    found = [IMAGE if each == image_id else colour for each, colour in zip(ids, found, strict=True)]
    return [colour if label == IGNORE_INDEX else ANSWER for label, colour in zip(labels, found, strict=True)]


def chat(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> Image:
    """A chat's tokens in the colours of KINDS, each with its id."""
    special = tokenizer.convert_tokens_to_ids(["<image>", "<|im_start|>", "<|im_end|>"])
    figure, axes = diagrams.canvas(21)
    diagrams.legend(axes, 18.5, KINDS)
    diagrams.tokens(axes, 16.5, [tokenizer.decode([each]) for each in ids], colours(ids, labels, *special), ids)
    return canvas.shown(figure, "A chat as tokens with their ids: template, 16 times <image>, the question, the answer")


def vocabularies(tables: dict[str, tuple[int, int, int]]) -> Image:
    """The rows of each model's table: pieces of text, special tokens, `<image>`, and those that are free."""
    figure, axes = diagrams.canvas(12.5 * len(tables))
    for i, (name, (pieces, special, rows)) in enumerate(tables.items()):
        bottom, image = 12.5 * (len(tables) - i) - 11, pieces + special
        diagrams.write(axes, 1, bottom + 9, f"{name}: a table of {rows:,} rows", ha="left", weight="bold")
        parts = [
            (TEXT, "pieces of text", f"0 to {pieces - 1:,}"),
            (TEMPLATE, "special tokens", f"{pieces:,} to {image - 1:,}"),
            (IMAGE, "<image>", f"{image:,}"),
            (PLAIN, f"{rows - image - 1:,} free rows", f"{image + 1:,} to {rows - 1:,}"),
        ]
        for (left, right), part in zip(pairwise((1, 48, 68, 80, 99)), parts, strict=True):
            diagrams.box(axes, left, bottom, right - left - 0.4, 6.5, *part)
    return canvas.shown(figure, "The rows of a table: pieces of text, special tokens, <image>, free rows; not to scale")


def sequences(before: torch.Tensor, after: torch.Tensor, here: torch.Tensor) -> Image:
    """The vectors (length, width) of a prompt as two tables of colours, with a frame around the rows of `here`."""
    figure, axes = canvas.panels(2, 4.2)
    limit = before.abs().quantile(0.99)
    first, last = here.nonzero()[[0, -1], 0].tolist()
    for each, rows, title in zip(axes, (before, after), ("from the table", "with the image in it"), strict=True):
        canvas.draw_numbers(each, rows, title, limit, aspect="auto")
        canvas.draw_frame(each, 0, first, rows.shape[1], last - first + 1)
        each.set_xlabel(f"{rows.shape[1]} numbers")
    axes[0].set_ylabel(f"{len(before)} positions")
    return canvas.shown(figure, "The vectors of all positions before and after image vectors replace those of <image>")


def nearest_words(
    image: PIL.Image.Image, words: Sequence[Sequence[str]], lengths: dict[str, torch.Tensor], patch: int
) -> Image:
    """An image with the words that each of its patches' vectors is nearest to, beside lengths of vectors.

    `lengths` has those of the "words" and of the "image vectors".
    """
    usual = lengths["words"].median().item()
    figure, (axes, boxes) = canvas.panels(2, 4.8, width_ratios=[1, 0.8])
    canvas.draw(axes, np.asarray(image), "the nearest words of each image vector")
    canvas.draw_grid(axes, image.width, patch)
    for i, (said, length) in enumerate(zip(words, lengths["image vectors"].tolist(), strict=True)):
        row, column = divmod(i, image.width // patch)
        place = ((column + 0.5) * patch - 0.5, (row + 0.5) * patch - 0.5)
        strength = max(0.3, min(1, length / usual))  # what a short vector says is noise
        options = {
            "color": "white",
            "alpha": strength,
            "ha": "center",
            "va": "center",
            "fontsize": 8,
            "linespacing": 1.3,
        }
        # dark behind the letters, or the thing in the patch hides them
        axes.text(*place, "\n".join(said), **options, bbox={"color": "black", "alpha": 0.45, "pad": 1.5})
    boxes.boxplot(list(lengths.values()), tick_labels=list(lengths), widths=0.5)
    boxes.set_title("lengths of the vectors")
    return canvas.shown(figure, "The nearest words of each patch's vector; lengths of words' and of image vectors")
