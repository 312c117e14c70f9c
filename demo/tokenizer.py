"""The demo's tokenizer: a small byte-level BPE with Qwen's special tokens and chat template.

Each word of the demo's world, English or Chinese, is one token, as frequent words are in Qwen's vocabulary.
"""

import json
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Tokenizer

from demo import chinese, english
from demo.questions import rounds
from demo.scenes import random_scene

CHAT_TEMPLATE = (  # ChatML with Qwen1.5's default system message
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
MAX_LENGTH = 1024  # tokens


def chinese_words() -> set[str]:
    """Every word of `demo/chinese.py`, where they are written apart."""
    texts = [*chinese.SYSTEM_PROMPTS, *chinese.INSTRUCTIONS, *chinese.DETAILED, *chinese.COUNTS, *chinese.ORDINALS]
    texts += [text for pairs in chinese.TEMPLATES.values() for pair in pairs for text in pair]
    for table in (chinese.NAMES, chinese.HUES, chinese.CORNERS, chinese.GROUPS, chinese.SIDES):
        texts += table.values()
    return {word for text in [*texts, "大 小 、"] for word in text.split() if "{" not in word}


def corpus() -> Iterator[str]:
    """English texts as they are, and Chinese word by word: no token may reach from one word into the next."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        scenes = [random_scene(rng, "train") for _ in range(rng.integers(4))]
        for pair in rounds(scenes, 4, rng, more=["caption"]):
            yield from (text for text in pair if text.isascii())
    yield from [*english.SYSTEM_PROMPTS, "You are a helpful assistant.", "system", "user", "assistant", "\n"]
    yield from sorted(chinese_words())


def make_tokenizer() -> Qwen2Tokenizer:
    """The same each time, in the files that a Qwen2 folder has."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=10_000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=MAX_LENGTH,
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
