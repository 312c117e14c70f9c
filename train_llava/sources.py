"""Where data lies -> normal records, read one at a time and kept as one Arrow file in the cache of `datasets`.

Reading ends in one normal form, whatever the source looks like:

    {"id": "0001", "messages": [{"role": "user", "content": "<image>\\nWhat?"}, ...],
     "images": [{"path": "/data/images/a.jpg", "bytes": None}],
     "problem": None, "missing": False, "file": 0, "place": None}

`problem` says why a record cannot be trained on; `missing`, that a file it names is not there; `file`, from which of
the source's files it is; `place`, in which row group and row of a parquet file its images were left, if they were.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import (
    ArrowBasedBuilder,
    BuilderConfig,
    Dataset,
    DatasetInfo,
    Features,
    List,
    SplitGenerator,
    Value,
)
from datasets import Image as ImageFeature
from datasets.builder import Key
from datasets.exceptions import DatasetGenerationError

from train_llava.command import InputError
from train_llava.data_files import choose, data_files, hub_files, local_folder, reader, stamp
from train_llava.formats import CAPTION_FIELDS, FORMATS, Fields, parse, recognise
from train_llava.images import MEMBER, forget_files
from train_llava.parquet_images import IN_PARQUET, PLACE, WINDOW
from train_llava.picture_folder import PictureFolder, archives_in
from train_llava.readers import BadLine

VERSION = 2  # of the normal form: copies made by another version are not read
STRING = Value("string")
RECORD = Features(
    {
        "id": STRING,
        "images": List(ImageFeature(decode=False)),
        "messages": List({"role": STRING, "content": STRING}),
        "problem": STRING,
        "missing": Value("bool"),
        "file": Value("int32"),
        "place": Value("int64"),
    }
)
GROUPS, ROW_BITS = 100_000, 24  # row groups in a file, and bits for a row in one: room for millions of files
ROWS = 500  # written at a time
SAMPLE = 200  # pictures looked for at every opening, to see that the Arrow copy is still true
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
    files: list[str]
    fields: Fields
    in_place: bool = False
    passed_over: dict[str, str] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)  # names of pictures in the first records

    @classmethod
    def find(
        cls,
        text: str | Path,
        caption_fields: list[str] | None = None,
        streaming: bool = False,
        held_out: bool = False,
    ) -> "Source":
        """Finds the files and their format. A dataset of the hub is downloaded first, unless it is to be streamed.

        Of a folder with files for training and held-out ones, `held_out` says which are meant.

        Raises:
            InputError: nothing there, or nothing of a known format.
        """
        name, path, weight = re.fullmatch(r"(?:(\w+)=)?(.+?)(?::(\d+\.?\d*))?", str(text)).groups()
        if name is not None and name not in FORMATS:
            raise InputError(f"{text}: no format {name!r}; known are {', '.join(FORMATS)}.")
        fields = caption_mapping(caption_fields)
        if streaming and not Path(path).exists():
            folder, files = hub_files(path)
            chosen, passed_over = choose(folder, files, held_out)
        else:
            place = local_folder(path)
            folder = str(place if place.is_dir() else place.parent)
            chosen, passed_over = choose(folder, data_files(place), held_out)
        beginnings = {file: list(islice(reader(file, streaming)(file, fields), 20)) for file in chosen}
        formats = {file: recognise(records, fields, [name] * bool(name)) for file, records in beginnings.items()}
        ranked = [format for format in FORMATS if format in formats.values()]
        if not ranked:
            known = ", ".join(f"{key} (field {fields.get(field, field)!r})" for key, (field, _) in FORMATS.items())
            raise InputError(f"{path}: no file with records of a known format: {known}. See docs/data.md.")
        for file, format in formats.items():
            if format is None:
                passed_over[file] = f"no records of the format {name}" if name else "no records of a known format"
            elif format != ranked[0]:
                passed_over[file] = f"{format} records; add {format}={path} to read them, too"
        files = [file for file, format in formats.items() if format == ranked[0]]
        first = [name for file in files for record in beginnings[file] for name in names_in(record, ranked[0], fields)]
        return cls(path, ranked[0], float(weight or 1), folder, files, fields, streaming, passed_over, first)

    def open(self) -> Dataset:
        """The records as a memory-mapped Arrow file, made by the first process that asks while others wait.

        A copy that is not true any more stays for the processes that read it; the next one gets another number.
        """
        forget_files()
        stamps = [stamp(file) for file in [*self.files, *archives_in(self.folder)]]
        names = (VERSION, self.folder, self.format, self.fields, self.in_place, stamps)
        key = hashlib.sha256(repr(names).encode()).hexdigest()[:32]
        # every batch of rows takes memory in every process; for pictures, datasets would write 100 rows each
        copy = partial(NormalRecords, source=self, writer_batch_size=ROWS)
        builder, number = copy(config_id=f"{key}-0"), 0
        while os.path.isdir(builder.cache_dir.replace(f"{key}-0", f"{key}-{number + 1}")):
            number += 1
        records = made(copy(config_id=f"{key}-{number}") if number else builder)
        if self._is_stale(records):  # pictures came, went or moved
            records = made(copy(config_id=f"{key}-{number + 1}"))
        return records

    def read(self) -> Iterator[dict[str, Any]]:
        """The records one after the other."""
        finder = PictureFolder(self.folder, self.first)
        for at, file in enumerate(self.files):
            for number, record in enumerate(reader(file, self.in_place)(file, self.fields)):
                where: dict[str, int | None] = {"file": at, "place": None}
                if self.in_place and isinstance(record, dict) and PLACE in record:
                    group, row = record[PLACE]
                    where["place"] = ((at * GROUPS + group) << ROW_BITS) + row
                yield normal(record, number, file, self.format, self.fields, finder) | where

    def files_read(self, records: Dataset) -> str:
        """File by file, how many records were read, and what was passed over and why."""
        counts = np.bincount(records.data["file"].to_numpy(), minlength=len(self.files))
        base = self.folder + "/"
        lines = [f"{count:>14,} {file.removeprefix(base)}" for file, count in zip(self.files, counts, strict=True)]
        lines = lines if len(lines) > 1 or self.passed_over else []
        over = [f"   passed over: {file.removeprefix(base)}: {why}" for file, why in self.passed_over.items()]
        return "\n".join([*shortened(lines), *shortened(over)])

    def _is_stale(self, records: Dataset) -> bool:
        missing = records.data["missing"].to_numpy()
        finder = PictureFolder(self.folder, self.first)
        for index in missing.nonzero()[0][:SAMPLE].tolist():
            names = [os.path.relpath(i["path"], finder.roots[0]) for i in records[index]["images"] if not i["bytes"]]
            if all(in_some_place(finder, name) for name in names):
                return True
        for index in range(0, len(records), max(1, len(records) // SAMPLE)):
            for image in [] if missing[index] else records[index]["images"]:
                if image["bytes"] is None and not is_there(image["path"]):
                    return True
        return False


@dataclass
class SourceConfig(BuilderConfig):
    """What `datasets` hands to the builder below."""

    source: Source | None = None


class NormalRecords(ArrowBasedBuilder):
    """How `datasets` makes the Arrow file of a source: under a lock, in a folder that is renamed when it is whole."""

    BUILDER_CONFIG_CLASS = SourceConfig

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=RECORD)

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [SplitGenerator(name="train", gen_kwargs={"source": self.config.source})]

    def _generate_tables(self, source: Source) -> Iterator[tuple[Key, pa.Table]]:
        rows = source.read()
        for number in count():
            if not (part := list(islice(rows, ROWS))):
                return
            yield Key(0, number), pa.Table.from_pylist(part, schema=RECORD.arrow_schema)


def made(builder: NormalRecords) -> Dataset:
    """Its records, once they are an Arrow file."""
    try:
        builder.download_and_prepare(verification_mode="no_checks")
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, InputError) else error from None
    return builder.as_dataset(split="train")


def names_in(record: Any, format: str, fields: Fields) -> list[str]:
    """The names of a raw record's picture files, none of one that is malformed."""
    try:
        names = [image["path"] for image in parse(record, format, fields)[1] if not image.get("bytes")]
        return [name for name in names if "::" not in name and "://" not in name]
    except Exception:  # as in `normal`, where it is said
        return []


