"""The figures of the lesson about diagnosis: losses by image, versions of labels, rates, memory over batch size."""

from collections.abc import Sequence

import PIL.Image
import torch
from IPython.display import Image
from matplotlib.ticker import LogLocator

from tutorial.figures import canvas

GREY = "#9aa5b1"
WHICH = {"own": canvas.BLUE, "other": canvas.ORANGE, "grey": GREY}
LEARNED, SKIPPED = torch.tensor([0.45, 0.78, 0.52]), torch.tensor([0.87, 0.89, 0.92])


def losses_by_image(images: Sequence[PIL.Image.Image], looks: dict[str, dict[str, float]]) -> Image:
    """A question's own image, another and a grey one; of each model, the loss of the answers with each."""
    figure, axes = canvas.panels(4, 2.5, width_ratios=[1, 1, 1, 3])
    for each, image, which in zip(axes[:3], images, WHICH, strict=True):
        canvas.draw(each, image, f"{which} image")
    for i, (which, colour) in enumerate(WHICH.items()):
        losses = [numbers[f"loss_{which}_image"] for numbers in looks.values()]
        axes[3].barh([y + 0.26 * (i - 1) for y in range(len(looks))], losses, height=0.24, color=colour, label=which)
    axes[3].set_yticks(range(len(looks)), looks)
    axes[3].invert_yaxis()
    axes[3].set_xlabel("loss of the answers")
    axes[3].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas.shown(figure, "Three images for one question, and the losses of two models")


def labels(versions: dict[str, torch.Tensor]) -> Image:
    """A record's labels (length,) in some versions: a box for each token, green where it is learned."""
    figure, axes = canvas.panels(1, 1.5, rows=len(versions))
    for each, (name, row) in zip(axes, versions.items(), strict=True):
        learned = row != -100
        canvas.draw(each, torch.where(learned[:, None], LEARNED, SKIPPED)[None].numpy(), aspect="auto")
        each.set_ylabel(f"{name}: {learned.sum()}", rotation=0, ha="right", va="center")
        for border in range(1, len(row)):
            each.axvline(border - 0.5, color="white", linewidth=1)
    return canvas.shown(figure, "A record's labels: healthy, without an end, none at all")


def rates(curves: dict[float, Sequence[float]]) -> Image:
    """The loss of three trainings, by their learning rates."""
    figure, (axes,) = canvas.panels(1, 2.6)
    for (rate, losses), colour in zip(curves.items(), (GREY, canvas.BLUE, canvas.ORANGE), strict=True):
        axes.plot(losses, color=colour, linewidth=2, label=f"rate {rate:.0e}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    return canvas.shown(figure, "The loss of three trainings: too slow, right, too fast")


def memory_over_batch(
    sizes: Sequence[int], needed: dict[str, dict[str, Sequence[float]]], room: dict[str, float]
) -> Image:
    """GiB over images in a batch: of each strategy, with activations kept or computed again; and what cards have."""
    figure, (axes,) = canvas.panels(1, 2.8)
    for (name, ways), colour in zip(needed.items(), (canvas.BLUE, canvas.ORANGE), strict=True):
        for (way, memory), style in zip(ways.items(), (".-", ".--"), strict=True):
            axes.plot(sizes, memory, style, color=colour, label=f"{name}{way}")
    for card, gib in room.items():
        axes.axhline(gib, color=canvas.INK, linewidth=0.8, linestyle=":")
        axes.text(sizes[0], gib * 1.1, f"room on {card}", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="images in a batch", ylabel="GiB")
    axes.set_xticks(sizes, sizes)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas.shown(figure, "Memory over batch size, with and without checkpointing")
