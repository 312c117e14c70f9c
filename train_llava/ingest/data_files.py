"""Which files of --data_path hold the records: in a folder, in a single file, or on the hub."""

import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from huggingface_hub import snapshot_download

from train_llava.cli import InputError
from train_llava.ingest.formats import FORMATS, Fields, recognise
from train_llava.ingest.image_index import ARCHIVES, is_archive
from train_llava.ingest.readers import READERS, SUFFIXES_READ, NoRecords, Unreadable, records_in

HELD_OUT = re.compile(r"(^|[-_.])(test|validation|valid|val|dev|eval)([-_.]|$)")
HUB = "hf://datasets/"
LOOKED_INTO = 20  # records at the beginning of a file, which say what it holds
LOOKED_AT = 200  # entries of each folder below one that has files with records itself


def local_folder(path: str) -> Path:
    """The file or folder itself, or the local copy of a dataset on the Hugging Face hub."""
    if Path(path).exists():
        return Path(os.path.abspath(path))  # links are not followed: what lies beside them belongs together
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise InputError(f"{path}: no such file or folder.")
    try:
        kinds = [f"*{suffix}" for suffix in {*SUFFIXES_READ, *ARCHIVES}]
        return Path(snapshot_download(path, repo_type="dataset", allow_patterns=kinds))
    except (ValueError, OSError) as error:  # what huggingface_hub's errors derive from
        raise InputError(f"{path}: no such file or folder, nor a dataset to be had from the hub.") from error


def hub_files(path: str) -> tuple[str, list[str]]:
    """Address of a dataset on the hub, and those of its parquet files.

    Raises:
        InputError: no such dataset, or none of its files is parquet.
    """
    try:
        system, root = url_to_fs(HUB + path)
        folder = system.unstrip_protocol(root)
        files = [system.unstrip_protocol(file) for file in system.find(root) if file.endswith(".parquet")]
    except Exception as error:  # without a network that of the HTTP library, another in each version of huggingface_hub
        raise InputError(f"{path}: no such file or folder, nor a dataset to be had from the hub.") from error
    if not files:
        hint = f"Download it: hf download {path} --repo-type dataset --local-dir data/{path.split('/')[-1]}"
        raise InputError(f"{path}: no parquet files, which alone can be read from the hub in training. {hint}.")
    return folder, files


def data_files(path: Path) -> list[str]:
    """The files that may hold records: the file itself, or those in a folder, without those below it.

    Raises:
        InputError: a file of another kind.
    """
    if path.is_file():
        if not may_hold_records(path.name):
            raise InputError(f"{path}: not a {', '.join(SUFFIXES_READ)} file.")
        return [str(path)]
    return sorted(entry.path for entry in os.scandir(path) if may_hold_records(entry.name) and is_file(entry.path))


def data_files_below(path: Path, all_of_them: bool) -> list[str]:
    """The same of the folders below. Where these are only to be named as passed over, not all are looked for, as there
    may be hundreds of thousands of images."""
    if not path.is_dir():
        return []
    most = None if all_of_them else LOOKED_AT
    found = islice(files_below(path, most), most and 10 * most)
    names = (file.rpartition("/")[::2] for file in found)
    return sorted(f"{folder}/{name}" for folder, name in names if folder != str(path) and may_hold_records(name))


def may_hold_records(name: str) -> bool:
    """By the name of a file; hidden ones, such as macOS leaves beside others, do not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in READERS


def is_file(path: str) -> bool:
    """Whether there is a file, or a link that leads nowhere, which must not be passed over without a word."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def files_below(path: Path, most: int | None = None) -> Iterator[str]:
    """All files that are not hidden, folder by folder; of each no more than `most` entries."""
    folders = [str(path)]
    while folders:
        with os.scandir(folders.pop(0)) as entries:
            for entry in islice(entries, most):
                if entry.name.startswith("."):
                    continue
                if is_file(entry.path):
                    yield entry.path
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)


