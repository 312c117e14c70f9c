"""Trains a LLaVA. `run_zero2.sh` starts this under DeepSpeed; torchrun or plain python work too:

    python -m train_llava.train --model_name_or_path models/llava --data_path data/LLaVA-CC3M-Pretrain-595K \\
        --train_type use_lora --output_dir output/first
"""

import sys
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import PrinterCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import ProgressCallback

from train_llava.cli import InputError, command, shared_output_folder
from train_llava.data import MULTIPLE, LlavaCollator, LlavaDataset
from train_llava.ingest.bad_images import BadImages
from train_llava.ingest.data_files import paths_of
from train_llava.model.config import load_llava_config, max_positions
from train_llava.model.freeze import apply_train_type
from train_llava.model.load import fetch, gpu, load, load_processor, take_memory_in_blocks_that_grow
from train_llava.model.structure import components_table
from train_llava.planning.arguments import DataArguments, LlavaTrainingArguments, ModelArguments
from train_llava.planning.budget import check_memory_budget, no_deepspeed_config
from train_llava.planning.foretell import foretell, this_gpu
from train_llava.planning.workload import Workload, fullest_pack, longest_batch
from train_llava.processing.chat import ChatEncoder
from train_llava.processing.images import FRAMINGS
from train_llava.training.callbacks import DiskSpaceCallback, ProgressLine
from train_llava.training.compiled_ops import compile_no_op
from train_llava.training.fault_tolerance import PreemptionCallback, Watchdog, close_process_group
from train_llava.training.flag_checks import check_flags, check_framing
from train_llava.training.held_out import check_scores
from train_llava.training.model_card import write_card
from train_llava.training.output_dir import drop_old_runs, prepare_output_dir, report_failure, set_old_run_aside
from train_llava.training.renamed import parse_flags
from train_llava.training.resume import (
    StepFlagsCallback,
    check_data,
    check_resumable,
    checkpoint_to_resume,
    convert_ranks,
    describe_run,
    newest_first,
    run_flags,
)
from train_llava.training.run_log import LastingStream, RunLog
from train_llava.training.samples import LogGenerationsCallback
from train_llava.training.step import fill_deepspeed_config
from train_llava.training.trainer import LlavaTrainer


