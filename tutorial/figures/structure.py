"""What the lesson about building draws: parts with their shapes, numbers as colours, sizes, grids of patches."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from IPython.display import Image

from train_llava.model.structure import component_of
from tutorial.figures import canvas, diagrams
from tutorial.figures.canvas import INK, ORANGE, STYLE
from tutorial.figures.diagrams import EDGE, LANGUAGE, PROJECTOR, TOWER

COLOURS = {"vision tower": TOWER, "projector": PROJECTOR, "language model": LANGUAGE, "head": "#e8daef"}


def parts(image: PIL.Image.Image, shapes: Mapping[str, Sequence[int]]) -> Image:
    """An image, and the parts that it goes through, each with the shape of what comes out of it."""
    figure, axes = diagrams.canvas(17)
    diagrams.picture(axes, (1, 1, 13, 13), np.asarray(image))
    diagrams.write(axes, 7.5, 15.5, f"{image.width} x {image.height} pixels")
    for i, (name, colour) in enumerate(COLOURS.items()):
        x = 19.5 + 20.5 * i
        diagrams.arrow(axes, (x - 5, 7.5), (x - 0.5, 7.5))
        diagrams.box(axes, x, 2.5, 15.5, 10, colour, name, " x ".join(map(str, shapes[name])))
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
                axes.barh(y, count / total, left=left, color=COLOURS[part], edgecolor=EDGE, linewidth=0.6)
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
