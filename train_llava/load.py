"""A folder -> the model and processor in it."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from train_llava.command import InputError

Model = LlavaForConditionalGeneration | PeftModel
Folder = str | Path


def load(
    folder: Folder, adapter: Folder | None = None, dtype: torch.dtype | str = "auto"
) -> tuple[Model, LlavaProcessor]:
    """Model (in eval mode, on the CPU) and processor of a LLaVA folder, an adapter folder, or a base with an adapter.

    Raises:
        InputError: the folder is not a LLaVA, or the adapter's base is not where the adapter says.
    """
    if adapter is None and (Path(folder) / "adapter_config.json").is_file():
        return load(read_json(folder, "adapter_config.json")["base_model_name_or_path"], folder, dtype)
    if (kind := read_json(folder, "config.json").get("model_type")) != "llava":
        raise InputError(f"{folder}: a {kind!r} model, not a LLaVA. Build one with python -m train_llava.build_model.")
    if adapter is not None:
        read_json(adapter, "adapter_config.json")
    try:
        # the whole path: an adapter trained on this model records it, and must find its base from anywhere
        base = Path(folder).resolve()
        model = LlavaForConditionalGeneration.from_pretrained(base, dtype=dtype, weights_only=True)
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        return model.eval(), load_processor(adapter or folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{adapter or folder}: cannot be loaded ({error}).") from error


def load_processor(folder: Folder) -> LlavaProcessor:
    """The processor alone, without any weights."""
    read_json(folder, "processor_config.json")
    return AutoProcessor.from_pretrained(folder)


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON file that a folder must have."""
    try:
        return json.loads((Path(folder) / name).read_text())
    except OSError as error:
        raise InputError(f"{folder}: no {name} here. Give the folder of a LLaVA or of an adapter.") from error
