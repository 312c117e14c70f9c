"""The sizes of the conversations of a training: those of the first batch, which is the largest, and the average."""

from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from datasets import Dataset

from train_llava.data import MULTIPLE, LlavaDataset
from train_llava.planning.activations import Batch
from train_llava.processing.chat import IGNORE_INDEX, ChatEncoder
from train_llava.processing.packs import Packs

DEFAULT_TOKENS = 620  # CC3M-595K with 576 image tokens an image, ChatML and its one-sentence captions
SAMPLE = 500  # records, evenly spaced, by which the average is known well enough
PACKS = 50  # by which the largest is


@dataclass
class Workload:
    """What decides on memory (the largest batch), on time (an average batch) and on FLOPs (the average sample)."""

    batch: Batch  # the largest
    typical: Batch  # of an average length, in random order, as it is padded on an NVIDIA GPU
    average: dict[str, float]  # of a sample: images, tokens, token_pairs and answer_tokens, as StepFlops.of takes them
    records: int | None  # in an epoch

    @classmethod
    def assumed(cls, batch_size: int, tokens: int, image_tokens: int) -> "Workload":
        """Without data: every sample has one image, and all text might be an answer."""
        answers = max(1, tokens - image_tokens)
        average = {"images": 1.0, "tokens": float(tokens), "token_pairs": float(tokens**2), "answer_tokens": answers}
        batch = Batch(batch_size, tokens, batch_size, batch_size * answers)
        return cls(batch, replace(batch, length=round_up(tokens)), average, None)

    @classmethod
    def of(cls, dataset: LlavaDataset, encoder: ChatEncoder, batch_size: int) -> "Workload":
        """From data whose tokens are counted (`LlavaDataset.filter_by_length`), each record as often as it is seen.

        Some records, evenly spaced over an epoch, stand for the average.
        """
        weights, lengths = dataset.weights, dataset.lengths.astype(float)
        some = np.arange(len(dataset))
        if len(dataset) > SAMPLE:
            seen = np.cumsum(weights)
            some, weights = np.searchsorted(seen, (np.arange(SAMPLE) + 0.5) / SAMPLE * seen[-1]), np.ones(SAMPLE)
        images, answers = np.average(counted(dataset.records, some, encoder), axis=0, weights=weights)
        average = {"images": images, "answer_tokens": answers}
        average["tokens"] = np.average(lengths, weights=dataset.weights)
        average["token_pairs"] = np.average(lengths**2, weights=dataset.weights)
        records = sum(round(n * source.weight) for n, source in zip(dataset.sizes, dataset.sources, strict=True))
        length = padded_length(dataset.lengths, dataset.weights, batch_size)
        typical = Batch(batch_size, round_up(length), batch_size * images, batch_size * answers)
        return cls(longest_batch(dataset, encoder, batch_size), typical, average, records)


def round_up(length: float) -> int:
    """A length of LlavaCollator on an NVIDIA GPU."""
    return ceil(length / MULTIPLE) * MULTIPLE


def padded_length(lengths: np.ndarray, weights: np.ndarray, batch_size: int) -> float:
    """The average length (tokens) to which a batch is padded: that of the longest of `batch_size` records, each drawn
    as often as its weight says. With F(l) of the records no longer than l, F(l)^n of all batches of n are."""
    order = np.argsort(lengths)
    below = np.cumsum(weights[order]) / np.sum(weights)
    return float(np.sum(lengths[order] * np.diff(below**batch_size, prepend=0)))


def longest_batch(dataset: LlavaDataset, encoder: ChatEncoder, batch_size: int) -> Batch:
    """The batch of the longest conversations, with which LlavaSampler begins a run."""
    longest = np.argsort(-dataset.lengths, kind="stable")[:batch_size]
    images, answers = counted(dataset.records, longest, encoder).sum(axis=0).tolist()
    batch = Batch(len(longest), int(dataset.lengths.max()), images, answers)
    return batch.times(batch_size / len(longest))  # where there are fewer records than a batch holds


def fullest_pack(dataset: LlavaDataset, encoder: ChatEncoder, budget: int, batch_size: int = 1) -> Batch:
    """The largest pack of --tokens_per_batch, as so many samples of one token: nothing in it is padded. Each is a
    micro-batch, so `batch_size` plays no part.

    Some packs, evenly spaced from the fullest to the emptiest, say how many images and supervised tokens one has.
    """
    packs = Packs(dataset.lengths, budget).fill(dataset.lengths)
    some = [packs[i] for i in np.unique(np.linspace(0, len(packs) - 1, PACKS).astype(int))]
    counts = counted(dataset.records, np.concatenate(some), encoder)
    starts = np.cumsum([0, *map(len, some[:-1])])
    images, answers = np.add.reduceat(counts, starts).T
    grey = len(encoder.image_ids) * int(images.min() == 0)  # the collator's image in a batch without any
    return Batch(int(dataset.lengths[packs[0]].sum()) + grey, 1, max(1, images.max()), int(answers.max()))


def counted(records: Dataset, rows: np.ndarray, encoder: ChatEncoder) -> np.ndarray:
    """(rows, 2): the numbers of images and of supervised tokens in each of these records."""
    counts = []
    for messages in records.select(rows)["messages"]:
        ids, labels = encoder.encode(messages)
        images = ids.count(encoder.image_ids[0]) // len(encoder.image_ids)
        counts.append((images, len(labels) - labels.count(IGNORE_INDEX)))
    return np.array(counts)
