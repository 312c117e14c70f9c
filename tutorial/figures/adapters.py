"""The figures of an adapter: a matrix with what LoRA adds to it, how large that is in each layer, what alpha does."""

import re
from collections.abc import Sequence

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
    axes[0].set(title="singular values", xlabel="number", yscale="log")
    axes[0].legend(frameon=False)
    table, layers, kinds = by_layer(sizes)
    picture = axes[1].imshow(table, cmap="Oranges", vmin=0, aspect="auto")
    axes[1].set_xticks(range(len(layers)), layers)
    axes[1].set_yticks(range(len(kinds)), kinds)
    axes[1].set(title="size of the change / size of W", xlabel="layer")
    figure.colorbar(picture, ax=axes[1])
    return canvas.shown(figure, "Singular values of W and of its change; the size of each change beside its matrix")


def matrices(tables: dict[str, torch.Tensor], strengths: Sequence[torch.Tensor]) -> Image:
    """W, B, A and (alpha / r) B A as colours, and its first 64 singular values in each layer."""
    figure, axes = canvas.panels(5, 2.5, width_ratios=[1, 0.3, 1, 1, 1.3])
    for each, (title, table) in zip(axes, tables.items(), strict=False):
        canvas.draw_numbers(each, table, title, 3 * table.std().item())
    for i, values in enumerate(strengths):
        axes[4].plot(range(1, 65), values[:64], label=f"layer {i}")
    axes[4].set(title="singular values", xlabel="number")
    axes[4].legend(frameon=False, fontsize=8)
    return canvas.shown(figure, "W, B and A of an adapter, B A, and its singular values")


def alphas(runs: dict[int, tuple[Sequence[float], Sequence[float]]]) -> Image:
    """How far each step has moved W, and the loss at each, for two alphas."""
    figure, axes = canvas.panels(2, 2.5)
    for (alpha, curves), colour in zip(runs.items(), (canvas.ORANGE, canvas.BLUE), strict=True):
        for each, curve in zip(axes, curves, strict=True):
            each.plot(curve, color=colour, linewidth=2, label=f"alpha {alpha}")
    axes[0].set(title="how far W has moved", xlabel="step")
    axes[1].set(title="loss", xlabel="step")
    axes[0].legend(frameon=False)
    return canvas.shown(figure, "Distance and loss over the steps, with alpha 8 and 64")


def by_layer(sizes: dict[str, float]) -> tuple[np.ndarray, list[int], list[str]]:
    """A table of the sizes: a row for each kind of matrix, a column for each layer."""
    where = {name: (name.rpartition(".")[2], int(re.search(r"layers\.(\d+)", name)[1])) for name in sizes}
    kinds = list(dict.fromkeys(kind for kind, _ in where.values()))
    layers = sorted({layer for _, layer in where.values()})
    table = np.full((len(kinds), len(layers)), np.nan)
    for name, (kind, layer) in where.items():
        table[kinds.index(kind), layers.index(layer)] = sizes[name]
    return table, layers, kinds
