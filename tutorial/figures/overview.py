"""What the map draws: the way from an image to the next word, the weights of the parts, a conversation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from IPython.display import Image
from transformers import LlavaConfig, LlavaProcessor

from tutorial.figures import canvas, diagrams
from tutorial.figures.diagrams import ANSWER, IMAGE, LANGUAGE, PLAIN, PROJECTOR, TEMPLATE, TEXT, TOWER

REAL = "#7a4fb5"  # of what is said about a model of the real size
PARTS = {"vision tower": "#8cc9a1", "projector": "#e0a800", "language model": "#e79c8d", "head": "#b79ad6"}


@dataclass(frozen=True)
class Sizes:
    """What goes from one part of a LLaVA to the next.

    pixels, side: how many pixels and how many patches an image has on a side. seen, known: numbers in a vector of the
    vision tower, and in one of the language model.
    """

    pixels: int
    side: int
    seen: int
    known: int

    @property
    def vectors(self) -> int:
        """Of an image."""
        return self.side**2


def sizes(config: LlavaConfig) -> Sizes:
    vision, language = config.vision_config, config.text_config
    side = vision.image_size // vision.patch_size
    return Sizes(vision.image_size, side, vision.hidden_size, language.hidden_size)


def two_lines(axes: diagrams.Axes, x: float, ours: str, theirs: str) -> None:
    diagrams.write(axes, x, 36, ours, 10, color=canvas.BLUE)
    diagrams.write(axes, x, 33.6, theirs, 10, color=REAL)


def draw_seeing(
    axes: diagrams.Axes, image: PIL.Image.Image, vectors: Sequence[torch.Tensor], demo: Sizes, real: Sizes
) -> None:
    """The upper half: image, vision tower, projector, and the vectors that each of the two gives."""
    canvas.draw_grid(diagrams.picture(axes, (1, 38, 20, 20), np.asarray(image)), demo.pixels, demo.pixels // demo.side)
    two_lines(axes, 11.5, *(f"{s.pixels} x {s.pixels}, {s.side} x {s.side} patches" for s in (demo, real)))
    diagrams.box(axes, 26, 41, 15, 14, TOWER, "vision tower", "knows images", "speaks no language")
    diagrams.box(axes, 62, 41, 13, 14, PROJECTOR, "projector", "translates")
    for x, each, width in (46, vectors[0], "seen"), (80, vectors[1], "known"):
        limit = each.abs().quantile(0.98)
        diagrams.picture(axes, (x, 38, 11, 20), each, cmap="RdBu_r", vmin=-limit, vmax=limit)
        two_lines(axes, x + 5.5, *(f"{s.vectors} x {getattr(s, width):,}" for s in (demo, real)))
    for start, end in (21.5, 25.5), (41.5, 45.5), (57.5, 61.5), (75.5, 79.5):
        diagrams.arrow(axes, (start, 48), (end, 48))


def percent(chance: float) -> str:
    return f"{chance:.1%}" if chance >= 0.001 else "< 0.1%"


def draw_reading(axes: diagrams.Axes, pieces: Sequence[str], vectors: int, best: dict[str, float]) -> None:
    """The lower half: image vectors among the words, the language model, the likeliest next tokens."""
    front = ["system prompt", "<|im_start|>", "user", "\n"]
    behind = ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    words = [*front, "1", "2", "...", str(vectors), "\n", *pieces, *behind]
    colours = [TEMPLATE] * 4 + [IMAGE] * 4 + [TEXT] * (1 + len(pieces)) + [TEMPLATE] * 5
    diagrams.write(axes, 1, 29.5, "one row of vectors: the image stands among the words", ha="left", style="italic")
    diagrams.tokens(axes, 27.5, words, colours, [""] * len(words), 7.8)
    diagrams.arrow(axes, (85.5, 32.3), (32, 28.2))
    reads = "reads vectors, knows how texts go on, has never seen an image"
    diagrams.box(axes, 1, 12, 98, 8, LANGUAGE, "language model", reads)
    for x in (8, 24, 40, 56, 72, 86):
        diagrams.arrow(axes, (x, 24.3), (x, 20.5))
    diagrams.arrow(axes, (93, 11.8), (93, 8.6))
    diagrams.write(axes, 52, 5.4, "the next word:", 11)
    for i, (word, chance) in enumerate(best.items()):
        colour = PLAIN if i else ANSWER
        diagrams.box(axes, 86.5 - 13.5 * i, 2.4, 12.5, 6, colour, diagrams.visible(word), percent(chance))


def next_words(processor: LlavaProcessor, logits: torch.Tensor, count: int = 3) -> dict[str, float]:
    """The likeliest next tokens with their probabilities."""
    chances, ids = logits.softmax(-1).topk(count)
    return dict(zip(map(processor.tokenizer.decode, ids.tolist()), chances.tolist(), strict=True))


def the_map(
    image: PIL.Image.Image,
    pieces: Sequence[str],
    vectors: Sequence[torch.Tensor],
    best: dict[str, float],
    demo: Sizes,
    real: Sizes,
) -> Image:
    """The whole way. `pieces` are the tokens of the question, `vectors` those of the tower and of the projector."""
    figure, axes = diagrams.canvas(63)
    diagrams.write(axes, 1, 61, "the demo", 11, ha="left", color=canvas.BLUE, weight="bold")
    real_name = "CLIP-ViT-L/336 + Qwen1.5-4B-Chat"
    diagrams.write(axes, 12, 61, real_name, 11, ha="left", color=REAL, weight="bold")
    draw_seeing(axes, image, vectors, demo, real)
    draw_reading(axes, pieces, demo.vectors, best)
    return canvas.shown(
        figure,
        "An image is cut into patches; the vision tower makes a vector of each; the projector translates them; they "
        "stand among the vectors of the words; the language model gives each next word a probability",
    )


def millions(number: int) -> str:
    return f"{number / 1e6:,.0f} M" if number > 1e7 else f"{number / 1e6:.1f} M"


def shares(models: dict[str, dict[str, int]]) -> Image:
    """A bar for each model: what share of its weights each part has."""
    figure, (axes,) = canvas.panels(1, 2.2)
    for row, counts in enumerate(models.values()):
        left, total = 0.0, sum(counts.values())
        for part, colour in PARTS.items():
            share = counts[part] / total
            axes.barh(-row, share, left=left, color=colour, label=part if row == 0 else None, height=0.6)
            if share > 0.05:
                axes.text(left + share / 2, -row, millions(counts[part]), ha="center", va="center", fontsize=9)
            left += share
    axes.set_yticks([-row for row in range(len(models))], list(models))
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.32), frameon=False)
    return canvas.shown(figure, "Shares of the weights: the language model has most, the projector next to none")


def conversation(image: PIL.Image.Image, pairs: Sequence[tuple[str, str]], answers: Sequence[str]) -> Image:
    """An image beside questions and a model's answers, which are blue where they are the right ones."""
    figure, axes = diagrams.canvas(34)
    diagrams.picture(axes, (1, 3, 28, 28), np.asarray(image))
    for row, ((question, right), answer) in enumerate(zip(pairs, answers, strict=True)):
        diagrams.write(axes, 33, 30.5 - 6.2 * row, question, ha="left", weight="bold")
        colour = canvas.BLUE if answer == right else canvas.ORANGE
        diagrams.write(axes, 33, 27.8 - 6.2 * row, answer, ha="left", color=colour)
    return canvas.shown(figure, "An image with questions and the model's answers: blue is right, orange is wrong")
