"""How long a training will take on this machine's GPUs, in a line before it starts."""

import torch
from transformers import LlavaConfig

from train_llava.model.load import gpu
from train_llava.planning.arguments import LlavaTrainingArguments, ModelArguments
from train_llava.planning.kernels import Way
from train_llava.planning.roofline import kind_of_gpu
from train_llava.planning.speed import hours
from train_llava.planning.workload import Workload

LONG = 10  # hours, from which on one epoch is recommended


def this_gpu(args: LlavaTrainingArguments) -> str | None:
    """The kind of the GPU that this rank trains on, if it is one of roofline.GPUS."""
    if args.use_cpu or gpu() != "cuda":
        return None
    return kind_of_gpu(torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory / 2**30)


def foretell(
    kind: str, config: LlavaConfig, workload: Workload, model_args: ModelArguments, args: LlavaTrainingArguments
) -> str:
    """Records, epochs and hours on a kind of GPU, as `planning/speed.py` works them out; and that one epoch is what
    LLaVA takes, where several take long."""
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = args.max_steps * args.step_size / workload.records
    way = Way(args.gradient_checkpointing, args.use_liger_kernel, True, model_args.load_in_4bit, model_args.lora)
    shape = (config, model_args.train_type, workload.typical, workload.records, epochs, kind, args.world_size, way)
    total = hours(*shape, args.gradient_accumulation_steps)
    advice = ""
    if total > LONG and args.max_steps <= 0 and epochs > 1:
        advice = f"; --num_train_epochs 1 is LLaVA's, and takes {total / epochs:.1f}"
    return f"{workload.records:,} records x {epochs:g} epochs: about {total:.1f} hours, as estimate counts{advice}"
