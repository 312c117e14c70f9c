"""A measurement in a process of its own: whatever it compiles, replaces or leaves on the GPU ends with it.

The process is forked, so it need not import torch and transformers again, which takes 15 seconds. A fork of a process
that has used CUDA cannot use it: so the one that starts measurements never does, and where a library has done so in
being imported, `method` is "spawn", which imports again.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

Tell = Callable[[str, Any], None]  # takes a figure's name and value
RESULT, MEASURED = "result", "measured"  # the last figure, and its value where nothing went wrong


def figures(
    measure: Callable[..., None], *args: Any, seconds: float, log: Path, method: str = "fork"
) -> Iterator[tuple[str, Any]]:
    """Calls `measure(tell, *args)` in a process of its own; yields each name and value that it tells, at once.

    The last is (RESULT, MEASURED), or why the measurement did not end: an error, a signal, or no time left, when the
    process is killed with all that it has started.

    Args:
        measure: a function of a module.
        seconds: how long it may take.
        log: the file to which goes what it prints.
        method: of starting a process, as `multiprocessing` names it.
    """
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context(method).Process(target=run, args=(send, log, measure, args))
    process.start()
    send.close()
    end = time.monotonic() + seconds
    try:
        name = ""
        while name != RESULT and wait([receive, process.sentinel], max(0.0, end - time.monotonic())):
            name, value = told_by(process, receive)
            yield name, value
        if name != RESULT:
            yield RESULT, f"no time left: stopped after {seconds:.0f} seconds"
    finally:
        for kill in (os.killpg, os.kill):  # the group is there as soon as the process has begun
            with suppress(ProcessLookupError):
                kill(process.pid, signal.SIGKILL)
        process.join()


def told_by(process: BaseProcess, receive: Connection) -> tuple[str, Any]:
    """The next figure of a process that has told one or has ended."""
    with suppress(EOFError):
        if receive.poll():
            return receive.recv()
    process.join()
    return RESULT, f"failed: ended with exit code {process.exitcode}"


def run(send: Connection, log: Path, measure: Callable[..., None], args: tuple) -> None:
    """What the process does."""
    os.setsid()
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    print(f"\n{'=' * 20} {measure.__name__} {args[0] if args else ''}", flush=True)
    try:
        measure(lambda name, value: send.send((name, value)), *args)
        result = MEASURED
    except BaseException as error:
        traceback.print_exc()
        result = reason(error)
    sys.stdout.flush()
    send.send((RESULT, result))


def reason(error: BaseException) -> str:
    """Why there is no measurement, in one line."""
    words = (str(error).strip() or "no words").splitlines()[-1][:300]
    if isinstance(error, ModuleNotFoundError):
        return f"skipped: {error.name} is not installed"
    if type(error).__name__ == "InputError":  # what the training refuses by name
        return f"refused: {words}"
    if "out of memory" in str(error):
        return "failed: out of memory"
    return f"failed: {type(error).__name__}: {words}"
