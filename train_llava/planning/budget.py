"""Before weights are loaded: will a step fit into memory? And how much will a checkpoint take of the disk?"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
from peft import PeftModel
from torch import nn
from transformers import LlavaConfig
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from train_llava.cli import InputError
from train_llava.model.load import gpu
from train_llava.model.structure import count_trained, count_weights, llava_in
from train_llava.planning.activations import Batch
from train_llava.planning.arguments import LlavaTrainingArguments, ModelArguments
from train_llava.planning.memory import MemoryModel, ZeroConfig, optimizer_bytes, reduces_once
from train_llava.planning.meta_model import meta_model
from train_llava.planning.micro_batch import SPARE, choose_micro_batch


def check_memory_budget(
    config: LlavaConfig,
    dtype: torch.dtype,
    longest: Callable[[int], Batch],
    model_args: ModelArguments,
    args: LlavaTrainingArguments,
) -> tuple[str, float]:
    """Compares what a training step will need with the memory of this rank; returns the verdict in one line, and the
    bytes needed. The disk must hold at least one checkpoint. `--per_device_train_batch_size auto` becomes a number.

    Args:
        config: of the whole LLaVA.
        dtype: in which its weights will be held.
        longest: the largest batch of so many samples.

    Raises:
        InputError: see `memory_verdict` and `check_disk_space`.
    """
    with no_deepspeed_config(args):
        model = meta_model(config, dtype, model_args.train_type, model_args.lora)
    on_gpu = gpu() is not None and not args.use_cpu
    memory = MemoryModel.of(model, model_args.load_in_4bit, on_gpu)
    zero = zero_of_run(args, memory, config.text_config.hidden_size)

    def needed(size: int) -> float:
        return memory.peak(longest(size), zero, args.gradient_checkpointing)

    chosen = ""
    if args.auto_batch:  # all ranks together, and so before one of them refuses anything
        most = (1 - SPARE) * free_memory(args)
        args.set_micro_batch(choose_micro_batch(lambda size: needed(size) <= most, args))
        chosen = f"; --per_device_train_batch_size auto is {args.train_batch_size}"
    check_disk_space(model, args, int(args.save_strategy != "no"))
    line = memory_verdict(memory, longest(args.train_batch_size), zero, args)
    return line + chosen, needed(args.train_batch_size)


def zero_of_run(args: LlavaTrainingArguments, memory: MemoryModel, hidden_size: int) -> ZeroConfig:
    """How a run's ranks share what it holds, and whether they sum its gradients up first (`reduces_once`)."""
    zero = ZeroConfig.read(deepspeed_json(args), args.world_size, hidden_size)
    zero.whole_sums = reduces_once(memory.trained, args.gradient_accumulation_steps, zero.stage, zero.offload)
    return zero


def deepspeed_json(args: LlavaTrainingArguments) -> dict | None:
    """The content of --deepspeed; None without it."""
    return args.hf_deepspeed_config.config if args.deepspeed else None


@contextmanager
def no_deepspeed_config(args: LlavaTrainingArguments) -> Iterator[None]:
    """Within this block transformers does not know that ZeRO-3 is on: it would share out weights that are not there."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


def memory_verdict(memory: MemoryModel, batch: Batch, zero: ZeroConfig, args: LlavaTrainingArguments) -> str:
    """See `check_memory_budget`.

    Weights, gradients and optimizer are certain: where they alone are too much, nothing helps. The activations of the
    largest batch are estimated (see memory.py), so that too much of these is only reported.

    Raises:
        InputError: weights, gradients and optimizer are too much; says the figures and what to lower.
    """
    free, checkpointing = free_memory(args), args.gradient_checkpointing
    own = 0 if memory.on_gpu else psutil.Process().memory_info().rss  # Python and its libraries, there already
    states = {
        "weights": zero.of_weights(memory.weights),
        "gradients": memory.gradients(zero),
        "optimizer": memory.optimizer(zero),
    }
    if not memory.on_gpu and zero.offload:  # the host's memory is the same
        states["optimizer"] = memory.on_host(zero)
    if args.check_resources and sum(states.values()) > free:
        raise InputError(
            f"each rank needs {sum(states.values()) / 1e9:.3g} GB for weights, gradients and optimizer, and "
            f"{free / 1e9:.3g} GB are free. Use more GPUs, --train_type use_lora (with --load_in_4bit true), or "
            "--deepspeed with ds_configs/zero2_offload.json or zero3.json; --check_resources false starts all the same."
        )
    needed, each = memory.peak(batch, zero, checkpointing), batch.times(1 / batch.samples)
    states["activations"] = memory.activations(batch, checkpointing)
    breakdown = ", ".join(f"{name} {size / 1e9:.2g}" for name, size in states.items())
    largest = memory.largest_batch(each, zero, checkpointing, free)
    unit = "batch" if args.tokens_per_batch is None else "--tokens_per_batch"
    advice = f"the largest {unit} that fits is {largest}" if largest else f"not even a {unit} of 1 fits"
    if needed > free and not checkpointing:
        with_it = memory.largest_batch(each, zero, True, free)
        advice += f", with --gradient_checkpointing true {with_it}"
    fits = "fits" if needed <= free else "will not fit"
    breakdown += f", the process itself {own / 1e9:.2g}" * bool(own)
    sizes = f"{(needed + own) / 1e9:.3g} GB of {(free + own) / 1e9:.3g} GB free per rank"
    return f"memory: {sizes} ({breakdown}): {fits}; {advice}"


def free_memory(args: LlavaTrainingArguments) -> float:
    """Bytes that this rank may use: those free on its GPU, or its share of the machine's memory."""
    if gpu() and not args.use_cpu:
        return torch.accelerator.get_memory_info()[0]
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return psutil.virtual_memory().available / neighbours


def check_disk_space(model: nn.Module, args: LlavaTrainingArguments, saves: int) -> None:
    """Refuses, on the first rank, a run whose checkpoints will not fit on the disk.

    Args:
        model: the one to save, or one of its shapes on the meta device.
        args: the flags.
        saves: how many checkpoints will be written. The oldest is deleted when the newest is whole.

    Raises:
        InputError: says the sizes and what to lower.
    """
    if not args.check_resources or args.process_index > 0:
        return
    last, each = model_bytes(model), checkpoint_bytes(model, bool(args.deepspeed), args.save_only_model)
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
    """Bytes of the weights that a save writes: all, or with adapters the trained ones."""
    adapter = isinstance(model, PeftModel)
    saved = (p for p in model.parameters() if p.requires_grad or not adapter)
    return sum(count_weights(p) * p.element_size() for p in saved)


def checkpoint_bytes(model: nn.Module, deepspeed: bool, only_model: bool = False) -> int:
    """Bytes of one checkpoint: weights and, without --save_only_model, the optimizer's states.

    DeepSpeed writes the weights once more, and with adapters also a head that is the embedding table, which it does not
    know to be frozen.
    """
    if only_model:
        return model_bytes(model)
    size = model_bytes(model) * (2 if deepspeed else 1) + optimizer_bytes(count_trained(model), deepspeed)
    llava, head = llava_in(model), 0
    if deepspeed and isinstance(model, PeftModel) and llava.config.tie_word_embeddings:
        head = count_weights(llava.lm_head.weight) * llava.lm_head.weight.element_size()
    return size + head
