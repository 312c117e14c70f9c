"""Where data lies -> normal records, read one at a time and kept as one Arrow file in the cache of `datasets`.

Reading ends in one normal form, whatever the source looks like:

    {"id": "0001", "messages": [{"role": "user", "content": "<image>\\nWhat?"}, ...],
     "images": [{"path": "/data/images/a.jpg", "bytes": None}], "problem": None, "missing": False}

`problem` says why a record cannot be trained on; `missing`, that a file it names is not there.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    ArrowBasedBuilder,
    BuilderConfig,
    Dataset,
    DatasetInfo,
    Features,
    IterableDataset,
    List,
    SplitGenerator,
    Value,
    load_dataset,
)
from datasets import Image as ImageFeature
from datasets.builder import Key
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import snapshot_download

from train_llava.command import InputError
from train_llava.formats import CAPTION_FIELDS, FORMATS, Fields, parse, recognise
from train_llava.images import MEMBER
from train_llava.picture_folder import PictureFolder
from train_llava.readers import READERS, BadLine

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
ROWS = 500  # written at a time
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
        formats = {file: recognise(list(records), fields, [name] * bool(name)) for file, records in found.items()}
        ranked = [format for format in FORMATS if format in formats.values()]
        if not ranked:
            known = ", ".join(f"{key} (field {fields.get(field, field)!r})" for key, (field, _) in FORMATS.items())
            raise InputError(f"{path}: no file with records of a known format: {known}. See docs/data.md.")
        files = [file for file, format in formats.items() if file and format == ranked[0]]
        base = folder if folder.is_dir() else folder.parent
        return cls(path, ranked[0], float(weight or 1), str(base), files, fields)

    def open(self) -> Dataset:
        """The records as a memory-mapped Arrow file, made by the first process that asks while others wait."""
        stamps = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in self.files]
        key = hashlib.sha256(repr((VERSION, self.folder, self.format, self.fields, stamps)).encode()).hexdigest()
        for _ in range(2):
            # every batch of rows takes memory in every process; for pictures, datasets would write 100 rows each
            builder = NormalRecords(config_id=key[:32], source=self, writer_batch_size=ROWS)
            try:
                builder.download_and_prepare(verification_mode="no_checks")
            except DatasetGenerationError as error:
                raise error.__cause__ if isinstance(error.__cause__, InputError) else error from None
            records = builder.as_dataset(split="train")
            if not self._is_stale(records):
                break
            shutil.rmtree(builder.cache_dir)  # pictures came, went or moved: read again
        return records

    def stream(self) -> IterableDataset:
        """The records, read while they are used; `datasets` shares the files out among ranks and workers."""
        if self.files:
            return IterableDataset.from_generator(read, features=RECORD, gen_kwargs=self._reading())
        raw = hub_stream(self.path)
        options = {"file": self.path, "format": self.format, "fields": self.fields, "finder": PictureFolder("")}
        names = [*next(iter(raw))]
        return raw.map(normal, with_indices=True, remove_columns=names, features=RECORD, fn_kwargs=options)

    def read(self) -> Iterator[dict[str, Any]]:
        """The records one after the other."""
        return read(**self._reading())

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


def read(files: list[str], folder: str, format: str, fields: Fields) -> Iterator[dict[str, Any]]:
    """Normal records of some of a source's files."""
    finder = PictureFolder(folder)
    for file in files:
        for number, record in enumerate(READERS[Path(file).suffix](Path(file), fields)):
            yield normal(record, number, file, format, fields, finder)


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
                path = found or os.path.join(finder.roots[0], path)
            row["images"].append({"bytes": data, "path": path})
        return row | {"messages": messages}
    except Exception as error:  # a record may hold anything at all; whatever it is, it is one bad record
        reason = str(error) if isinstance(error, InputError) else f"malformed, {type(error).__name__}: {error}"
        return row | {"images": [], "problem": f"{file}, record {row['id']!r} (number {number}): {reason}"}


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
