"""The folder of a run: whose it is, and what is left in it when the run fails."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from train_llava.arguments import LlavaTrainingArguments
from train_llava.command import InputError
from train_llava.resume import is_whole, newest_first

RUN_FILES = (
    "checkpoint-*",
    "runs",
    "adapter_*",
    "model*.safetensors*",
    "config.json",
    "trainer_state.json",
    "bad_images.jsonl",
    "samples",
    "curves.png",
    "README.md",
)


def claim_output_dir(args: LlavaTrainingArguments, checkpoint: str | None) -> None:
    """Sees to it that the folder is this run's alone: refuses another run's, or clears it when told to."""
    folder = Path(args.output_dir)
    left = [] if checkpoint else [path for pattern in RUN_FILES for path in folder.glob(pattern)]
    with args.main_process_first():
        if left and not args.overwrite_output_dir:
            hint = "Continue it with --resume_from_checkpoint true, replace it with --overwrite_output_dir true"
            raise InputError(f"{folder} holds another run. {hint}, or give another --output_dir.")
        for path in left if args.process_index == 0 else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def last_words(args: LlavaTrainingArguments) -> Iterator[None]:
    """Whatever ends a training, says what is left of it and how to go on."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if isinstance(error, torch.OutOfMemoryError):
            hint = "Out of memory. Lower --per_device_train_batch_size (and raise --gradient_accumulation_steps)"
            print(f"{hint}, or give --gradient_checkpointing true.", file=sys.stderr)
        whole = [path for path in newest_first(args) if is_whole(path)]
        left = f"The last whole checkpoint is {whole[0]}" if whole else "There is no whole checkpoint"
        how = "; continue with --resume_from_checkpoint true" if whole else ""
        print(f"The training ended with {type(error).__name__}. {left}{how}.", file=sys.stderr, flush=True)
        raise
