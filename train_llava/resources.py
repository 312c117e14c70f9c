"""Before the first step: will what the run holds and writes fit into memory and on the disk?"""

import math
import os
import shutil

import psutil
import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from train_llava.arguments import LlavaTrainingArguments
from train_llava.command import InputError
from train_llava.parts import weights_in


def check_memory(model: nn.Module, args: LlavaTrainingArguments) -> None:
    """Compares what weights, gradients and optimizer take with the memory of this rank, before they are there.

    Activations come on top. Whether these fit shows in the first step, into which the sampler puts the longest.

    Raises:
        InputError: it is too little; says the figures and what to lower.
    """
    ranks = args.world_size if args.deepspeed else 1  # among which DeepSpeed shares out gradients and optimizer
    gradients = sum(weights_in(p) * p.element_size() for p in model.parameters() if p.requires_grad)
    optimizer, offload = optimizer_bytes(model, args), False
    if args.deepspeed:
        offload = "offload_optimizer" in args.hf_deepspeed_config.config.get("zero_optimization", {})
    if torch.cuda.is_available() and not args.use_cpu:
        needed = (
            sum(p.nbytes for p in model.parameters() if not p.is_cuda) + (gradients + optimizer * (not offload)) / ranks
        )
        free = torch.cuda.mem_get_info()[0]
    else:
        needed = (gradients + optimizer) / ranks  # the weights are there already
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        free = psutil.virtual_memory().available / neighbours
    if args.check_resources and needed > free:
        raise InputError(
            f"each rank needs {needed / 1e9:.3g} GB for weights, gradients and optimizer, and {free / 1e9:.3g} GB are "
            "free. Use more GPUs, --train_type use_lora (with --load_in_4bit true), or --deepspeed with "
            "ds_configs/zero2_offload.json or zero3.json; --check_resources false starts all the same."
        )


class EnoughDisk(TrainerCallback):
    """Before the first step: refuses a run whose checkpoints will not fit on the disk."""

    def on_train_begin(
        self, args: LlavaTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        if not (args.check_resources and state.is_world_process_zero):
            return
        last, each = model_bytes(kwargs["model"]), checkpoint_bytes(kwargs["model"], args)
        steps = {
            "steps": state.save_steps,
            "epoch": max(1, state.max_steps // max(1, math.ceil(args.num_train_epochs))),
        }
        saves = (state.max_steps - state.global_step) // steps.get(args.save_strategy, state.max_steps + 1)
        # the oldest is deleted when the newest is whole
        at_once = min(saves, (args.save_total_limit or saves) + 1)
        needed, free = at_once * each + last, shutil.disk_usage(args.output_dir).free
        if needed > free:
            sizes = f"{at_once} checkpoints of {each / 1e9:.3g} GB and the model of {last / 1e9:.3g} GB"
            hint = "Lower --save_total_limit, give --save_only_model true or another --output_dir"
            raise InputError(
                f"{args.output_dir}: {sizes} will be there at once, and the disk has {free / 1e9:.3g} GB free. {hint}; "
                "--check_resources false starts all the same."
            )


def model_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a save writes: of an adapter the trained ones alone."""
    adapter = isinstance(model, PeftModel)
    kept = (p for p in model.parameters() if p.requires_grad or not adapter)
    return sum(weights_in(p) * p.element_size() for p in kept)


def checkpoint_bytes(model: nn.Module, args: LlavaTrainingArguments) -> int:
    """Bytes of one checkpoint: weights, and unless --save_only_model what the optimizer keeps; DeepSpeed writes the
    weights once more."""
    if args.save_only_model:
        return model_bytes(model)
    return model_bytes(model) * (2 if args.deepspeed else 1) + optimizer_bytes(model, args)


def optimizer_bytes(model: nn.Module, args: LlavaTrainingArguments) -> int:
    """Bytes that AdamW keeps for the trained weights, on all ranks together.

    Two fp32 moments of each, and with DeepSpeed an fp32 master copy: 8 or 12 bytes (ZeRO, arXiv:1910.02054,
    section 3.1). DeepSpeed shares them out among the ranks.
    """
    return (12 if args.deepspeed else 8) * sum(weights_in(p) for p in model.parameters() if p.requires_grad)
