"""Runs a command of the package inside a notebook, which has imported everything: no second start to wait for."""

import shlex
import sys
from contextlib import redirect_stderr, suppress
from importlib import import_module
from unittest.mock import patch


def run(line: str) -> None:
    """Does what `python -m <line>` does in a terminal, and shows what it says there, refusals included."""
    module, *flags = shlex.split(line)
    with patch.object(sys, "argv", [module, *flags]), redirect_stderr(sys.stdout), suppress(SystemExit):
        import_module(module).main()
