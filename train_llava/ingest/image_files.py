"""Where an image lies -> its encoded bytes.

An image is `{"path", "bytes"}`, as the `datasets` library stores one. `bytes` is set where it came inside a record;
otherwise `path` names a file, or what is read in place: a member of an archive by its position there,
`images.zip::a/b.jpg::<offset>:<size>:<zip's method>`, or an image left in a parquet file,
`train.parquet::<column>::<row group>:<row in it>:<number in the row>`.
"""

import os
import re
import stat
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from train_llava.cli import InputError
from train_llava.ingest.limits import MOST_IMAGE_BYTES
from train_llava.ingest.parquet_images import IN_PARQUET, image_bytes, open_parquet, open_row_group

MEMBER = re.compile(r"(?P<archive>.+?)::(?P<name>.+)::(?P<offset>\d+):(?P<size>\d+):(?P<method>\d+)$")
STORED, DEFLATED = 0, 8  # methods of the ZIP format (APPNOTE 4.4.5); a tar stores
LONGEST_NAME = 500  # that is written out in a message
TOO_LARGE = f"more than {MOST_IMAGE_BYTES >> 20} MB"
ImageRef = dict[str, Any] | str | Path


def read_bytes(ref: dict[str, Any]) -> bytes:
    """Reads the encoded image from the record, an archive or a file.

    Raises:
        InputError: larger than an image may be, in the archive or unpacked.
    """
    if ref["bytes"] is not None:
        return ref["bytes"]
    if row := IN_PARQUET.match(ref["path"]):
        return image_bytes(**row.groupdict())
    member = MEMBER.match(ref["path"])
    if member is None:
        return Path(ref["path"]).read_bytes()
    if int(member["size"]) > MOST_IMAGE_BYTES:
        raise InputError(TOO_LARGE)
    # pread moves no file position, so that forked workers may share the open file
    data = os.pread(open_archive(member["archive"]).fileno(), int(member["size"]), int(member["offset"]))
    if int(member["method"]) == DEFLATED:
        unpacking = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        data = unpacking.decompress(data, MOST_IMAGE_BYTES)
        if unpacking.unconsumed_tail:
            raise InputError(TOO_LARGE)
    return data


@lru_cache(maxsize=64)
def open_archive(path: str) -> BinaryIO:
    """Opens an archive, which stays open until so many others were opened; then Python closes it."""
    return open(path, "rb", buffering=0)


def forget_files() -> None:
    """Closes what is open. Data calls this when it is opened: files may be others by now than those that were read."""
    open_archive.cache_clear()
    open_row_group.cache_clear()
    open_parquet.cache_clear()


def in_a_file(ref: dict[str, Any]) -> bool:
    """Whether the image is a file of its own."""
    return ref["bytes"] is None and not MEMBER.match(ref["path"])  # which fits an image in parquet, too


def image_name(ref: dict[str, Any]) -> str:
    """The name of an image in a message."""
    member = MEMBER.match(ref["path"] or "")
    name = f"{member['archive']}, {member['name']}" if member else ref["path"] or "image inside the record"
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}... ({len(name):,} characters)"


def beginning_of(ref: dict[str, Any]) -> bytes:
    """The first bytes of an encoded image."""
    if not in_a_file(ref):
        return read_bytes(ref)[:64]
    with open(ref["path"], "rb") as file:
        return file.read(64)


def check_file(path: str) -> None:
    """Refuses what is not a file, such as a pipe that nobody writes to, and what is too large.

    Raises:
        InputError: see there.
        FileNotFoundError: nothing there.
    """
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise InputError("no file")
    if state.st_size > MOST_IMAGE_BYTES:
        raise InputError(TOO_LARGE)
