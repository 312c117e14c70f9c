"""Where data lies -> normal records, read one at a time and kept as one Arrow file in the cache of `datasets`.

Reading ends in one normal form, whatever the source looks like:

    {"id": "0001", "messages": [{"role": "user", "content": "<image>\\nWhat?"}, ...],
     "images": [{"path": "/data/images/a.jpg", "bytes": None}], "problem": None, "missing": False}

`problem` says why a record cannot be trained on; `missing`, that a file it names is not there.
"""

import json
import os
import re
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import snapshot_download

from train_llava.command import InputError
from train_llava.formats import CAPTION_FIELDS, FORMATS, Fields, parse, recognise
from train_llava.images import DEFLATED, MEMBER, STORED, open_archive

VERSION = 1  # of the normal form: copies made by another version are not read
STRING = Value("string")
RECORD = Features(
    {
        "id": STRING,
        "images": List(ImageFeature(decode=False)),
        "messages": List({"role": STRING, "content": STRING}),
        "problem": STRING,
        "missing": Value("bool"),
    }
)
HELD_OUT = re.compile(r"(^|[-_.])(test|validation|valid|val|dev|eval)([-_.]|$)")
SAMPLE = 200  # pictures looked for at every opening, to see that the Arrow copy is still true


@dataclass
class Source:
    """One entry of --data_path, `[format=]path[:weight]`: files in one format below one folder."""

    path: str
    format: str
    weight: float
    folder: str
    files: list[str]  # none for a dataset that is streamed from the hub
    fields: Fields

    @classmethod
    def find(cls, text: str | Path, caption_fields: list[str] | None = None, streaming: bool = False) -> "Source":
        """Finds the files and their format. A dataset of the hub is downloaded first, unless it is to be streamed.

        Raises:
            InputError: nothing there, or nothing of a known format.
        """
        name, path, weight = re.fullmatch(r"(?:(\w+)=)?(.+?)(?::(\d+\.?\d*))?", str(text)).groups()
        if name is not None and name not in FORMATS:
            raise InputError(f"{text}: no format {name!r}; known are {', '.join(FORMATS)}.")
        fields = caption_mapping(caption_fields)
        if streaming and not Path(path).exists():
            folder, found = Path(), {None: hub_stream(path).take(20)}
        else:
            folder = local_folder(path)
            found = {str(file): islice(READERS[file.suffix](file, fields), 20) for file in data_files(folder)}
        formats = {file: name or recognise(list(records), fields) for file, records in found.items()}
        ranked = [format for format in FORMATS if format in formats.values()]
        if not ranked:
            known = ", ".join(f"{key} (field {fields.get(field, field)!r})" for key, (field, _) in FORMATS.items())
            raise InputError(f"{path}: no file with records of a known format: {known}. See docs/data.md.")
        files = [file for file, format in formats.items() if file and format == ranked[0]]
        base = folder if folder.is_dir() else folder.parent
        return cls(path, ranked[0], float(weight or 1), str(base), files, fields)

    def open(self) -> Dataset:
        """The records as a memory-mapped Arrow file, made by the first process that asks while others wait."""
        stamps = tuple((os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in self.files)
        key = {**self._reading(), "stamps": (VERSION, *stamps)}
        for _ in range(2):
            try:
                records = Dataset.from_generator(read, features=RECORD, gen_kwargs=key)
            except DatasetGenerationError as error:
                raise error.__cause__ if isinstance(error.__cause__, InputError) else error from None
            if not self._is_stale(records):
                break
            shutil.rmtree(Path(records.cache_files[0]["filename"]).parent)  # pictures came, went or moved: read again
        return records

    def stream(self) -> IterableDataset:
        """The records, read while they are used; `datasets` shares the files out among ranks and workers."""
        if self.files:
            return IterableDataset.from_generator(read, features=RECORD, gen_kwargs=self._reading())
        raw = hub_stream(self.path)
        options = {"file": self.path, "format": self.format, "fields": self.fields, "finder": PictureFolder("")}
        names = [*next(iter(raw))]
        return raw.map(normal, with_indices=True, remove_columns=names, features=RECORD, fn_kwargs=options)

    def _reading(self) -> dict[str, Any]:
        return {"files": self.files, "folder": self.folder, "format": self.format, "fields": self.fields}

    def _is_stale(self, records: Dataset) -> bool:
        missing = records.data["missing"].to_numpy()
        finder = PictureFolder(self.folder)
        for index in missing.nonzero()[0][:SAMPLE].tolist():
            if all(finder.find(os.path.basename(i["path"])) for i in records[index]["images"] if not i["bytes"]):
                return True
        for index in range(0, len(records), max(1, len(records) // SAMPLE)):
            for image in [] if missing[index] else records[index]["images"]:
                member = MEMBER.match(image["path"] or "")
                if image["bytes"] is None and not os.path.isfile(member["archive"] if member else image["path"]):
                    return True
        return False


def read(files: list[str], folder: str, format: str, fields: Fields, stamps: tuple = ()) -> Iterator[dict[str, Any]]:
    """Normal records of some of a source's files; `stamps` only tell one version of them from another in the cache."""
    finder = PictureFolder(folder)
    for file in files:
        for number, record in enumerate(READERS[Path(file).suffix](Path(file), fields)):
            yield normal(record, number, file, format, fields, finder)


def normal(record: Any, number: int, file: str, format: str, fields: Fields, finder: "PictureFolder") -> dict[str, Any]:
    """One record in the normal form."""
    name = record.get("id", number) if isinstance(record, dict) else number
    row = {"id": str(name), "images": [], "messages": [], "problem": None, "missing": False}
    try:
        if isinstance(record, BadLine):
            raise InputError(record)
        messages, images = parse(record, format, fields)
        for image in images:
            data, path = image.get("bytes"), image.get("path")
            if not data:
                found = finder.find(path)
                row["missing"] |= found is None
                path = found or os.path.join(finder.roots[0], path)
            row["images"].append({"bytes": data, "path": path})
        return row | {"messages": messages}
    except InputError as error:
        return row | {"images": [], "problem": f"{file}, record {name!r} (number {number}): {error}"}


class BadLine(str):
    """What a line that is not JSON yields instead of a record: the reason."""


def local_folder(path: str) -> Path:
    """The file or folder itself, or the local copy of a dataset on the Hugging Face hub."""
    if Path(path).exists():
        return Path(path).resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise InputError(f"{path}: no such file or folder.")
    try:
        kinds = [f"*{suffix}" for suffix in (*READERS, ".zip")]
        return Path(snapshot_download(path, repo_type="dataset", allow_patterns=kinds))
    except (ValueError, OSError) as error:  # what huggingface_hub's errors derive from
        raise InputError(f"{path}: no such file or folder, nor a dataset to be had from the hub.") from error


def hub_stream(path: str) -> IterableDataset:
    """The rows of a dataset on the hub, pictures left encoded."""
    try:
        return load_dataset(path, split="train", streaming=True).decode(False)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: no such file or folder, nor a dataset to be had from the hub.") from error


def caption_mapping(pairs: list[str] | None) -> Fields:
    """`--caption_fields answer=text ...` over the defaults."""
    given = dict(pair.partition("=")[::2] for pair in pairs or [])
    if unknown := [key for key in given if key not in CAPTION_FIELDS or not given[key]]:
        raise InputError(
            f"--caption_fields {unknown[0]}: expected {', '.join(f'{key}=...' for key in CAPTION_FIELDS)}."
        )
    return CAPTION_FIELDS | given


def data_files(path: Path) -> list[Path]:
    """The files that may hold records: those in the folder itself, or if there are none, those below it.

    Held-out splits (files named test, validation, ...) are left out unless there is nothing else.
    """
    if path.is_file():
        if path.suffix not in READERS:
            raise InputError(f"{path}: not a {', '.join(READERS)} file.")
        return [path]
    files = [path / entry.name for entry in os.scandir(path) if Path(entry.name).suffix in READERS]
    if not files:
        walk = ((Path(folder), names) for folder, _, names in os.walk(path))
        files = [folder / name for folder, names in walk for name in names if Path(name).suffix in READERS]
    return sorted(file for file in files if not HELD_OUT.search(file.stem)) or sorted(files)


def read_json(file: Path, fields: Fields, chunk: int = 1 << 22) -> Iterator[Any]:
    """The elements of a JSON list, decoded one after the other, so that memory never holds them all."""
    decoder, text, at = json.JSONDecoder(), "", 0
    with file.open(encoding="utf-8-sig") as stream:
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


def read_lines(file: Path, fields: Fields) -> Iterator[Any]:
    """JSON Lines; a broken line is one bad record, not the end."""
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    yield BadLine(f"not valid JSON ({error})")


def read_parquet(file: Path, fields: Fields) -> Iterator[Any]:
    """Rows of a parquet file."""
    for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
        yield from batch.to_pylist()


def read_tar(file: Path, fields: Fields) -> Iterator[Any]:
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


READERS = {".json": read_json, ".jsonl": read_lines, ".parquet": read_parquet, ".tar": read_tar}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class PictureFolder:
    """Finds the pictures that records name: loose below a folder, or inside a zip in it that was not unpacked."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.roots = [os.path.join(folder, name) for name in ("images", "images_dl", "")]

    def find(self, name: str) -> str | None:
        """The path of a picture as `images.py` reads it; None if there is no such file.

        Raises:
            InputError: the name is an address, or leads out of the folder.
        """
        member = MEMBER.match(name)
        file = os.path.normpath(os.path.join(self.folder, member["archive"] if member else name))
        if "://" in name or not file.startswith(os.path.join(self.folder, "")):
            raise InputError(f"the picture {name!r} must be a file inside the data folder {self.folder}")
        if member:
            return name
        return self._loose(name) or self._packed(name)

    def _loose(self, name: str) -> str | None:
        names = [name] if os.path.splitext(name)[1] else [name, f"{name}.jpg", f"{name}.png"]
        for roots in (self.roots, self._all_folders):
            for root in roots:
                for path in (os.path.join(root, name) for name in names):
                    if os.path.isfile(path):
                        self.roots.insert(0, self.roots.pop(self.roots.index(root)) if root in self.roots else root)
                        return path
        return None

    @cached_property
    def _all_folders(self) -> list[str]:
        return [folder for folder, _, _ in os.walk(self.folder)]

    def _packed(self, name: str) -> str | None:
        for prefix in self._prefixes:
            if found := self._members.get(prefix + name):
                self._prefixes.insert(0, self._prefixes.pop(self._prefixes.index(prefix)))
                archive, info = found
                if info.flag_bits & 1 or info.compress_type not in (STORED, DEFLATED):
                    raise InputError(f"{archive}, {info.filename}: encrypted or packed in an unusual way; unpack it")
                # a member's data follow its own header, which ends in a name and an extra field of these lengths
                head = os.pread(open_archive(archive), 30, info.header_offset)
                start = info.header_offset + 30 + sum(struct.unpack("<26xHH", head))
                return f"{archive}::{info.filename}::{start}:{info.compress_size}:{info.compress_type}"
        return None

    @cached_property
    def _members(self) -> dict[str, tuple[str, zipfile.ZipInfo]]:
        archives = sorted(str(path) for path in Path(self.folder).glob("*.zip"))
        members = {}
        for archive in archives:
            with zipfile.ZipFile(archive) as file:
                members |= {info.filename: (archive, info) for info in file.infolist()}
        return members

    @cached_property
    def _prefixes(self) -> list[str]:
        folders = {name.rpartition("/")[0] for name in self._members}
        parents = {"/".join(f.split("/")[:i]) for f in folders for i in range(f.count("/") + 2)}
        return ["", *sorted(f"{folder}/" for folder in parents if folder)]
