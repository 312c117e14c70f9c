"""How many tokens each record has, counted once for the order of records and for what is too long."""

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np
from datasets import Dataset

from train_llava.cli import InputError
from train_llava.processing.chat import ChatEncoder


def token_lengths(records: Dataset, encoder: ChatEncoder, processes: int) -> np.ndarray:
    """The number of ids of every record after cutting, 0 where not one answer fits. Counted once and cached by
    `datasets`, beside the records.

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
    """A batch of records -> the number of ids of each."""
    lengths = []
    for name, messages in zip(batch["id"], batch["messages"], strict=True):
        try:
            lengths.append(len(encoder.encode(messages)[0]))
        except Exception as error:  # templates refuse what they do not know with errors of their own
            raise InputError(f"record {name!r}: the chat template does not take it ({error})") from error
    return {"length": lengths}


def too_long(lengths: Sequence[int] | np.ndarray, positions: int | None) -> str:
    """A line about the conversations that have more tokens than the model has positions; empty if there are none."""
    count = int((np.asarray(lengths) > positions).sum()) if positions else 0
    hint = f"what lies beyond was never learned to be read; cut them with --model_max_length {positions}"
    return f"{count:>10,} records have more tokens than the model's {positions:,} positions: {hint}" if count else ""
