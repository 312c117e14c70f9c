"""Data folders -> examples -> batches.

`ingest/` finds and reads the records, `processing/` turns messages into ids and labels, and images into numbers.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import concatenate_datasets
from PIL import Image
from transformers import LlavaProcessor

from train_llava.cli import InputError
from train_llava.ingest.bad_images import BadImages
from train_llava.ingest.image_files import image_name
from train_llava.ingest.records import TAGS, bad_records, column, drop_invalid
from train_llava.ingest.sources import Source, blocks_of, packed_below
from train_llava.processing.chat import IGNORE_INDEX, ChatEncoder
from train_llava.processing.images import FastImageProcessor, PixelBytes, open_image, tokens_per_image
from train_llava.processing.rows import rows_of_answers, rows_of_images
from train_llava.processing.token_lengths import token_lengths, too_long

MOST_TRIED = 1000  # substitutes for one record
MULTIPLE = 32  # of lengths on NVIDIA's GPUs, see LlavaCollator
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # where texts end, for FlashAttention
DataPath = str | Path | Sequence[str | Path]


class LlavaDataset(torch.utils.data.Dataset):
    """The examples of one or more sources: `{"id", "messages", "images": [RGB images]}`; held out, also TAGS.

    Args:
        data_path: one or more `[format=]path[:weight]`, see docs/data.md.
        on_bad_record: "error" refuses records that cannot be trained on, "skip" leaves them out.
        bad_images: the report of images that cannot be read. A record with such an image is replaced by another of its
            source, drawn by seed and index, so batches keep their size and a run its order. None: such an image is an
            error.
        caption_fields: `answer=..., image=..., instruction=...` of caption records.
        streaming: leave the images of parquet files where they are, instead of copying them; a dataset of the hub is
            then not downloaded.
        held_out: read the held-out files of a folder, if it has some, instead of the others.
        image_folder: the folder with the images that records name, if they are not beside the data.
        seed: of the draw of substitutes.

    Raises:
        InputError: no data here, or a record that cannot be trained on; names file, record and reason.
    """

    def __init__(
        self,
        data_path: DataPath,
        on_bad_record: str = "error",
        bad_images: BadImages | None = None,
        caption_fields: list[str] | None = None,
        streaming: bool = False,
        held_out: bool = False,
        seed: int = 0,
        image_folder: str | Path | None = None,
    ) -> None:
        where = (caption_fields, streaming, held_out, image_folder)
        self.sources = [Source.find(path, *where) for path in as_paths(data_path)]
        whole = [source.open() for source in self.sources]
        self.files = [source.files_read(records) for source, records in zip(self.sources, whole, strict=True)]
        self.bad_records = bad_records(whole)
        opened = [drop_invalid(records, on_bad_record) for records in whole]
        self.records = concatenate_datasets(opened)
        self.sizes = [len(records) for records in opened]
        self.lengths = np.zeros(len(self.records), dtype=np.int64)  # see filter_by_length
        self.dropped = 0
        self.blocks = None  # see LlavaSampler
        if streaming:
            self.blocks = np.concatenate([blocks_of(records, i) for i, records in enumerate(opened)], axis=1)
        self.bad_images, self.seed = bad_images, seed
        self._check_missing()
        wanted = ["id", "messages", "images", *(TAGS if held_out else ())]  # the others cost time at each record
        self.records = self.records.select_columns(wanted)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # raises beyond the end, so that plain iteration works
        record = self.records[index]
        try:
            return example_of(record)
        except InputError as error:
            if self.bad_images is None:
                raise InputError(f"record {record['id']!r}: {error}") from error
            substitute = self._substitute(index)
            self.bad_images.add(record["id"], str(error), substitute["id"])
            return substitute

    def _substitute(self, index: int) -> dict[str, Any]:
        """The example of another record of the same source, no longer if there is one: a pack has no room for more.

        Raises:
            InputError: none of MOST_TRIED can be read.
        """
        ends = np.cumsum(self.sizes)
        source = np.searchsorted(ends, index, side="right")
        rng = np.random.default_rng([self.seed, index])
        drawn = rng.integers(ends[source] - self.sizes[source], ends[source], MOST_TRIED)
        for other in drawn[np.argsort((self.lengths[drawn] - self.lengths[index]).clip(0), kind="stable")].tolist():
            with suppress(InputError):
                return example_of(self.records[other])
        raise InputError(f"{MOST_TRIED} records that were drawn, all of {self.sources[source].path}, cannot be read")

    def filter_by_length(self, encoder: ChatEncoder, processes: int = 1) -> "LlavaDataset":
        """Another dataset, whose records' tokens are counted (for the sampler), without the records of which not one
        answer fits into the encoder's `max_length`. Its `dropped` is how many these are.

        Raises:
            InputError: nothing is left.
        """
        filtered, lengths = copy(self), token_lengths(self.records, encoder, processes)
        fits = lengths > 0
        filtered.lengths, filtered.dropped = lengths[fits], int((~fits).sum())
        if filtered.dropped:
            filtered.sizes = [int(part.sum()) for part in np.split(fits, np.cumsum(self.sizes)[:-1])]
            filtered.records = self.records.select(np.flatnonzero(fits))
            filtered.blocks = None if self.blocks is None else self.blocks[:, fits]
        if filtered.dropped and not len(filtered):
            raise InputError(f"no record has an answer that fits into --model_max_length {encoder.max_length}.")
        return filtered

    @property
    def weights(self) -> np.ndarray:
        """(records,): how often each record is seen in an epoch."""
        return np.repeat([source.weight for source in self.sources], self.sizes)

    def summary(self, positions: int | None = None) -> str:
        """A line for each source, each of its files, and the whole; and the number of records with more tokens than the
        model has `positions`."""
        lines = []
        for source, size, files in zip(self.sources, self.sizes, self.files, strict=True):
            lines += [f"{size:>10,} records ({source.format}) x {source.weight:g} from {source.path}", files]
        lengths, tokens = self.lengths, "not counted"
        if lengths.any():
            tokens = f"{np.average(lengths, weights=self.weights):.0f} tokens on average, at most {lengths.max():,}"
        dropped = f", {self.dropped:,} too long and left out" * bool(self.dropped)
        lines += [
            self.bad_records,
            too_long(lengths, positions),
            f"{len(self):>10,} records together, {tokens}{dropped}",
        ]
        return "\n".join(filter(None, lines))

    def fingerprint(self) -> str:
        """A digest that changes with the records, their order or their weights, but not with the place of the files."""
        digest = hashlib.sha256(str([(len(self), source.weight) for source in self.sources]).encode())
        texts = self.records.select_columns(["id", "messages"]).with_format("arrow")
        for part in texts.iter(batch_size=10_000):
            turns = pc.list_flatten(part["messages"].combine_chunks())
            for words in (part["id"].combine_chunks(), turns.field("role"), turns.field("content")):
                digest.update(pc.binary_length(words).to_numpy(zero_copy_only=False).tobytes())
                digest.update("".join(words.to_pylist()).encode())
            digest.update(pc.list_value_length(part["messages"]).to_numpy().tobytes())
        return digest.hexdigest()

    def _check_missing(self) -> None:
        missing = np.flatnonzero(column(self.records, "missing").to_numpy())
        limit = self.bad_images.limit(len(self)) if self.bad_images else 0
        if len(missing) > limit:
            record = self.records[int(missing[0])]
            where = ", ".join(image_name(image) for image in record["images"])
            count = f"{len(missing)} of {len(self)} records name images that are not there, more than {limit}"
            hint = f"If they are elsewhere, give --image_folder{''.join(map(packed_below, self.sources))}"
            raise InputError(f"{count}. The first: record {record['id']!r}: no such image file: {where}. {hint}.")


def as_paths(data_path: DataPath) -> Sequence[str | Path]:
    """One path as a list of one."""
    return [data_path] if isinstance(data_path, str | Path) else data_path


def example_of(record: dict[str, Any]) -> dict[str, Any]:
    """A canonical record with its images opened."""
    return record | {"images": [open_image(image) for image in record["images"]]}


class LlavaCollator:
    """Examples -> one batch.

    `collator(examples)` gives, for `batch` conversations with `images` images in all and a longest one of `length`:
    input_ids, attention_mask and labels (batch, length) int64; pixel_values (images, 3, height, width) float32.

    A batch without any image gets a grey one. Its image tokens stand beside the shortest conversation, hidden by the
    mask and without labels. So the projector takes part in every rank's backward pass, as DeepSpeed and DDP expect, and
    the loss does not change. No examples at all, as a rank may get at the end of an epoch, make a batch of this image
    alone.

    Args:
        max_length: longer conversations are cut behind an answer; the images of the rest are left out.
        for_trainer: what LlavaTrainer wants: pixel_values as PixelBytes, which it normalises on the device, the `ids`
            of the records and `counts` of what is in them, and what the model would otherwise have to look for, with
            the GPU waiting: `answer_rows`, `targets`, `image_rows` (see rows.py) and, packed, `sequence_ids`
            (1, length), of each token the number of its conversation. Padded on the right and without attention_mask:
            no token sees what comes after it, so padding there changes nothing, and without a mask attention takes
            its fast, causal kernel.
        packing: no padding; the conversations follow each other in one row (1, sum of lengths), and position_ids,
            which start anew with each, take the place of attention_mask: transformers reads from them who sees whom
            (masking_utils.find_packed_sequence_indices). Flash attention is told where they end, or it would work
            this out in every layer, and the GPU wait for it (modeling_flash_attention_utils._is_packed_sequence).
        multiple: for the trainer, lengths are rounded up to a multiple of this. cuDNN's attention, which torch prefers
            on some GPUs, makes a plan for each new shape, and that takes longer than many steps.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        max_length: int | None = None,
        for_trainer: bool = False,
        packing: bool = False,
        multiple: int = 1,
    ) -> None:
        self.tokenizer, self.for_trainer, self.packing = processor.tokenizer, for_trainer, packing
        self.multiple = multiple if for_trainer else 1
        self.side = "right" if for_trainer else processor.tokenizer.padding_side
        self.pixels = FastImageProcessor(processor.image_processor)
        template = processor.chat_template
        self.encoder = ChatEncoder(processor.tokenizer, tokens_per_image(processor), template, max_length)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows, images = [], []
        for example in examples:
            ids, labels = self.encoder.encode(example["messages"])
            if not ids:
                raise InputError(f"record {example.get('id')!r}: no answer fits into {self.encoder.max_length} tokens")
            rows.append(as_row(ids, labels, 1))
            images += example["images"][: ids.count(self.encoder.image_ids[0]) // len(self.encoder.image_ids)]
        lengths = [row.shape[1] for row in rows]
        counts = {"images": len(images), "tokens": sum(lengths), "token_pairs": sum(n * n for n in lengths)}
        if not images:
            images = [Image.new("RGB", (32, 32), "grey")]
            rows = self._with_hidden_image(rows)
        batch = self._packed(rows) if self.packing else self._padded(rows, self.side)
        if self.for_trainer:
            batch.pop("attention_mask", None)
            batch["answer_rows"], batch["targets"] = rows_of_answers(batch["labels"])
            batch["image_rows"] = rows_of_images(batch["input_ids"], self.encoder.image_ids[0])
            counts["answer_tokens"] = len(batch["targets"])
            batch |= {"ids": [str(example.get("id")) for example in examples], "counts": counts}
        return batch | self._pixels(images)

    def prompts(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of conversations that wait for an answer: no labels, padded on the left for `generate`."""
        rows = [as_row(*self.encoder.encode(e["messages"], add_generation_prompt=True), 1) for e in examples]
        batch = self._padded(rows, "left")
        del batch["labels"]
        return batch | self._pixels([image for example in examples for image in example["images"]])

    def _with_hidden_image(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        ids = self.encoder.image_ids
        hidden = as_row(ids, [IGNORE_INDEX] * len(ids), 0)
        if self.packing or not rows:
            return [*rows, hidden]
        shortest = min(range(len(rows)), key=lambda i: rows[i].shape[1])
        sides = (hidden, rows[shortest]) if self.side == "left" else (rows[shortest], hidden)
        return [*rows[:shortest], np.concatenate(sides, axis=1), *rows[shortest + 1 :]]

    def _padded(self, rows: list[np.ndarray], side: str) -> dict[str, torch.Tensor]:
        length = max(row.shape[1] for row in rows)
        batch = np.empty((3, len(rows), length + -length % self.multiple), dtype=np.int64)
        batch[:] = np.array([self.tokenizer.pad_token_id, IGNORE_INDEX, 0])[:, None, None]
        for i, row in enumerate(rows):
            batch[:, i, slice(-row.shape[1], None) if side == "left" else slice(row.shape[1])] = row
        return dict(zip(("input_ids", "labels", "attention_mask"), torch.from_numpy(batch), strict=True))

    def _packed(self, rows: list[np.ndarray]) -> dict[str, Any]:
        lengths = [row.shape[1] for row in rows]
        ids, labels, _ = torch.from_numpy(np.concatenate(rows, axis=1))[:, None]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        # with a cache, transformers would not look at the positions
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}
        if self.for_trainer:
            batch["sequence_ids"] = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths))[None]
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return batch | dict(zip(PACKED, (ends, ends, max(lengths), max(lengths)), strict=True))

    def _pixels(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        if not images:
            return {}
        pixels = self.pixels(images)
        plain = isinstance(pixels, PixelBytes) and not self.for_trainer
        return {"pixel_values": pixels.normalise() if plain else pixels}


def as_row(ids: list[int], labels: list[int], seen: int) -> np.ndarray:
    """Ids, labels and attention mask of a conversation as (3, length); the pad token may be a real one."""
    row = np.empty((3, len(ids)), dtype=np.int64)
    row[0], row[1], row[2] = ids, labels, seen
    return row
