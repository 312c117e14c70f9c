"""Runs commands of the package as a terminal does, from a notebook."""

import io
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

from benchmarks.script import environment


def run(line: str, show: bool = True) -> None:
    """Does what `python -m <line>` does in a terminal, and shows what it says there, refusals included. It runs inside
    the notebook, which has imported everything: no second start to wait for.

    Paths are shown as seen from this folder, so that a lesson says the same on every machine.
    """
    module, *flags = shlex.split(line)
    said = io.StringIO()
    with (
        patch.object(sys, "argv", [module, *flags]),
        redirect_stdout(said),
        redirect_stderr(said),
        suppress(SystemExit),
    ):
        import_module(module).main()
    if show:
        print(said.getvalue().replace(f"{Path.cwd()}/", ""), end="")


def run_zero2(variables: str, flags: str) -> None:
    """Does what `<variables> bash run_zero2.sh <flags>` does in a terminal: two processes on the CPU, with this Python.

    Raises:
        CalledProcessError: the training failed.
    """
    settings = dict(word.split("=", 1) for word in shlex.split(f"{variables} CUDA_VISIBLE_DEVICES= NUM_PROCESSES=2"))
    command = ["bash", "run_zero2.sh", *shlex.split(flags)]
    subprocess.run(command, env=environment(**settings), check=True, capture_output=True)
