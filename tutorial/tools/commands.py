"""Runs a command of the package inside a notebook, which has imported everything: no second start to wait for."""

import io
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from unittest.mock import patch


def run(line: str, show: bool = True) -> None:
    """Does what `python -m <line>` does in a terminal, and shows what it says there, refusals included.

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
