"""What every command does alike: say errors in one line, and keep the libraries quiet."""

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from transformers.utils import logging


class InputError(ValueError):
    """Wrong usage or input. The message names the file or record and says how to mend it."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a command's `main`: an InputError becomes one line on stderr and exit code 2, once per machine; what the
    terminal cannot show is written by its number, and so ends nothing."""

    @functools.wraps(main)
    def wrapper() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError):  # of what a notebook or a test has put there
                stream.reconfigure(errors="backslashreplace")
        # transformers reports, for one, each weight of CLIP's text tower, which a LLaVA leaves behind on purpose
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            main()
        except InputError as error:
            reason = str(error).rpartition("InputError: ")[2]  # a loader's worker puts its traceback in front
            if int(os.environ.get("LOCAL_RANK", "0")) <= 0:
                print(f"error: {reason}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapper


def number(kind: type, least: float, most: float, words: str) -> Callable[[str], float]:
    """A type for argparse: a finite number from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}") from error
        if not (math.isfinite(value) and least <= value <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return read


positive = number(int, 1, 2**63 - 1, "a whole number from 1 on")
not_negative = number(int, 0, 2**63 - 1, "a whole number from 0 on")
