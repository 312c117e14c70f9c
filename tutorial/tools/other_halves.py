"""Halves for the lesson about building: of other kinds, as configs alone; and copies of the demo's with a mistake."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, SiglipVisionConfig

from train_llava.cli import InputError
from tutorial.tools.trained import DEMO

SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
PIXELS = 112


def siglip(folder: Path, pixels: int = PIXELS) -> Path:
    """A tiny SigLIP for images of 112 pixels, whose image processor makes them `pixels` large."""
    SiglipVisionConfig(**SIZE, image_size=PIXELS, patch_size=16).save_pretrained(folder)
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": pixels, "width": pixels}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def llama(folder: Path, **settings) -> Path:
    """A tiny Llama with the demo's tokenizer."""
    LlamaConfig(**SIZE, vocab_size=896, **settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO / "qwen").save_pretrained(folder)
    return folder


def without_a_tensor(folder: Path) -> Path:
    """The demo's CLIP, of which a tensor is lost."""
    shutil.copytree(DEMO / "clip", folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    del weights["vision_model.pre_layrnorm.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without_an_end(folder: Path) -> Path:
    """The demo's Qwen, whose chat template leaves out <|im_end|>."""
    shutil.copytree(DEMO / "qwen", folder, dirs_exist_ok=True)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", ""))
    return folder


def refusal(action: Callable, *args: Any, **kwargs: Any) -> str:
    """What is said when something is refused, with paths as a reader in the repository would write them.

    Raises:
        AssertionError: it is not refused.
    """
    try:
        action(*args, **kwargs)
    except (InputError, RuntimeError, ValueError) as error:
        return str(error).replace(f"{Path.cwd()}/", "")
    raise AssertionError("this should have been refused")
