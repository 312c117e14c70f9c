"""Qwen1.5's real tokenizer without a model hub: the PyPI package dashscope ships the vocabulary."""

import base64
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from transformers import Qwen2Tokenizer

from demo.tokenizer import CHAT_TEMPLATE


@cache
def qwen_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, from dashscope's file of tokens and ranks.

    A byte-level BPE's merges follow from the ranks: a token is made of the two parts that are left when its bytes are
    merged by all earlier ranks.
    """
    file = Path(find_spec("dashscope").origin).parent / "resources" / "qwen.tiktoken"
    ranks = {base64.b64decode(text): int(rank) for text, rank in map(str.split, file.read_text().splitlines())}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}  # as GPT-2 writes bytes

    def write(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    def halves(token: bytes, rank: int) -> list[bytes]:
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    merges = [tuple(map(write, halves(token, rank))) for token, rank in ranks.items() if len(token) > 1]
    return {write(token): rank for token, rank in ranks.items()}, merges


def qwen_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer of Qwen1.5-Chat, with its chat template and special tokens."""
    vocabulary, merges = qwen_vocabulary()
    names = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=names)
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHAT_TEMPLATE
    return tokenizer
