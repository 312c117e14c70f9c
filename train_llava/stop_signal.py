"""Pre-emption: on SIGTERM or SIGINT all ranks save a checkpoint of the same step and end; a second one ends at once."""

import math
import os
import signal
import time
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
