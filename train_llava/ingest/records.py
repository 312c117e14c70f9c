"""The canonical form of a record, into which every source is read:

    {"id": "0001", "messages": [{"role": "user", "content": "<image>\\nWhat?"}, ...],
     "images": [{"path": "/data/images/a.jpg", "bytes": None}],
     "answers": None, "metric": None, "category": None, "problem": None, "missing": False, "file": 0, "place": None}

`answers`, `metric` and `category` say how the model's answer is scored (see benchmarks.py); `problem` is the reason why
a record cannot be trained on, if there is one; `missing`: whether it names a file that is not there; `file`: the number
of the file in its source; `place`: the row group and row of a parquet file in which its images were left, if they were.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from train_llava.cli import InputError
from train_llava.ingest.benchmarks import tags_of
from train_llava.ingest.formats import Fields, parse
from train_llava.ingest.image_index import ImageIndex
from train_llava.ingest.readers import Unreadable

STRING = Value("string")
TAGS = {"answers": List(STRING), "metric": STRING, "category": STRING}
RECORD = Features(
    {
        "id": STRING,
        "images": List(ImageFeature(decode=False)),
        "messages": List({"role": STRING, "content": STRING}),
        **TAGS,
        "problem": STRING,
        "missing": Value("bool"),
        "file": Value("int32"),
        "place": Value("int64"),
    }
)


def to_canonical(record: Any, number: int, file: str, format: str, fields: Fields, index: ImageIndex) -> dict[str, Any]:
    """One record in the canonical form.

    Args:
        record: as the file holds it.
        number: of the record in its file.
        file: that it is from, for messages.
        format: one of FORMATS.
        fields: of caption records.
        index: where its images are looked up.
    """
    name = record.get("id", record.get("question_id", number)) if isinstance(record, dict) else number
    row = {
        "id": str(name).encode(errors="replace").decode(),
        "images": [],
        "messages": [],
        "problem": None,
        "missing": False,
    }
    try:
        if isinstance(record, Unreadable):
            raise InputError(record)
        messages, images = parse(record, format, fields)
        for image in images:
            data, path = image.get("bytes"), image.get("path")
            if not data:
                found = index.find(path)
                row["missing"] |= found is None
                path = found or index.wanted(path)
            row["images"].append({"bytes": data, "path": path})
        return row | {"messages": messages} | tags_of(record, format, file)
    except Exception as error:  # a record may hold anything at all; whatever it is, it is one bad record
        reason = str(error) if isinstance(error, InputError) else f"malformed, {type(error).__name__}: {error}"
        reason = reason.encode(errors="replace").decode()
        return row | {"images": [], "problem": f"{file}, record {row['id']!r} (number {number}): {reason}"}


def names_in(record: Any, format: str, fields: Fields) -> list[str]:
    """The names of a record's image files; none if the record is malformed."""
    try:
        names = [image["path"] for image in parse(record, format, fields)[1] if not image.get("bytes")]
        return [name for name in names if "::" not in name and "://" not in name]
    except Exception:  # as in `to_canonical`, which reports it
        return []


def drop_invalid(records: Dataset, on_bad_record: str) -> Dataset:
    """The records that can be trained on.

    Raises:
        InputError: there are others, and `on_bad_record` is "error".
    """
    problems = records.data["problem"]
    bad = np.flatnonzero(problems.is_valid().to_numpy())
    if len(bad) == 0:
        return records
    if on_bad_record == "error":
        count = f"{len(bad)} of {len(records)} records cannot be trained on"
        hint = "Mend them or leave them out with --on_bad_record skip"
        raise InputError(f"{count}. The first: {problems[int(bad[0])].as_py()}. {hint}.")
    return records.select(np.setdiff1d(np.arange(len(records)), bad))


def bad_records(parts: list[Dataset]) -> str:
    """A line about the records that cannot be trained on: how many, and the first reason. Empty if there are none."""
    problems = pa.chunked_array([chunk for part in parts for chunk in column(part, "problem").chunks], pa.string())
    if not (count := len(problems) - problems.null_count):
        return ""
    return f"{count:>10,} records cannot be trained on and are left out; the first: {problems.drop_null()[0]}"


def column(records: Dataset, name: str) -> pa.ChunkedArray:
    """One column, without reading the others."""
    return records.select_columns(name).with_format("arrow")[:][name]
