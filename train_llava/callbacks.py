"""What a run measures and says while it trains."""

import resource
import time
from collections import Counter
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train_llava.flops import StepFlops, peak_flops


class Meter(TrainerCallback):
    """Measures speed since the last log: LlavaTrainer reports its batches here and logs what `read` says."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.peak, self.flops = peak_flops(), StepFlops.count(kwargs["model"])
        self.last_step, self.waited = state.global_step, 0.0  # not 0 after a resume
        self.last_time = self.idle_since = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.waited += time.perf_counter() - self.idle_since  # since the last step, or what followed it, was done

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.idle_since = time.perf_counter()

    on_save = on_evaluate = on_step_end  # neither is waiting for data

    def read(self, args: TrainingArguments, state: TrainerState) -> dict[str, float]:
        """Steps, samples and tokens per second of all ranks together, as this one has seen its share; the part of the
        time spent waiting for data; the most memory used so far by this rank, in GB; on a GPU whose peak is known
        model FLOPs utilisation (see flops.py)."""
        now = time.perf_counter()
        seconds = now - self.last_time
        samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        speed = (state.global_step - self.last_step) / seconds
        measured = {"steps_per_second": speed, "samples_per_second": speed * samples}
        measured["tokens_per_second"] = self.counts["tokens"] * args.world_size / seconds
        measured |= {"data_wait": self.waited / seconds, "memory_gb": peak_memory_gb()}
        if self.peak:
            measured["mfu"] = self.flops.of(**self.counts) / seconds / self.peak
        self.last_step, self.last_time, self.waited, self.idle_since = state.global_step, now, 0.0, time.perf_counter()
        self.counts.clear()
        return measured


class ProgressLine(TrainerCallback):
    """One line per logging step, the same on a terminal and in a file."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.first_step, self.first_time = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # what accelerate wrapped
            stage = getattr(optimizer, "zero_stage_string", "")  # DeepSpeed's own word: ZeRO-1 or ZeRO-2
            sizes = (args.train_batch_size, args.gradient_accumulation_steps, args.world_size)
            batch = f"{sizes[0] * sizes[1] * sizes[2]} samples a step ({' x '.join(map(str, sizes))})"
            name = f"{type(optimizer).__name__} {stage}".strip()
            print(f"{name} on {args.world_size} ranks, {state.max_steps} steps, {batch}", flush=True)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        if state.is_world_process_zero and "eval_loss" in logs:
            print(f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}", flush=True)
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
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            flush=True,
        )


def peak_memory_gb() -> float:
    """The most memory this rank has used, on its GPU or else of its process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