def choose(folder: str, files: list[str], held_out: bool) -> tuple[list[str], dict[str, str]]:
    """Which of a folder's files to read, and why not the others: the held-out ones (a file or a folder named test,
    validation, ...) or the others, as is wanted; all, where there are none of the kind."""

    def parts(file: str) -> list[str]:
        *folders, name = file.removeprefix(f"{folder}/").split("/")
        return [*folders, name.rpartition(".")[0]]

    wanted = [file for file in files if any(map(HELD_OUT.search, parts(file))) == held_out]
    why = "not held out" if held_out else "held out"
    return wanted or files, {file: why for file in files if wanted and file not in wanted}


class FileProbe:
    """The first records of files, and what these say: `records` and `formats` by file; in `passed_over` the files that
    are not read, and why."""

    def __init__(self, fields: Fields, in_place: bool, format: str | None, path: str, held_out: bool) -> None:
        self.fields, self.in_place, self.format, self.path, self.held_out = fields, in_place, format, path, held_out
        self.records: dict[str, list[Any]] = {}
        self.formats: dict[str, str | None] = {}
        self.passed_over: dict[str, str] = {}

    def into(self, place: Path, folder: str) -> None:
        """Looks at a file, or into a folder, and below it if that holds no records itself."""
        found = self.at(folder, data_files(place))
        below = data_files_below(place, all_of_them=not found)
        if found:
            self.passed_over |= dict.fromkeys(below, "it lies below a folder that holds others")
        else:
            self.at(folder, below)

    def at(self, folder: str, files: list[str]) -> bool:
        """Looks into these files of a folder; whether one holds records."""
        chosen, over = choose(folder, files, self.held_out)
        self.passed_over |= over
        for file in chosen:
            try:
                self.records[file] = list(islice(records_in(file, self.fields, self.in_place), LOOKED_INTO))
            except NoRecords as error:
                self.passed_over[file] = str(error)
            else:
                self.formats[file] = recognise(self.records[file], self.fields, [self.format] * bool(self.format))
        return any(self.formats.get(file) for file in chosen)

    def result(self) -> tuple[str, list[str]]:
        """The format, and the files that are in it; among these those that are broken from the start.

        Raises:
            InputError: none is.
        """
        ranked = [format for format in FORMATS if format in self.formats.values()]
        broken = [file for file, records in self.records.items() if records and isinstance(records[0], Unreadable)]
        if not ranked:
            if broken:
                raise InputError(f"{broken[0]}: {self.records[broken[0]][0]}.")
            known = ", ".join(f"{key} (field {self.fields.get(field, field)!r})" for key, (field, _) in FORMATS.items())
            why = "".join(f" {file}: {reason}." for file, reason in islice(self.passed_over.items(), 3))
            raise InputError(f"{self.path}: no file with records of a known format: {known}. See docs/data.md.{why}")
        for file, format in self.formats.items():
            if format is None and file not in broken:
                self.passed_over[file] = what_else(file, self.format)
            elif format not in (None, ranked[0]):
                self.passed_over[file] = f"{format} records; add {format}={self.path} to read them, too"
        return ranked[0], [file for file in self.formats if file not in self.passed_over]


def what_else(file: str, format: str | None) -> str:
    """What a file holds that is passed over."""
    if is_archive(file):
        return "images without texts; records may name them"
    return f"no records of the format {format}" if format else "no records of a known format"


def parts_of(text: str) -> tuple[str | None, str, float]:
    """Format, path and weight of `[format=]path[:weight]`; what is there by this very name is the path.

    Raises:
        InputError: it is empty.
    """
    if not text:
        raise InputError("--data_path is empty.")
    if Path(text).exists():
        return None, text, 1.0
    name, path, weight = re.fullmatch(r"(?:(\w+)=)?(.+?)(?::(\d+\.?\d*))?", text, re.DOTALL).groups()
    if weight and Path(f"{path}:{weight}").exists():
        path, weight = f"{path}:{weight}", None
    return name, path, float(weight or 1)


def paths_of(texts: Iterable[str]) -> list[str]:
    """The paths alone."""
    return [parts_of(text)[1] for text in texts]


def stamp(file: str) -> tuple[str, ...]:
    """Changes when the file does."""
    if "://" in file:
        system, path = url_to_fs(file)
        return file, system.ukey(path)
    state = os.stat(file) if os.path.exists(file) else os.lstat(file)
    return file, str(state.st_size), str(state.st_mtime_ns)
