"""The folder of a run: whose it is, and where to go on from."""

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from train_llava.arguments import LlavaTrainingArguments
from train_llava.command import InputError

RUN_FILES = (
    "checkpoint-*",
    "runs",
    "adapter_*",
    "model*.safetensors*",
    "config.json",
    "trainer_state.json",
    "bad_images.jsonl",
)


def newest_first(args: LlavaTrainingArguments) -> list[Path]:
    """The checkpoints of a run."""
    return sorted(Path(args.output_dir).glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))


def is_whole(checkpoint: Path) -> bool:
    """Whether it was written to its end: trainer_state.json comes last."""
    return (checkpoint / "trainer_state.json").is_file()


def checkpoint_to_resume(args: LlavaTrainingArguments) -> str | None:
    """The checkpoint that --resume_from_checkpoint means: a path, or `true` for the newest whole one.

    One that was cut off while it was written is passed over.
    """
    wanted = str(args.resume_from_checkpoint or "false")
    if wanted.lower() == "false":
        return None
    candidates = newest_first(args) if wanted.lower() == "true" else [Path(wanted)]
    for path in candidates:
        if is_whole(path):
            return str(path)
        if args.process_index == 0:
            print(f"{path} was not written to its end and is passed over", flush=True)
    raise InputError(f"--resume_from_checkpoint {wanted}: no whole checkpoint (one with trainer_state.json) there.")


def claim_output_dir(args: LlavaTrainingArguments, checkpoint: str | None) -> None:
    """Sees to it that the folder is this run's alone: refuses another run's, or clears it when told to."""
    folder = Path(args.output_dir)
    left = [] if checkpoint else [path for pattern in RUN_FILES for path in folder.glob(pattern)]
    with args.main_process_first():
        if left and not args.overwrite_output_dir:
            hint = "Continue it with --resume_from_checkpoint true, replace it with --overwrite_output_dir true"
            raise InputError(f"{folder} holds another run. {hint}, or give another --output_dir.")
        for path in left if args.process_index == 0 else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class EnoughDisk(TrainerCallback):
    """Before the first step: refuses a run whose checkpoints will not fit on the disk."""

    def on_train_begin(
        self, args: LlavaTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        if not (args.check_disk and state.is_world_process_zero):
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
                "--check_disk false starts all the same."
            )


def model_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a save writes: of an adapter the trained ones alone."""
    adapter = isinstance(model, PeftModel)
    return sum(p.nbytes for p in model.parameters() if p.requires_grad or not adapter)


def checkpoint_bytes(model: nn.Module, args: LlavaTrainingArguments) -> int:
    """Bytes of one checkpoint: weights, and unless --save_only_model what AdamW keeps of each trained one.

    That is two fp32 moments, 8 bytes. DeepSpeed adds its fp32 master copy, 4 bytes, and writes the weights once more.
    """
    if args.save_only_model:
        return model_bytes(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model_bytes(model) * (2 if args.deepspeed else 1) + trained * (12 if args.deepspeed else 8)


@contextmanager
def last_words(args: LlavaTrainingArguments) -> Iterator[None]:
    """Whatever ends a training, says what is left of it and how to go on."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if isinstance(error, torch.OutOfMemoryError):
            hint = "Out of memory. Lower --per_device_train_batch_size (and raise --gradient_accumulation_steps)"
            print(f"{hint}, or give --gradient_checkpointing true.", file=sys.stderr)
        whole = [path for path in newest_first(args) if is_whole(path)]
        left = f"The last whole checkpoint is {whole[0]}" if whole else "There is no whole checkpoint"
        how = "; continue with --resume_from_checkpoint true" if whole else ""
        print(f"The training ended with {type(error).__name__}. {left}{how}.", file=sys.stderr, flush=True)
        raise
