"""Before weights are loaded: will memory do? Before the first step: will the disk?"""

import os

import psutil
import torch
from peft import PeftModel
from torch import nn

from train_llava.arguments import LlavaTrainingArguments
from train_llava.cli import InputError
from train_llava.model.structure import llava_in, weights_in
from train_llava.planning.activations import Batch, trained_in
from train_llava.planning.memory import Sharing, Step, optimizer_bytes


def check_memory(step: Step, batch: Batch, sharing: Sharing, args: LlavaTrainingArguments) -> str:
    """Compares what a step will need with the memory of this rank; returns the verdict in one line.

    Weights, gradients and optimizer are certain: where they alone are too much, nothing helps. The activations of the
    largest batch are estimated (see memory.py), so that too much of these is only said.

    Raises:
        InputError: weights, gradients and optimizer are too much; says the figures and what to lower.
    """
    free, checkpointing = free_memory(args), args.gradient_checkpointing
    own = 0 if step.on_gpu else psutil.Process().memory_info().rss  # Python and its libraries, there already
    states = {
        "weights": sharing.of_weights(step.weights),
        "gradients": step.gradients(sharing),
        "optimizer": step.optimizer(sharing),
    }
    if not step.on_gpu and sharing.offload:  # the host's memory is the same
        states["optimizer"] = step.on_host(sharing)
    if args.check_resources and sum(states.values()) > free:
        raise InputError(
            f"each rank needs {sum(states.values()) / 1e9:.3g} GB for weights, gradients and optimizer, and "
            f"{free / 1e9:.3g} GB are free. Use more GPUs, --train_type use_lora (with --load_in_4bit true), or "
            "--deepspeed with ds_configs/zero2_offload.json or zero3.json; --check_resources false starts all the same."
        )
    needed, each = step.peak(batch, sharing, checkpointing), batch.times(1 / batch.samples)
    states["activations"] = step.activations(batch, checkpointing)
    parts = ", ".join(f"{name} {size / 1e9:.2g}" for name, size in states.items())
    most = step.largest_batch(each, sharing, checkpointing, free)
    advice = f"the largest batch that fits is {most}" if most else "not even a batch of 1 fits"
    if needed > free and not checkpointing:
        with_it = step.largest_batch(each, sharing, True, free)
        advice += f", with --gradient_checkpointing true {with_it}"
    fits = "fits" if needed <= free else "will not fit"
    parts += f", the process itself {own / 1e9:.2g}" * bool(own)
    sizes = f"{(needed + own) / 1e9:.3g} GB of {(free + own) / 1e9:.3g} GB free per rank"
    return f"memory: {sizes} ({parts}): {fits}; {advice}"


def free_memory(args: LlavaTrainingArguments) -> float:
    """Bytes that this rank may take: of its GPU, or its share of the machine's memory."""
    if torch.cuda.is_available() and not args.use_cpu:
        return torch.cuda.mem_get_info()[0]
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return psutil.virtual_memory().available / neighbours


def model_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a save writes: of an adapter the trained ones alone."""
    adapter = isinstance(model, PeftModel)
    kept = (p for p in model.parameters() if p.requires_grad or not adapter)
    return sum(weights_in(p) * p.element_size() for p in kept)


def checkpoint_bytes(model: nn.Module, deepspeed: bool, only_model: bool = False) -> int:
    """Bytes of one checkpoint: weights, and unless --save_only_model what the optimizer keeps; DeepSpeed writes the
    weights once more, and with adapters a head that is the embedding table, which it does not know to be frozen."""
    if only_model:
        return model_bytes(model)
    size = model_bytes(model) * (2 if deepspeed else 1) + optimizer_bytes(trained_in(model), deepspeed)
    llava, head = llava_in(model), 0
    if deepspeed and isinstance(model, PeftModel) and llava.config.tie_word_embeddings:
        head = weights_in(llava.lm_head.weight) * llava.lm_head.weight.element_size()
    return size + head
