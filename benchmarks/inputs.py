"""Models and data that several benchmarks use."""

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, Qwen2Config

from demo.tokenizer import make_tokenizer

SIDE = 140  # pixels of an image of the middle-sized model: 100 patches
PHOTO_SIDE = 224  # pixels
WORDS = "a man in a red shirt holding the hand of his child on an old wooden bridge over a quiet river at night"


def middle_size(folder: Path, layers: int = 6) -> tuple[Path, Path]:
    """Folders with the configs of a CLIP of width 384 and of a Qwen2 of width 512 with the demo's tokenizer, to be
    filled at random."""
    folders = folder / "vision", folder / "language"
    vision = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_hidden_layers": layers}
    CLIPVisionConfig(**vision, image_size=SIDE, patch_size=14).save_pretrained(folders[0])
    size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=size, crop_size=crop).save_pretrained(folders[0])
    language = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_hidden_layers": layers}
    words = {"vocab_size": 448, "tie_word_embeddings": False}
    Qwen2Config(**language, num_key_value_heads=8, **words).save_pretrained(folders[1])
    make_tokenizer().save_pretrained(folders[1])
    return folders


def caption(rng: random.Random) -> str:
    """5 to 20 words, as many as CC3M's captions have."""
    return " ".join(rng.choices(WORDS.split(), k=rng.randint(5, 20)))


def write_photos(folder: Path, count: int) -> None:
    """JPEG files with the detail of small photographs, 224 x 224 pixels, in the layout of CC3M-595K."""
    rng, words = np.random.default_rng(0), random.Random(0)
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC))
        pixels = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:09}.jpg", quality=85)
        question = {"from": "human", "value": "Write a terse but informative summary of the image.\n<image>"}
        turns = [question, {"from": "gpt", "value": caption(words)}]
        records.append({"id": f"{i:09}", "image": f"{i:09}.jpg", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))
