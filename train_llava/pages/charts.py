"""One style for every chart: of a run, of a dataset, of a benchmark."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOUR = "#3b6fb6"  # where a chart has one


@contextmanager
def chart(path: Path, width: float = 8, height: float = 4, columns: int = 1) -> Iterator[Any]:
    """The axes of a new chart, or an array of several side by side, which is saved as `path` at the end of the block.

    `width` and `height` are in inches, 120 pixels each.
    """
    import matplotlib.pyplot as plt  # a second, which only those who draw should wait

    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    try:
        yield axes
        for each in figure.axes:
            each.spines[["top", "right"]].set_visible(False)
            if each.get_legend_handles_labels()[0]:
                each.legend(frameon=False)
        figure.savefig(path, dpi=120)
    finally:
        plt.close(figure)
