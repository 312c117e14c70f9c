"""The folder of a run: whose it is, and where to go on from."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

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
    "samples",
    "curves.png",
    "README.md",
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
            check_resumable(path, args)
            return str(path)
        if args.process_index == 0:
            print(f"{path} was not written to its end and is passed over", flush=True)
    raise InputError(f"--resume_from_checkpoint {wanted}: no whole checkpoint (one with trainer_state.json) there.")


def check_resumable(checkpoint: Path, args: LlavaTrainingArguments) -> None:
    """Sees to it that the optimizer's states can be read as this run is started, before anything is written over.

    ZeRO keeps a file per rank. For another number of ranks DeepSpeed converts them to a universal checkpoint; where
    there is one beside them, it is used.

    Raises:
        InputError: they are missing, of another number of ranks, or of a run with (without) DeepSpeed; says what to do.
    """
    states = list(checkpoint.glob("global_step*/*_optim_states.pt"))
    if not states and not (checkpoint / "optimizer.pt").is_file():
        raise InputError(f"{checkpoint} holds no optimizer states (--save_only_model): it is a model to start from.")
    if bool(states) != bool(args.deepspeed):
        word = "with" if states else "without"
        raise InputError(f"{checkpoint} is of a run {word} DeepSpeed; resume it {word} --deepspeed.")
    if not states or len(states) == args.world_size:
        return
    if (checkpoint / "latest_universal").is_file():
        args.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
        return
    step = states[0].parent
    raise InputError(
        f"{checkpoint} is of {len(states)} ranks, this run has {args.world_size}. Convert it once, then resume again:\n"
        f"  python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {step} "
        f"--output_folder {step}_universal"
    )


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
