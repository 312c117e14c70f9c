"""The order of records in training: a function of seed, epoch and samples (or packs) per step alone.

So a resumed run continues exactly, and a run on other ranks, with other micro-batches or workers, sees the same records
in each step.
"""

from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from train_llava.processing.packs import Packs


class LlavaSampler(torch.utils.data.Sampler):
    """Each record `weight` times per epoch, shuffled; a fraction of a time is a share of the records, drawn anew.

    The longest conversations come first, so that a run which is too large for its memory ends in its first step.

    Args:
        sizes: number of records of each source, in the order in which they lie in the dataset.
        weights: of each source.
        lengths: of each record, in tokens, image tokens included.
        batch: samples per step over all ranks.
        grouped: whether samples of similar length share a batch.
        blocks: (2, records), of each record the row group in which its images lie, or -1, and the window of rows in it
            that is read at once; see `order_by_row_group`.
    """

    def __init__(
        self,
        sizes: list[int],
        weights: list[float],
        lengths: np.ndarray,
        batch: int,
        grouped: bool,
        seed: int,
        blocks: np.ndarray | None = None,
    ) -> None:
        self.sizes, self.weights, self.lengths, self.blocks = sizes, weights, lengths, blocks
        self.batch, self.grouped, self.seed, self.epoch = batch, grouped, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Must be called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(round(size * weight) for size, weight in zip(self.sizes, self.weights, strict=True))

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        drawn, times, start = [], [], 0
        for size, weight in zip(self.sizes, self.weights, strict=True):
            count = round(size * weight)
            whole = np.tile(np.arange(size), count // size) if size else np.arange(0)
            drawn += [start + whole, start + rng.permutation(size)[: count - len(whole)]]
            times.append(np.arange(count) // max(1, size))
            start += size
        indices = np.concatenate(drawn)
        if self.blocks is None:
            indices = rng.permutation(indices)
        else:
            indices = indices[order_by_row_group(*self.blocks[:, indices], np.concatenate(times), rng)]
        lengths, first = self.lengths[indices], np.arange(0)
        if self.grouped:
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            indices = indices[get_length_grouped_indices(lengths.tolist(), self.batch, generator=generator)]
        elif self.epoch == 0:
            longest = np.argsort(-lengths, kind="stable")[: self.batch]
            first, indices = indices[longest], np.delete(indices, longest)
        if self.blocks is not None:
            indices = spread_over_lanes(indices, self.batch)
        return iter(np.concatenate([first, indices]).tolist())


def order_by_row_group(
    blocks: np.ndarray, windows: np.ndarray, times: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """An order in which row groups come one after the other, shuffled, and the rows of each nearly as they lie: only
    the rows of one window are shuffled. Records in no row group come anywhere.

    `times` is the number of the repetition that each place of the order is of its record.
    """
    alone = -1 - np.arange(len(blocks))
    _, unit = np.unique(np.where(blocks < 0, alone, blocks * (times.max(initial=0) + 1) + times), return_inverse=True)
    order = np.lexsort([rng.random(len(blocks)), windows, rng.permutation(unit.max(initial=0) + 1)[unit]])
    return np.roll(order, rng.integers(max(1, len(order))))  # or a single row group would begin alike in each epoch


def spread_over_lanes(indices: np.ndarray, batch: int) -> np.ndarray:
    """Cuts an order into as many equal parts as a step has samples; the n-th sample of each step is from the n-th part.

    So the samples of a step come from all over the data, while each rank and worker reads its row groups forwards.
    """
    rows = np.arange(len(indices))
    each, longer = divmod(len(indices), batch)  # the first parts are longer by one
    lane, step = rows % batch, rows // batch
    return indices[lane * each + np.minimum(lane, longer) + step]


class PackSampler(torch.utils.data.Sampler[list[int]]):
    """The packs of --tokens_per_batch: all records in conversations of at most so many tokens together, shuffled.

    Each epoch has as many packs of the same lengths; which of equally long records is in which of them is drawn anew.
    The fullest packs come first, so that a run which is too large for its memory ends in its first step.

    Args:
        records: (samples,), indices, each as often as it is seen in an epoch.
        lengths: (samples,), of each of these, in tokens, image tokens included.
        budget: the most tokens of a pack; no length is above it.
        batch: packs per step over all ranks.
    """

    def __init__(self, records: np.ndarray, lengths: np.ndarray, budget: int, batch: int, seed: int) -> None:
        self.records, self.lengths, self.packs = records, lengths, Packs(lengths, budget)
        self.batch, self.seed, self.epoch = batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Must be called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.packs)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        shuffled = rng.permutation(len(self.records))
        packs = self.packs.fill(self.lengths[shuffled])
        first = min(self.batch, len(packs)) if self.epoch == 0 else 0
        for number in chain(range(first), first + rng.permutation(len(packs) - first)):
            yield self.records[shuffled[packs[number]]].tolist()


class RankBatches(torch.utils.data.Sampler[list[int]]):
    """An epoch as the micro-batches of one rank. Every place of the order is in one step of one rank, none is repeated.

    The last step of an epoch has what is left, shared out evenly over ranks and micro-batches, some of which may be
    empty; the loss is a mean over the tokens of the whole step, so that each record counts as everywhere else.

    Args:
        order: of all ranks together.
        size: samples per micro-batch.
        accumulation: micro-batches per step.
        ranks, rank: how many there are, and which this is.
        drop_last: leave out what does not fill a step.
    """

    def __init__(
        self,
        order: torch.utils.data.Sampler,
        size: int,
        accumulation: int,
        ranks: int,
        rank: int,
        drop_last: bool = False,
    ) -> None:
        self.order, self.size, self.accumulation, self.ranks, self.rank = order, size, accumulation, ranks, rank
        self.batch, self.drop_last = size * accumulation * ranks, drop_last

    def __len__(self) -> int:
        steps = len(self.order) // self.batch if self.drop_last else -(-len(self.order) // self.batch)
        return steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        places = [*self.order]
        for start in range(0, len(self) // self.accumulation * self.batch, self.batch):
            numbers = np.arange(start, min(start + self.batch, len(places)))
            parts = np.array_split(numbers, self.accumulation * self.ranks)
            yield from ([places[number] for number in part] for part in parts[self.rank :: self.ranks])

    @property
    def samples(self) -> int:
        """In an epoch, of all ranks."""
        return len(self.order)


class PackBatches(RankBatches):
    """The same of a PackSampler: each of its packs is a micro-batch."""

    def __init__(self, order: PackSampler, accumulation: int, ranks: int, rank: int, drop_last: bool = False) -> None:
        super().__init__(order, 1, accumulation, ranks, rank, drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([*chain.from_iterable(packs)] for packs in super().__iter__())  # of one pack or, at the end, none

    @property
    def samples(self) -> int:
        return len(self.order.records)


class SetEpochCallback(TrainerCallback):
    """Sets the epoch of the loader's LlavaSampler or PackSampler, if it has one.

    Trainer's own call does not reach the sampler behind the batches that a resumed run skips.
    """

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        order = getattr(kwargs["train_dataloader"].batch_sampler, "order", None)
        if isinstance(order, LlavaSampler | PackSampler):
            order.set_epoch(int(state.epoch or 0))
