"""Figures of lesson 13: dice, what the model gets of them, what it answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from IPython.display import Image as Shown
from PIL import Image
from transformers import LlavaProcessor

from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.processing.chat import IGNORE_INDEX
from train_llava.show_batch import visible
from tutorial.figures import canvas

GREEN, RED = "#1d8a4a", "#c0392b"


def sheet(pictures: dict[tuple[str, str], Image.Image], framed: Sequence[tuple[str, str]]) -> Shown:
    """All dice in rows of twelve, some framed."""
    figure, axes = canvas.panels(12, 0.85 * -(-len(pictures) // 12), -(-len(pictures) // 12))
    for each, (pair, picture) in zip(axes, pictures.items(), strict=True):
        canvas.draw(each, np.asarray(picture))
        if pair in framed:
            canvas.draw_frame(each, 2, 2, 108, 108)
    return canvas.shown(figure, "Six faces of a die in six colours; six of these pairs, framed, are held out")


def batch(processor: LlavaProcessor, examples: list[dict[str, Any]]) -> Shown:
    """The image of each example as the vision tower gets it, and the words under it, what is learned in green."""
    collator = LlavaCollator(processor, for_trainer=True)
    made = collator(examples)
    figure, axes = canvas.panels(len(examples), 3.1)
    per_image = len(collator.encoder.image_ids)
    for row, (each, example, picture) in enumerate(zip(axes, examples, visible(made["pixel_values"]), strict=True)):
        ids, labels = made["input_ids"][row], made["labels"][row]
        question = example["messages"][0]["content"].replace("<image>\n", f"{per_image} image tokens\n")
        canvas.draw(each, picture, question)
        each.set_xlabel(processor.tokenizer.decode(ids[labels != IGNORE_INDEX]), color=GREEN, fontsize=9)
    return canvas.shown(figure, "Four images as the vision tower gets them, with the words that are learned in green")


def result(losses: Sequence[float], scores: dict[str, dict[str, float]]) -> Shown:
    """The loss of each step, and the share of right answers of each category, before and after."""
    figure, axes = canvas.panels(2, 2.8)
    axes[0].plot(losses, color=canvas.BLUE)
    axes[0].set(xlabel="step", ylabel="loss", ylim=(0, None))
    for (name, shares), at, colour in zip(scores.items(), (-0.2, 0.2), ("#8794a3", canvas.ORANGE), strict=True):
        axes[1].bar([i + at for i in range(len(shares))], [*shares.values()], 0.36, color=colour, label=name)
    axes[1].set_xticks(range(len(shares)), [*shares])
    axes[1].set(ylim=(0, 1.05), title="share of answers that are exactly right")
    axes[1].legend(frameon=False)
    return canvas.shown(figure, "The loss falls; the share of right answers rises for known and for held-out pairs")


def answers(dataset: LlavaDataset, rows: Sequence[dict[str, Any]]) -> Shown:
    """Images with the model's answers, green where they are right."""
    pictures = {example["id"]: example["images"][0] for example in dataset}
    figure, axes = canvas.panels(len(rows), 2.3)
    for each, row in zip(axes, rows, strict=True):
        canvas.draw(each, np.asarray(pictures[row["id"]]))
        colour = GREEN if row["answer"] == row["reference"] else RED
        each.set_xlabel(row["answer"].replace(". ", ".\n"), color=colour, fontsize=8.5)
    return canvas.shown(figure, "Six images of held-out pairs with the model's answers")
