"""Sample captions in the trackers of --report_to that show images: each example drawn on a card, and its texts.

transformers' callbacks have started the tracker's run by then, log numbers to it, and end it. Here is what a tracker's
own documentation names for an image with a text, at the step that the callback's numbers have.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

Cards = dict[str, tuple[Image.Image, str]]  # by the name of the example: what it shows, and its texts as Markdown
STEP = "train/global_step"  # what transformers' callbacks log beside each number, and wandb draws it over


def to_tensorboard(cards: Cards, step: int, folder: Path) -> None:
    """A writer of its own: no callback gives away its."""
    with SummaryWriter(str(folder / "runs" / "samples")) as writer:
        for name, (card, _) in cards.items():
            writer.add_image(name, np.asarray(card), step, dataformats="HWC")
        writer.add_text("samples", "\n\n".join(text for _, text in cards.values()), step)


def to_wandb(cards: Cards, step: int, folder: Path) -> None:
    """https://docs.wandb.ai/ref/python/data-types/image"""
    import wandb

    wandb.log({name: wandb.Image(card, caption=text) for name, (card, text) in cards.items()} | {STEP: step})


def to_swanlab(cards: Cards, step: int, folder: Path) -> None:
    """https://docs.swanlab.cn/en/api/py-Image.html"""
    import swanlab

    swanlab.log({name: swanlab.Image(card, caption=text) for name, (card, text) in cards.items()}, step=step)


def to_trackio(cards: Cards, step: int, folder: Path) -> None:
    """https://huggingface.co/docs/trackio/track"""
    import trackio

    trackio.log({name: trackio.Image(card, caption=text) for name, (card, text) in cards.items()} | {STEP: step})


TRACKERS: dict[str, Callable[[Cards, int, Path], None]] = {
    "tensorboard": to_tensorboard,
    "wandb": to_wandb,
    "swanlab": to_swanlab,
    "trackio": to_trackio,
}
