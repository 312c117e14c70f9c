"""The first step of a run, which has the longest batch: was its memory foreseen, and if it ran out, what follows."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train_llava.model.load import gpu
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.planning.micro_batch import smaller_micro_batch, write_limit
from train_llava.training.callbacks import peak_memory_gb


class FirstStepCallback(TrainerCallback):
    """Knows when the first step runs, and says on a GPU how much memory it took.

    `expected` is what the estimate said, in bytes.
    """

    expected: float | None = None

    def __init__(self) -> None:
        self.began = self.ended = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.began = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not self.ended and self.expected and gpu() and not args.use_cpu and state.is_world_process_zero:
            sizes = f"{peak_memory_gb():.1f} GB used in the first step, {self.expected / 1e9:.1f} expected"
            print(f"memory: {sizes}", flush=True)
        self.ended = True

    @contextmanager
    def halving(self, args: LlavaTrainingArguments) -> Iterator[None]:
        """If this block runs out of memory in the first step, and --per_device_train_batch_size auto can take less,
        ends the process with `os.EX_TEMPFAIL`, so that the run can start again with half the micro-batch."""
        try:
            yield
        except torch.OutOfMemoryError:
            size = smaller_micro_batch(args) if args.auto_batch else 0
            if not size or not self.began or self.ended:
                raise
            what = f"rank {args.process_index}: out of memory with a micro-batch of {args.train_batch_size}"
            hint = f"Start again with --per_device_train_batch_size {size}; a step has as many samples as before"
            print(f"{what}. {'Starting again with half' if write_limit(size) else hint}.", file=sys.stderr, flush=True)
            # Not an exception: at a normal end Python and CUDA may wait for collectives that nobody completes any more
            os._exit(os.EX_TEMPFAIL)
