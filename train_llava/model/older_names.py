"""A model's folder with the names of weights that transformers 4 wrote, which vLLM reads.

It has the tower as `vision_tower.vision_model`, as transformers 4 had; transformers 5 saves `vision_tower` alone, and
reads both forms.
"""

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from train_llava.model.folder import model_files


def older_name(name: str) -> str:
    """The name of transformers 4; one that is old already stays."""
    return name.replace("vision_tower.", "vision_tower.vision_model.").replace("vision_model." * 2, "vision_model.")


def copy_with_older_names(source: Path, target: Path) -> int:
    """Copies a model's files, one shard in memory at a time. Returns how many tensors got another name."""
    renamed = 0
    for path in sorted(model_files(source)):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            renamed += sum(older_name(name) != name for name in tensors)
            save_file(
                {older_name(name): value for name, value in tensors.items()}, target / path.name, {"format": "pt"}
            )
        elif path.name.endswith(".safetensors.index.json"):
            index = json.loads(path.read_text(encoding="utf-8"))
            index["weight_map"] = {older_name(name): shard for name, shard in index["weight_map"].items()}
            (target / path.name).write_text(json.dumps(index, indent=2), encoding="utf-8")
        else:
            shutil.copyfile(path, target / path.name)
    return renamed
