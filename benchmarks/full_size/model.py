"""The real model's shapes, CLIP-ViT-L/336 and Qwen1.5-4B-Chat, from the configs in this folder; and data for it."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationConfig, LlavaConfig, LlavaProcessor

from benchmarks.result import ROOT
from train_llava.ingest.conversation import IMAGE_TOKEN
from train_llava.model.backbones import load_image_processor, load_tokenizer
from train_llava.model.config import compose_config, read_config, read_vision_config
from train_llava.model.freeze import LoraSettings
from train_llava.model.load import Model, accelerator, load_processor
from train_llava.model.structure import processor_config
from train_llava.planning.meta_model import meta_model
from train_llava.processing.chat_template import CONTENT_PARTS

CONFIGS = Path(__file__).parent / "configs"
FULL_SIZE = CONFIGS / "clip", CONFIGS / "qwen"
DEMO = ROOT / "demo" / "clip", ROOT / "demo" / "qwen"
QUESTION = "Write a brief description of the image."


def on_meta(train_type: str) -> nn.Module:
    """The model to train in bf16, on the meta device: shapes alone, without memory or weights."""
    config = compose_config(read_vision_config(FULL_SIZE[0]), read_config(FULL_SIZE[1]))
    return meta_model(config, torch.bfloat16, train_type, LoraSettings(lora_dropout=0.0)).train()


def lay_out_llava(folder: Path, vision: Path, language: Path) -> None:
    """A LLaVA's folder without its weights: the configs of two halves, and a processor with the demo's tokenizer.

    Its 421 entries are in any vocabulary, and Qwen's tokenizer, which has to be downloaded, makes as many tokens of
    the texts of `write_images`.
    """
    vision_config, tokenizer = read_vision_config(vision), load_tokenizer(DEMO[1])
    ids = {"image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), "pad_token_id": tokenizer.pad_token_id}
    config = compose_config(vision_config, read_config(language), **ids)
    processor = LlavaProcessor(
        image_processor=load_image_processor(vision, vision_config.image_size),
        tokenizer=tokenizer,
        **processor_config(config),
        image_token=IMAGE_TOKEN,
        chat_template=CONTENT_PARTS.read_text() + tokenizer.chat_template,
    )
    generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    for part in (config, generation, processor):
        part.save_pretrained(folder)


def load_random(
    model_name_or_path: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None, **_: Any
) -> tuple[Model, LlavaProcessor]:
    """`train_llava.model.load.load` for a folder without weights: random ones are made where they will be used, which
    takes seconds on a GPU, where 8.5 GB would have to be written and read."""
    torch.manual_seed(0)
    config, kind = LlavaConfig.from_pretrained(model_name_or_path), accelerator()
    with torch.device(torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind else "cpu"):
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        model = AutoModelForImageTextToText.from_config(config, **options)
    model.generation_config = GenerationConfig.from_pretrained(model_name_or_path)
    model.name_or_path, model.fingerprint = str(model_name_or_path), "random"
    return model.eval(), load_processor(model_name_or_path)


def write_images(folder: Path, count: int, files: int = 64) -> None:
    """`count` records with captions of 20 words, as LLaVA-CC3M-Pretrain-595K lays them out, of at most `files` JPEG
    images of 336 x 336 noise. Each word is one token of Qwen's and of the demo's, so all samples are of one length."""
    rng, records = np.random.default_rng(0), []
    words = ["a", "red", "seven", "at", "the", "top", "left", "and", "blue", "one", "bottom", "right"]
    (folder / "images").mkdir(parents=True)
    for i in range(min(count, files)):
        pixels = rng.integers(0, 256, (21, 21, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((336, 336)).save(folder / "images" / f"{i}.jpg")
    for i in range(count):
        question = {"from": "human", "value": f"<image>\n{QUESTION}"}
        answer = {"from": "gpt", "value": f"a {' '.join(rng.choice(words, 19))}"}
        records.append({"id": str(i), "image": f"{i % files}.jpg", "conversations": [question, answer]})
    (folder / "chat.json").write_text(json.dumps(records))
