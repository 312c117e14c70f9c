"""A folder of a model, made beside what lies there and put in its place when it is whole."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train_llava.command import InputError

UNFINISHED = ".unfinished-"
# What a model's folder may hold; everything else in a folder that is replaced is left where it is
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json"),
    *("generation_config.json", "*processor_config.json", "chat_template.*", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt"),
)


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Refuses a folder that holds something, unless that is a model and may be replaced.

    Raises:
        InputError: see there.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"{output_dir} is a file. Give another --output_dir.")
    full = output_dir.exists() and any(not path.name.startswith(UNFINISHED) for path in output_dir.iterdir())
    if full and not (overwrite and (output_dir / "config.json").is_file()):
        hint = "It holds no model to overwrite" if overwrite else "Give --overwrite if it is a model to replace"
        raise InputError(f"{output_dir} is not empty. {hint}, or give another --output_dir.")


@contextmanager
def new_folder(output_dir: Path, overwrite: bool = False, needed: int = 0) -> Iterator[Path]:
    """An empty folder inside `output_dir`, whose files replace the model there at the end of the `with` block.

    If the block fails, nothing has changed. `needed` is how many bytes the disk must have.

    Raises:
        InputError: `output_dir` is not empty and not to be replaced, or the disk has no room.
    """
    check_output_dir(output_dir, overwrite)
    made = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
    output_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output_dir).free
    folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=output_dir))
    try:
        if needed > free:
            sizes = f"the model takes {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
            raise InputError(f"{output_dir}: {sizes}. Free some, or give an --output_dir on another disk.")
        yield folder
        for old in [path for pattern in MODEL_FILES for path in output_dir.glob(pattern)]:
            old.unlink(missing_ok=True)
        for path in folder.iterdir():
            path.replace(output_dir / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()
