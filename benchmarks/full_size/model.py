"""The real model's shapes, CLIP-ViT-L/336 and Qwen1.5-4B-Chat, from the configs in this folder; and data for it."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from tests.qwen_tokenizer import qwen_tokenizer
from train_llava.model.config import compose_config, read_config, read_vision_config
from train_llava.model.freeze import LoraSettings
from train_llava.planning.meta_model import meta_model

CONFIGS = Path(__file__).parent / "configs"


def on_meta(train_type: str) -> nn.Module:
    """The model to train in bf16, on the meta device: shapes alone, without memory or weights."""
    config = compose_config(read_vision_config(CONFIGS / "clip"), read_config(CONFIGS / "qwen"))
    return meta_model(config, torch.bfloat16, train_type, LoraSettings(lora_dropout=0.0)).train()


def build_command(folder: Path) -> list[str]:
    """The words of the command that builds the model in `folder`/llava; lays Qwen's half ready."""
    language = folder / "qwen"
    shutil.copytree(CONFIGS / "qwen", language)
    qwen_tokenizer().save_pretrained(language)
    flags = ["--vision_model_name_or_path", str(CONFIGS / "clip"), "--random_weights"]
    flags += ["--language_model_name_or_path", str(language), "--dtype", "bfloat16"]
    return [sys.executable, "-m", "train_llava.build_model", *flags, "--output_dir", str(folder / "llava")]


def write_images(folder: Path, count: int) -> None:
    """`count` JPEG images of 336 x 336 noise with captions of 20 words, as LLaVA-CC3M-Pretrain-595K lays them out."""
    rng, records = np.random.default_rng(0), []
    words = ["a", "house", "beside", "the", "river", "under", "tall", "green", "trees", "and", "blue", "sky"]
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(0, 256, (21, 21, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((336, 336)).save(folder / "images" / f"{i}.jpg")
        question = {"from": "human", "value": "<image>\nProvide a brief description of the given image."}
        answer = {"from": "gpt", "value": " ".join(rng.choice(words, 20))}
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": [question, answer]})
    (folder / "chat.json").write_text(json.dumps(records))
