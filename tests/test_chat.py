"""Ids and labels: golden ids of the real Qwen vocabulary, and spans that decode to exactly the answers."""

import pytest
from transformers import LlavaProcessor

from train_llava.build_model import CONTENT_PARTS, load_tokenizer
from train_llava.chat import IGNORE_INDEX, ChatEncoder
from train_llava.command import InputError

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
QUESTION = {"role": "user", "content": "<image>\nWhat are these?"}
GOLDEN = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 151646, 198]
GOLDEN += [3838, 525, 1493, 30, 151645, 198, 151644, 77091, 198]
TURNS = [
    QUESTION,
    {"role": "assistant", "content": "Two cats, asleep."},
    {"role": "user", "content": "  Are you sure?\n\nLook again: 100% 🐈 "},
    {"role": "assistant", "content": "Yes.\n\nBoth are cats 🐈🐈."},
]


@pytest.fixture(scope="module")
def tokenizer(qwen_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    qwen_tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return ChatEncoder(tokenizer, 1, tokenizer.chat_template)


def spans(labels):
    """The supervised stretches of a label list."""
    found, before = [], IGNORE_INDEX
    for label in labels:
        if label != IGNORE_INDEX:
            if before == IGNORE_INDEX:
                found.append([])
            found[-1].append(label)
        before = label
    return found


def test_golden_ids(encoder, tokenizer):
    assert encoder.encode([SYSTEM, QUESTION], add_generation_prompt=True)[0] == GOLDEN
    assert encoder.encode([QUESTION], add_generation_prompt=True)[0] == GOLDEN  # the template's own system message
    assert tokenizer.pad_token_id == 151643
    assert encoder.end_of_turn_id == 151645


def test_one_turn_is_the_original(encoder, tokenizer):
    """The original: prompt ids, answer ids tokenised alone, <|im_end|>; labels -100 over the prompt."""
    ids, labels = encoder.encode(TURNS[:2])
    answer = [*tokenizer("Two cats, asleep.").input_ids, 151645]
    assert ids[: len(GOLDEN + answer)] == GOLDEN + answer
    assert labels[: len(GOLDEN + answer)] == [IGNORE_INDEX] * len(GOLDEN) + answer
    assert tokenizer.decode(ids[len(GOLDEN + answer) :]) == "\n"  # the template's line break, not supervised
    assert set(labels[len(GOLDEN + answer) :]) == {IGNORE_INDEX}


def test_every_answer_is_supervised_and_nothing_else(encoder, tokenizer):
    ids, labels = encoder.encode(TURNS)
    answers = [m["content"] for m in TURNS if m["role"] == "assistant"]
    assert [tokenizer.decode(span) for span in spans(labels)] == [answer + "<|im_end|>" for answer in answers]
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    assert ids == tokenizer(encoder.render(TURNS)).input_ids


def test_images_become_their_number_of_tokens(tokenizer):
    ids, labels = ChatEncoder(tokenizer, 576, tokenizer.chat_template).encode(TURNS)
    where = [i for i, token in enumerate(ids) if token == 151646]
    assert len(where) == 576 and where[-1] - where[0] == 575
    assert {labels[i] for i in where} == {IGNORE_INDEX}


def test_text_that_looks_special_stays_text(encoder, tokenizer):
    typed = "<image>\nWhat does <|im_end|> mean? <|im_start|>system"
    ids, labels = encoder.encode([{"role": "user", "content": typed}, {"role": "assistant", "content": "<|im_end|>"}])
    assert ids.count(151645) == 3  # system, user, assistant: the template's alone
    assert tokenizer.decode(spans(labels)[0][:-1]) == "<|im_end|>"
    assert tokenizer.decode(ids).count("What does <|im_end|> mean? <|im_start|>system") == 1


def test_pad_equal_to_end_of_turn_keeps_the_end_supervised(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    same = load_tokenizer(tmp_path)
    same.pad_token = "<|im_end|>"
    _, labels = ChatEncoder(same, 1, same.chat_template).encode(TURNS)
    assert [span[-1] for span in spans(labels)] == [151645, 151645]


def test_content_parts_equal_text(tokenizer):
    parts = [{"type": "image"}, {"type": "text", "text": "What are these?"}]
    template = CONTENT_PARTS.read_text() + tokenizer.chat_template
    for content in (parts, QUESTION["content"]):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False
        )
        assert tokenizer(text).input_ids == GOLDEN[:-3]
    after = [{"type": "text", "text": "What are these?"}, {"type": "image"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": after}], chat_template=template, tokenize=False)
    assert "What are these?\n<image><|im_end|>" in text


def test_a_template_that_strips_is_followed(tokenizer):
    """As Llama 3's: special tokens around the role, and every message stripped."""
    template = (
        "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '<|im_start|>\n\n' + "
        "message['content'] | trim + '<|im_end|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_start|>\n\n' }}{%- endif %}"
    )
    encoder = ChatEncoder(tokenizer, 1, template)
    assert encoder.encode(TURNS)[0] == tokenizer(encoder.render(TURNS)).input_ids


def test_a_template_without_end_of_turn_is_refused(tokenizer):
    template = "{%- for message in messages %}{{- message['role'] + ': ' + message['content'] + '\n' }}{%- endfor %}"
    with pytest.raises(InputError, match="cannot be told apart exactly"):
        ChatEncoder(tokenizer, 1, template)


def test_prompts_equal_the_processor(encoder, tokenizer, llava):
    """What pipeline sends to the model is what training showed it."""
    processor = LlavaProcessor.from_pretrained(llava)
    ours = ChatEncoder(processor.tokenizer, 4, processor.chat_template).encode([QUESTION], add_generation_prompt=True)[
        0
    ]
    from PIL import Image

    text = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    assert processor(images=Image.new("RGB", (40, 30)), text=text).input_ids[0] == ours
