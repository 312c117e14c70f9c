"""What every command does alike: say errors in one line, and keep the libraries quiet."""

import functools
import os
import sys
from collections.abc import Callable

from transformers.utils import logging


class InputError(ValueError):
    """Wrong usage or input. The message names the file or record and says how to mend it."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a command's `main`: an InputError becomes one line on stderr and exit code 2, once per machine."""

    @functools.wraps(main)
    def wrapper() -> None:
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
