"""Files -> records as they were published, one at a time. READERS maps the suffix of a file to its reader."""

import codecs
import json
import os
import re
import shlex
import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, BinaryIO, TextIO

import pyarrow.parquet as pq

from train_llava.cli import InputError
from train_llava.ingest.benchmarks import HEAD, benchmark_records
from train_llava.ingest.formats import Fields
from train_llava.ingest.image_files import STORED
from train_llava.ingest.image_index import tar_members
from train_llava.ingest.image_kinds import SUFFIXES
from train_llava.ingest.limits import MOST_RECORD_BYTES
from train_llava.ingest.parquet_images import rows_without_images

BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
# The first bytes of files of other kinds that are named like data, and what to do about them
OTHER_KINDS = {
    b"PAR1": "a parquet file: name it so",
    b"\x1f\x8b": "packed: unpack it with gunzip",
    b"PK\x03\x04": "an archive or a spreadsheet: unpack it, or save it as JSON",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file with git lfs pull",
    b"<": "a web page, as a failed download leaves it: fetch it again",
}
BEHIND = tuple(",]}[{ \t\r\n")  # what may stand behind a value of JSON
LONGEST_REASON = 300  # characters
TOO_LARGE = f"a record of more than {MOST_RECORD_BYTES >> 20} MB"


class Unreadable(str):
    """Yielded by a reader in place of what cannot be read: the reason."""


class NoRecords(InputError):
    """The file is whole, and of a kind that holds no records."""


def records_in(file: str, fields: Fields, in_place: bool = False) -> Iterator[Any]:
    """The records of a file, local or on the hub. If it cannot be read any further, an Unreadable is the last.

    Raises:
        NoRecords: see there.
    """
    suffix = os.path.splitext(file)[1].lower()
    reader = IN_PLACE.get(suffix, READERS[suffix]) if in_place else READERS[suffix]
    try:
        yield from reader(file, fields)
    except NoRecords:
        raise
    except Exception as error:  # whatever the libraries raise on broken files
        yield Unreadable(f"cannot be read any further: {reason_of(error, file)}")


def reason_of(error: Exception, file: str) -> str:
    """The reason why something cannot be read, in a line; for text that is not UTF-8, with what it may be."""
    if isinstance(error, UnicodeDecodeError) and error.encoding.startswith("utf-8"):
        try:
            codecs.getincrementaldecoder("gb18030")().decode(error.object)  # which may end inside a character
        except UnicodeDecodeError:
            return "not UTF-8 text. Save it as UTF-8"
        return f"not UTF-8 text, perhaps GB18030: iconv -f GB18030 -t UTF-8 {shlex.quote(file)} > utf8.json"
    return (str(error).splitlines() or [""])[0][:LONGEST_REASON].removesuffix(".") or type(error).__name__


def read_json(file: str, fields: Fields) -> Iterator[Any]:
    """JSON lists and objects, one after the other or in a line each, whatever the suffix is; UTF-8, or UTF-16 with its
    mark; and a benchmark's object around its records."""
    with open(file, "rb") as binary:
        head = known_beginning(binary)
        if not head.strip():
            raise NoRecords("it is empty")
        encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
        binary.seek(0)
        if (records := benchmark_records(file, binary.read(HEAD))) is not None:
            if records == []:
                raise NoRecords("answers, which are read with their questions")
            yield from records
            return
        binary.seek(0)
        lines = encoding != "utf-16" and in_lines(binary, file)
    if lines:
        yield from read_lines(file)
    else:
        with open(file, encoding=encoding) as stream:
            yield from read_values(stream)


def known_beginning(binary: BinaryIO) -> bytes:
    """The first bytes of a file.

    Raises:
        ValueError: it is of another kind.
    """
    head = binary.read(1 << 12)
    for beginning, what in OTHER_KINDS.items():
        if head.startswith(beginning):
            raise ValueError(what)
    return head


def in_lines(binary: BinaryIO, file: str) -> bool:
    """Whether a record ends where its line does."""
    first = binary.readline(MOST_RECORD_BYTES).removeprefix(b"\xef\xbb\xbf").strip()
    if first.startswith(b"["):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):  # broken, or an object of many lines
        return file.lower().endswith(".jsonl") and first != b"{"


def read_lines(file: str) -> Iterator[Any]:
    """JSON Lines; a broken line is one bad record, not the end."""
    with open(file, "rb") as lines:
        for number, line in enumerate(bounded_lines(lines), 1):
            if line.strip():
                try:
                    if len(line) > MOST_RECORD_BYTES:
                        raise ValueError(TOO_LARGE)
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield Unreadable(f"line {number}: not valid JSON ({reason_of(error, file)})")


def bounded_lines(lines: BinaryIO) -> Iterator[bytes]:
    """Lines; of a line beyond the bound only the beginning."""
    while line := lines.readline(MOST_RECORD_BYTES + 1):
        rest = line
        while len(rest) > MOST_RECORD_BYTES and not rest.endswith(b"\n"):
            rest = lines.readline(MOST_RECORD_BYTES + 1)
        yield line


