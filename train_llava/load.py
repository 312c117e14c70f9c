"""A folder -> the model and processor in it."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoProcessor, BitsAndBytesConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_bitsandbytes_available

from train_llava.command import InputError

Model = LlavaForConditionalGeneration | PeftModel
Folder = str | Path


def load(
    folder: Folder, adapter: Folder | None = None, dtype: torch.dtype | str = "auto", in_4bit: bool = False
) -> tuple[Model, LlavaProcessor]:
    """Model (in eval mode, on the CPU) and processor of a LLaVA folder, an adapter folder, or a base with an adapter.

    With `in_4bit` the language model's linear layers are held as 4-bit NormalFloat with doubly quantised scales, as
    QLoRA does it (arXiv:2305.14314, section 3); vision tower, projector and head keep their precision.

    Raises:
        InputError: the folder is not a LLaVA, the adapter's base is not where the adapter says, or bitsandbytes is
            not installed.
    """
    if adapter is None and (Path(folder) / "adapter_config.json").is_file():
        return load(read_json(folder, "adapter_config.json")["base_model_name_or_path"], folder, dtype, in_4bit)
    if (kind := read_json(folder, "config.json").get("model_type")) != "llava":
        raise InputError(f"{folder}: a {kind!r} model, not a LLaVA. Build one with python -m train_llava.build_model.")
    if adapter is not None:
        read_json(adapter, "adapter_config.json")
    if in_4bit and not is_bitsandbytes_available():
        raise InputError("--load_in_4bit needs bitsandbytes: pip install bitsandbytes")
    quantization = four_bit(dtype) if in_4bit else None
    try:
        # the whole path: an adapter trained on this model records it, and must find its base from anywhere
        base = Path(folder).resolve()
        options = {"dtype": dtype, "weights_only": True, "quantization_config": quantization}
        model = LlavaForConditionalGeneration.from_pretrained(base, **options)
        if is_deepspeed_zero3_enabled():
            # transformers forgets here which names it changed in loading, and in saving would change them twice
            model._weight_conversions = []
        for module in model.modules() if in_4bit else []:
            # on some CPUs bitsandbytes would repack its weights at the first evaluation, and training could not go on
            module.support_avx512bf16_for_cpu = False
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        return model.eval(), load_processor(adapter or folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{adapter or folder}: cannot be loaded ({error}).") from error


def four_bit(dtype: torch.dtype | str) -> BitsAndBytesConfig:
    """QLoRA's settings; products are computed in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        llm_int8_skip_modules=[".*vision_tower", ".*multi_modal_projector", "lm_head"],  # in 4 bits, too
    )


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
