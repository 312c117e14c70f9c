"""What a run logs and prints: launch.log in the output folder has what libraries report, the terminal their errors."""

import logging
import platform
from importlib.metadata import version
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from deepspeed.utils import logger as deepspeed_logger
from transformers.utils import logging as transformers_logging

from train_llava.cli import lead_nowhere
from train_llava.planning.arguments import LlavaTrainingArguments

LOG_FILE = "launch.log"
OWN = logging.getLogger(__name__)
OWN.setLevel(logging.INFO)
VERSIONS = ("torch", "transformers", "deepspeed", "peft", "accelerate", "datasets")


class RunLog:
    """Collects within its block what libraries log, and Python's warnings; `begin` writes them to the file.

    Until then nothing is written, for a run may be refused. With --log_level info or debug the terminal shows all.
    """

    def __init__(self, args: LlavaTrainingArguments) -> None:
        self.folder, self.rank = Path(args.output_dir), args.process_index
        self.memory = MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self.terminal = logging.StreamHandler()
        self.terminal.setLevel(logging.INFO if args.log_level in ("info", "debug", "detail") else logging.ERROR)

    def __enter__(self) -> "RunLog":
        for handler in (self.memory, self.terminal):
            logging.getLogger().addHandler(handler)
        transformers_logging.disable_default_handler()  # it writes to the terminal whatever the level lets through
        transformers_logging.enable_propagation()
        self.theirs, deepspeed_logger.handlers[:] = deepspeed_logger.handlers[:], []
        deepspeed_logger.propagate = True
        logging.captureWarnings(True)
        return self

    def begin(self) -> None:
        """Writes what was collected, and from now on everything at once. Several runs go one below the other."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # another machine's may be missing
            file = logging.FileHandler(self.folder / LOG_FILE, encoding="utf-8")
        except OSError:
            return
        file.setFormatter(logging.Formatter(f"%(asctime)s rank {self.rank} %(levelname)s %(name)s: %(message)s"))
        self.memory.setTarget(file)
        self.memory.flush()
        self.memory.capacity = 1
        if self.rank == 0:
            versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
            OWN.info("Python %s, %s", platform.python_version(), versions)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        logging.captureWarnings(False)
        deepspeed_logger.propagate, deepspeed_logger.handlers[:] = False, self.theirs
        transformers_logging.disable_propagation()
        transformers_logging.enable_default_handler()
        for handler in (self.memory, self.terminal):
            logging.getLogger().removeHandler(handler)
        if self.memory.target is not None:
            self.memory.target.close()
        self.memory.close()


class LastingStream:
    """A stream to print to that outlives its reader: once the pipe is closed or the terminal is gone, what is printed
    is dropped. So a training goes on to its end."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            lead_nowhere(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            lead_nowhere(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
