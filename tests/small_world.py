"""What most tests run on, apart from the demo: its images with short captions, and a tokenizer of 421 entries.

The small tokenizer is that of the demo's first edition: the tests' old adapters were made with it.
"""

import json
from pathlib import Path

import numpy as np
from transformers import Qwen2Tokenizer

from demo.english import INSTRUCTIONS, join
from demo.make_data import record
from demo.questions import pick
from demo.scenes import KINDS, PLACES, draw, random_scene
from demo.tokenizer import CHAT_TEMPLATE


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE with ChatML's tokens, <|endoftext|> 418, <|im_start|> 419 and <|im_end|> 420."""
    kept = json.loads((Path(__file__).parent / "small_tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(kept["vocab"])},
        merges=[tuple(pair.split(" ")) for pair in kept["merges"]],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=512,
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_split(folder: Path, split: str, count: int, seed: int) -> None:
    """`count` images of one or two things with captions, in the layout of LLaVA-CC3M-Pretrain-595K."""
    rng, records = np.random.default_rng(seed), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene = random_scene(rng, split)[:2]
        image = f"{split}_{i:06}.{'png' if rng.random() < 0.1 else 'jpg'}"
        draw(scene, rng, split).resize((56, 56)).save(folder / "images" / image, quality=95, subsampling=0)
        text = join([f"a {item.colour} {KINDS[item.kind]} at the {PLACES[item.place]}" for item in scene])
        records.append(record(image[:-4], image, [(pick(rng, INSTRUCTIONS), text)], behind=True))
    (folder / "chat.json").write_text(json.dumps(records, indent=1))
