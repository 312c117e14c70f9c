"""What a step leaves out, because it changes nothing: walks through all modules, reductions over the ranks, waits.

Losses and weights are the same without it (tests/test_step.py).
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train_llava.model.structure import count_trained
from train_llava.planning.memory import reduces_once


def fill_deepspeed_config(config: dict[str, Any], train_type: str, sums_in_bf16: bool) -> None:
    """Adds to the JSON of --deepspeed, in place, what is best for this run; what is in it stays.

    Args:
        config: the JSON.
        train_type: of --train_type.
        sums_in_bf16: whether gradients of several micro-batches would be added up in bf16, whose 8 bits lose the small
            ones. Then they are in fp32, for 2 bytes of memory more per trained weight, shared out as they are.

    The gradients of adapters or a projector fit into one small bucket. To overlap its reduction with the backward pass
    would bring nothing, but cost a second bucket and a wait after each backward pass.
    """
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if zero.get("stage") in (1, 2):
        few = train_type in ("use_lora", "projector")
        zero.setdefault("overlap_comm", not few)
        zero.setdefault("reduce_bucket_size", 5e7 if few else 2e8)
    if sums_in_bf16 and zero.get("stage") in (2, 3) and not offload:
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def walk_once(model: nn.Module) -> None:
    """Changes `train` of a model in place: it walks through the modules only where the mode changes.

    Trainer calls it before each micro-step, which takes 6 ms for the 2,400 modules of a 4B model with adapters.
    """
    walk, last = model.train, {}

    def train(mode: bool = True) -> nn.Module:
        if last.get("mode") != mode:
            walk(mode)
            last["mode"] = mode
        return model

    model.train = train


class ReduceOnceCallback(TrainerCallback):
    """Has gradients reduced once a step, where `reduces_once` says so."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.abandon = accelerator, lambda: None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.deepspeed:
            wrapped, model = self.accelerator.deepspeed_engine_wrapped, kwargs["model"]
            zero = (wrapped.engine.zero_optimization_stage(), wrapped.engine.zero_cpu_offload())
            if reduces_once(count_trained(model), args.gradient_accumulation_steps, *zero):
                self.abandon = reduce_once(wrapped, model.parameters())


def reduce_once(wrapped: Any, parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Changes `backward` of accelerate's wrapper of a DeepSpeed engine: each rank sums the gradients of a step's
    micro-batches in fp32, and the last of them begins the one reduction and the optimizer's step.

    Returns what must be called when a step has failed: DeepSpeed would else begin the reduction when the process ends,
    and wait for ranks that do not come. (A private name, seen in DeepSpeed 0.19; tests/test_hooks.py.)
    """
    engine, step, inside = wrapped.engine, ExitStack(), False
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float32

    def backward(loss: torch.Tensor, sync_gradients: bool = True, **kwargs) -> None:
        nonlocal inside
        if not inside:
            step.enter_context(engine.coalesce_grad_reduction())
        inside = not sync_gradients
        engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        engine.backward(loss, **kwargs)
        if sync_gradients:
            step.close()  # reduces
            engine.set_gradient_accumulation_boundary(is_boundary=True)
            engine.step()

    def abandon() -> None:
        engine._flush_coalesced_reduction_zero12 = lambda optimizer: None
        step.close()

    wrapped.backward = backward
    return abandon
