"""The files of --data_path that hold the records: in a folder, a single file, or on the hub."""

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

HELD_OUT = re.compile(r"(^|[-_.])(test|validation|valid|val|dev|eval)(dev)?(20\d\d)?([-_.]|$)")  # val2014: of COCO
HUB = "hf://datasets/"
PROBED = 20  # records at the beginning of a file, which tell its format
LISTED_AT_MOST = 200  # entries of each folder below one that has files with records itself


def local_folder(path: str) -> Path:
    """The file or folder itself, or the local copy of a dataset of the Hugging Face hub."""
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
    """The address of a dataset on the hub, and the addresses of its parquet files.

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
    """The files that may hold records in the folders below. Where they are only named as passed over, not all of them
    are searched for, as there may be hundreds of thousands of images."""
    if not path.is_dir():
        return []
    most = None if all_of_them else LISTED_AT_MOST
    found = islice(files_below(path, most), most and 10 * most)
    names = (file.rpartition("/")[::2] for file in found)
    return sorted(f"{folder}/{name}" for folder, name in names if folder != str(path) and may_hold_records(name))


def may_hold_records(name: str) -> bool:
    """Whether a file may hold records, by its name. Hidden files, such as macOS leaves beside others, do not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in READERS


def is_file(path: str) -> bool:
    """Whether there is a file, or a link that leads nowhere: the latter must be reported, not passed over."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def files_below(path: Path, most: int | None = None) -> Iterator[str]:
    """All files that are not hidden, folder by folder; at most `most` entries of each folder."""
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
    """The files of a folder to read, and why the others are not read.

    Held-out files are those with test, validation, ... in their name or in the name of a folder. `held_out` says
    whether these are wanted or the others; where there are none of the wanted kind, all are read.
    """

    def parts(file: str) -> list[str]:
        *folders, name = file.removeprefix(f"{folder}/").split("/")
        return [*folders, name.rpartition(".")[0]]

    wanted = [file for file in files if any(map(HELD_OUT.search, parts(file))) == held_out]
    why = "not held out" if held_out else "held out"
    return wanted or files, {file: why for file in files if wanted and file not in wanted}


class FileProbe:
    """Reads the first records of files to find their format.

    `records` and `formats` are by file; `passed_over` holds the files that are not read, and why.
    """

    def __init__(self, fields: Fields, in_place: bool, format: str | None, path: str, held_out: bool) -> None:
        self.fields, self.in_place, self.format, self.path, self.held_out = fields, in_place, format, path, held_out
        self.records: dict[str, list[Any]] = {}
        self.formats: dict[str, str | None] = {}
        self.passed_over: dict[str, str] = {}

    def probe(self, place: Path, folder: str) -> None:
        """Probes a file, or the files in a folder, or below the folder if it holds no records itself."""
        found = self.probe_files(folder, data_files(place))
        below = data_files_below(place, all_of_them=not found)
        if found:
            self.passed_over |= dict.fromkeys(below, "it lies below a folder that holds others")
        else:
            self.probe_files(folder, below)

    def probe_files(self, folder: str, files: list[str]) -> bool:
        """Probes these files of a folder; returns whether one holds records."""
        chosen, over = choose(folder, files, self.held_out)
        self.passed_over |= over
        for file in chosen:
            try:
                self.records[file] = list(islice(records_in(file, self.fields, self.in_place), PROBED))
            except NoRecords as error:
                self.passed_over[file] = str(error)
            else:
                self.formats[file] = recognise(self.records[file], self.fields, [self.format] * bool(self.format))
        return any(self.formats.get(file) for file in chosen)

    def chosen(self) -> tuple[str, list[str]]:
        """The format, and the files that have it, broken ones included.

        Raises:
            InputError: no file has a known format.
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
                self.passed_over[file] = other_content(file, self.format)
            elif format not in (None, ranked[0]):
                self.passed_over[file] = f"{format} records; add {format}={self.path} to read them, too"
        return ranked[0], [file for file in self.formats if file not in self.passed_over]


def other_content(file: str, format: str | None) -> str:
    """What a file holds that is passed over, in words."""
    if is_archive(file):
        return "images without texts; records may name them"
    return f"no records of the format {format}" if format else "no records of a known format"


def parse_data_path(text: str) -> tuple[str | None, str, float]:
    """Splits `[format=]path[:weight]`. If there is a file or folder of the whole name, that is the path.

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
    """The paths of such texts."""
    return [parse_data_path(text)[1] for text in texts]


def stamp(file: str) -> tuple[str, ...]:
    """A stamp that changes when the file changes."""
    if "://" in file:
        system, path = url_to_fs(file)
        return file, system.ukey(path)
    state = os.stat(file) if os.path.exists(file) else os.lstat(file)
    return file, str(state.st_size), str(state.st_mtime_ns)
