"""What the lesson about ZeRO draws: who keeps what, gibibytes as stacked bars, the speed of tricks."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image
from matplotlib.axes import Axes

from train_llava.model.config import compose_config, read_text_config, read_vision_config
from train_llava.model.freeze import LoraSettings
from train_llava.planning.memory import MemoryModel, ZeroConfig
from train_llava.planning.meta_model import meta_model
from tutorial.figures import canvas
from tutorial.figures.canvas import ORANGE, STYLE

FULL = "benchmarks/full_size/configs"  # the configs of CLIP-ViT-L/336 and Qwen1.5-4B; no weights
PARTS = {"weights": "#9dbbe8", "gradients": "#f2b98f", "optimizer": "#9fd0a8"}
SHARED = {0: (), 1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "weights")}
STAGES = {0: "without", 1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}
WORK = {"loading": "where images are the work", "model": "where the model is the work"}  # rows of tricks.json


def memory_model(train_type: str, lora: LoraSettings | None = None) -> MemoryModel:
    """The memory of CLIP-ViT-L/336 with Qwen1.5-4B in bf16 under one --train_type."""
    config = compose_config(read_vision_config(f"{FULL}/clip"), read_text_config(f"{FULL}/qwen"))
    return MemoryModel.of(meta_model(config, torch.bfloat16, train_type, lora))


def gib(memory: MemoryModel, stage: int, gpus: int) -> dict[str, float]:
    """GiB of each of PARTS that one of so many GPUs keeps."""
    zero = ZeroConfig(stage=stage, ranks=gpus)
    sizes = (zero.of_weights(memory.weights), memory.gradients(zero), memory.optimizer(zero))
    return {part: size / 2**30 for part, size in zip(PARTS, sizes, strict=True)}


def owners(gpus: int = 4) -> Image:
    """Which quarter of which part each of four GPUs keeps, stage by stage."""
    figure, axes = canvas.panels(4, 3.4)
    for (stage, name), each in zip(STAGES.items(), axes, strict=True):
        for row, (part, colour) in enumerate(PARTS.items()):
            for gpu, quarter in np.ndindex(gpus, gpus):
                kept = part not in SHARED[stage] or quarter == gpu
                options = {"facecolor": colour if kept else "white", "edgecolor": "#c9d1da", "linewidth": 0.5}
                each.add_patch(plt.Rectangle((gpu, row + quarter / gpus * 0.9), 0.85, 0.9 / gpus, **options))
        each.set(xlim=(-0.1, gpus), ylim=(2.95, -0.05), title=f"{name} ZeRO" if stage == 0 else name)
        each.set_xticks(np.arange(gpus) + 0.42, [f"GPU {gpu}" for gpu in range(gpus)], size=7.5)
        each.set_yticks(np.arange(3) + 0.45, PARTS if stage == 0 else ["", "", ""])
        each.tick_params(length=0)
        each.spines[:].set_visible(False)
    return canvas.shown(
        figure, "What each of four GPUs keeps: without ZeRO everything, then a quarter of more and more"
    )


def stack(axes: Axes, columns: Mapping[str, dict[str, float]]) -> None:
    """Stacked bars with their sums."""
    bottom = np.zeros(len(columns))
    for part, colour in PARTS.items():
        heights = np.array([column[part] for column in columns.values()])
        axes.bar(list(columns), heights, bottom=bottom, color=colour, width=0.7, label=part)
        bottom += heights
    for x, total in enumerate(bottom):
        axes.text(x, total, f"{total:.1f}", ha="center", va="bottom", size=9)


def by_gpus(memory: MemoryModel, counts: Sequence[int] = (1, 2, 8)) -> Image:
    """What a GPU keeps, by the number of GPUs and the stage."""
    figure, axes = canvas.panels(len(counts), 3.3, sharey=True)
    with plt.rc_context(STYLE):
        for each, gpus in zip(axes, counts, strict=True):
            stack(each, {name: gib(memory, stage, gpus) for stage, name in STAGES.items()})
            each.set_title(f"{gpus} GPU{'s' * (gpus > 1)}")
            each.axhline(24, color=ORANGE, linewidth=1, linestyle="--")
        axes[0].set_ylabel("GiB on each GPU")
        axes[-1].text(3.4, 24.5, "a card of 24 GB", color=ORANGE, size=8, ha="right")
        axes[-1].legend(frameon=False)
    return canvas.shown(figure, "Weights, gradients and optimizer states on each GPU, by their number and the stage")


def by_strategy(memories: Mapping[str, MemoryModel], counts: Sequence[int] = (1, 8)) -> Image:
    """What a GPU keeps under ZeRO-2, by the strategy."""
    figure, axes = canvas.panels(len(counts), 2.8, sharey=True)
    with plt.rc_context(STYLE):
        for each, gpus in zip(axes, counts, strict=True):
            stack(each, {name: gib(memory, 2, gpus) for name, memory in memories.items()})
            each.set_title(f"ZeRO-2 on {gpus} GPU{'s' * (gpus > 1)}")
        axes[0].set_ylabel("GiB on each GPU")
        axes[-1].legend(frameon=False, loc="upper left")
    return canvas.shown(figure, "Memory by training strategy on one GPU and on eight, under ZeRO-2")


def real_ranks(found: Mapping[str, dict[str, Any]]) -> Image:
    """What `two_ranks` found on each rank."""
    figure, axes = canvas.panels(2, 2.6)
    with plt.rc_context(STYLE):
        for each, name, colour in zip(
            axes, ("weights", "moments"), (PARTS["weights"], PARTS["optimizer"]), strict=True
        ):
            for i, stage in enumerate(found.values()):
                for rank, kept in enumerate(stage["ranks"]):
                    options = {"color": colour, "hatch": "//" * rank, "edgecolor": "white"}
                    each.bar(i + 0.38 * rank - 0.19, kept[name] / 1e6, 0.34, **options)
            each.set_xticks(range(len(found)), STAGES.values())
            each.set_title(f"{name} kept, millions: rank 0 and rank 1 (hatched)")
    return canvas.shown(figure, "What two real ranks keep of weights and of Adam's moments, under each stage")


def tricks(rows: Mapping[str, dict[str, list[dict[str, float]]]]) -> Image:
    """Speeds beside the plain run of the same round, and memory: medians."""
    figure, axes = canvas.panels(2, 2.7)
    with plt.rc_context(STYLE):
        for each, (work, runs) in zip(axes, rows.items(), strict=True):
            plain = np.array([run["samples_per_second"] for run in runs["plain"]])
            for y, (trick, rounds) in enumerate(runs.items()):
                speed = np.median(np.array([run["samples_per_second"] for run in rounds]) / plain)
                memory = np.median([run["memory_gb"] for run in rounds])
                each.barh(trick, speed, color=PARTS["weights"])
                each.text(speed + 0.03, y, f"{speed:.2f} x, {memory:.2f} GB", va="center", size=8)
            each.set(xlim=(0, 3.4), title=WORK[work])
            each.invert_yaxis()
    return canvas.shown(figure, "Training tricks: how many times as fast as a plain run, and their memory")
