"""Losses, gradients and weights that are NaN or infinite: they end a run before anything of them is saved."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

MOST_BATCHES = 256  # whose losses are kept before they are checked: each check waits for the GPU
MOST_SKIPPED = 10  # steps in a row
HINT = "Look at them with train_llava.show_batch; else lower --learning_rate or --max_grad_norm"


class FiniteCallback(TrainerCallback):
    """Keeps losses and gradient norms, and checks them where the run has to wait anyway: at a log and before a save.

    DeepSpeed and fp16's loss scale skip a step whose gradient is not finite; skipped steps are counted. Anywhere else
    such a gradient has gone into the weights.

    The norm is taken from accelerate's `clip_grad_norm_`, which Trainer calls at every step, clipping or not. No
    callback receives it, so the method of this one accelerator is wrapped (tests/test_hooks.py names it).
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.losses: list[tuple[int, list[str], torch.Tensor]] = []  # step, records, loss
        self.norms: dict[int, Any] = {}  # of the gradient, per step since the last check
        self.skipped, self.in_a_row, self.in_all = 0, 0, 0  # steps: since a log, until now, since the start
        self.norm: Any = None
        plain = accelerator.clip_grad_norm_

        def clip_grad_norm_(*args, **kwargs) -> Any:
            self.norm = plain(*args, **kwargs)
            return self.norm

        accelerator.clip_grad_norm_ = clip_grad_norm_

    def add_loss(self, step: int, records: list[str], loss: torch.Tensor) -> None:
        """Keeps the loss of a batch of this rank."""
        self.losses.append((step, records, loss.detach()))
        if len(self.losses) > MOST_BATCHES:
            self.check()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Counts a skipped step.

        Raises:
            RuntimeError: it is the last of `MOST_SKIPPED`.
        """
        if not self.accelerator.optimizer_step_was_skipped:
            self.norms[state.global_step], self.in_a_row = self.norm, 0
            return
        self.skipped, self.in_a_row, self.in_all = self.skipped + 1, self.in_a_row + 1, self.in_all + 1
        if self.in_a_row == MOST_SKIPPED:
            steps = f"{state.global_step - MOST_SKIPPED + 1} to {state.global_step}"
            records = dict.fromkeys(record for _, batch, _ in self.losses[-4:] for record in batch)
            raise RuntimeError(
                f"the gradients of steps {steps} are not finite, so that these steps were skipped and no weight moves "
                f"any more; the last records were {', '.join(records)}. {HINT}."
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.in_all and state.is_world_process_zero:
            print(f"{self.in_all} steps were skipped: their gradients were not finite", flush=True)

    def check(self) -> None:
        """Checks all losses and gradients since the last call.

        Raises:
            RuntimeError: a loss, or the gradient of a step that was not skipped, is NaN or infinite; names step and
                records.
        """
        for step, records, loss in self.losses:
            self._check_norms(before=step)
            if not torch.isfinite(loss):
                raise RuntimeError(f"the loss is {loss.item()} at step {step}, records {', '.join(records)}. {HINT}.")
        self._check_norms(before=math.inf)
        self.losses.clear()

    def _check_norms(self, before: float) -> None:
        for step in [step for step in self.norms if step < before]:
            norm = self.norms.pop(step)
            if norm is not None and not math.isfinite(norm):
                records = [record for at, batch, _ in self.losses if at == step for record in batch]
                raise RuntimeError(
                    f"the gradient is {float(norm)} at step {step}, records {', '.join(records)}, and went into the "
                    f"weights. {HINT}."
                )

    def check_weights(self, model: nn.Module) -> None:
        """Checks the weights before a save. All ranks call this, and all find the same.

        Raises:
            RuntimeError: a trained weight is NaN or infinite.
        """
        trained = [getattr(p, "ds_tensor", p) for p in model.parameters() if p.requires_grad]  # a rank's of ZeRO-3
        bad = sum(1 - torch.isfinite(part.detach()).all().float() for part in trained)
        if self.accelerator.gather(bad.reshape(1)).any():
            raise RuntimeError(
                "the trained weights hold values that are NaN or infinite, so that nothing is saved. Continue from the "
                "last checkpoint with a lower --max_grad_norm, or train its model anew at a lower --learning_rate."
            )
