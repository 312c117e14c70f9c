"""Figures of lesson 6: the circle of a step, losses, and the words that surprise the model."""

from collections.abc import Sequence

import numpy as np
from IPython.display import Image

from tutorial.figures import canvas

PARTS = {
    "a batch": "images, ids, labels",
    "forward": "model(**batch).loss",
    "backward": "loss.backward()",
    "step": "optimizer.step()",
    "clear": "optimizer.zero_grad()",
}


def circle() -> Image:
    """The parts of a step, clockwise."""
    figure, (axis,) = canvas.panels(1, 2.9)
    axis.set_axis_off()
    axis.set(xlim=(-1.9, 1.9), ylim=(-1.35, 1.25))
    for i, (name, code) in enumerate(PARTS.items()):
        angle = np.pi / 2 - i * 2 * np.pi / len(PARTS)
        box = {"boxstyle": "round,pad=0.5", "facecolor": canvas.BLUE, "edgecolor": "none"}
        place = {"ha": "center", "va": "center"}
        axis.text(1.3 * np.cos(angle), np.sin(angle), name, color="white", bbox=box, **place)
        axis.text(1.3 * np.cos(angle), np.sin(angle) - 0.33, code, fontsize=9, **place)
        start, end = ((1.3 * np.cos(angle - turn), np.sin(angle - turn)) for turn in (0.4, 0.85))
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": canvas.ORANGE, "lw": 2})
    axis.text(0, -0.1, "one step", ha="center", color=canvas.ORANGE, fontsize=13)
    return canvas.shown(figure, "The five parts of a training step in a circle: batch, forward, backward, step, clear")


def shelf(
    losses: Sequence[float],
    steps: range,
    blind: float,
    by_part: dict[str, dict[int, float]],
    guess: dict[str, float],
) -> Image:
    """The loss beside what a blind model would pay, and by step that of each sort of words, on new images; `guess` is
    what guessing costs for some of them. `steps` are shaded in both."""
    figure, axes = canvas.panels(2, 3.4)
    axes[0].plot(losses, color=canvas.BLUE)
    axes[0].axhline(blind, color=canvas.ORANGE, linestyle="--")
    axes[0].text(len(losses) - 1, blind + 0.06, "perfect grammar, blind", color=canvas.ORANGE, ha="right")
    for axis in axes:
        axis.axvspan(steps.start, steps.stop, color=canvas.INK, alpha=0.08, linewidth=0)
    axes[0].text((steps.start + steps.stop) / 2, 2.4, "the shelf", ha="center")
    axes[0].set(xlabel="step", ylabel="loss", ylim=(0, None))
    for name, losses_of_part in by_part.items():
        (line,) = axes[1].plot(losses_of_part.keys(), losses_of_part.values(), label=name)
        if name in guess:
            axes[1].axhline(guess[name], color=line.get_color(), linestyle=":")
    axes[1].set(xlabel="step", title="loss on new images, by sort of word", ylim=(0, 6))
    axes[1].legend(frameon=False)
    return canvas.shown(
        figure, "The loss falls below that of a blind model; colour and kind are the last to be learned"
    )


def surprises(image: np.ndarray, words: Sequence[str], by_step: dict[int, Sequence[float]]) -> Image:
    """-log p of each token of the image's caption, a row for each step that was looked at."""
    figure, axes = canvas.panels(2, 2.6, width_ratios=[1, 5])
    canvas.draw(axes[0], image, "a new image")
    title = "-log p of each token of the right caption"
    canvas.draw(axes[1], np.stack([*by_step.values()]), title, cmap="Blues", vmin=0, vmax=4)
    axes[1].set_aspect("auto")
    axes[1].set_xticks(range(len(words)), words, rotation=60, ha="right", rotation_mode="anchor")
    axes[1].set_yticks(range(len(by_step)), [f"step {step}" for step in by_step])
    axes[1].tick_params(length=0)
    figure.colorbar(axes[1].images[0], ax=axes[1], fraction=0.02, pad=0.01)
    return canvas.shown(figure, "How surprised the model is by each token of a caption, at four moments")


def both(ours: Sequence[float], theirs: Sequence[float]) -> Image:
    """Two losses on each other, and how far they differ."""
    figure, axes = canvas.panels(2, 2.8)
    axes[0].plot(ours, color=canvas.BLUE, label="our loop")
    axes[0].plot(theirs, "--", color=canvas.ORANGE, label="train_llava.train")
    axes[0].set(xlabel="step", ylabel="loss", ylim=(0, 3))
    axes[0].legend(frameon=False)
    axes[1].plot(np.abs(np.subtract(ours, theirs)), color=canvas.INK)
    axes[1].set(xlabel="step", title="difference", ylim=(0, None))
    return canvas.shown(figure, "Both losses lie on each other; their difference is that of rounding")
