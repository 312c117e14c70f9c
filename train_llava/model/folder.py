"""The folder of a model: written beside the one that it replaces, and put in its place when it is whole."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from train_llava.cli import UNFINISHED, InputError, output_folder

LEAVING, REPLACED = ".leaving-", ".replaced-"  # folders with the files of a model while another takes its place
# What a model's folder may hold; everything else in a folder that is replaced is left where it is
MODEL_FILES = (
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin"),
    *("pytorch_model.bin.index.json", "config.json", "generation_config.json", "*processor_config.json"),
    *("chat_template.*", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("adapter_model.*", "adapter_config.json", "adapter_base.json", "training_args.bin"),
)
CONFIGS = ("config.json", "adapter_config.json")  # without which nothing loads
CARD = "README.md"


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Refuses a folder that holds something, unless that is a model and may be replaced.

    Raises:
        InputError: see there.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"{output_dir} is a file. Give another --output_dir.")
    ours = (UNFINISHED, LEAVING, REPLACED)
    full = output_dir.exists() and any(not path.name.startswith(ours) for path in output_dir.iterdir())
    if full and not (overwrite and (output_dir / "config.json").is_file()):
        hint = "It holds no model to overwrite" if overwrite else "Give --overwrite if it is a model to replace"
        raise InputError(f"{output_dir} is not empty. {hint}, or give another --output_dir.")


@contextmanager
def new_folder(output_dir: Path, overwrite: bool = False, needed: int = 0) -> Iterator[Path]:
    """Gives an empty folder inside `output_dir`, whose files replace the model there at the end of the `with` block.

    If the block fails, nothing has changed. `needed` is the number of bytes that the disk must have free.

    Raises:
        InputError: `output_dir` is not empty and not to be replaced, another process writes there, or the disk has no
            room.
    """
    check_output_dir(output_dir, overwrite)
    with output_folder(output_dir):
        recover_model(output_dir)
        free = shutil.disk_usage(output_dir).free
        if needed > free:
            sizes = f"the model takes {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
            raise InputError(f"{output_dir}: {sizes}. Free some, or give an --output_dir on another disk.")
        folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=output_dir))
        try:
            yield folder
            put_in_place(folder, output_dir)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(new: Path, folder: Path) -> None:
    """Moves the files of a model into a folder, where they replace those of another one.

    The config goes first and comes last, so that no mixture of the two ever loads; whatever ends the process in
    between, `recover_model` brings the old model back. A card that somebody else has written stays.
    """
    if is_foreign_card(folder / CARD):
        (new / CARD).unlink(missing_ok=True)
    make_readable(new)
    old = model_files(folder) | {folder / path.name for path in new.iterdir() if (folder / path.name).exists()}
    replaced = None
    if old:
        leaving = Path(tempfile.mkdtemp(prefix=LEAVING, dir=folder))
        move(old, leaving)
        replaced = leaving.rename(folder / leaving.name.replace(LEAVING, REPLACED))
    move(new.iterdir(), folder)
    if replaced:
        shutil.rmtree(replaced)


def model_files(folder: Path) -> set[Path]:
    """The files of a model in a folder."""
    return {path for pattern in MODEL_FILES for path in folder.glob(pattern)}


def upload(folder: Path, repo_id: str, **options) -> None:
    """Puts on the hub what of a folder belongs there: the model, its card and the images in that. Not what Trainer
    pickles, nor logs: both name folders of this machine. `options` are those of HfApi.upload_folder."""
    names = sorted(path.name for path in model_files(folder) if path.name != "training_args.bin")
    names += [CARD, "curves.png", "samples/*.png"]
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=names, **options)


def recover_model(folder: Path) -> None:
    """Brings back a model whose replacement was cut off, and deletes what no process is writing any more. The folder
    must be held by this process."""
    for leaving in folder.glob(f"{LEAVING}*"):
        move(leaving.iterdir(), folder)
        leaving.rmdir()
    for replaced in folder.glob(f"{REPLACED}*"):
        if not any((folder / name).exists() for name in CONFIGS):
            for part in model_files(folder):
                part.unlink()
            move(replaced.iterdir(), folder)
        shutil.rmtree(replaced)
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def move(files: Iterable[Path], folder: Path) -> None:
    """Moves the files of a model: its config first when they leave, and last when they arrive."""
    arrive = not folder.name.startswith(LEAVING)
    for path in sorted(files, key=lambda path: (path.name in CONFIGS) == arrive):
        path.replace(folder / path.name)


def is_foreign_card(path: Path) -> bool:
    """Whether there is a README that none of these commands has written."""
    return path.is_file() and "train_llava" not in path.read_text(encoding="utf-8", errors="replace")


def make_readable(folder: Path) -> None:
    """Gives all files the permissions of new files; safetensors makes its own unreadable for everybody else."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def save_llava(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, output_dir: str | Path, overwrite: bool = False
) -> None:
    """Writes one folder that plain transformers loads, in safetensors shards of 2 GB (the check maps one at a time).

    Raises:
        InputError: the folder is not empty, or the disk has no room for the weights.
    """
    with new_folder(Path(output_dir), overwrite, sum(p.nbytes for p in model.parameters())) as folder:
        model.save_pretrained(folder, max_shard_size="2GB")
        processor.save_pretrained(folder)
        # save_pretrained names the dtype of the first weight, the tower's; loading should follow the language model's
        model.config.dtype = model.lm_head.weight.dtype
        model.config.save_pretrained(folder)
