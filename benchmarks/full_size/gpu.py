"""What benchmarks/gpu.sh runs, in 9 minutes on one GPU: a diagnosis of the machine, then a ladder of trainings.

    python -m benchmarks.full_size.gpu [--json FILE] [--dry_run]

The model is CLIP-ViT-L/336 + Qwen1.5-4B with random weights, made on the GPU; samples have some 620 tokens, 20 of them
learned. A row is ten steps, 20 timed ones and 3 under torch's profiler, without accumulation (ladder.py, steps.py).
Each figure is in the file the moment it is known, benchmarks/results/gpu_<name>.json if no other one is given; what the
trainings print goes to a .log beside it. What is refused, not installed, out of memory or out of time says so in its
`result`. docs/gpu.md says how to read it.

--dry_run goes through all of it on a CPU with the demo's shapes, in two minutes. Its numbers mean nothing.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.full_size.diagnose import diagnose, look_at_packages
from benchmarks.full_size.ladder import rows
from benchmarks.full_size.process import MEASURED, RESULT, figures, reason
from benchmarks.result import RESULTS, parser, write

SECONDS = 9 * 60  # of the whole, imports and gpu.sh included
LONGEST = 150  # seconds of one row: torch.compile and DeepSpeed's AdamW for CPUs are compiled within
LEAST = 25  # seconds without which no row is begun


class Ladder:
    """The measurements one by one, and the file that they fill."""

    def __init__(self, file: Path, on_gpu: bool) -> None:
        self.end = psutil.Process().create_time() + SECONDS
        self.file, self.log, self.on_gpu, self.method = file, file.with_suffix(".log"), on_gpu, "fork"
        self.log.unlink(missing_ok=True)
        self.machine: dict[str, Any] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.head = {"command": "bash benchmarks/gpu.sh", "date": str(date.today())}
        if not on_gpu:
            self.head |= {"command": "bash benchmarks/gpu.sh --dry_run"}
            self.head |= {"note": "numbers mean nothing: a CPU, in fp32, and the demo's shapes stand in for a GPU's"}

    def run(self) -> None:
        """All of it; a row's `result` says why its figures are not there."""
        print("diagnosis", flush=True)
        self.try_both(diagnose)
        with tempfile.TemporaryDirectory() as name:
            work, lacking = Path(name), self.machine[RESULT] != MEASURED and self.machine[RESULT]
            os.environ["HF_DATASETS_CACHE"] = str(work / "cache")
            lacking = lacking or self.get_ready(work)
            for row in rows(self.machine.get("gpu_memory_gib")):
                print(row.name, flush=True)
                found = self.rows[row.name] = asdict(row)
                if lacking:
                    self.keep(found, RESULT, lacking)
                else:
                    steps = import_module("benchmarks.full_size.steps")
                    self.measure(found, getattr(steps, row.measure), row, self.machine, work, self.on_gpu)

    def get_ready(self, work: Path) -> str | None:
        """Imports what all rows need, and lays model and data out; or says why there will be no row."""
        try:
            steps = import_module("benchmarks.full_size.steps")
        except ImportError as error:
            return reason(error)
        self.try_both(look_at_packages)
        if self.machine[RESULT] == MEASURED:
            self.measure(self.machine, steps.lay_out, work, self.on_gpu)
        return None if self.machine[RESULT] == MEASURED else self.machine[RESULT]

    def try_both(self, function: Callable[..., None]) -> None:
        """Measures the machine, if need be in processes that are not forked: an import may have used CUDA."""
        self.measure(self.machine, function, self.on_gpu)
        if self.machine[RESULT] != MEASURED and self.method == "fork":
            self.method = "spawn"
            self.measure(self.machine, function, self.on_gpu)

    def measure(self, into: dict[str, Any], function: Callable[..., None], *args: Any) -> None:
        """Fills `into` with what `function(tell, *args)` tells, each figure at once in the file, too."""
        left = self.end - time.time()
        if left < LEAST:
            self.keep(into, RESULT, "no time left")
            return
        for figure in figures(function, *args, seconds=min(left, LONGEST), log=self.log, method=self.method):
            self.keep(into, *figure)

    def keep(self, into: dict[str, Any], name: str, value: Any) -> None:
        """Writes a figure to the file, and prints it if it is a short one."""
        into[name] = value
        if not isinstance(value, dict | list) or len(value) < 4:
            print(f"  {name}: {value}", flush=True)
        write(self.file, {**self.head, "diagnosis": self.machine, "rows": self.rows})


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the measurement ends, too
    flags = parser(__doc__, "--json")
    flags.add_argument("--dry_run", action="store_true", help="on a CPU, with the demo's shapes")
    args = flags.parse_args()
    if not args.dry_run and not torch.cuda.device_count():
        sys.exit("error: no NVIDIA GPU here; --dry_run goes through everything on a CPU")
    Ladder(args.json or RESULTS / f"gpu{'_dry_run' * args.dry_run}.json", not args.dry_run).run()


if __name__ == "__main__":
    main()
