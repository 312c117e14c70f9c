"""Pre-emption: on SIGTERM or SIGINT all ranks save a checkpoint of the same step and end; a second one ends at once."""

import math
import os
import signal
import sys
import threading
import time
from functools import cache, partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

PATIENCE = 5  # seconds, and three times as long as the last step took
ECHO = 1.0  # seconds within which a signal is the same one, sent by a scheduler and passed on by a launcher


def deaf_worker(worker: int) -> None:
    """First thing in a loader's worker: a signal to the whole group must not end it before its rank has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class StopSignal(TrainerCallback):
    """After each step the ranks ask each other whether one was told to stop, so that they agree on a step.

    `received` is the number of the signal, 0 without one.
    """

    def __init__(self) -> None:
        self.received, self.since = 0, 0.0
        self.step_began, self.step_seconds = time.monotonic(), 0.0
        self.before: dict[int, Any] = {}
        self.group: dist.ProcessGroup | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            # some bytes on the CPU, so that no GPU has to wait
            self.group = dist.new_group(backend="gloo")
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._receive)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self.since > ECHO:
            os._exit(128 + number)
        if not self.received:
            self.received, self.since = number, time.monotonic()
            # a step that does not end any more, because another rank was killed, must not keep this one alive
            signal.alarm(math.ceil(PATIENCE + 3 * self.step_seconds))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        now = time.monotonic()
        self.step_seconds, self.step_began = now - self.step_began, now
        received = torch.tensor(self.received)
        if self.group is not None:
            dist.all_reduce(received, op=dist.ReduceOp.MAX, group=self.group)
        if received.item() and not control.should_training_stop:
            self.received, self.since = int(received), self.since or time.monotonic()
            signal.alarm(0)
            control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                name = signal.Signals(self.received).name
                print(f"{name}: saving a checkpoint of step {state.global_step}, then ending", flush=True)


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


@cache
def fork_in_quiet() -> None:
    """Before Python 3.12 a worker hangs, and its rank with it, that is forked just when a thread of Gloo's takes the
    interpreter's lock (github.com/python/cpython/issues/112275); so from now on a fork waits until these are idle."""
    if sys.version_info < (3, 12):
        os.register_at_fork(before=partial(time.sleep, 0.02))
