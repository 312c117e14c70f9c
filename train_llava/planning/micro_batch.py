"""The micro-batch of --per_device_train_batch_size auto: as many samples at a time as fit into a rank's memory.

Where memory runs out all the same, the run starts again with half as many: a rank that has run out cannot rejoin what
the others are in the middle of. scripts/launch.sh does that, and names a file in which the limit is handed over.
"""

import os
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import gather_object

from train_llava.planning.arguments import LlavaTrainingArguments

MOST = 64  # samples; long before that a GPU's products are as fast as they get
SPARE = 0.1  # of the memory: kernels, NCCL, what the allocator loses between blocks, and the estimate's own error
LIMIT_FILE = "MICRO_BATCH_FILE"  # the environment variable that names the file


def choose_micro_batch(fits: Callable[[int], bool], args: LlavaTrainingArguments) -> int:
    """The largest of `args.micro_batches` that fits on all ranks, up to `MOST` and the limit of a former start; 1 where
    none does.

    Args:
        fits: whether this rank's memory holds so many samples at a time.
    """
    most = min(MOST, read_limit() or MOST)
    sizes = (size for size in reversed(args.micro_batches) if size <= most)
    return min(gather_object([next(filter(fits, sizes), 1)]))


def smaller_micro_batch(args: LlavaTrainingArguments) -> int:
    """The largest of `args.micro_batches` that is at most half of the present one; 0 if that is 1."""
    return max((size for size in args.micro_batches if 2 * size <= args.train_batch_size), default=0)


def read_limit() -> int | None:
    """The most samples at a time that a former start has left to try."""
    file = os.environ.get(LIMIT_FILE)
    return int(Path(file).read_text() or 0) or None if file else None


def write_limit(size: int) -> bool:
    """Leaves a limit for the next start; False where nobody would start it."""
    if file := os.environ.get(LIMIT_FILE):
        Path(file).write_text(str(size))
    return bool(file)
