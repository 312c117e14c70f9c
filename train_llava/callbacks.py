"""What a run says while it trains."""

import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressLine(TrainerCallback):
    """One line per logging step: loss, gradient norm, learning rate, speed since the last line, time left."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.first_step = self.last_step = state.global_step  # not 0 after a resume
        self.first_time = self.last_time = time.perf_counter()
        if state.is_world_process_zero:
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # what accelerate wrapped
            stage = getattr(optimizer, "zero_stage_string", "")  # DeepSpeed's own word: ZeRO-1 or ZeRO-2
            print(f"{type(optimizer).__name__} {stage} on {args.world_size} ranks, {state.max_steps} steps", flush=True)

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
        left = int(seconds_per_step * (state.max_steps - state.global_step))
        print(
            f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"grad {logs.get('grad_norm', float('nan')):.2f}  lr {logs['learning_rate']:.2e}  "
            f"{steps_per_second:.2f} steps/s  {steps_per_second * samples_per_step:.1f} samples/s  "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            flush=True,
        )
        self.last_step, self.last_time = state.global_step, now