@command
def main() -> None:
    """Checks the flags, holds the output folder, and then prepares, trains and finishes."""
    sys.stdout = sys.stdout and LastingStream(sys.stdout)
    take_memory_in_blocks_that_grow()
    model_args, data_args, args = parse_flags()
    check_flags(model_args, data_args, args)
    checkpoint = checkpoint_to_resume(args)
    if checkpoint:
        check_resumable(checkpoint, args, run_flags(model_args, data_args, args))
    paths = paths_of([*data_args.data_path, *(data_args.eval_data_path or [])])
    inputs = (model_args.model_name_or_path, data_args.image_folder, *paths)  # must not be written to
    check_folder = partial(prepare_output_dir, args, checkpoint)
    with RunLog(args) as log, shared_output_folder(Path(args.output_dir), check_folder, *inputs):
        preemption = PreemptionCallback()
        trainer = prepare(model_args, data_args, args, checkpoint, preemption)
        log.begin()
        with report_failure(args):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            if not preemption.received:
                finish(trainer, model_args, data_args)
        shut_down(args, preemption)


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: LlavaTrainingArguments,
    checkpoint: Path | None,
    preemption: PreemptionCallback,
) -> LlavaTrainer:
    """Opens the data, loads and freezes the model, and puts both into a trainer.

    Args:
        model_args, data_args, args: the flags, already checked.
        checkpoint: the one to resume from, if any.
        preemption: the callback that stops the run after a signal.

    Raises:
        InputError: the flags, the data or this machine do not allow it; before weights are loaded wherever possible.
    """
    set_up_deepspeed(args, model_args.train_type)
    # DeepSpeed with bf16 keeps fp32 master weights of its own; otherwise the weights themselves are kept in fp32
    dtype = torch.bfloat16 if args.deepspeed and args.bf16 else torch.float32
    config = load_llava_config(fetch(model_args.model_name_or_path))
    processor = load_processor(model_args.model_name_or_path)
    options = {"for_trainer": True, "packing": data_args.packing, "multiple": MULTIPLE if gpu() == "cuda" else 1}
    collator = LlavaCollator(processor, data_args.model_max_length, **options)
    framing = collator.pixels.framing()
    check_framing(framing, model_args)
    train_dataset, eval_dataset = open_data(data_args, args, collator.encoder, max_positions(config))
    if args.tokens_per_batch is None:
        longest = partial(longest_batch, train_dataset, collator.encoder)
    else:
        longest = partial(fullest_pack, train_dataset, collator.encoder, args.tokens_per_batch)
    memory_line, expected = check_memory_budget(config, dtype, longest, model_args, args)
    if args.auto_batch:  # a micro-batch is chosen now, for which the settings were made anew
        fill_settings(args, model_args.train_type)
    run = describe_run(model_args, data_args, args, train_dataset, collator)  # with the batch that fits
    universal = False  # whether DeepSpeed must load a universal checkpoint, as for another number of ranks
    if checkpoint:
        check_data(checkpoint, run["data"])
        universal = convert_ranks(checkpoint, args)
    kind = this_gpu(args) if args.tokens_per_batch is None else None
    if args.process_index == 0:
        print(f"images that are not square: {FRAMINGS[framing]}", flush=True)
        print(memory_line, flush=True)
        if kind:
            workload = Workload.of(train_dataset, collator.encoder, args.train_batch_size)
            with no_deepspeed_config(args):
                print(foretell(kind, config, workload, model_args, args), flush=True)

    model = load_model(model_args, args, dtype)
    if args.process_index == 0 and not checkpoint:
        set_old_run_aside(args)
    trainer = LlavaTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,  # saved beside the weights in every checkpoint
        callbacks=[
            StepFlagsCallback(),
            ProgressLine(foretold=kind is not None),
            DiskSpaceCallback(),
            Watchdog(),
            preemption,
        ],
    )
    trainer.run, trainer.first_step.expected = run, expected
    if universal:
        trainer.load_universal_checkpoint()
    if data_args.sample_steps:
        dataset, pause = eval_dataset or train_dataset, trainer.throughput.paused
        trainer.add_callback(LogGenerationsCallback(dataset, processor, data_args.sample_steps, pause))
    for replaced in (ProgressCallback, PrinterCallback):  # by ProgressLine
        trainer.remove_callback(replaced)
    return trainer


