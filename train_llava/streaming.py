"""Sources too large for the disk: read while training, without a copy, in an order fixed by the seed.

Files are shared out among ranks and workers, shuffled, and repeated without end; `--max_steps` says when to stop.
"""

from functools import partial
from typing import Any

from datasets import IterableDataset, interleave_datasets

from train_llava.chat import ChatEncoder
from train_llava.command import InputError
from train_llava.data import BadPictures, DataPath, as_paths, example_of
from train_llava.sources import Source

BUFFER = 1_000  # records among which the next one is drawn; held in memory, pictures inside records included


def open_stream(
    data_path: DataPath,
    encoder: ChatEncoder,
    seed: int,
    on_bad_record: str = "error",
    bad_pictures: BadPictures | None = None,
    caption_fields: list[str] | None = None,
) -> IterableDataset:
    """An endless stream of examples, `{"id", "messages", "images"}`; weights are shares of the stream.

    Raises:
        InputError: as LlavaDataset, but about a record only when it is reached.
    """
    sources = [Source.find(path, caption_fields, streaming=True) for path in as_paths(data_path)]
    streams = [source.stream().repeat(None).shuffle(seed=seed, buffer_size=BUFFER) for source in sources]
    shares = [source.weight / sum(source.weight for source in sources) for source in sources]
    stream = interleave_datasets(streams, shares, seed=seed) if len(streams) > 1 else streams[0]
    step = partial(open_record, encoder=encoder, on_bad_record=on_bad_record, bad_pictures=bad_pictures)
    # batches of one, because a function of batches may also return none
    return stream.map(step, batched=True, batch_size=1, remove_columns=["problem", "missing"])


def open_record(
    batch: dict[str, list], encoder: ChatEncoder, on_bad_record: str, bad_pictures: BadPictures | None
) -> dict[str, list]:
    """One record with its pictures opened, or none where it is passed over."""
    record: dict[str, Any] = {name: values[0] for name, values in batch.items()}
    nothing = {"id": [], "messages": [], "images": []}
    if record["problem"] is not None:
        if on_bad_record == "error":
            raise InputError(f"{record['problem']}. Mend it or pass over such records with --on_bad_record skip.")
        return nothing
    if encoder.max_length and not encoder.encode(record["messages"])[0]:
        return nothing
    try:
        return {name: [value] for name, value in example_of(record).items()}
    except InputError as error:
        if bad_pictures is None:
            raise InputError(f"record {record['id']!r}: {error}") from error
        bad_pictures.add(record["id"], str(error))
        return nothing
