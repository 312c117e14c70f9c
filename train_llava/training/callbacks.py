"""What a run measures and prints while it trains, and the check of the disk before it does."""

import math
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train_llava.model.load import gpu
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.planning.budget import check_disk_space
from train_llava.planning.flops import StepFlops, peak_flops
from train_llava.planning.foretell import LONG


class ThroughputCallback(TrainerCallback):
    """Measures the speed of training since the last log. LlavaTrainer adds its batches, and logs what `read` returns.

    The time of evaluations, captions and saves does not count.
    """

    def __init__(self) -> None:
        self._reset(0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.peak, self.flops = peak_flops(), StepFlops.count(kwargs["model"])
        self._reset(state.global_step)  # not 0 after a resume

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if control.should_save:
            synchronize()
        self.mark = time.perf_counter()

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        now = time.perf_counter()
        self.away += now - self.mark
        self.mark = now

    def add(self, samples: int, counts: dict[str, int]) -> None:
        """Adds a batch of this rank; `counts` are the arguments of StepFlops.of."""
        self.samples += samples
        self.counts.update(counts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time within this block does not count."""
        synchronize()
        began = time.perf_counter()
        yield
        self.mark = time.perf_counter()
        self.away += self.mark - began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time within this block counts as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def read(self, args: TrainingArguments, state: TrainerState) -> dict[str, float]:
        """The measurements since the last call.

        Steps, samples and tokens per second of all ranks, computed from this rank's share; the share of the time spent
        waiting for data; the most memory that this rank has used so far, in GB; on a GPU whose peak is known the model
        FLOPs utilisation (see flops.py).
        """
        seconds = time.perf_counter() - self.last_time - self.away
        measured = {"steps_per_second": (state.global_step - self.last_step) / seconds}
        measured["samples_per_second"] = self.samples * args.world_size / seconds
        measured["tokens_per_second"] = self.counts["tokens"] * args.world_size / seconds
        measured |= {"data_wait": self.waited / seconds, "memory_gb": peak_memory_gb()}
        if self.peak:
            measured["mfu"] = self.flops.of(**self.counts) / seconds / self.peak
        self._reset(state.global_step)
        return measured

    def _reset(self, step: int) -> None:
        self.samples, self.counts = 0, Counter[str]()
        self.waited = self.away = 0.0  # seconds since the last log: for data, and on something else than training
        self.last_step, self.last_time = step, time.perf_counter()
        self.mark = self.last_time  # where a save begins, if one follows


def synchronize() -> None:
    """Waits until the GPU has finished its work."""
    if gpu():
        torch.accelerator.synchronize()


MEASURED = 5  # steps after the first, which has the longest batch; from these the hours are foretold


class ProgressLine(TrainerCallback):
    """Prints one line per logging step, the same on a terminal and in a file; and of a run of more than an hour, after
    its first steps, how long it will take.

    Args:
        foretold: whether the run has begun with its hours, and with the advice to take fewer epochs.
    """

    def __init__(self, foretold: bool = False) -> None:
        self.foretold = foretold

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.first_step, self.first_time = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # what accelerate wrapped
            stage = getattr(optimizer, "zero_stage_string", "")  # DeepSpeed's own word: ZeRO-1 or ZeRO-2
            batch = f"{args.step_size} {args.step_unit} a step ({' x '.join(map(str, args.step_factors.values()))})"
            batch += f", each of at most {args.tokens_per_batch:,} tokens" if args.tokens_per_batch else ""
            name = f"{type(optimizer).__name__} {stage}".strip()
            print(f"{name} on {args.world_size} ranks, {state.max_steps} steps, {batch}", flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        done = state.global_step - self.first_step
        if done == 1:
            self.first_done = time.perf_counter()
        if done != 1 + MEASURED or not state.is_world_process_zero:
            return
        seconds = (time.perf_counter() - self.first_done) / MEASURED * state.max_steps
        advice = ""
        if seconds > LONG * 3600 and args.max_steps <= 0 and args.num_train_epochs > 1 and not self.foretold:
            advice = f"; --num_train_epochs 1, LLaVA's, takes {hours(seconds / args.num_train_epochs)}"
        if seconds > 3600:
            print(f"about {hours(seconds)} hours in all at this speed{advice}", flush=True)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        if state.is_world_process_zero and "eval_loss" in logs:
            exact = f"  exact match {logs['eval_exact_match']:.1%}" if "eval_exact_match" in logs else ""
            held_out = f"held-out loss {logs['eval_loss']:.4f}{exact}"
            print(f"step {state.global_step}/{state.max_steps}  {held_out}", flush=True)
        if not state.is_world_process_zero or "loss" not in logs:
            return
        each = (time.perf_counter() - self.first_time) / max(1, state.global_step - self.first_step)
        left = int(each * (state.max_steps - state.global_step))
        skipped = f"{logs['skipped_steps']} skipped  " if "skipped_steps" in logs else ""
        mfu = f"MFU {logs['mfu']:.0%}  " if "mfu" in logs else ""
        print(
            f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"{skipped}grad {logs.get('grad_norm', float('nan')):.2f}  lr {logs['learning_rate']:.2e}  "
            f"{logs['samples_per_second']:.1f} samples/s  {logs['tokens_per_second']:,.0f} tokens/s  {mfu}"
            f"data {logs['data_wait']:.0%}  {logs['memory_gb']:.1f} GB  "
            f"{hours(left)}:{left % 60:02} left",
            flush=True,
        )


def hours(seconds: float) -> str:
    """A time as hours and minutes, such as 50:10."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}"


def peak_memory_gb() -> float:
    """The most memory this rank has used, on its GPU or else of its process."""
    if gpu():
        return torch.accelerator.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


class DiskSpaceCallback(TrainerCallback):
    """Before the first step: refuses a run whose checkpoints will not fit on the disk."""

    def on_train_begin(
        self, args: LlavaTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        steps = {
            "steps": state.save_steps,
            "epoch": max(1, state.max_steps // max(1, math.ceil(args.num_train_epochs))),
        }
        saves = (state.max_steps - state.global_step) // steps.get(args.save_strategy, state.max_steps + 1)
        check_disk_space(kwargs["model"], args, saves)
