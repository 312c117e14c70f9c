"""The folder of a run: refused if it holds another one, and reported on if the run fails."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from train_llava.cli import InputError
from train_llava.model.folder import CARD, CONFIGS, is_foreign_card, model_files, recover_model
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.planning.micro_batch import read_limit
from train_llava.training.resume import is_whole, newest_first
from train_llava.training.run_log import LOG_FILE

OLD_RUN = "_old-run-"  # folders with a run that is being replaced; Trainer uploads no names with this beginning
RUN_FILES = ("checkpoint-*", "runs", "samples", "trainer_state.json", "bad_images.jsonl", "curves.png", CARD)


def prepare_output_dir(args: LlavaTrainingArguments, checkpoint: Path | None) -> None:
    """Recovers what an interrupted run has left; refuses a folder with another run, unless it is replaced or resumed.

    Raises:
        InputError: it holds another run, or files that are not of a run.
    """
    folder = Path(args.output_dir)
    recover_model(folder)
    if read_limit() and not checkpoint:  # this is another start of the same run, see planning/micro_batch.py
        drop_unborn_run(args)
    left = run_files(folder)
    if not left or checkpoint:
        return
    if not args.overwrite_output_dir:
        hint = "Continue it with --resume_from_checkpoint true, replace it with --overwrite_output_dir true"
        raise InputError(f"{folder} holds another run. {hint}, or give another --output_dir.")
    if not any((folder / name).exists() for name in (*CONFIGS, "trainer_state.json")) and not newest_first(args):
        raise InputError(f"{folder} holds no run to replace, but {left.pop().name}. Give another --output_dir.")


def set_old_run_aside(args: LlavaTrainingArguments) -> None:
    """Moves the run that will be replaced into a folder of its own, where it stays until the new one is whole."""
    folder = Path(args.output_dir)
    if left := run_files(folder):
        left |= {*folder.glob(LOG_FILE)}  # alone it is no run
        aside = Path(tempfile.mkdtemp(prefix=OLD_RUN, dir=folder))
        for path in sorted(left, key=lambda path: path.name not in CONFIGS):
            path.replace(aside / path.name)
        print(f"the run that was in {folder} is in {aside} until this one is whole", flush=True)


def run_files(folder: Path) -> set[Path]:
    """The files of a run in a folder, without a card that somebody else has written."""
    left = model_files(folder) | {path for pattern in RUN_FILES for path in folder.glob(pattern)}
    return left - {folder / CARD} if is_foreign_card(folder / CARD) else left


def drop_unborn_run(args: LlavaTrainingArguments) -> None:
    """Deletes what a new run leaves before its first step is done, so that it may start again in the same folder."""
    shutil.rmtree(Path(args.output_dir) / "runs", ignore_errors=True)  # by another rank, too
    (Path(args.output_dir) / "bad_images.jsonl").unlink(missing_ok=True)


def drop_old_runs(args: LlavaTrainingArguments) -> None:
    """Deletes the runs that were set aside."""
    for aside in Path(args.output_dir).glob(f"{OLD_RUN}*"):
        shutil.rmtree(aside)


@contextmanager
def report_failure(args: LlavaTrainingArguments) -> Iterator[None]:
    """Prints, when an error ends a training, which checkpoint is left and how to continue."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if isinstance(error, torch.OutOfMemoryError):
            tokens, lower, size = args.tokens_per_batch, "", f"{args.train_batch_size}"
            if tokens:
                lower, size = "lower --tokens_per_batch, or ", f"{tokens} tokens"
            elif args.train_batch_size > 1:
                lower = "lower --per_device_train_batch_size (a step keeps its samples with --global_batch_size), or "
            hint = f"{lower}give --gradient_checkpointing true"
            print(f"Out of memory with a micro-batch of {size}: {hint}.", file=sys.stderr)
        whole = [path for path in newest_first(args) if is_whole(path)]
        left = f"The last whole checkpoint is {whole[0]}" if whole else "There is no whole checkpoint"
        how = "; continue with --resume_from_checkpoint true" if whole else ""
        print(f"The training ended with {type(error).__name__}. {left}{how}.", file=sys.stderr, flush=True)
        raise
