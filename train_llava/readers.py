"""Files -> records as they were published, one at a time. READERS says what reads which kind of file."""

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pyarrow.parquet as pq

from train_llava.command import InputError
from train_llava.formats import Fields
from train_llava.images import STORED
from train_llava.parquet_images import rows_without_images

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class BadLine(str):
    """What a line that is not JSON yields instead of a record: the reason."""


def read_json(file: str, fields: Fields, chunk: int = 1 << 22) -> Iterator[Any]:
    """The elements of a JSON list, decoded one after the other, so that memory never holds them all."""
    decoder, text, at = json.JSONDecoder(), "", 0
    with open(file, encoding="utf-8-sig") as stream:
        text = stream.read(chunk).lstrip()
        if not text.startswith("["):
            raise InputError(f"{file}: expected a JSON list of records.")
        at = 1
        while True:
            try:
                at = re.compile(r"[\s,]*").match(text, at).end()
                if text[at : at + 1] == "]":
                    return
                record, at = decoder.raw_decode(text, at)
                yield record
            except ValueError as error:  # broken, or only cut off where this chunk ends
                more = stream.read(max(chunk, len(text) - at))
                if not more:
                    raise InputError(f"{file}: not valid JSON ({error}).") from error
                text, at = text[at:] + more, 0


def read_lines(file: str, fields: Fields) -> Iterator[Any]:
    """JSON Lines; a broken line is one bad record, not the end."""
    with open(file, "rb") as lines:
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    yield BadLine(f"not valid JSON ({error})")


def read_parquet(file: str, fields: Fields) -> Iterator[Any]:
    """Rows of a parquet file."""
    for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
        yield from batch.to_pylist()


def read_parquet_in_place(file: str, fields: Fields) -> Iterator[Any]:
    """Rows of a parquet file, here or on the hub, whose images stay where they are."""
    return rows_without_images(file, ["images", "image", fields["image"]])


def read_tar(file: str, fields: Fields) -> Iterator[Any]:
    """WebDataset: files that share a name up to the first dot make up one record; pictures are read in place."""
    with tarfile.open(file) as tar:
        members = (member for member in tar if member.isfile())
        for key, group in groupby(members, key=lambda m: re.match(r"(?:.*/)?[^/.]*", m.name)[0]):
            record: dict[str, Any] = {"id": key}
            images = []
            for member in group:
                kind = member.name[len(key) :].lower()
                if kind == ".json":
                    record |= json.load(tar.extractfile(member))
                elif kind == ".txt":
                    record[fields["answer"]] = tar.extractfile(member).read().decode()
                elif kind in IMAGE_SUFFIXES:
                    images.append({"path": f"{file}::{member.name}::{member.offset_data}:{member.size}:{STORED}"})
            yield record | {"images": images, fields["image"]: images}


IN_PLACE = {".parquet": read_parquet_in_place}
READERS = {".json": read_json, ".jsonl": read_lines, ".parquet": read_parquet, ".tar": read_tar}
