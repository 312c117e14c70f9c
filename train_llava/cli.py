"""What all commands share: errors in one line, numbers as flags, and safe writing.

A command writes apart from what it reads, one process at a time, and a file is in its place only when it is whole. A
lock is the system's own (flock) on the folder or file itself, so nothing is left of it when a process dies. Forked
workers release it at once: a worker that outlives its parent must not keep it.
"""

import argparse
import fcntl
import functools
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils import logging


class InputError(ValueError):
    """Wrong usage or input. The message names the file or record, and says how to mend it."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a command's `main`. An InputError becomes one line on stderr, once per machine, and exit code 2.

    A character that the terminal cannot show is written by its number, instead of ending the command.
    """

    @functools.wraps(main)
    def wrapper() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError):  # of what a notebook or a test has put there
                stream.reconfigure(errors="backslashreplace")
        # transformers reports, for one, each weight of CLIP's text tower, which a LLaVA leaves behind on purpose
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        datasets = sys.modules.get("datasets")  # which a command that reads no data has not imported
        if datasets and not is_terminal(sys.stderr):  # a file would hold one bar after the other
            datasets.disable_progress_bars()
        try:
            main()
        except InputError as error:
            reason = str(error).rpartition("InputError: ")[2]  # a loader's worker puts its traceback in front
            if int(os.environ.get("LOCAL_RANK", "0")) <= 0:
                print(f"error: {reason}", file=sys.stderr, flush=True)
            if dist.is_initialized():  # a thread of Gloo's may hold a tensor still: Python's own end would abort
                sys.stdout.flush()
                os._exit(2)
            sys.exit(2)
        except BrokenPipeError:  # as in `... | head`: nobody reads on
            lead_nowhere(sys.stdout)
            sys.exit(128 + signal.SIGPIPE)

    return wrapper


def lead_nowhere(stream: TextIO) -> None:
    """Drops what is written to a stream from now on, also what Python itself writes at its end."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody watches; a closed stream is None."""
    return stream is not None and stream.isatty()


def command_parser(description: str | None, **options) -> argparse.ArgumentParser:
    """A parser of flags, which shows the description as it is written and takes no abbreviations."""
    options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(description=description, **options)


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


UNFINISHED = ".unfinished-"  # the beginning of names of files and folders that are being written
HELD: dict[tuple[int, int], int] = {}  # what this process has locked: device and inode, and the open file


def check_apart(output: str | Path, *read: str | Path | None, is_file: bool = False) -> None:
    """Refuses an output that the command reads (links are followed), a folder above that, and a file in it. A folder
    inside of what is read is a place of its own.

    Raises:
        InputError: see there.
    """
    target = Path(os.path.realpath(output))
    for name in read:
        if name is None or not os.path.exists(name):  # an id of the hub
            continue
        place = Path(os.path.realpath(name))
        if is_file:
            how = "is" if target == place else "lies in" if target.parent == place else None
        else:
            how = "is" if target == place else "lies above" if target in place.parents else None
        if how:
            raise InputError(f"{output} {how} {name}, which is read here. Give another place to write to.")


@contextmanager
def output_folder(folder: Path, *read: str | Path | None) -> Iterator[None]:
    """Holds a folder for this process alone until the block ends.

    Creates it if it is not there, and removes it again if nothing was written into it.

    Raises:
        InputError: see `check_apart`; or it is a file, cannot be written to, or another process writes into it.
    """
    check_apart(folder, *read)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        place = os.open(folder, os.O_RDONLY)
    except OSError as error:
        remove_empty(made)
        raise InputError(f"{folder}: cannot be written to ({error.strerror}). Give another place.") from error
    with locked(folder, place):
        try:
            yield
        finally:
            remove_empty(made)


@contextmanager
def shared_output_folder(folder: Path, check: Callable[[], None], *read: str | Path | None) -> Iterator[None]:
    """The same for several ranks, of which the first writes. It calls `check` before; all ranks refuse what it refuses.

    Raises:
        InputError: see `output_folder` and `check`.
    """
    with ExitStack() as stack:
        reason = None
        if PartialState().is_main_process:
            try:
                stack.enter_context(output_folder(folder, *read))
                check()
            except InputError as error:
                reason = str(error)
        [reason] = broadcast_object_list([reason])
        if reason:
            raise InputError(reason)
        yield


def remove_empty(folders: list[Path]) -> None:
    """Removes the folders that are empty, from the innermost on."""
    with suppress(OSError):
        for path in folders:
            path.rmdir()


def is_still(place: int, path: Path) -> bool:
    """Whether what was opened is what the path leads to: it may have been moved or replaced since."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(place), os.stat(path))
    return False


@contextmanager
def locked(path: Path, place: int) -> Iterator[None]:
    """Holds a file or folder, opened as `place`, against other processes, and closes it at the end. A folder that this
    process holds already may be held again.

    Raises:
        InputError: another process holds it, or another thread the file.
    """
    inode = (os.fstat(place).st_dev, os.fstat(place).st_ino)
    if inode in HELD and path.is_dir():
        os.close(place)
        yield
        return
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_still(place, path):
            raise BlockingIOError  # the other process has finished meanwhile, and moved it to its place
    except BlockingIOError as error:
        os.close(place)
        raise InputError(f"{path}: another process is writing there. Wait for it, or give another place.") from error
    except OSError:
        print(f"warning: no locks on the disk of {path}; let nothing else write there", file=sys.stderr)
    HELD[inode] = place
    try:
        yield
    finally:
        if HELD.pop(inode, None) is not None:
            os.close(place)


def release_locks() -> None:
    """Closes, in a forked process, what its parent holds."""
    for place in HELD.values():
        os.close(place)
    HELD.clear()


os.register_at_fork(after_in_child=release_locks)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives the path of a new file beside `path`, to be written within the block; it replaces `path` when the block
    ends.

    Raises:
        InputError: nothing can be written there, or another process does.
    """
    new = path.with_name(f"{UNFINISHED}{path.name}")
    with open_locked(new) as file:
        try:
            file.truncate(0)
            yield new
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    """JSON Lines, with letters of all languages as they are."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_whole(path: Path, text: str) -> None:
    """Writes a text as a `whole_file`."""
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def open_locked(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to append to, held against other processes.

    Creates it if it is not there, and removes it again if it stays empty.

    Raises:
        InputError: nothing can be written there, or another process does.
    """
    made = not path.exists()
    if not made and not path.is_file():
        raise InputError(f"{path} is no file. Give another place.")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            place = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.enter_context(locked(path, place))
            file = stack.enter_context(path.open("ab"))
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}). Give another place.") from error
        try:
            yield file
        finally:
            if made and is_still(place, path) and not path.stat().st_size:
                path.unlink()


def check_same(facts: dict[str, Any], file: Path, *others: Path) -> None:
    """Refuses to replace results about something else.

    Args:
        facts: what the new results are about; `file`, if it is there, must hold the same.
        others: files that are written beside `file`.

    Raises:
        InputError: see there.
    """
    if not any(path.exists() for path in (file, *others)):
        return
    known = None
    with suppress(OSError, ValueError):
        known = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(known, dict) or any(known.get(name) != value for name, value in facts.items()):
        about = {name: known.get(name) for name in facts} if isinstance(known, dict) else "something else"
        raise InputError(f"{file.parent} holds results about {about}. Give another place to write to.")
