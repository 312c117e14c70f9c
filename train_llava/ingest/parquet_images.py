"""Images that are left inside a parquet file, local or on the hub, and read from there one by one.

A row group can be read forwards only, some rows at a time. So LlavaSampler hands out the records of a row group in
nearly the order in which they lie, and a reader of each row group in use stays open at the row that it has reached.
"""

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

IN_PARQUET = re.compile(r"(?P<file>.+\.(?i:parquet))::(?P<column>.+)::(?P<group>\d+):(?P<row>\d+):(?P<number>\d+)$")
WINDOW = 32  # rows that are read, and shuffled, together
PLACE = "train_llava: row group and row"  # a field that no data set has
ROWS = 500  # read together where their images are not


def image_bytes(file: str, column: str, group: str, row: str, number: str) -> bytes:
    """The encoded image in a row of a column of images or of lists of images.

    Raises:
        FileNotFoundError: no such file.
        ValueError: there is no image in that place.
    """
    # a forked worker must not read with its parent's files
    value = open_row_group(file, column, int(group), os.getpid())[int(row)]
    image = (value if isinstance(value, list) else [value])[int(number)]
    if not image or image["bytes"] is None:
        raise ValueError("the row holds no image")
    return image["bytes"]


class RowGroup:
    """The rows of one column in a row group, by number. Reading is cheap as long as the numbers hardly ever fall."""

    def __init__(self, file: str, column: str, group: int) -> None:
        self.file, self.column, self.group = file, column, group
        self._rewind()

    def __getitem__(self, row: int) -> Any:
        if row < self.start:
            self._rewind()
        while row >= self.start + len(self.rows):
            self.start += len(self.rows)
            self.rows = next(self.batches).column(0)
        return self.rows[row - self.start].as_py()

    def _rewind(self) -> None:
        options = {"row_groups": [self.group], "columns": [self.column], "use_threads": False}
        self.batches = open_parquet(self.file, os.getpid()).iter_batches(WINDOW, **options)
        self.start, self.rows = 0, next(self.batches).column(0)


@lru_cache(maxsize=256)  # as many as a rank has samples in a step: each is in another row group
def open_row_group(file: str, column: str, group: int, process: int) -> RowGroup:
    """A reader of a row group, which stays at the row that it has reached."""
    return RowGroup(file, column, group)


@lru_cache(maxsize=32)
def open_parquet(file: str, process: int) -> pq.ParquetFile:
    """Opens a parquet file. A local one is mapped into memory, so that what is read of it need not be held."""
    return pq.ParquetFile(fsspec.open(file).open()) if "://" in file else pq.ParquetFile(file, memory_map=True)


def rows_without_images(file: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file. Each image of these columns is replaced by its place, without its bytes; the field PLACE
    holds the row group and the row in it.

    Columns of images are those of {"bytes", ...} and of lists of them; others are read as they are.
    """
    parquet = open_parquet(file, os.getpid())
    schema = parquet.schema_arrow
    columns = [name for name in columns if name in schema.names and holds_images(schema.field(name).type)]
    # of an image only its path is read, which says how many there are
    leaves = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
    leaves = [leaf for leaf in leaves if not (leaf.split(".")[0] in columns and leaf.endswith(".bytes"))]
    for group in range(parquet.num_row_groups):
        batches = parquet.iter_batches(ROWS, row_groups=[group], columns=leaves, use_threads=False)
        for row, record in enumerate(record for batch in batches for record in batch.to_pylist()):
            for column in columns:
                images, where = record.get(column), f"{file}::{column}::{group}:{row}"
                if isinstance(images, list):
                    record[column] = [{"bytes": None, "path": f"{where}:{i}"} for i in range(len(images))]
                elif images is not None:
                    record[column] = {"bytes": None, "path": f"{where}:0"}
            yield record | {PLACE: (group, row)}


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column's type is {"bytes", "path"} or a list of these, as `datasets` writes images."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
