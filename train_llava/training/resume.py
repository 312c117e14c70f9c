"""Resuming from a checkpoint: finding it, and checking that it belongs to this run.

Beside the model, a checkpoint holds `run.json`: the flags, the data and the batch that decide what is seen in which
step, and how it is learned. A run that differs in one of them is refused before weights are loaded. Other numbers of
ranks, micro-batches or workers make no difference, as long as a step has as many samples.
"""

import json
import os
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

from torch.serialization import register_package
from transformers import TrainerCallback, TrainerControl, TrainerState

from train_llava.cli import InputError
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.planning.arguments import DataArguments, LlavaTrainingArguments, ModelArguments

# Without DeepSpeed, on a CPU, Trainer loads the optimizer to what accelerate calls a rank's CPU, `cpu:0`, which
# torch.load does not know before 2.12
register_package(100, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None)
RUN = "run.json"
NEW_RUN = "start a new run from its model (an adapter merged, see train_llava.merge_lora) with another --output_dir"
# Flags that a resumed run cannot change: it takes them from its checkpoint, or could not continue with others
# (of those of adapters all but the dropout, which may be changed)
LORA = (
    *("train_projector", "lora_r", "lora_alpha", "lora_target_modules", "vision_lora", "load_in_4bit"),
    *("use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio"),
)
BEST = "metric_for_best_model"  # compared where both runs have one: what was best by one says nothing of another
FLAGS = (
    BEST,
    *("train_type", *LORA),
    *("learning_rate", "projector_learning_rate", "vision_learning_rate", "weight_decay", "optim", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "bf16", "fp16", "seed"),
    *("data_seed", "train_sampling_strategy", "dataloader_drop_last", "tokens_per_batch"),
)


def newest_first(args: LlavaTrainingArguments) -> list[Path]:
    """The checkpoints of a run."""
    return sorted(Path(args.output_dir).glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: trainer_state.json comes last."""
    return (checkpoint / "trainer_state.json").is_file()


def checkpoint_to_resume(args: LlavaTrainingArguments) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means: a path, or `true` for the newest whole one.

    One that was cut off while it was written is passed over.

    Raises:
        InputError: there is none.
    """
    wanted = str(args.resume_from_checkpoint or "false")
    if wanted.lower() == "false":
        return None
    candidates = newest_first(args) if wanted.lower() == "true" else [Path(wanted)]
    for path in candidates:
        if is_whole(path):
            return path
        if args.process_index == 0:
            print(f"{path} was not written to its end and is passed over", flush=True)
    raise InputError(f"--resume_from_checkpoint {wanted}: no whole checkpoint (one with trainer_state.json) there.")


def run_flags(model_args: ModelArguments, data_args: DataArguments, args: LlavaTrainingArguments) -> dict[str, Any]:
    """The flags that a run and its resumed run must have in common."""
    given = {**vars(model_args), **vars(data_args), **vars(args)}
    unused = LORA if model_args.train_type != "use_lora" else ()
    flags = {name: given[name] for name in FLAGS if name not in unused}
    flags["data_seed"] = args.order_seed
    return json.loads(json.dumps(flags, default=str))  # as they will be read again


def describe_run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: LlavaTrainingArguments,
    dataset: LlavaDataset,
    collator: LlavaCollator,
) -> dict[str, Any]:
    """What a checkpoint holds of its run: the flags, the batch, the data, and how it becomes tokens and pixels."""
    data = {"records": len(dataset), "data": dataset.fingerprint(), "tokens": collator.encoder.fingerprint()}
    data["images"] = collator.pixels.fingerprint()
    return {"flags": run_flags(model_args, data_args, args), "batch": args.step_factors, "data": data}


def check_resumable(checkpoint: Path, args: LlavaTrainingArguments, flags: dict[str, Any]) -> None:
    """Checks, before anything is loaded, that this run can continue from the checkpoint.

    Raises:
        InputError: it has no optimizer states; it is of a run with (without) DeepSpeed; it was written with other flags
            or with other samples per step. Says how to go on.
    """
    states = zero_states(checkpoint)
    if not states and not (checkpoint / "optimizer.pt").is_file():
        raise InputError(f"{checkpoint} holds no optimizer states (--save_only_model): it is a model to start from.")
    if bool(states) != bool(args.deepspeed):
        word = "with" if states else "without"
        raise InputError(f"{checkpoint} is of a run {word} DeepSpeed; resume it {word} --deepspeed.")
    run = read_run(checkpoint)
    if run is None:
        if args.process_index == 0:
            print(f"{checkpoint} has no {RUN}: whether this run sees its records in the same order is not known")
        return
    other = {name: value for name, value in run["flags"].items() if flags.get(name) != value}
    if None in (other.get(BEST), flags.get(BEST)):
        other.pop(BEST, None)
    if other:
        needed = ", ".join(f"--{name} {as_flag(value)}" for name, value in other.items() if value is not None)
        dropped = ", ".join(f"no --{name}" for name, value in other.items() if value is None)
        raise InputError(
            f"{checkpoint} was written with other flags, which a resumed run cannot change. Give "
            f"{', '.join(filter(None, [needed, dropped]))}, or {NEW_RUN}."
        )
    before = prod(run["batch"].values())
    if before != args.step_size:
        raise InputError(
            f"{checkpoint} is of a run with {before} {args.step_unit} in a step ({factors(run['batch'])}), this one "
            f"has {args.step_size} ({factors(args.step_factors)}), so that records would be left out or seen twice. "
            f"{same_batch(before, args)}"
        )


