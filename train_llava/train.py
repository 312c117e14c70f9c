"""Trains a LLaVA. `run_zero2.sh` starts this under DeepSpeed; torchrun or plain python work too:

    python -m train_llava.train --model_name_or_path models/llava --data_path data/LLaVA-CC3M-Pretrain-595K \\
        --train_type use_lora --output_dir output/first
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlavaConfig, PrinterCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import ProgressCallback

from train_llava.arguments import DataArguments, LlavaTrainingArguments, ModelArguments, check_flags, parse_flags
from train_llava.cli import InputError, command, shared_output_folder
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.ingest.bad_images import BadImages
from train_llava.ingest.data_files import paths_of
from train_llava.model.config import positions_of, whole_config
from train_llava.model.freeze import apply_train_type
from train_llava.model.load import fetch, load, load_processor
from train_llava.model.structure import parts_table
from train_llava.planning.budget import check_memory
from train_llava.planning.memory import Sharing, Step
from train_llava.planning.meta_model import skeleton
from train_llava.planning.workload import longest_batch
from train_llava.processing.chat import ChatEncoder
from train_llava.training.callbacks import EnoughDisk, ProgressLine
from train_llava.training.fault_tolerance import StopSignal, Watchdog
from train_llava.training.model_card import write_card
from train_llava.training.output_dir import check_unclaimed, drop_old_runs, last_words, set_aside
from train_llava.training.resume import (
    ObeyStepFlags,
    check_data,
    check_resumable,
    checkpoint_to_resume,
    convert_ranks,
    newest_first,
    run_batch,
    run_data,
    run_flags,
)
from train_llava.training.samples import SampleCaptions
from train_llava.training.trainer import LlavaTrainer


@command
def main() -> None:
    model_args, data_args, args = parse_flags()
    check_flags(model_args, data_args, args)
    checkpoint, flags = checkpoint_to_resume(args), run_flags(model_args, data_args, args)
    if checkpoint:
        check_resumable(checkpoint, args, flags)
    paths = paths_of([*data_args.data_path, *(data_args.eval_data_path or [])])
    read = (model_args.model_name_or_path, data_args.image_folder, *paths)
    with shared_output_folder(Path(args.output_dir), partial(check_unclaimed, args, checkpoint), *read):
        train(model_args, data_args, args, checkpoint, flags)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: LlavaTrainingArguments,
    checkpoint: Path | None,
    flags: dict[str, Any],
) -> None:
    """The run, from a checkpoint if there is one; `flags` are what the next checkpoints hold of them."""
    # at its first start on a CPU, DeepSpeed would compile an op of tensor-parallel inference, which no training calls
    deepspeed.ops.__compatible_ops__ = {}
    if is_deepspeed_zero3_enabled():  # which shares out the weights while the model is built
        deepspeed.init_distributed("gloo" if args.use_cpu else None)
    # DeepSpeed with bf16 keeps fp32 master weights of its own; everywhere else the weights themselves are the masters
    dtype = torch.bfloat16 if args.deepspeed and args.bf16 else torch.float32
    config = whole_config(fetch(model_args.model_name_or_path))
    processor = load_processor(model_args.model_name_or_path)
    collator = LlavaCollator(processor, data_args.model_max_length, for_trainer=True, packing=data_args.packing)
    train_dataset, eval_dataset = open_data(data_args, args, collator.encoder, positions_of(config))
    run = {"flags": flags, "batch": run_batch(args), "data": run_data(train_dataset, collator.encoder)}
    if checkpoint:
        check_data(checkpoint, run["data"])
        convert_ranks(checkpoint, args)
    foresee(config, dtype, model_args, args, train_dataset, collator.encoder)
    options = {"in_4bit": model_args.load_in_4bit, "attn_implementation": model_args.attn_implementation}
    model, processor = load(model_args.model_name_or_path, dtype=dtype, **options)
    set_seed(args.seed)  # adapters start alike however the model was loaded
    model = apply_train_type(model, model_args)
    if args.torch_compile:
        compile_layers(model, args)
    if args.process_index == 0:
        print(f"--train_type {model_args.train_type}\n{parts_table(model)}", flush=True)

    if args.process_index == 0 and not checkpoint:
        set_aside(args)
    # the processor is saved beside the weights in every checkpoint
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": collator}
    stop = StopSignal()
    callbacks = [ObeyStepFlags(), ProgressLine(), EnoughDisk(), Watchdog(), stop]
    trainer = LlavaTrainer(model, args, processing_class=processor, callbacks=callbacks, **data)
    trainer.run = run
    if data_args.sample_steps:
        asked = (eval_dataset or train_dataset, processor, data_args.sample_steps)
        trainer.add_callback(SampleCaptions(*asked, pause=trainer.meter.paused))
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    with last_words(args):
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if not stop.received:
            if eval_dataset is not None and args.eval_strategy == "no":
                trainer.evaluate()
            trainer.save_model(_internal_call=True)  # pushed below, with its card
            trainer.save_state()
            if trainer.is_world_process_zero():
                if bad_images := train_dataset.bad_images.summary():
                    print(bad_images, flush=True)
                write_card(model, trainer.state, args, model_args, data_args)
                drop_old_runs(args)
            if args.push_to_hub:
                trainer.push_to_hub()
    if stop.received and args.process_index == 0:
        hint = "The same command with --resume_from_checkpoint true goes on from there"
        print(f"The checkpoint is {newest_first(args)[0]}. {hint}.", flush=True)
    if dist.is_initialized():
        dist.barrier()  # meanwhile Gloo's threads let go of their last tensors; with these held, the next line can hang
        dist.destroy_process_group()
    if stop.received:
        sys.exit(128 + stop.received)  # as shells say it


def foresee(
    config: LlavaConfig,
    dtype: torch.dtype,
    model_args: ModelArguments,
    args: LlavaTrainingArguments,
    dataset: LlavaDataset,
    encoder: ChatEncoder,
) -> None:
    """Says what memory the run will need, before any weight is loaded; refuses what cannot be.

    Raises:
        InputError: see `check_memory`.
    """
    unset_hf_deepspeed_config()  # or, under ZeRO-3, transformers would share out weights that are not there
    model = skeleton(config, model_args, dtype)
    if args.deepspeed:
        set_hf_deepspeed_config(args.hf_deepspeed_config)
    step = Step.of(model, model_args.load_in_4bit, on_gpu=torch.cuda.is_available() and not args.use_cpu)
    zero = args.hf_deepspeed_config.config if args.deepspeed else None
    sharing = Sharing.read(zero, args.world_size, config.text_config.hidden_size)
    batch = longest_batch(dataset, encoder, args.train_batch_size)
    verdict = check_memory(step, batch, sharing, args)
    if args.process_index == 0:
        print(verdict, flush=True)


def open_data(
    data_args: DataArguments, args: LlavaTrainingArguments, encoder: ChatEncoder, positions: int | None
) -> tuple[LlavaDataset, LlavaDataset | None]:
    """Training data and held-out data, the latter None without --eval_data_path.

    Raises:
        InputError: see LlavaDataset; or weights in an order that takes each record once.
    """
    bad_images = BadImages(Path(args.output_dir) / "bad_images.jsonl", data_args.max_bad_images)
    options = {"on_bad_record": data_args.on_bad_record, "caption_fields": data_args.caption_fields}
    options |= {"bad_images": bad_images, "streaming": data_args.streaming, "image_folder": data_args.image_folder}
    options["seed"] = args.order_seed
    held_out = None
    with args.main_process_first():  # the others then find its Arrow copies
        if data_args.eval_data_path:
            held_out = LlavaDataset(data_args.eval_data_path, held_out=True, **options)
            held_out_dropped = held_out.fit(encoder, args.dataloader_num_workers or 1)
        dataset = LlavaDataset(data_args.data_path, **options)
        dropped = dataset.fit(encoder, args.dataloader_num_workers or 1)
        if args.train_sampling_strategy == "sequential" and {source.weight for source in dataset.sources} != {1}:
            raise InputError("--train_sampling_strategy sequential reads every record once: leave out the weights.")
        if args.process_index == 0:
            print(dataset.summary(positions) + left_out(dropped), flush=True)
            if held_out is not None:
                print(f"held out:\n{held_out.summary(positions)}{left_out(held_out_dropped)}", flush=True)
    return dataset, held_out


def left_out(count: int) -> str:
    """How many records `fit` has dropped, to end a summary; empty without any."""
    return f", {count:,} too long and left out" * bool(count)


def compile_layers(model: nn.Module, args: LlavaTrainingArguments) -> None:
    """Compiles the language model's layers in place; all share what was compiled for the first.

    Trainer would compile the whole model, many times as long and again for each kind of batch, since what comes between
    the layers depends on data (where images and answers are). So it is told that nothing is left to compile. The
    tower's layers are few operations, and hooks inside them would break their graphs.
    """
    how = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
    for name, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer) and "language_model" in name:
            layer.forward = torch.compile(layer.forward, **how)
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None


if __name__ == "__main__":
    main()
