"""An entry of --data_path -> canonical records (records.py), kept as one Arrow file in the cache of `datasets`.

The Arrow file is made by a builder of `datasets`, which locks, writes into a temporary folder and renames it when it is
whole. `Dataset.from_generator` does the same, but counts rows alone: 500 rows of large images would be held at a time.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import (
    ArrowBasedBuilder,
    BuilderConfig,
    Dataset,
    DatasetInfo,
    SplitGenerator,
)
from datasets.exceptions import DatasetGenerationError

from train_llava.cli import InputError
from train_llava.ingest.benchmarks import BENCHMARKS, answers_file
from train_llava.ingest.data_files import FileProbe, files_below, hub_files, local_folder, parse_data_path, stamp
from train_llava.ingest.formats import CAPTION_FIELDS, FORMATS, Fields, split_captions
from train_llava.ingest.image_files import MEMBER, forget_files
from train_llava.ingest.image_index import ImageIndex, archives_in, is_archive
from train_llava.ingest.parquet_images import IN_PARQUET, PLACE, WINDOW
from train_llava.ingest.readers import records_in
from train_llava.ingest.records import RECORD, column, names_in, to_canonical

VERSION = 4  # of the canonical form: copies made by another version are not read
GROUPS, ROW_BITS = 100_000, 24  # row groups in a file, and bits for a row in one: room for millions of files
ROWS, BYTES = 500, 256 << 20  # written at a time: rows, or fewer that hold so many bytes of images
SAMPLE = 200  # images searched for at every opening, to see that the Arrow copy is still true
LISTED = 8  # files named in a summary


@dataclass
class Source:
    """One entry of --data_path, `[format=]path[:weight]`: files in one format below one folder.

    `in_place`: the images in parquet files stay there, and are read while training; `passed_over`: files that hold
    something else, or more than was asked for, and why they are not read.
    """

    path: str
    format: str
    weight: float
    folder: str
    images: str  # the folder that they are in
    files: list[str]
    fields: Fields
    in_place: bool = False
    passed_over: dict[str, str] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)  # names of images in the first records

    @classmethod
    def find(
        cls,
        text: str | Path,
        caption_fields: list[str] | None = None,
        streaming: bool = False,
        held_out: bool = False,
        image_folder: str | Path | None = None,
    ) -> "Source":
        """Finds the files and their format. A dataset of the hub is downloaded first, unless it is to be streamed.

        Of a folder with files for training and held-out ones, `held_out` says which are meant. `image_folder` is where
        the images are that records name, if not beside them.

        Raises:
            InputError: nothing there, or nothing of a known format.
        """
        name, path, weight = parse_data_path(str(text))
        if name is not None and name not in FORMATS:
            raise InputError(f"{text}: no format {name!r}; known are {', '.join(FORMATS)}.")
        if image_folder is not None and not Path(image_folder).is_dir():
            raise InputError(f"--image_folder {image_folder}: no such folder.")
        probe = FileProbe(caption_mapping(caption_fields), streaming, name, path, held_out)
        if streaming and not Path(path).exists():
            folder, files = hub_files(path)
            probe.probe_files(folder, files)
        else:
            place = local_folder(path)
            folder = str(place if place.is_dir() else place.parent)
            try:
                probe.probe(place, folder)
            except OSError as error:
                raise InputError(f"{error.filename or path}: cannot be read ({error.strerror}).") from error
        format, files = probe.chosen()
        if format in BENCHMARKS and BENCHMARKS[format].test_only and not held_out:
            raise InputError(f"{path}: {format} is a test, not to be trained on. Give it to train_llava.evaluate.")
        raw = (record for file in files for record in probe.records[file])
        single = (one for record in raw for one in split_captions(record, format, probe.fields))
        first = [name for record in single for name in names_in(record, format, probe.fields)]
        images = os.path.abspath(image_folder) if image_folder else folder
        return cls(path, format, weight, folder, images, files, probe.fields, streaming, probe.passed_over, first)

    def open(self) -> Dataset:
        """The records as a memory-mapped Arrow file, which the first process makes while others wait.

        A copy that is stale stays for the processes that read it; the next copy gets another number.
        """
        forget_files()
        answers = filter(None, map(answers_file, self.files))
        stamps = [stamp(file) for file in [*self.files, *answers, *archives_in(self.images)]]
        names = (VERSION, self.folder, self.images, self.format, self.fields, self.in_place, stamps)
        key = hashlib.sha256(repr(names).encode()).hexdigest()[:32]
        # every batch of rows takes memory in every process; for images, datasets would write 100 rows each
        copy = partial(RecordBuilder, source=self, writer_batch_size=ROWS)
        try:
            builder, number = copy(config_id=f"{key}-0"), 0
        except OSError as error:
            hint = "Set HF_DATASETS_CACHE to a folder that can be written to"
            raise InputError(f"no cache for the data ({error}). {hint}.") from error
        while os.path.isdir(builder.cache_dir.replace(f"{key}-0", f"{key}-{number + 1}")):
            number += 1
        records = built_records(copy(config_id=f"{key}-{number}") if number else builder)
        if self._is_stale(records):  # images came, went or moved
            records = built_records(copy(config_id=f"{key}-{number + 1}"))
        return records

    def read(self) -> Iterator[dict[str, Any]]:
        """The canonical records, one after the other."""
        index = self.image_index()
        for at, file in enumerate(self.files):
            records = records_in(file, self.fields, self.in_place)
            records = (one for record in records for one in split_captions(record, self.format, self.fields))
            for number, record in enumerate(records):
                where: dict[str, int | None] = {"file": at, "place": None}
                if self.in_place and isinstance(record, dict) and PLACE in record:
                    group, row = record[PLACE]
                    where["place"] = ((at * GROUPS + group) << ROW_BITS) + row
                yield to_canonical(record, number, file, self.format, self.fields, index) | where

    def image_index(self) -> ImageIndex:
        """The index of the images that records name."""
        return ImageIndex(self.images, self.first, self.folder)

    def files_read(self, records: Dataset) -> str:
        """A line for each file: how many records were read, or why it was passed over; and a line for each broken
        archive, in which an image may be that is not found."""
        counts = np.bincount(records.data["file"].to_numpy(), minlength=len(self.files))
        base = self.folder + "/"
        lines = [f"{count:>14,} {file.removeprefix(base)}" for file, count in zip(self.files, counts, strict=True)]
        lines = lines if len(lines) > 1 or self.passed_over else []
        over = [f"   passed over: {file.removeprefix(base)}: {why}" for file, why in self.passed_over.items()]
        missing = records.data["missing"].to_numpy().any()
        broken = self.image_index().broken() if missing else {}
        over += [f"   broken: {archive.removeprefix(f'{self.images}/')}: {why}" for archive, why in broken.items()]
        return "\n".join([*first_lines(lines), *first_lines(over)])

    def _is_stale(self, records: Dataset) -> bool:
        missing = records.data["missing"].to_numpy()
        index = self.image_index()
        for row in missing.nonzero()[0][:SAMPLE].tolist():
            images = [image for image in records[row]["images"] if not image["bytes"]]
            names = [os.path.relpath(image["path"], index.roots[0]) for image in images]
            if all(is_found_now(index, name) for name in names):
                return True
        for row in range(0, len(records), max(1, len(records) // SAMPLE)):
            for image in [] if missing[row] else records[row]["images"]:
                if image["bytes"] is None and not image_exists(image["path"]):
                    return True
        return False


@dataclass
class SourceConfig(BuilderConfig):
    """What `datasets` passes to the builder below."""

    source: Source | None = None


class RecordBuilder(ArrowBasedBuilder):
    """Lets `datasets` make the Arrow file of a source, some rows at a time."""

    BUILDER_CONFIG_CLASS = SourceConfig

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=RECORD)

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [SplitGenerator(name="train", gen_kwargs={"source": self.config.source})]

    def _generate_tables(self, source: Source) -> Iterator[tuple[int, pa.Table]]:
        rows, number, part, size = source.read(), count(), [], 0
        for row in chain(rows, [None]):
            if part and (row is None or len(part) == ROWS or size > BYTES):
                yield next(number), pa.Table.from_pylist(part, schema=RECORD.arrow_schema)
                part, size = [], 0
            part.append(row)
            size += sum(len(image["bytes"] or b"") for image in row["images"]) if row else 0


def built_records(builder: RecordBuilder) -> Dataset:
    """The records of a builder, as an Arrow file.

    Raises:
        InputError: the cache cannot be written.
    """
    try:
        builder.download_and_prepare(verification_mode="no_checks")
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(f"{builder.cache_dir}: the copy of the data cannot be made ({cause}).") from error
    return builder.as_dataset(split="train")


def caption_mapping(pairs: list[str] | None) -> Fields:
    """`--caption_fields answer=text ...` over the defaults."""
    given = dict(pair.partition("=")[::2] for pair in pairs or [])
    if unknown := [key for key in given if key not in CAPTION_FIELDS or not given[key]]:
        raise InputError(
            f"--caption_fields {unknown[0]}: expected {', '.join(f'{key}=...' for key in CAPTION_FIELDS)}."
        )
    return CAPTION_FIELDS | given


def image_exists(path: str) -> bool:
    """Whether the file or archive of an image still exists; the hub is not asked."""
    place = IN_PARQUET.match(path) or MEMBER.match(path)
    return "://" in path or os.path.isfile(place[1] if place else path)


def is_found_now(index: ImageIndex, name: str) -> bool:
    """Whether an image that was missing would be found now, in one place or in several."""
    try:
        return index.find(name) is not None
    except InputError:
        return True


def first_lines(lines: list[str]) -> list[str]:
    """The first lines, and how many more there are."""
    rest = len(lines) - LISTED
    return lines if rest <= 0 else [*lines[:LISTED], f"{'':>15}and {rest:,} more"]


def blocks_of(records: Dataset, source: int) -> np.ndarray:
    """(2, records): the row group of each record's images, numbered over all sources, and the window in it; -1 where
    there is none."""
    places = column(records, "place").fill_null(-1).to_numpy()
    blocks = np.where(places < 0, -1, (places >> ROW_BITS) + source * 10**12)
    return np.stack([blocks, (places & (2**ROW_BITS - 1)) // WINDOW])


def packed_below(source: Source) -> str:
    """The end of a message: an archive that is broken, or that is not searched because of where it lies; else empty."""
    for archive, why in source.image_index().broken().items():
        return f"; {archive} is broken ({why})"
    archives = (path for path in files_below(Path(source.images)) if is_archive(os.path.basename(path)))
    below = next((path for path in archives if os.path.dirname(path) != source.images), None)
    return f"; unpack {below}, or move it into {source.images}" if below else ""