def check_data(checkpoint: Path, data: dict[str, Any]) -> None:
    """Checks that a resumed run has the data of its checkpoint.

    Raises:
        InputError: it has other data.
    """
    run = read_run(checkpoint)
    was = data if run is None else data | run["data"]  # earlier versions wrote nothing about images
    if was == data:
        return
    if was | {"images": ""} == data | {"images": ""}:
        raise InputError(
            f"{checkpoint} was trained with another image processor than this model has now (such as one with another "
            f"--image_aspect_ratio of build_model). Give the model of that run, or {NEW_RUN}."
        )
    if was["records"] != data["records"]:
        what = f"on {was['records']:,} records, and here are {data['records']:,}"
    elif was["data"] != data["data"]:
        what = "on records with other texts, weights or order"
    else:
        what = "with another tokenizer, chat template or --model_max_length"
    raise InputError(
        f"{checkpoint} was trained {what}, so that records would be left out or seen twice. Give the data and flags of "
        f"that run (--data_path, --on_bad_record, --caption_fields, --model_max_length), or {NEW_RUN}."
    )


def convert_ranks(checkpoint: Path, args: LlavaTrainingArguments) -> bool:
    """ZeRO keeps a file of optimizer states per rank. For another number of ranks, DeepSpeed makes a universal
    checkpoint of them, once, beside them; returns whether that one must be loaded.

    Raises:
        InputError: it cannot be made.
    """
    states = zero_states(checkpoint)
    if not states or len(states) == args.world_size:
        return False
    universal = states[0].parent.with_name(f"{states[0].parent.name}_universal")
    with args.main_process_first(local=False):
        if not (checkpoint / "latest_universal").is_file():
            print(f"{checkpoint} is of {len(states)} ranks, this run has {args.world_size}: converting it", flush=True)
            shutil.rmtree(universal, ignore_errors=True)  # of a conversion that was cut off
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            command += ["--input_folder", str(states[0].parent), "--output_folder", str(universal)]
            environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
            done = subprocess.run(command, env=environment | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
            if done.returncode:
                shutil.rmtree(universal, ignore_errors=True)
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise InputError(f"{checkpoint}: cannot be converted to {args.world_size} ranks ({reason}).")
    return True


def zero_states(checkpoint: Path) -> list[Path]:
    """Files of optimizer states, one per rank; none without DeepSpeed."""
    return list(checkpoint.glob("global_step*/*_optim_states.pt"))


def write_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Writes run.json beside the weights; trainer_state.json, which marks a whole checkpoint, comes later."""
    (checkpoint / RUN).write_text(json.dumps(run, indent=2) + "\n")


def read_run(checkpoint: Path) -> dict[str, Any] | None:
    """Reads run.json; None where this version did not write it."""
    try:
        run = json.loads((checkpoint / RUN).read_text())
        return run if {"flags", "batch", "data"} <= run.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def as_flag(value: Any) -> str:
    """A value as one types it in a command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def factors(batch: dict[str, int]) -> str:
    """The factors of a step's samples, as text."""
    return " x ".join(map(str, batch.values()))


def same_batch(wanted: int, args: LlavaTrainingArguments) -> str:
    """A sentence with the flags that make this run's steps as large."""
    if wanted % args.world_size:
        return (
            f"{wanted} {args.step_unit} cannot be shared out among {args.world_size} ranks; start it on another number."
        )
    if args.global_batch_size:
        return f"Give --global_batch_size {wanted}."
    each = wanted // args.world_size
    if args.tokens_per_batch is not None:
        return f"Give --gradient_accumulation_steps {each}."
    size = max(n for n in range(1, args.train_batch_size + 1) if each % n == 0)
    return f"Give --per_device_train_batch_size {size} --gradient_accumulation_steps {each // size}."


class StepFlagsCallback(TrainerCallback):
    """Lets a resumed run log, evaluate and save as its flags say; Trainer would take this from the checkpoint."""

    def on_train_begin(
        self, args: LlavaTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        names = [f"{kind}_steps" for kind in ("logging", "eval", "save")]
        before = {name: getattr(state, name) for name in names}
        state.compute_steps(args, state.max_steps)
        for name in names if state.global_step and state.is_world_process_zero else []:
            if getattr(state, name) != before[name]:
                print(f"--{name} {getattr(state, name):g} from here on, {before[name] or 0:g} until now", flush=True)
        if state.global_step >= state.max_steps and state.is_world_process_zero:
            print(f"nothing is left to train: the run ends at step {state.max_steps}", flush=True)
