"""A byte-level BPE tokenizer with its chat template -> the keys of a GGUF file."""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase

from train_llava.cli import InputError
from train_llava.model.generate import ends_of_answer

# How text is cut into words before they are merged: the regular expressions of tokenizer.json, one after the other,
# and llama.cpp's name for them (src/llama-vocab.cpp), which has no others
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
DIGITS = r"\p{N}"
WORDS = {(QWEN2,): "qwen2", (LLAMA3,): "llama-bpe", (DIGITS, GPT2): "smollm", (GPT2,): "gpt-2"}
MARKERS = Path(__file__).parent.parent / "processing" / "media_markers.jinja"


def unsupported_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The reason why a tokenizer is not exported; None if it is."""
    parts = backend(tokenizer) if getattr(tokenizer, "backend_tokenizer", None) else {"model": {"type": "none"}}
    if parts["model"]["type"] != "BPE" or parts["model"].get("byte_fallback"):
        return "its tokenizer is no byte-level BPE, as those of Qwen and Llama 3 are"
    if (parts["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return f"its tokenizer changes text ({parts['normalizer']['type']}), and llama.cpp does not"
    words = words_of(parts)
    if words not in WORDS:
        return f"its tokenizer cuts text into words in a way that is not known here: {words}"
    if bool(parts["model"].get("ignore_merges")) != (WORDS[words] == "llama-bpe"):  # llama.cpp goes by the name
        return "its tokenizer treats whole words in another way than llama.cpp"
    return None


def backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json holds."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def words_of(parts: dict[str, Any]) -> tuple[str, ...]:
    """The regular expressions that a tokenizer cuts text by, in order; what is none of these, by its name."""
    steps = parts["pre_tokenizer"] or {"type": "none"}
    found = []
    for step in steps.get("pretokenizers", [steps]):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(step["pattern"].get("Regex", "a string"))
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append(DIGITS)
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found += [GPT2] * step["use_regex"]
        else:
            found.append(step["type"])
    return tuple(found)


def add_vocabulary(writer: GGUFWriter, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Adds all tokens with their kinds, the merges, the ends of an answer and the chat template.

    Rows of the embedding table that no token has are filled with tokens that no text becomes. The chat template writes
    whatever comes first, so nothing is to be added in front.

    Raises:
        InputError: the model knows more ends of an answer than the format has keys for.
    """
    tokenizer, parts = processor.tokenizer, backend(processor.tokenizer)
    added = tokenizer.added_tokens_decoder
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    rows = model.config.text_config.vocab_size
    kinds = {i: TokenType.CONTROL if token.special else TokenType.USER_DEFINED for i, token in added.items()}
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
    writer.add_tokenizer_pre(WORDS[words_of(parts)])
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([kinds.get(i, TokenType.NORMAL if i in tokens else TokenType.UNUSED) for i in range(rows)])
    writer.add_token_merges([" ".join(pair) for pair in parts["model"]["merges"]])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    for add, i in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if i is not None:
            add(i)
    ends, keys = (
        ends_of_answer(model, processor),
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id),
    )
    if len(ends) > len(keys):
        raise InputError(f"{len(ends)} tokens end an answer, and a GGUF file names three at most. Take some out of "
                         "eos_token_id in generation_config.json.")  # fmt: skip
    for add, end in zip(keys, ends, strict=False):
        add(end)
    writer.add_chat_template(MARKERS.read_text() + processor.chat_template)
