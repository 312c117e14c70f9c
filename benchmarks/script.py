"""Trainings by the repository's scripts, and benchmarks that run themselves in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.result import ROOT


def environment(**variables: Any) -> dict[str, str]:
    """Variables for a script such as run_zero2.sh, which then finds this Python first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path} | {name: str(value) for name, value in variables.items()}


def read_log(folder: Path) -> list[dict[str, float]]:
    """What a training logged."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def last_line(module: str, *words: Any, variables: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a benchmark in a process of its own, which gives its answer as JSON in the last line that it prints.

    `variables` are all that it finds in its environment; by default those of this process.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
