"""Does the model look at the image? The loss of its answers given their own image, another record's, and a grey one.

A model that ignores images has the same loss three times. Answers that are right may hide this for long: many
questions can be guessed.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from PIL import Image
from transformers import LlavaProcessor

from train_llava.data import LlavaDataset
from train_llava.ingest.records import column
from train_llava.model.answer_losses import answer_losses
from train_llava.model.load import Model
from train_llava.model.ranks import gather

MOST = 256  # records: three passes over so many are a small part of an evaluation that generates answers
ENOUGH = 10  # records, for a sentence about the model
GREY = (128, 128, 128)  # the middle of what a pixel can be
SAME = 1e-3  # of the loss: below, it does not change with the image; rounding in 16 bits is of this size
CLEAR = 2.0  # standard errors: chance alone exceeds them once in 44 times (the normal distribution's upper tail)


class Losses(NamedTuple):
    """Of one record: the sums of -log p over its answers' tokens given each image, and the number of these tokens."""

    own: float
    other: float
    grey: float
    tokens: int


def image_use(
    model: Model, processor: LlavaProcessor, dataset: LlavaDataset, batch_size: int, share: slice
) -> dict[str, float]:
    """`figures` of a sample of the records, on every rank; empty where all images look alike.

    Args:
        share: the places in the sample that this rank works on.
    """
    losses = gather(losses_by_image(model, processor, dataset, sample(dataset), batch_size, share))
    return figures(losses) if losses else {}


def sample(dataset: LlavaDataset) -> list[int]:
    """At most MOST records that have an image, evenly spaced over the dataset; always the same."""
    having = np.flatnonzero(pc.list_value_length(column(dataset.records, "images")).to_numpy())
    return having[np.linspace(0, len(having) - 1, min(MOST, len(having))).astype(int)].tolist()


def losses_by_image(
    model: Model,
    processor: LlavaProcessor,
    dataset: LlavaDataset,
    indices: Sequence[int],
    batch_size: int,
    share: slice = slice(None),
) -> Iterator[Losses]:
    """The losses of some records. The other image of a record is that of the next one of `indices` that looks
    different, and the first one follows the last; so the figures do not depend on batches or ranks.

    Args:
        indices: of the records, each with an image.
        share: those of them to work on, as a rank does.

    Yields:
        One entry for each record of the share; none where all images look alike.
    """
    examples = examples_by_image(dataset, indices, range(len(indices))[share])
    while batch := list(islice(examples, batch_size)):
        own, other, grey = (answer_losses(model, processor, some) for some in zip(*batch, strict=True))
        yield from (Losses(a, b, c, n) for (a, n), (b, _), (c, _) in zip(own, other, grey, strict=True))


def examples_by_image(
    dataset: LlavaDataset, indices: Sequence[int], places: Sequence[int]
) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """The examples at some places of `indices`: as they are, with another record's image, and with grey ones."""

    @cache
    def looks(index: int) -> tuple[tuple[int, int], bytes]:
        image = dataset[index]["images"][0]
        return image.size, hashlib.sha256(image.tobytes()).digest()

    for place in places:
        index, following = indices[place], chain(indices[place + 1 :], indices[:place])
        other = next((each for each in following if looks(each) != looks(index)), None)
        if other is not None:
            example, image = dataset[index], dataset[other]["images"][0]
            grey = [Image.new("RGB", own.size, GREY) for own in example["images"]]
            yield example, example | {"images": [image] * len(grey)}, example | {"images": grey}


def figures(losses: Sequence[Losses]) -> dict[str, float]:
    """The number of records, the mean loss per answer token given each image, and by how much the loss of a record
    grows with another one's image: the mean over records, and its standard error (0 of a single record)."""
    own, other, grey, tokens = (sum(values) for values in zip(*losses, strict=True))
    means = {"loss_own_image": own / tokens, "loss_other_image": other / tokens, "loss_grey_image": grey / tokens}
    gains = np.array([each.other - each.own for each in losses])
    error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return {"image_records": len(losses), **means, "image_gain": gains.mean().item(), "image_gain_error": float(error)}


def verdict(figures: dict[str, float]) -> str:
    """`figures` in words. The model looks at images if another record's image makes its answers less likely, by more
    than CLEAR standard errors; it ignores them if no image changes its loss."""
    own, other, grey = (figures[f"loss_{which}_image"] for which in ("own", "other", "grey"))
    if figures["image_records"] < ENOUGH:
        few = figures["image_records"]
        return f"{few:g} records with another image are too few to say whether the model looks at the image."
    if max(abs(other - own), abs(grey - own)) <= SAME * own:
        return "The model ignores the image: its loss is the same whatever it is shown."
    if figures["image_gain"] <= CLEAR * figures["image_gain_error"]:
        return "No sign that the model looks at the image: another record's image serves as well as its own."
    times = math.exp(min(other - own, 100))
    return (
        f"The model looks at the image: with its own, a token of the answer is {times:.3g} times as likely on average."
    )
