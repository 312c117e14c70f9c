"""Figures of lesson 12: memory, speed, hours and the order of work at the real size."""

from IPython.display import Image

from train_llava.estimate import memory_budget
from tutorial.figures import canvas

PARTS = {
    "weights": "#8794a3",
    "gradients": canvas.BLUE,
    "optimizer": canvas.ORANGE,
    "on top, at the peak": "#d5dbe2",
}
CARDS = {"24 GB": "rtx4090-24g", "40 GB": "a100-40g", "80 GB": "h100-80g"}
# What is done in turn, and the fault that it finds
WORK = {
    "check_data": "a broken record,\na missing image",
    "show_batch": "wrong labels,\ncropped images",
    "estimate": "out of memory,\ntoo many days",
    "--max_steps 20": "slow disk or host,\nloss is NaN",
    "one epoch": "it does not look\nat the image",
    "all of it": "",
}
FREE = 3  # of WORK


def memory_bars(needs: dict[int, dict[str, dict[str, float]]]) -> Image:
    """GiB on each GPU: of each number of GPUs and each strategy, those of PARTS."""
    figure, axes = canvas.panels(len(needs), 3.6, sharey=True)
    for each, (gpus, strategies) in zip(axes, needs.items(), strict=True):
        left = dict.fromkeys(strategies, 0.0)
        for part, colour in PARTS.items():
            widths = {name: parts[part] for name, parts in strategies.items()}
            each.barh([*widths], [*widths.values()], left=[*left.values()], color=colour, label=part)
            left = {name: left[name] + width for name, width in widths.items()}
        for card, kind in CARDS.items():
            each.axvline(memory_budget(kind) / 2**30, color=canvas.INK, linewidth=1, linestyle=":")
            each.text(memory_budget(kind) / 2**30, -0.55, card, ha="center", fontsize=9)
        each.set_ylim(len(strategies) - 0.5, -0.5)
        each.set_title(f"{gpus} GPU{'s' * (gpus > 1)}, GiB on each", pad=18)
    axes[-1].legend(frameon=False, loc="center right", bbox_to_anchor=(0.97, 0.5))
    return canvas.shown(figure, "Memory of four strategies on 1 and 8 GPUs, beside the room of 24, 40 and 80 GB cards")


def published(rows: list[dict]) -> Image:
    """How near the estimate of speed comes to the runs of benchmarks/results/published.json."""
    figure, (axis,) = canvas.panels(1, 4.4)
    for row in rows[::-1]:
        colour = canvas.BLUE if row["comparable"] else canvas.ORANGE
        axis.barh(f"{row['run']}  ({row['gpus']})", row["published_over_predicted"], color=colour)
    axis.axvline(1, color=canvas.INK, linewidth=1, linestyle=":")
    axis.set_title("published speed / estimated speed")
    return canvas.shown(figure, "Published speeds divided by estimated ones: near 1 on one GPU, below for whole jobs")


def hour_bars(hours: dict[str, float], against: str, measured: float) -> Image:
    """From the hours of each kind of GPU to five times these; what an hour of a kind is worth beside another's."""
    figure, (axis,) = canvas.panels(1, 2.9)
    axis.barh([*hours], [4 * each for each in hours.values()], left=[*hours.values()], color=canvas.BLUE)
    axis.plot(measured, [*hours].index(against), "o", color=canvas.ORANGE, label="measured, early code")
    for at, each in enumerate(hours.values()):
        axis.text(3 * each, at, f"{hours[against] / each:.0%}", color="white", ha="center", va="center")
    axis.set_xlabel("hours of one epoch on one GPU; %: its speed beside an H100's")
    axis.legend(frameon=False, loc="upper right")
    return canvas.shown(figure, "Hours of one epoch on six kinds of GPU, and what each is worth beside an H100")


def order_of_work() -> Image:
    figure, (axis,) = canvas.panels(1, 1.7)
    axis.set_axis_off()
    axis.set(xlim=(-0.55, 5.55), ylim=(-1.2, 0.8))
    for at, (name, fault) in enumerate(WORK.items()):
        box = {"boxstyle": "round,pad=0.5", "facecolor": canvas.BLUE if at < FREE else canvas.ORANGE}
        axis.text(at, 0, name, ha="center", va="center", color="white", bbox=box | {"edgecolor": "none"}, fontsize=9.5)
        axis.text(at, -0.85, fault, ha="center", va="center", fontsize=9)
        if at + 1 < len(WORK):
            axis.annotate("", (at + 0.56, 0), (at + 0.44, 0), arrowprops={"arrowstyle": "->", "color": canvas.INK})
    axis.text(1, 0.6, "costs nothing: no GPU", ha="center", color=canvas.BLUE)
    axis.text(4, 0.6, "costs money", ha="center", color=canvas.ORANGE)
    return canvas.shown(figure, "Six steps from check_data to the whole training, and the fault that each one finds")
