"""What a run says while it trains."""

import resource
import time

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressLine(TrainerCallback):
    """One line per logging step: loss, gradient norm, learning rate; speed since the last line, the share of it spent
    waiting for data, the most memory used so far; time left."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.first_step = self.last_step = state.global_step  # not 0 after a resume
        self.first_time = self.last_time = self.idle_since = time.perf_counter()
        self.waited = 0.0
        if state.is_world_process_zero:
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # what accelerate wrapped
            stage = getattr(optimizer, "zero_stage_string", "")  # DeepSpeed's own word: ZeRO-1 or ZeRO-2
            print(f"{type(optimizer).__name__} {stage} on {args.world_size} ranks, {state.max_steps} steps", flush=True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.waited += time.perf_counter() - self.idle_since  # since the last step, or what followed it, was done

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.idle_since = time.perf_counter()

    on_save = on_evaluate = on_step_end  # neither is waiting for data

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        logs = kwargs["logs"]
        if state.is_world_process_zero and "eval_loss" in logs:
            print(f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}", flush=True)
        if not state.is_world_process_zero or "loss" not in logs:
            return
        now = time.perf_counter()
        steps_per_second = (state.global_step - self.last_step) / (now - self.last_time)
        samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seconds_per_step = (now - self.first_time) / max(1, state.global_step - self.first_step)
        share = 100 * self.waited / (now - self.last_time)
        left = int(seconds_per_step * (state.max_steps - state.global_step))
        print(
            f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"grad {logs.get('grad_norm', float('nan')):.2f}  lr {logs['learning_rate']:.2e}  "
            f"{steps_per_second:.2f} steps/s  {steps_per_second * samples_per_step:.1f} samples/s  "
            f"data {share:.0f}%  {peak_memory_gb():.1f} GB  "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            flush=True,
        )
        self.last_step, self.last_time, self.waited, self.idle_since = state.global_step, now, 0.0, time.perf_counter()


def peak_memory_gb() -> float:
    """The most memory this rank has used, on its GPU or else of its process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
