"""What the lessons draw with: one style for all, photos with their grid of patches, tables of numbers as colours.

Each figure is returned as an image with a text that says what it shows, for those who cannot see it. JPEG keeps the
notebooks small where photos are in it; two builds of the same figure have the same bytes.
"""

import io

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 9.6  # inches; all figures are as wide as the text
DPI = 110
INK, LINES, BLUE, ORANGE = "#26303b", "#ffffff", "#2f6fde", "#e8762d"
STYLE = {
    "font.family": "DejaVu Sans",  # matplotlib brings it along, so a figure looks alike on every machine
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 10.5,
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8794a3",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "image.interpolation": "nearest",  # a pixel is a square
}


def panels(columns: int, height: float, rows: int = 1, **options) -> tuple[Figure, list[Axes]]:
    """An empty figure and its panels, row by row; `options` go to matplotlib's `subplots`."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)
    return figure, list(np.atleast_1d(axes).flat)


def shown(figure: Figure, alt: str, kind: str = "png") -> Image:
    """What a cell ends with; `kind` is "jpeg" for photos."""
    content = io.BytesIO()
    options = {"pil_kwargs": {"quality": 85, "subsampling": 0}} if kind == "jpeg" else {}
    with plt.rc_context(STYLE):
        figure.savefig(content, format=kind, dpi=DPI, **options)
    plt.close(figure)
    return Image(content.getvalue(), format=kind, alt=alt)


def draw(axes: Axes, pixels: np.ndarray, title: str = "", **options) -> None:
    """An image without ticks; `options` go to matplotlib's `imshow`."""
    with plt.rc_context(STYLE):
        axes.imshow(pixels, **options)
        axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_numbers(axes: Axes, table: np.ndarray, title: str = "", limit: float | None = None, **options) -> None:
    """A table of numbers: red above zero, blue below. `limit` has the full colour; by default that is the largest."""
    limit = limit or float(abs(table).max())
    draw(axes, table, title, cmap="RdBu_r", vmin=-limit, vmax=limit, **options)


def draw_grid(axes: Axes, size: int, patch: int, colour: str = LINES, width: float = 0.6) -> None:
    """The borders of the patches over an image of `size` pixels on a side."""
    for at in range(0, size + 1, patch):
        axes.plot([at - 0.5, at - 0.5], [-0.5, size - 0.5], color=colour, linewidth=width)
        axes.plot([-0.5, size - 0.5], [at - 0.5, at - 0.5], color=colour, linewidth=width)


def draw_frame(axes: Axes, left: float, top: float, width: float, height: float, colour: str = ORANGE) -> None:
    """A border around a part of an image, in pixels."""
    axes.add_patch(plt.Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=colour, linewidth=2))


def photos(pictures: dict[str, np.ndarray], alt: str, height: float = 3.4) -> Image:
    """Photos side by side under their titles, all equally high."""
    widths = [picture.shape[1] / picture.shape[0] for picture in pictures.values()]
    figure, axes = panels(len(pictures), height, width_ratios=widths)
    for each, (title, picture) in zip(axes, pictures.items(), strict=True):
        draw(each, picture, title)
    return shown(figure, alt, "jpeg")


def apart(pixels: np.ndarray, patch: int, gap: int) -> np.ndarray:
    """An image cut into its patches, with white between them."""
    rows, columns = (side // patch for side in pixels.shape[:2])
    sheet = np.full((rows * (patch + gap) - gap, columns * (patch + gap) - gap, 3), 255, np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (patch + gap), column * (patch + gap)
            sheet[top : top + patch, left : left + patch] = pixels[row * patch :, column * patch :][:patch, :patch]
    return sheet