def normal(record: Any, number: int, file: str, format: str, fields: Fields, finder: "PictureFolder") -> dict[str, Any]:
    """One record in the normal form."""
    name = record.get("id", number) if isinstance(record, dict) else number
    row = {
        "id": str(name).encode(errors="replace").decode(),
        "images": [],
        "messages": [],
        "problem": None,
        "missing": False,
    }
    try:
        if isinstance(record, BadLine):
            raise InputError(record)
        messages, images = parse(record, format, fields)
        for image in images:
            data, path = image.get("bytes"), image.get("path")
            if not data:
                found = finder.find(path)
                row["missing"] |= found is None
                path = found or finder.wanted(path)
            row["images"].append({"bytes": data, "path": path})
        return row | {"messages": messages}
    except Exception as error:  # a record may hold anything at all; whatever it is, it is one bad record
        reason = str(error) if isinstance(error, InputError) else f"malformed, {type(error).__name__}: {error}"
        return row | {"images": [], "problem": f"{file}, record {row['id']!r} (number {number}): {reason}"}


def caption_mapping(pairs: list[str] | None) -> Fields:
    """`--caption_fields answer=text ...` over the defaults."""
    given = dict(pair.partition("=")[::2] for pair in pairs or [])
    if unknown := [key for key in given if key not in CAPTION_FIELDS or not given[key]]:
        raise InputError(
            f"--caption_fields {unknown[0]}: expected {', '.join(f'{key}=...' for key in CAPTION_FIELDS)}."
        )
    return CAPTION_FIELDS | given


def is_there(path: str) -> bool:
    """Whether the file or archive of a picture still is; one on the hub is not asked for."""
    place = IN_PARQUET.match(path) or MEMBER.match(path)
    return "://" in path or os.path.isfile(place[1] if place else path)


def in_some_place(finder: PictureFolder, name: str) -> bool:
    """Whether a picture that was missing would be found, or found in several places, now."""
    try:
        return finder.find(name) is not None
    except InputError:
        return True


def shortened(lines: list[str]) -> list[str]:
    """The first lines, and how many more there are."""
    rest = len(lines) - LISTED
    return lines if rest <= 0 else [*lines[:LISTED], f"{'':>15}and {rest:,} more"]


def column(records: Dataset, name: str) -> pa.ChunkedArray:
    """One column, without reading the others."""
    return records.select_columns(name).with_format("arrow")[:][name]


def blocks_of(records: Dataset, source: int) -> np.ndarray:
    """(2, records): row group, numbered over all sources, and window in it of each record's images; -1: of none."""
    places = column(records, "place").fill_null(-1).to_numpy()
    blocks = np.where(places < 0, -1, (places >> ROW_BITS) + source * 10**12)
    return np.stack([blocks, (places & (2**ROW_BITS - 1)) // WINDOW])
