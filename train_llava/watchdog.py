"""Ends a rank that waits in vain, for a host that fell silent without its connections being closed."""

import os
import sys
import threading
import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

NOTHING_LEFT_TO_DO = 1  # exit code


class Watchdog(TrainerCallback):
    """Ends the process when nothing has happened for --ddp_timeout seconds: no step done, no batch evaluated, no save.

    That flag bounds how long torch waits for other ranks, but the groups that DeepSpeed makes have torch's half hour.
    A thread watches, because the rank itself hangs in a call that no signal handler interrupts.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.last, self.over = time.monotonic(), threading.Event()
        if args.world_size > 1:
            threading.Thread(target=self._watch, args=(args, state), daemon=True).start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.last = time.monotonic()

    on_substep_end = on_prediction_step = on_evaluate = on_save = on_step_end

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.over.set()

    def _watch(self, args: TrainingArguments, state: TrainerState) -> None:
        while not self.over.wait(1):
            if time.monotonic() - self.last > args.ddp_timeout:
                print(
                    f"rank {args.process_index}: nothing has moved since step {state.global_step}, for "
                    f"{args.ddp_timeout} seconds (--ddp_timeout). Another machine is gone or stuck. Start all of them "
                    "again with --resume_from_checkpoint true.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(NOTHING_LEFT_TO_DO)
