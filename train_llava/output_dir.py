"""The folder of a run: whose it is, and where to go on from."""

import shutil
from pathlib import Path

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


def checkpoint_to_resume(args: LlavaTrainingArguments) -> str | None:
    """The checkpoint that --resume_from_checkpoint means: a path, or `true` for the newest whole one.

    A checkpoint without trainer_state.json was cut off while it was written, and is passed over.
    """
    wanted = str(args.resume_from_checkpoint or "false")
    if wanted.lower() == "false":
        return None
    newest_first = sorted(Path(args.output_dir).glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    candidates = newest_first if wanted.lower() == "true" else [Path(wanted)]
    for path in candidates:
        if (path / "trainer_state.json").is_file():
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
