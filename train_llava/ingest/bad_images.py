"""Images that cannot be read: a report that lists them, and a limit beyond which they are an error."""

import fcntl
import json
import math
from pathlib import Path

from train_llava.cli import InputError


def most_bad_images(most: float, records: int) -> int:
    """How many bad images --max_bad_images allows in so many records. A share is rounded up, so that one image does not
    end a small run."""
    return int(most) if most >= 1 else math.ceil(most * records)


class BadImages:
    """A JSON Lines report of the images that could not be read, each once; too many of them are an error.

    Args:
        report: the file; shared by all workers and ranks that see it, and kept when a run is resumed.
        most: how many there may be, as a number (1 or more) or as a share of the records (below 1; above 0, one may
            always be).
    """

    def __init__(self, report: Path, most: float) -> None:
        self.report, self.most, self.records = report, most, 0

    def limit(self, records: int) -> int:
        """The number that `most` allows; remembers how many records there are."""
        self.records = records
        return most_bad_images(self.most, records)

    def summary(self) -> str:
        """How many there were in the whole run, empty without any."""
        count = len(self.report.read_text(encoding="utf-8").splitlines()) if self.report.is_file() else 0
        names = f"{self.report} names them, and the records seen in their place"
        return f"{count:,} records have images that cannot be read; {names}" if count else ""

    def add(self, record_id: str, reason: str, replaced_by: str) -> None:
        """Adds an image to the report, and the record that is seen in its place.

        Raises:
            InputError: there are more than allowed by now.
        """
        known = json.dumps({"id": record_id, "reason": reason}, ensure_ascii=False)[:-1]
        line = known + json.dumps({"replaced_by": replaced_by}, ensure_ascii=False).replace("{", ", ", 1) + "\n"
        self.report.parent.mkdir(parents=True, exist_ok=True)
        with self.report.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # workers and ranks write to the same file
            file.seek(0)
            lines = file.readlines()
            if not any(other.startswith(known) for other in lines):
                file.write(line)
                lines.append(line)
        if len(lines) > self.limit(self.records):
            count = f"{len(lines)} images cannot be read, more than --max_bad_images {self.most:g} allows"
            raise InputError(f"{count}. The last: record {record_id!r}: {reason} All are listed in {self.report}.")
