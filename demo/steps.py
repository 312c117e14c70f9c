"""The loop that pretrains both halves: Muon for matrices, AdamW for the rest, a cosine schedule, 5% warm-up.

Muon (Jordan et al. 2024) makes the update of a matrix orthogonal; here it needs half as many steps as AdamW alone.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

Batch = dict[str, torch.Tensor]


def make_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, scaled so that AdamW's rate suits it, and AdamW for all else."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and ".layers." in name else others).append(weight)
    muon = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw", weight_decay=0.05)
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.05)
    return [muon(matrices, lr=learning_rate), adamw(others, lr=learning_rate)]


def run_steps(
    model: nn.Module, steps: int, learning_rate: float, next_batch: Callable[[int], Batch], bf16: bool = False, **kwargs
) -> float:
    """Trains with batches of `next_batch(step)`; prints a line every 100 steps and returns the last mean loss.

    `bf16` multiplies matrices in bfloat16, which takes two thirds of the time where a CPU has instructions for it.
    """
    optimizers = make_optimizers(model, learning_rate)
    warm_up = max(1, steps // 20)

    def share(step: int) -> float:  # of the rate
        return min((step + 1) / warm_up, 0.5 + 0.5 * np.cos(np.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    start, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**next_batch(step), **kwargs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(f"  step {step}/{steps}  loss {np.mean(losses[-100:]):.3f}  {seconds:.0f} s", flush=True)
    return float(np.mean(losses[-100:]))
