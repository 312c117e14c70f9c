"""The figures of an adapter: a matrix with what LoRA adds to it, and how large that is in each layer."""

import re

import numpy as np
import torch
from IPython.display import Image

from tutorial.figures import canvas


def sum_of_matrices(weight: torch.Tensor, change: torch.Tensor) -> Image:
    """W, (alpha / r) B A and their sum, in the same colours."""
    figure, axes = canvas.panels(3, 3.2)
    limit = 3 * weight.std().item()
    tables = {"W, of the base": weight, "(alpha / r) B A, of the adapter": change, "their sum": weight + change}
    for each, (title, table) in zip(axes, tables.items(), strict=True):
        canvas.draw_numbers(each, table, title, limit)
    figure.colorbar(axes[2].images[0], ax=axes, fraction=0.012, pad=0.01)
    return canvas.shown(figure, "A matrix of the base, what the adapter adds to it, and their sum")


def sizes_of_changes(singular: dict[str, torch.Tensor], rank: int, sizes: dict[str, float]) -> Image:
    """Singular values of two matrices, and the size of the change of every adapted matrix, by its name."""
    figure, axes = canvas.panels(2, 2.8, width_ratios=[1.5, 1])
    for (name, values), colour in zip(singular.items(), (canvas.INK, canvas.BLUE), strict=True):
        axes[0].plot(range(1, len(values) + 1), values, color=colour, linewidth=2, label=name)
    axes[0].axvline(rank, color="#8794a3", linestyle=":", label=f"r = {rank}")
    axes[0].set(title="singular values", yscale="log")
    axes[0].legend(frameon=False)
    table, layers, kinds = by_layer(sizes)
    picture = axes[1].imshow(table, cmap="Oranges", vmin=0, aspect="auto")
    axes[1].set_xticks(range(len(layers)), layers)
    axes[1].set_yticks(range(len(kinds)), kinds)
    axes[1].set(title="size of the change / size of W", xlabel="layer")
    figure.colorbar(picture, ax=axes[1])
    return canvas.shown(figure, "Singular values of W and of its change; the size of each change beside its matrix")


def by_layer(sizes: dict[str, float]) -> tuple[np.ndarray, list[int], list[str]]:
    """A table of the sizes: a row for each kind of matrix, a column for each layer."""
    where = {name: (name.rpartition(".")[2], int(re.search(r"layers\.(\d+)", name)[1])) for name in sizes}
    kinds = list(dict.fromkeys(kind for kind, _ in where.values()))
    layers = sorted({layer for _, layer in where.values()})
    table = np.full((len(kinds), len(layers)), np.nan)
    for name, (kind, layer) in where.items():
        table[kinds.index(kind), layers.index(layer)] = sizes[name]
    return table, layers, kinds
