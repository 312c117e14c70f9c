"""What all benchmarks share: their flags, the head of a result, and the files that hold it."""

import argparse
import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def parser(doc: str, flag: str = "", default: Path | None = None) -> argparse.ArgumentParser:
    """A parser whose help is the benchmark's docstring.

    Args:
        doc: the docstring.
        flag: `--json` for one result file, `--output` for a result of several files, named without their endings.
        default: where the result goes if the flag is not given; with None it is printed only.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if flag:
        made.add_argument(flag, type=Path, default=default)
    return made


def head(doc: str, *flags: str) -> dict[str, Any]:
    """The first lines of every result: the command, which the docstring names, with these flags; date and machine."""
    command = re.search(r"^ +(python -m [\w.]+)", doc, re.M)[1]
    return {"command": " ".join([command, *flags]), **machine()}


def machine() -> dict[str, str]:
    """Date, processor, number of threads, version of torch and, where there is one, the GPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    where = ", ".join([model, f"{os.cpu_count()} threads", f"torch {torch.__version__}", *gpu])
    return {"date": str(date.today()), "machine": where}


def write(path: Path | None, result: dict[str, Any], markdown: str = "") -> None:
    """Writes a result as .json and a table beside it as .md; prints the table. Without a path nothing is written."""
    if path:
        path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        if markdown:
            path.with_suffix(".md").write_text(markdown)
    if markdown:
        print(markdown)


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]]) + "\n"
