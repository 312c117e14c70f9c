"""In which order records are trained on: a function of seed and epoch alone, so that a resumed run goes on exactly."""

import hashlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from train_llava.chat import ChatEncoder
from train_llava.command import InputError


class LlavaSampler(torch.utils.data.Sampler):
    """Each record `weight` times per epoch, shuffled; a fraction of a time is a share of the records, drawn anew.

    The longest conversations come first, so that a run which is too large for its memory ends in its first step.

    Args:
        sizes: number of records of each source, in the order in which they lie in the dataset.
        weights: of each source.
        lengths: of each record, in tokens, image tokens included.
        batch: samples per step over all ranks.
        grouped: whether samples of similar length share a batch.
    """

    def __init__(
        self, sizes: list[int], weights: list[float], lengths: np.ndarray, batch: int, grouped: bool, seed: int
    ) -> None:
        self.sizes, self.weights, self.lengths = sizes, weights, lengths
        self.batch, self.grouped, self.seed, self.epoch = batch, grouped, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(round(size * weight) for size, weight in zip(self.sizes, self.weights, strict=True))

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        drawn, start = [], 0
        for size, weight in zip(self.sizes, self.weights, strict=True):
            count = round(size * weight)
            whole = np.tile(np.arange(size), count // size) if size else np.arange(0)
            drawn += [start + whole, start + rng.permutation(size)[: count - len(whole)]]
            start += size
        indices = rng.permutation(np.concatenate(drawn))
        lengths = self.lengths[indices]
        if self.grouped:
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            indices = indices[get_length_grouped_indices(lengths.tolist(), self.batch, generator=generator)]
        elif self.epoch == 0:
            longest = np.argsort(-lengths, kind="stable")[: self.batch]
            indices = np.concatenate([indices[longest], np.delete(indices, longest)])
        return iter(indices.tolist())


class TellEpoch(TrainerCallback):
    """Tells the sampler the epoch. Trainer's own call does not reach it behind the batches that a resumed run skips."""

    def __init__(self, sampler: LlavaSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


def token_lengths(records: Dataset, encoder: ChatEncoder, processes: int) -> np.ndarray:
    """Ids of every record after cutting, 0 where not one answer fits; counted once, then kept beside the records.

    Raises:
        InputError: the chat template refuses a conversation; names the record.
    """
    # not datasets' own fingerprint of the records, which differs between making an Arrow file and opening it
    identity = [*(file["filename"] for file in records.cache_files), len(records), encoder.fingerprint()]
    key = hashlib.sha256(str(identity).encode()).hexdigest()[:32]
    options = {"batched": True, "remove_columns": records.column_names, "new_fingerprint": key}
    processes = processes if len(records) > 20_000 else None  # starting them takes longer than counting so few
    counted = records.map(partial(count, encoder), num_proc=processes, desc="Counting tokens", **options)
    return counted.with_format("numpy")["length"][:]


def count(encoder: ChatEncoder, batch: dict[str, list]) -> dict[str, list[int]]:
    """A batch of records -> their numbers of ids."""
    lengths = []
    for name, messages in zip(batch["id"], batch["messages"], strict=True):
        try:
            lengths.append(len(encoder.encode(messages)[0]))
        except Exception as error:  # templates refuse what they do not know with errors of their own
            raise InputError(f"record {name!r}: the chat template does not take it ({error})") from error
    return {"length": lengths}
