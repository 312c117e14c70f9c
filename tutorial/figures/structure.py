"""What the lesson about building draws: parts with their shapes, numbers as colours, sizes, grids of patches."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from IPython.display import Image
from matplotlib.patches import FancyBboxPatch

from train_llava.model.structure import component_of
from tutorial.figures import canvas
from tutorial.figures.canvas import INK, ORANGE, STYLE

COLOURS = {"vision tower": "#d5f5e3", "projector": "#fcf3cf", "language model": "#fadbd8", "head": "#e8daef"}


def parts(image: PIL.Image.Image, shapes: Mapping[str, Sequence[int]]) -> Image:
    """An image, and the parts that it goes through, each with the shape of what comes out of it."""
    figure, (left, axes) = canvas.panels(2, 2.0, width_ratios=[1, 5.2])
    canvas.draw(left, np.asarray(image), f"{image.width} x {image.height} pixels")
    with plt.rc_context(STYLE):
        for i, (name, colour) in enumerate(COLOURS.items()):
            box = FancyBboxPatch((i * 2.6, 0), 1.9, 1, boxstyle="round,pad=0.1", facecolor=colour, edgecolor="#8794a3")
            axes.add_patch(box)
            axes.text(i * 2.6 + 0.95, 0.72, name, ha="center", va="center", size=11, weight="bold")
            axes.text(i * 2.6 + 0.95, 0.28, " x ".join(map(str, shapes[name])), ha="center", va="center")
            arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.5}
            axes.annotate("", (i * 2.6 - 0.12, 0.5), (i * 2.6 - 0.55, 0.5), arrowprops=arrow)
    axes.set(xlim=(-0.7, 10), ylim=(-0.2, 1.2))
    axes.axis("off")
    return canvas.shown(
        figure, "An image goes through the vision tower, the projector, the language model and its head"
    )


def on_the_way(image: PIL.Image.Image, patch: int, tables: Mapping[str, torch.Tensor], where: torch.Tensor) -> Image:
    """The image with its patches, and vectors as rows of colours; `where` are the image's places in the last table."""
    figure, axes = canvas.panels(1 + len(tables), 3.4, width_ratios=[1.1] + [1] * len(tables))
    canvas.draw(axes[0], np.asarray(image), "the image and its patches")
    canvas.draw_grid(axes[0], image.width, patch)
    for each, (title, table) in zip(axes[1:], tables.items(), strict=True):
        limit = table.float().abs().quantile(0.98)
        canvas.draw_numbers(each, table, title, limit, aspect="auto")
        each.set_xlabel(f"{table.shape[0]} vectors of {table.shape[1]} numbers")
    first, last = where.nonzero()[[0, -1], 0].tolist()
    canvas.draw_frame(axes[-1], 0, first, table.shape[1], last - first + 1)
    return canvas.shown(figure, "The image, the tower's vectors, the projector's, and the row with image and words")


def counts(model: torch.nn.Module) -> dict[str, int]:
    """How many parameters each part has."""
    found = dict.fromkeys(COLOURS, 0)
    for name, parameter in model.named_parameters():
        found[component_of(name)] += parameter.numel()
    return found


def sizes(models: Mapping[str, torch.nn.Module]) -> Image:
    """The share of each part in each model."""
    figure, (axes,) = canvas.panels(1, 2.2)
    with plt.rc_context(STYLE):
        for y, model in enumerate(models.values()):
            found, left = counts(model), 0.0
            total = sum(found.values())
            for part, count in found.items():
                axes.barh(y, count / total, left=left, color=COLOURS[part], edgecolor="#8794a3", linewidth=0.6)
                if (share := count / total) > 0.04:
                    turned = {"rotation": 90, "size": 7} if share < 0.12 else {"size": 9}
                    axes.text(left + share / 2, y, f"{part}\n{count:,}", ha="center", va="center", **turned)
                left += count / total
            axes.text(1.01, y, f"{total:,}", va="center", size=9)
        axes.set_yticks(range(len(models)), models)
        axes.set(xlim=(0, 1.15))
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
        axes.tick_params(length=0)
    return canvas.shown(
        figure, "Which part of the parameters is in the tower, the projector, the language model, the head"
    )


def towers(image: PIL.Image.Image, models: Mapping[str, torch.nn.Module]) -> Image:
    """The patches that each model's tower makes of the image, and its CLS."""
    figure, axes = canvas.panels(len(models), 3.4)
    for each, (name, model) in zip(axes, models.items(), strict=True):
        vision, tokens = model.config.vision_config, model.config.image_seq_length
        side, dropped = vision.image_size, model.config.vision_feature_select_strategy == "default"
        canvas.draw(each, np.asarray(image.resize((side, side))), f"{name}: {tokens} image tokens")
        canvas.draw_grid(each, side, vision.patch_size)
        note = "and CLS, which is dropped" if dropped else "no CLS"
        each.set_xlabel(f"{side} pixels, patches of {vision.patch_size}; {note}", color=ORANGE if dropped else INK)
    return canvas.shown(figure, "The same image cut into patches by a CLIP and by a SigLIP")
