"""What a run does when it is told to stop, when another rank hangs, and when it forks or ends beside Gloo's threads.

On SIGTERM or SIGINT all ranks save a checkpoint of the same step and end; a second signal ends them at once.
"""

import math
import os
import signal
import sys
import threading
import time
from multiprocessing.context import BaseContext, ForkContext, ForkProcess
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

GRACE_SECONDS = 5  # for the current step to end, and three times as long as the last step took
DEDUP_SECONDS = 1.0  # within which a signal is the same one, sent by a scheduler and passed on by a launcher
FORK_DELAY = 0.02  # seconds, in which Gloo's threads become idle


def close_process_group() -> None:
    """Ends the process group once all ranks are here.

    A thread of Gloo's still holds the last tensors, and needs Python's lock to release them. Whoever ends the group,
    here or where the model is dropped, holds that lock and waits for the thread. So let it run before.
    """
    dist.barrier()
    time.sleep(0.5)
    dist.destroy_process_group()


def ignore_signals_in_worker(worker: int) -> None:
    """Runs first in a loader's worker: a signal to the whole group must not end it before its rank has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class PreemptionCallback(TrainerCallback):
    """Saves and stops after a signal. After each step the ranks ask each other whether one has received a signal, so
    that they agree on the step.

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
        self.step_began = time.monotonic()  # the time of loading is not that of a step
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._receive)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self.since > DEDUP_SECONDS:
            os._exit(128 + number)
        if not self.received:
            self.received, self.since = number, time.monotonic()
            # a step that does not end any more, because another rank was killed, must not keep this one alive
            signal.alarm(math.ceil(GRACE_SECONDS + 3 * self.step_seconds))

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
                os._exit(1)


class DelayedFork(ForkProcess):
    """A process that waits before it is forked."""

    def start(self) -> None:
        time.sleep(FORK_DELAY)
        super().start()


class DelayedForkContext(ForkContext):
    """Makes a loader's workers so."""

    Process = DelayedFork


def delay_forks_for_gloo(context: str | None) -> str | BaseContext | None:
    """The multiprocessing context of a loader's workers: the one that was asked for, or one that forks with a delay.

    Before Python 3.12 a worker hangs, and its rank with it, if it is forked just when a thread of Gloo's takes the
    interpreter's lock (github.com/python/cpython/issues/112275).
    """
    return context or (DelayedForkContext() if sys.version_info < (3, 12) else None)
