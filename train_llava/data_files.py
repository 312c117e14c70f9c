"""Which files of --data_path hold the records: in a folder, in a single file, or on the hub."""

import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from huggingface_hub import snapshot_download

from train_llava.command import InputError
from train_llava.formats import Fields
from train_llava.readers import IN_PLACE, READERS

HELD_OUT = re.compile(r"(^|[-_.])(test|validation|valid|val|dev|eval)([-_.]|$)")
HUB = "hf://datasets/"
LOOKED_AT = 200  # entries of each folder below one that has files with records itself


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
    """The files that may hold records: the file itself, or all in a folder and below it.

    Where the folder itself has some, those below it are only named as passed over; so they are not looked for among
    hundreds of thousands of images.

    Raises:
        InputError: a file of another kind.
    """
    if path.is_file():
        if path.suffix not in READERS:
            raise InputError(f"{path}: not a {', '.join(READERS)} file.")
        return [str(path)]
    top = [entry.path for entry in os.scandir(path) if entry.is_file() and Path(entry.name).suffix in READERS]
    found = islice(files_below(path, LOOKED_AT if top else None), 10 * LOOKED_AT if top else None)
    return sorted({*top, *(file for file in found if Path(file).suffix in READERS)})


def files_below(path: Path, most: int | None = None) -> Iterator[str]:
    """All files, folder by folder; of each no more than `most` entries."""
    folders = [str(path)]
    while folders:
        with os.scandir(folders.pop(0)) as entries:
            for entry in islice(entries, most):
                if entry.is_file():
                    yield entry.path
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)


def choose(folder: str, files: list[str], held_out: bool) -> tuple[list[str], dict[str, str]]:
    """Which of a folder's files to read, and why not the others.

    Those in the folder itself, or if there are none, those below it. Of these the held-out ones (a file or a folder
    named test, validation, ...) or the others, as is wanted; all, where there are none of the kind.
    """

    def parts(file: str) -> list[str]:
        *folders, name = file.removeprefix(f"{folder}/").split("/")
        return [*folders, name.rpartition(".")[0]]

    top = [file for file in files if len(parts(file)) == 1]
    passed_over = {file: "it lies below a folder that holds others" for file in files if top and file not in top}
    level = top or files
    wanted = [file for file in level if any(map(HELD_OUT.search, parts(file))) == held_out]
    why = "not held out" if held_out else "held out"
    passed_over |= {file: why for file in level if wanted and file not in wanted}
    return wanted or level, passed_over


def reader(file: str, in_place: bool) -> Callable[[str, Fields], Iterator[Any]]:
    """What reads a file, given its path or address."""
    suffix = os.path.splitext(file)[1]
    return IN_PLACE.get(suffix, READERS[suffix]) if in_place else READERS[suffix]


def stamp(file: str) -> tuple[str, ...]:
    """Changes when the file does."""
    if "://" in file:
        system, path = url_to_fs(file)
        return file, system.ukey(path)
    return file, str(os.stat(file).st_size), str(os.stat(file).st_mtime_ns)
