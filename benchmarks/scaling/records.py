"""What it costs to open a chat.json, the first time and every later time, from 1,000 to 5,000,000 records.

    python -m benchmarks.scaling.records [--records 1000 5000000 ...] [--output benchmarks/results/scaling_records]

Makes each in the layout of CC3M-595K with (empty) image files, and opens it in new processes: once, and three times
later. "own memory" is what a process holds for itself (anonymous pages), beyond what it held after its imports; the
records are mapped from one file, which all processes share. Five minutes, 4 GB of temporary disk. Writes .json and
.png.
"""

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.inputs import caption
from benchmarks.result import RESULTS, head, parser, write
from benchmarks.script import last_line
from train_llava.pages.charts import chart

RECORDS = (1_000, 10_000, 100_000, 1_000_000, 5_000_000)
IMAGES = 10_000  # files at most; the records share them
ROUNDS = 3


def write_data(folder: Path, records: int) -> None:
    """Records with captions of 5 to 20 words, written one by one, and the files of their images."""
    rng = random.Random(0)
    names = [f"GCC_train_{i:09}.jpg" for i in range(min(records, IMAGES))]
    with (folder / "chat.json").open("w") as file:
        for i in range(records):
            name = names[i % len(names)]
            question = {"from": "human", "value": "Provide a brief description of the given image.\n<image>"}
            turns = [question, {"from": "gpt", "value": caption(rng)}]
            file.write(("[" if i == 0 else ", ") + json.dumps({"id": name[:-4], "image": name, "conversations": turns}))
        file.write("]")
    (folder / "images").mkdir()
    for name in names:
        (folder / "images" / name).touch()


def private_mb() -> float:
    """Memory of this process alone, mapped files not counted: their pages are in the cache of the system anyway."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1000


def opened(folder: str, reads: int = 10_000) -> dict[str, float]:
    """Opens a folder in this process and reads records at random."""
    import numpy as np

    from train_llava.data import LlavaDataset

    before, start = private_mb(), time.perf_counter()
    dataset = LlavaDataset(folder)
    seconds = time.perf_counter() - start
    indices = np.random.default_rng(0).integers(len(dataset), size=reads).tolist()
    start = time.perf_counter()
    for index in indices:
        dataset.records[index]
    each = (time.perf_counter() - start) / reads
    return {
        "seconds": round(seconds, 2),
        "microseconds_per_random_record": round(each * 1e6, 1),
        "own_memory_mb": round(private_mb() - before),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
    }


def written(folder: Path, records: int) -> None:
    """`write_data` in a process of its own: a child's peak memory starts at its parent's."""
    writer = multiprocessing.get_context("spawn").Process(target=write_data, args=(folder, records))
    writer.start()
    writer.join()


def open_anew(folder: Path, cache: Path) -> dict[str, float]:
    """`opened` in a new process."""
    variables = {"HF_DATASETS_CACHE": str(cache), "PATH": "/usr/bin:/bin", "DS_ACCELERATOR": "cpu"}
    return last_line("benchmarks.scaling.records", "--open", folder, variables=variables)


def measure(work: Path, records: int) -> dict[str, Any]:
    """A row: the first opening, and the medians of the later ones."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        data, cache = Path(folder, "data"), Path(folder, "cache")
        data.mkdir()
        written(data, records)
        first = open_anew(data, cache)
        later = [open_anew(data, cache) for _ in range(ROUNDS)]
    return {"records": records, "first": first, "later": {name: median(one[name] for one in later) for name in first}}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory of opening, and time of a random record, over the number of records."""
    x = [row["records"] for row in rows]
    panels = [("seconds", "seconds to open"), ("own_memory_mb", "memory of its own, MB")]
    panels += [("microseconds_per_random_record", "microseconds for a random record")]
    with chart(path, 13.8, 3.8, columns=3) as axes:
        for panel, (name, label) in zip(axes, panels, strict=True):
            for when in ("first", "later"):
                y = [row[when][name] for row in rows]
                panel.plot(x, y, "o-", label=f"{when} opening", clip_on=False)
                slope = 0 if panel is axes[2] else (y[-1] - y[0]) / (x[-1] - x[0])
                panel.plot(x, [y[0] + slope * (n - x[0]) for n in x], "--", color="grey", zorder=0)
            panel.lines[-1].set_label("theory: constant" if panel is axes[2] else "theory: constant + linear")
            panel.set(xscale="log", xlabel="records", ylabel=label, ylim=(0, None))
        axes[0].set(yscale="log", ylim=(0.01, 100))
        axes[1].set(yscale="log", ylim=(1, 200))


def main() -> None:
    flags = parser(__doc__, "--output", RESULTS / "scaling_records")
    flags.add_argument("--records", type=int, nargs="+", default=RECORDS)
    flags.add_argument("--open", help=argparse.SUPPRESS)  # what the new processes do
    args = flags.parse_args()
    if args.open:
        print(json.dumps(opened(args.open)))
        return
    result, rows = head(__doc__) | {"rounds": ROUNDS}, []
    with tempfile.TemporaryDirectory() as work:
        for records in args.records:
            rows.append(measure(Path(work), records))
            print(rows[-1], flush=True)
    write(args.output, result | {"rows": rows})
    draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
