"""The figures of the lesson about images: a photo in patches, on its way to a square, in the tower's first layer."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from IPython.display import Image

from tutorial.figures import canvas

PATCH = 14


def photo_in_patches(photo: np.ndarray, square: np.ndarray) -> Image:
    """A photo (rows, columns, 3), its middle (336, 336, 3) in patches, and one row of these."""
    figure, axes = canvas.panels(2, 5.2, rows=2, height_ratios=[10, 1], width_ratios=[1.5, 1])
    canvas.draw(axes[0], photo, "a photo")
    canvas.draw(axes[1], canvas.apart(square, PATCH, 4), "its middle, cut into 24 x 24 patches")
    for below in axes[2:]:
        below.remove()
    strip = figure.add_subplot(axes[2].get_gridspec()[1, :])
    row = canvas.apart(square[9 * PATCH : 10 * PATCH], PATCH, 4)
    canvas.draw(strip, row, "one row of them: 24 of the 576, read like words")
    return canvas.shown(figure, "A photo, its middle as 24 x 24 patches, and one row of these patches", "jpeg")


def to_a_square(steps: dict[str, PIL.Image.Image], left: int, normalised: np.ndarray) -> Image:
    """The photo as it is, resized and cropped (from the column `left` on), and its red channel normalised."""
    figure, axes = canvas.panels(4, 2.1, width_ratios=[1.5, 1.5, 1, 1])
    for each, (name, image) in zip(axes, steps.items(), strict=False):
        canvas.draw(each, np.asarray(image), f"{name}: {image.width} x {image.height}")
    canvas.draw_frame(axes[1], left, 0, 336, 335)
    canvas.draw_numbers(axes[3], normalised[..., 0], "normalised: red channel", 2.5)
    figure.colorbar(axes[3].images[0], ax=axes, fraction=0.012, pad=0.01)
    return canvas.shown(figure, "The photo as it is, resized, cropped, and its red channel normalised", "jpeg")


def embedding(
    image: PIL.Image.Image, left: int, top: int, tables: dict[str, torch.Tensor], vector: torch.Tensor
) -> Image:
    """The grid with one patch framed; the patch and a filter (3, 14, 14) as `tables`; the patch's vector (1024,)."""
    figure, axes = canvas.panels(4, 3.4, width_ratios=[2.4, 0.8, 0.8, 2.4])
    canvas.draw(axes[0], np.asarray(image), "24 x 24 patches")
    canvas.draw_grid(axes[0], 336, PATCH)
    canvas.draw_frame(axes[0], left, top, PATCH, PATCH)
    for each, (title, table) in zip(axes[1:3], tables.items(), strict=True):
        canvas.draw_numbers(each, torch.cat(list(table)), title)
        for border in (13.5, 27.5):
            each.axhline(border, color=canvas.INK, linewidth=1)
        each.set_ylabel("blue            green            red")
    canvas.draw_numbers(axes[3], vector.reshape(32, 32), "= 1 of 1,024 numbers")
    canvas.draw_frame(axes[3], 0, 0, 1, 1)
    axes[3].set_xlabel("red: above zero, blue: below")
    alt = "The grid, the 588 numbers of one patch, a filter, the patch's 1,024 numbers"
    return canvas.shown(figure, alt, "jpeg")


def filters(image: PIL.Image.Image, filtered: Sequence[torch.Tensor]) -> Image:
    """The photo, and what some filters make of it: tables (24, 24)."""
    figure, axes = canvas.panels(1 + len(filtered), 2.3)
    canvas.draw(axes[0], np.asarray(image), "336 x 336 pixels")
    for i, (each, table) in enumerate(zip(axes[1:], filtered, strict=True)):
        canvas.draw_numbers(each, table, f"filter {i}: 24 x 24")
    return canvas.shown(figure, "The photo, and what four filters make of it", "jpeg")