def finish(trainer: LlavaTrainer, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Evaluates, saves the model with its card, and drops the run that it replaces."""
    args = trainer.args
    if trainer.eval_dataset is not None and args.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_model(_internal_call=True)  # pushed below, with its card
    trainer.save_state()
    if trainer.is_world_process_zero():
        if bad_images := trainer.train_dataset.bad_images.summary():
            print(bad_images, flush=True)
        write_card(trainer.model, trainer.state, args, model_args, data_args, trainer.hub_model_id)
        drop_old_runs(args)
    if args.push_to_hub:
        trainer.push_to_hub()


def shut_down(args: LlavaTrainingArguments, preemption: PreemptionCallback) -> None:
    """Closes the process group. If a signal has stopped the run, exits with 128 + its number."""
    if preemption.received and args.process_index == 0:
        hint = "The same command with --resume_from_checkpoint true goes on from there"
        print(f"The checkpoint is {newest_first(args)[0]}. {hint}.", flush=True)
    if dist.is_initialized():
        close_process_group()
    if preemption.received:
        sys.exit(128 + preemption.received)  # as shells report it


def fill_settings(args: LlavaTrainingArguments, train_type: str) -> None:
    """Completes DeepSpeed's settings for this run."""
    if args.deepspeed:
        sums_in_bf16 = args.bf16 and args.gradient_accumulation_steps > 1
        fill_deepspeed_config(args.hf_deepspeed_config.config, train_type, sums_in_bf16)


def set_up_deepspeed(args: LlavaTrainingArguments, train_type: str) -> None:
    """What DeepSpeed must know before a model is built."""
    fill_settings(args, train_type)
    compile_no_op()
    if is_deepspeed_zero3_enabled():  # which shares out the weights while the model is built
        deepspeed.init_distributed("gloo" if args.use_cpu else None)


def load_model(model_args: ModelArguments, args: LlavaTrainingArguments, dtype: torch.dtype) -> nn.Module:
    """The model, frozen and adapted as --train_type asks."""
    options = {"in_4bit": model_args.load_in_4bit, "attn_implementation": model_args.attn_implementation}
    model, _ = load(model_args.model_name_or_path, dtype=dtype, **options)
    set_seed(args.seed)  # adapters start alike however the model was loaded
    model = apply_train_type(model, model_args.train_type, model_args.lora)
    if args.compile_options is not None:
        compile_layers(model, args.compile_options)
    if args.process_index == 0:
        print(f"--train_type {model_args.train_type}\n{components_table(model)}", flush=True)
    return model


def open_data(
    data_args: DataArguments, args: LlavaTrainingArguments, encoder: ChatEncoder, positions: int | None
) -> tuple[LlavaDataset, LlavaDataset | None]:
    """The training data and the held-out data, which is None without --eval_data_path.

    Raises:
        InputError: see LlavaDataset and `check_tokens_per_batch`; or a source has a weight, and
            --train_sampling_strategy sequential reads every record once.
    """
    bad_images = BadImages(Path(args.output_dir) / "bad_images.jsonl", data_args.max_bad_images)
    options = {"on_bad_record": data_args.on_bad_record, "caption_fields": data_args.caption_fields}
    options |= {"bad_images": bad_images, "streaming": data_args.streaming, "image_folder": data_args.image_folder}
    options["seed"] = args.order_seed
    held_out, processes = None, args.dataloader_num_workers or 1
    with args.main_process_first():  # the others then find its Arrow copies
        if data_args.eval_data_path:
            held_out = LlavaDataset(data_args.eval_data_path, held_out=True, **options)
            held_out = held_out.filter_by_length(encoder, processes)
            if args.eval_generate:
                check_scores(held_out, args)
        dataset = LlavaDataset(data_args.data_path, **options).filter_by_length(encoder, processes)
        if args.train_sampling_strategy == "sequential" and {source.weight for source in dataset.sources} != {1}:
            raise InputError("--train_sampling_strategy sequential reads every record once: leave out the weights.")
        check_tokens_per_batch(args.tokens_per_batch, dataset)
        if args.process_index == 0:
            print(dataset.summary(positions), flush=True)
            if held_out is not None:
                print(f"held out:\n{held_out.summary(positions)}", flush=True)
    return dataset, held_out


def check_tokens_per_batch(tokens: int | None, dataset: LlavaDataset) -> None:
    """Checks that packs of so many tokens can hold each conversation, and are as many in each epoch.

    Raises:
        InputError: they cannot, or a source has a weight that is not a whole number.
    """
    if tokens is None:
        return
    if (longest := int(dataset.lengths.max())) > tokens:
        raise InputError(
            f"--tokens_per_batch {tokens}: the longest conversation has {longest} tokens. Give at least {longest}, or "
            f"cut it with --model_max_length {tokens}."
        )
    for source in dataset.sources:
        if source.weight != round(source.weight):
            raise InputError(
                f"--tokens_per_batch {tokens}: with {source.path}:{source.weight:g} other records are drawn in each "
                "epoch, and there would be more or fewer batches. Give whole numbers as weights."
            )


def compile_layers(model: nn.Module, options: dict[str, str | None]) -> None:
    """Compiles the language model's layers in place; all share what was compiled for the first.

    Trainer would compile the whole model, many times as long and again for each kind of batch, since what comes between
    the layers depends on data (where images and answers are). The tower's layers are few operations, and hooks inside
    them would break their graphs.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer) and "language_model" in name:
            layer.compile(**options)


if __name__ == "__main__":
    main()