def read_values(stream: TextIO, chunk: int = 1 << 22) -> Iterator[Any]:
    """The elements of JSON lists, and objects outside of them, decoded one after the other, so that memory never holds
    them all."""
    decoder, blanks, text, at, inside, first = json.JSONDecoder(), re.compile(r"[\s,]*"), "", 0, False, True
    passed, lines, line_start = 0, 1, 0  # of the text before `text`: characters, and lines begun; where the last began
    while True:
        try:
            at = blanks.match(text, at).end()
            sign = text[at : at + 1]
            if sign == ("]" if inside else "["):
                inside, at = not inside, at + 1
                continue
            if sign and not inside and sign != "{":
                raise json.JSONDecodeError("Extra data", text, at)
            value, end = decoder.raw_decode(text, at)
            if text[end : end + 1] in BEHIND:  # a number could go on
                yield value
                at, first = end, False
                continue
            error = None
        except ValueError as broken:  # or only cut off where this chunk ends
            error, value = broken, None
        more = stream.read(max(chunk, len(text) - at))
        if more:
            if len(text) - at > MOST_RECORD_BYTES:
                raise ValueError(TOO_LARGE) if inside or not first else NoRecords("one large JSON object")
            if breaks := text.count("\n", 0, at):
                lines, line_start = lines + breaks, passed + text.rindex("\n", 0, at) + 1
            passed, text, at = passed + at, text[at:] + more, 0
        elif error is None:
            yield value
            at, first = end, False
        elif not sign and not inside:
            return
        else:
            place = getattr(error, "pos", at)
            line = lines + text.count("\n", 0, place)
            begins = passed + text.rindex("\n", 0, place) + 1 if "\n" in text[:place] else line_start
            where = f"line {line} column {passed + place - begins + 1} (char {passed + place})"
            raise ValueError(f"not valid JSON, {getattr(error, 'msg', error)}: {where}") from error


def read_parquet(file: str, fields: Fields) -> Iterator[Any]:
    """Rows of a parquet file."""
    for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
        yield from batch.to_pylist()


def read_parquet_in_place(file: str, fields: Fields) -> Iterator[Any]:
    """Rows of a parquet file, here or on the hub, whose images stay where they are."""
    return rows_without_images(file, ["images", "image", fields["image"]])


def read_tar(file: str, fields: Fields) -> Iterator[Any]:
    """WebDataset: files that share a name up to the first dot make up one record; images are read in place."""
    with open(file, "rb") as binary:
        known_beginning(binary)
    with tarfile.open(file, "r:") as tar:  # not packed: positions inside would be others than in the file
        for key, group in groupby(tar_members(tar), key=lambda m: re.match(r"(?:.*/)?[^/.]*", m.name)[0]):
            try:
                yield shard_record(file, tar, key, [*group], fields)
            except (ValueError, RecursionError) as error:
                yield Unreadable(f"{key}: {reason_of(error, file)}")


def shard_record(
    file: str, tar: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], fields: Fields
) -> dict[str, Any]:
    """The record that some members of a shard make up.

    Raises:
        ValueError: a text among them is too large, not UTF-8, or not the JSON of an object.
    """
    record: dict[str, Any] = {"id": key}
    images = []
    for member in members:
        kind = member.name[len(key) :].lower()
        if kind in SUFFIXES:
            images.append({"path": f"{file}::{member.name}::{member.offset_data}:{member.size}:{STORED}"})
        elif kind in (".json", ".txt"):
            if member.size > MOST_RECORD_BYTES:
                raise ValueError(TOO_LARGE)
            text = tar.extractfile(member).read().decode("utf-8-sig")
            content = json.loads(text) if kind == ".json" else {fields["answer"]: text}
            if not isinstance(content, dict):
                raise ValueError(f"{member.name} holds no JSON object")
            record |= content
    return record | {"images": images, fields["image"]: images}


def refuse_kind(hint: str) -> Callable[[str, Fields], Iterator[Any]]:
    """A reader for a kind of file that is not read: its error says what to do."""

    def reader(file: str, fields: Fields) -> Iterator[Any]:
        raise NoRecords(hint)
        yield

    return reader


IN_PLACE = {".parquet": read_parquet_in_place}
READERS = {".json": read_json, ".jsonl": read_json, ".parquet": read_parquet, ".tar": read_tar}
SUFFIXES_READ = tuple(READERS)
TABLE = (
    "a table: save it as JSON Lines, such as with datasets.load_dataset('csv', data_files=...)['train'].to_json(...)"
)
READERS |= dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx"), refuse_kind(TABLE))
SAVED = "written by save_to_disk: save it as parquet, with datasets.load_from_disk(...).to_parquet(...)"
READERS |= {".arrow": refuse_kind(SAVED)}
READERS |= dict.fromkeys((".gz", ".tgz", ".bz2", ".xz", ".zst"), refuse_kind("packed: unpack it"))
