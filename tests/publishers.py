"""The chat templates of publishers in tests/templates, each on a small tokenizer with the tokens that it writes."""

import re

from conftest import ROOT
from small_world import make_tokenizer

from train_llava.ingest.conversation import IMAGE_TOKEN

DEEPSEEK = ("<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>")
# name: beginning and end of sentence, what is done about it, or why it is refused
PUBLISHED = {
    "qwen1.5": (None, "<|im_end|>", "written out"),  # the last answer has no end
    "qwen2.5": (None, "<|im_end|>", "as it is"),
    "qwen3": (None, "<|im_end|>", "written out"),  # drops the empty thought of earlier rounds
    "qwen3-2507": (None, "<|im_end|>", "as it is"),
    "qwen3.5": (None, "<|im_end|>", "written out"),
    "qwen3-next-thinking": (None, "<|im_end|>", "asks for an answer behind .*<think>"),
    "smollm2": (None, "<|im_end|>", "as it is"),
    "smollm3": (None, "<|im_end|>", "written out"),  # the day's date
    "mistral-v0.1": ("<s>", "</s>", "as it is"),
    "mistral-v0.3": ("<s>", "</s>", "does not end with a special token"),  # but with a blank before it
    "tinyllama": ("<s>", "</s>", "as it is"),
    "olmo2": ("<|endoftext|>", "<|endoftext|>", "as it is"),
    "granite3.3": (None, "<|end_of_text|>", "written out"),  # the day's date
    "phi3": ("<s>", "<|endoftext|>", "as it is"),
    "deepseek-v3": (*DEEPSEEK, "asks for an answer behind .*<think>"),
    "deepseek-v3.1": (*DEEPSEEK, "written out"),
    "deepseek-r1-distill": (*DEEPSEEK, "asks for an answer behind .*<think>"),
}
SPECIAL = re.compile(r"<\|[^|'\"<>]+\|>|<\uff5c[^\uff5c]+\uff5c>|\[/?INST\]")


def published(name):
    """A publisher's template, and the demo's tokenizer with the special tokens that it writes."""
    template = (ROOT / "tests" / "templates" / f"{name}.jinja").read_text()
    start, end, what = PUBLISHED[name]
    tokenizer = make_tokenizer()
    own = set(SPECIAL.findall(template)) if name != "tinyllama" else set()  # whose roles are no special tokens
    own |= {IMAGE_TOKEN, end, *([start] if start else [])}
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(own)}, replace_extra_special_tokens=False)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = start, end, template
    return tokenizer, template, what
