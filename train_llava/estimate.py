"""Estimates what a training will need, before a GPU is rented: memory, disk, operations and hours. Loads no weights.

    python -m train_llava.estimate --vision_model_name_or_path openai/clip-vit-large-patch14-336 \\
        --language_model_name_or_path Qwen/Qwen1.5-4B-Chat --train_type use_lora --num_gpus 8

The model is a LLaVA, or the two backbones it will be built of: folders, config.json files, or ids of the hub, of which
the config alone is downloaded. With --data_path the tokens are counted, once for this and the training.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from train_llava.cli import InputError, command
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.backbones import load_tokenizer
from train_llava.model.config import (
    compose_config,
    load_llava_config,
    max_positions,
    read_text_config,
    read_vision_config,
)
from train_llava.model.load import load_processor
from train_llava.model.structure import STRATEGIES, components_table
from train_llava.planning.arguments import DataArguments, FlagParser, ModelArguments, flag
from train_llava.planning.budget import checkpoint_bytes, model_bytes
from train_llava.planning.flops import PEAKS, StepFlops
from train_llava.planning.kernels import Way
from train_llava.planning.memory import MemoryModel, ZeroConfig
from train_llava.planning.meta_model import meta_model
from train_llava.planning.roofline import GPUS
from train_llava.planning.speed import Speed
from train_llava.planning.workload import DEFAULT_TOKENS, Workload
from train_llava.processing.chat import ChatEncoder
from train_llava.training.flag_checks import check_lora
from train_llava.training.step import fill_deepspeed_config

# Taken beside tensors, as a rule of thumb: GiB of CUDA, its kernels and NCCL, and the share that PyTorch's allocator
# loses between blocks
CONTEXT, LOST = 1.0, 0.05
# What takes memory of ds_zero2.json, ds_configs/zero2_offload.json and ds_configs/zero3.json, before training/step.py
# fills in the rest; an installed package has none of these files
ZERO2 = {"stage": 2}
ZERO_CONFIGS = {
    "ZeRO-0": None,
    "ZeRO-2": ZERO2,
    "offload": {**ZERO2, "offload_optimizer": {"device": "cpu"}},
    "ZeRO-3": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
}
# What to try in turn where a batch does not fit: ZeRO's config, gradient checkpointing, mark in the table
FALLBACKS = (("ZeRO-2", False, ""), ("ZeRO-2", True, " c"), ("offload", True, " co"), ("ZeRO-3", True, " c3"))
CC3M = 595_375  # records of LLaVA-CC3M-Pretrain-595K
GONE = {"mfu": "is gone: hours rest on the kernels of a step, and the MFU is a result"}


@dataclass
class EstimateModel(ModelArguments):
    """The flags of the model: a whole one or both backbones."""

    model_name_or_path: str | None = flag("a LLaVA: folder, config.json or hub id", default=None)
    vision_model_name_or_path: str | None = flag("or its backbones: CLIP or SigLIP", default=None)
    language_model_name_or_path: str | None = flag("and a chat model", default=None)


@dataclass
class EstimateData(DataArguments):
    """The flags of the data, if it is there already."""

    data_path: list[str] | None = flag("as in training; needs a tokenizer beside the config", default=None)
    tokens_per_sample: int | None = flag(f"without --data_path; {DEFAULT_TOKENS} if not given", default=None)


@dataclass
class EstimateArguments:
    """The flags of the training."""

    per_device_train_batch_size: int = flag("samples per GPU at a time", default=4)
    num_gpus: int = flag("how many", default=1)
    gpu: list[str] = flag(f"kinds to compare; all if not given: {', '.join(GPUS)}", default_factory=lambda: [*GPUS])


@command
def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of PEFT and transformers about each other's names
    parser = FlagParser((EstimateModel, EstimateData, EstimateArguments), description=__doc__)
    model_args, data_args, args = parser.parse(GONE)
    check_lora(model_args)
    if min(args.num_gpus, args.per_device_train_batch_size, data_args.tokens_per_sample or 1) < 1:
        raise InputError("--num_gpus, --per_device_train_batch_size and --tokens_per_sample start at 1.")
    if unknown := set(args.gpu) - set(GPUS):
        raise InputError(f"--gpu {unknown.pop()}: not known; there are {', '.join(GPUS)}.")
    config = config_of(model_args)
    workload = workload_of(config, model_args, data_args, args.per_device_train_batch_size)
    print("\n".join(report(config, model_args, args, workload)))


def config_of(args: EstimateModel) -> LlavaConfig:
    """The config of the whole model.

    Raises:
        InputError: neither a whole model nor two backbones are given, or they do not fit.
    """
    backbones = (args.vision_model_name_or_path, args.language_model_name_or_path)
    if (args.model_name_or_path is None) == (None in backbones):
        hint = "--vision_model_name_or_path and --language_model_name_or_path"
        raise InputError(f"give either --model_name_or_path or both {hint}.")
    if args.model_name_or_path is not None:
        return load_llava_config(args.model_name_or_path)
    vision, language = backbones
    return compose_config(
        read_vision_config(vision, "--vision_model_name_or_path"),
        read_text_config(language, "--language_model_name_or_path"),
    )


def workload_of(config: LlavaConfig, model_args: EstimateModel, args: EstimateData, batch_size: int) -> Workload:
    """The workload of the data, or without data the assumed one.

    Raises:
        InputError: there is no tokenizer to count the data's tokens with.
    """
    if args.data_path is None:
        tokens = args.tokens_per_sample or DEFAULT_TOKENS
        return Workload.assumed(batch_size, min(tokens, args.model_max_length or tokens), config.image_seq_length)
    folder = model_args.model_name_or_path or model_args.language_model_name_or_path
    if not Path(folder).is_dir():
        raise InputError(f"--data_path: {folder} has no tokenizer to count its tokens with. Give a folder, or no data.")
    if model_args.model_name_or_path:
        encoder = LlavaCollator(load_processor(folder), args.model_max_length).encoder
    else:
        encoder = ChatEncoder(load_tokenizer(Path(folder)), config.image_seq_length, max_length=args.model_max_length)
    options = {"caption_fields": args.caption_fields, "streaming": args.streaming}
    dataset = LlavaDataset(args.data_path, on_bad_record=args.on_bad_record, **options)
    return Workload.of(dataset.filter_by_length(encoder), encoder, batch_size)


def zero_config(name: str, ranks: int, hidden_size: int, train_type: str) -> ZeroConfig:
    """One of ZERO_CONFIGS as a training fills it in, without accumulation; ZeRO-0 spreads nothing."""
    if ZERO_CONFIGS[name] is None:
        return ZeroConfig(ranks=ranks)
    settings = {"zero_optimization": {**ZERO_CONFIGS[name]}}
    fill_deepspeed_config(settings, train_type, sums_in_bf16=False)
    return ZeroConfig.read(settings, ranks, hidden_size)


def zero_configs(
    config: LlavaConfig, model_args: ModelArguments, args: EstimateArguments, train_type: str
) -> dict[str, ZeroConfig]:
    """Those of ZERO_CONFIGS that a training takes: DoRA is refused with ZeRO-3 (flag_checks.check_adapters)."""
    dora = model_args.use_dora and train_type == "use_lora"
    names = [name for name in ZERO_CONFIGS if not (dora and name == "ZeRO-3")]
    return {name: zero_config(name, args.num_gpus, config.text_config.hidden_size, train_type) for name in names}


def report(
    config: LlavaConfig, model_args: ModelArguments, args: EstimateArguments, workload: Workload
) -> Iterator[str]:
    """All lines that the command prints."""
    model = meta_model(config, torch.bfloat16, model_args.train_type, model_args.lora)
    memory = MemoryModel.of(model, model_args.load_in_4bit)
    average, batch = workload.average, workload.batch
    yield f"--train_type {model_args.train_type}\n{components_table(model)}\n"
    image_tokens, answer = average["images"] * config.image_seq_length, average["answer_tokens"]
    yield f"a sample has {average['tokens']:.0f} tokens, {image_tokens:.0f} of images, {answer:.0f} to be learned;"
    yield f"the longest has {batch.length}, {'as counted' if workload.records else 'as assumed (--data_path counts)'}"
    positions = max_positions(config)
    if positions and batch.length > positions:
        yield f"more than the model's {positions:,} positions: cut such records with --model_max_length {positions}"
    yield f"{args.num_gpus} GPUs x {batch.samples:g} samples in bf16 under DeepSpeed\n"
    yield from memory_table(memory, workload, zero_configs(config, model_args, args, model_args.train_type))
    last, each = model_bytes(model) / 1e9, checkpoint_bytes(model, deepspeed=True) / 1e9
    yield f"\ndisk: {last:.3g} GB for the trained model, {each:.3g} GB for a checkpoint"
    yield from time_table(StepFlops.count(model), memory, config, model_args, args, workload)
    yield ""
    yield from fit_table(config, model_args, args, workload)


def memory_table(memory: MemoryModel, workload: Workload, zeros: dict[str, ZeroConfig]) -> Iterator[str]:
    """GiB per GPU, each at its own maximum; the peak is less than their sum."""
    batch, ranks = workload.batch, zeros["ZeRO-0"].ranks
    checkpointing = "  with gradient checkpointing"
    rows = [
        ("weights", lambda zero: zero.of_weights(memory.weights)),
        ("gradients", memory.gradients),
        ("optimizer states", memory.optimizer),
        ("activations", lambda zero: memory.activations(batch, False)),
        (checkpointing, lambda zero: memory.activations(batch, True)),
        ("logits and loss", lambda zero: memory.logits(batch)),
        ("temporary", memory.temporary),
        ("peak", lambda zero: memory.peak(batch, zero, False)),
        (checkpointing, lambda zero: memory.peak(batch, zero, True)),
        ("host memory of all GPUs", lambda zero: memory.on_host(zero) * ranks),
    ]
    yield table_row("GiB per GPU", zeros)
    for name, size in rows:
        yield table_row(name, [f"{size(zero) / 2**30:.2f}" for zero in zeros.values()])


def time_table(
    flops: StepFlops,
    memory: MemoryModel,
    config: LlavaConfig,
    model_args: ModelArguments,
    args: EstimateArguments,
    workload: Workload,
) -> Iterator[str]:
    """Operations; and under ZeRO-2, for each kind of GPU, the largest batch, the speed and the hours of an epoch.

    Where the wanted batch fits with checkpointing alone, speed and hours are those with it.
    """
    each, records = flops.of(**workload.average), workload.records or CC3M
    whose = "of the data" if workload.records else "as in LLaVA-CC3M-Pretrain-595K"
    yield f"operations: {each / 1e12:.4g} TFLOP per sample, {each * records / 1e18:.3g} EFLOP per epoch of {records:,}"
    yield f"            records ({whose}); recomputation for gradient checkpointing is not counted\n"
    yield table_row("ZeRO-2", ["fits", "at most", "at most, c", "samples/s", "MFU", "hours/epoch", "limit"])
    batch, speeds = workload.batch, {}
    zero = zero_config("ZeRO-2", args.num_gpus, config.text_config.hidden_size, model_args.train_type)
    for kind in args.gpu:
        most = [
            memory.largest_batch(batch.times(1 / batch.samples), zero, checkpointing, memory_budget(kind))
            for checkpointing in (False, True)
        ]
        if max(most) < batch.samples:
            yield table_row(kind, ["no", *most, "-", "-", "-", "-"])
            continue
        checkpointing = most[0] < batch.samples
        if checkpointing not in speeds:
            way = Way(checkpointing, in_4bit=model_args.load_in_4bit, lora=model_args.lora)
            speeds[checkpointing] = Speed.of(config, model_args.train_type, workload.typical, args.num_gpus, way)
        speed, best = speeds[checkpointing].samples_per_second(kind), speeds[checkpointing].limit(kind)
        mfu = speed * each / args.num_gpus / PEAKS[GPUS[kind].name]
        hours = [f"{records / each_second / 3600:.3g}" for each_second in (speed, best)]
        yield table_row(kind, ["c" if checkpointing else "yes", *most, f"{speed:.4g}", f"{mfu:.0%}", *hours])
    yield "c: with --gradient_checkpointing true; limit: of a step that were matrices and attention alone"


def fit_table(
    config: LlavaConfig, model_args: ModelArguments, args: EstimateArguments, workload: Workload
) -> Iterator[str]:
    """For each strategy and kind of GPU the largest batch, and what it takes to fit."""
    yield table_row("largest batch per GPU", args.gpu)
    for strategy in STRATEGIES:
        in_4bit = model_args.load_in_4bit and strategy == "use_lora"
        memory = MemoryModel.of(meta_model(config, torch.bfloat16, strategy, model_args.lora), in_4bit)
        zeros = zero_configs(config, model_args, args, strategy)
        yield table_row(strategy, [largest_fit(memory, workload, zeros, kind) for kind in args.gpu])
    yield "c: with --gradient_checkpointing true; co: and --deepspeed ds_configs/zero2_offload.json; c3: and zero3.json"


def largest_fit(memory: MemoryModel, workload: Workload, zeros: dict[str, ZeroConfig], kind: str) -> str:
    """The largest batch with the first of FALLBACKS under which the wanted one fits, and its mark."""
    batch = workload.batch
    for name, checkpointing, mark in FALLBACKS:
        if name in zeros and memory.peak(batch, zeros[name], checkpointing) <= memory_budget(kind):
            each = batch.times(1 / batch.samples)
            largest = memory.largest_batch(each, zeros[name], checkpointing, memory_budget(kind))
            return f"{largest}{mark}"
    return "no"


def used_on_device(peak: float) -> float:
    """Bytes that the driver reports when tensors take `peak`."""
    return CONTEXT * 2**30 + (1 + LOST) * peak


def memory_budget(kind: str) -> float:
    """Bytes that tensors may take on a kind of GPU."""
    return (GPUS[kind].memory - CONTEXT) * 2**30 / (1 + LOST)


def table_row(name: str, cells: Any, width: int = 13) -> str:
    """A name and its cells, aligned."""
    return f"{name:<31}" + "".join(f"{cell:>{width}}" for cell in cells)


if __name__ == "__main__":
    main()
