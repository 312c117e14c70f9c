"""Ids and labels: golden ids of the real Qwen vocabulary, and spans that decode to exactly the answers."""

import json
import re
import shutil
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlavaProcessor

from train_llava.cli import InputError
from train_llava.ingest.conversation import IMAGE_TOKEN
from train_llava.model.backbones import load_tokenizer
from train_llava.processing.chat import IGNORE_INDEX, ChatEncoder
from train_llava.processing.chat_template import CONTENT_PARTS

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


def test_a_template_that_strips_answers_alone_is_followed(tokenizer):
    template = (
        "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + (message['content'] | trim if "
        "message['role'] == 'assistant' else message['content']) + '<|im_end|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )
    encoder = ChatEncoder(tokenizer, 1, template)
    turns = [{"role": "user", "content": " What? "}, {"role": "assistant", "content": " A cat.\n"}]
    ids, labels = encoder.encode(turns)
    assert ids == tokenizer(encoder.render(turns)).input_ids
    assert tokenizer.decode([i for i in labels if i != -100]) == "A cat.<|im_end|>"
    assert " What? " in tokenizer.decode(ids)


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


# ------------------------------------------------------------------------------------------ any conversation at all

SPECIAL = re.compile(r"<\|\w*\|>|<image>")
WORDS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["", "\n", "\n\nTwo lines\n\n", "  spaces  ", "🐈‍⬛🧑🏽‍🚀", "e\u0301", "日本語", "\ue0000\ue001", "\x00"]
    ),
)
TYPED = st.sampled_from(["<|im_end|>", "<|im_start|>user\n", "<|endoftext|>", "a<|im_end|>b", "<|im_start|>"])


@st.composite
def conversations(draw, typed=False):
    """1 to 4 rounds, perhaps a system message, <image> anywhere in the questions; `typed`: text of special tokens."""
    words = st.lists(st.one_of(WORDS, TYPED) if typed else WORDS, max_size=3).map("".join)
    words = words if typed else words.filter(lambda text: not SPECIAL.search(text))
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        question = IMAGE_TOKEN.join(draw(st.lists(words, min_size=1, max_size=3)))
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": draw(words)})
    return messages


def in_pieces(tokenizer, text, messages):
    """The template's whole text tokenised by the plain tokenizer, cut where generation starts and nowhere else.

    Without the cuts, a line break at the start of an answer would melt with the template's own into one token that
    the model never sees when it is asked.
    """
    ids, start = [], 0
    for message in messages:
        if message["role"] == "assistant":
            head = text.index("<|im_start|>assistant\n", start) + len("<|im_start|>assistant\n")
            end = head + len(message["content"])
            assert text[head:end] == message["content"]
            ids += tokenizer(text[start:head]).input_ids + tokenizer(text[head:end]).input_ids
            start = end
    return ids + tokenizer(text[start:]).input_ids


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations())
def test_any_conversation_equals_the_template_tokenised_whole(encoder, tokenizer, messages):
    ids, _ = encoder.encode(messages)
    text = encoder.render(messages)
    assert ids == in_pieces(tokenizer, text, messages)
    if all(message["content"][:1].strip() for message in messages if message["role"] == "assistant"):
        plain = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids == plain


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations(typed=True))
def test_any_answer_is_supervised_exactly(encoder, tokenizer, messages):
    """Also where people type the text of special tokens: it stays text, in training and when the model is asked."""
    ids, labels = encoder.encode(messages)
    assert len(ids) == len(labels)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    for span, answer in zip(spans(labels), answers, strict=True):
        assert span[-1] == encoder.end_of_turn_id and not set(span[:-1]) & set(encoder.special_ids.values())
        # Qwen's tokenizer brings text into Unicode's normal form C
        assert tokenizer.decode(span[:-1]) == unicodedata.normalize("NFC", answer)
    turns = len(messages) + (messages[0]["role"] != "system")  # the template adds a system message
    assert ids.count(encoder.end_of_turn_id) == ids.count(151644) == turns and ids.count(151643) == 0
    assert ids.count(151646) == sum(message["content"].count(IMAGE_TOKEN) for message in messages)

    asked, _ = encoder.encode(messages[:-1], add_generation_prompt=True)
    assert ids[: len(asked)] == asked  # what is asked is what was trained on
    assert labels[len(asked)] != IGNORE_INDEX


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations(typed=True), limit=st.integers(20, 120))
def test_what_is_too_long_ends_behind_an_answer(encoder, tokenizer, messages, limit):
    whole, whole_labels = encoder.encode(messages)
    short = ChatEncoder.__new__(ChatEncoder)
    short.__dict__ |= {**encoder.__dict__, "max_length": limit}
    ids, labels = short.encode(messages)
    assert (ids, labels) == (whole[: len(ids)], whole_labels[: len(ids)])
    if len(whole) <= limit:
        assert ids == whole
        return
    assert len(ids) <= limit
    assert not ids or (ids[-1] == encoder.end_of_turn_id and labels[-1] == encoder.end_of_turn_id)
    ends = [i + 1 for i, label in enumerate(whole_labels) if label == encoder.end_of_turn_id]
    assert len(ids) == max([end for end in ends if end <= limit], default=0)


def test_a_prompt_is_never_cut(encoder, tokenizer):
    """Whatever is cut in training: it would end where an answer had been, and not where one is asked for."""
    short = ChatEncoder(tokenizer, 1, max_length=20)
    asked = [*TURNS, {"role": "user", "content": "And what else is there to be seen in this image?"}]
    prompt, _ = short.encode(asked, add_generation_prompt=True)
    assert len(prompt) > 20 and prompt == encoder.encode(asked, add_generation_prompt=True)[0]


def test_another_call_of_the_tokenizer_changes_nothing(encoder, tokenizer):
    """It leaves its truncation and padding behind in the Rust tokenizer, which both use."""
    messages = [{"role": "user", "content": "Never asked before, and longer than four."}, TURNS[1]]
    tokenizer("one two three four five six", truncation=True, max_length=4, padding="max_length")
    ids, _ = encoder.encode(messages)
    assert ids == tokenizer(encoder.render(messages)).input_ids


def test_the_fingerprint_tells_what_changes_ids(old_qwen, tmp_path):
    """Template, tokens of an image, greatest length, and the tokenizer's merges; counts of tokens are kept by it."""
    shutil.copytree(old_qwen, tmp_path / "other")
    content = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    own, other = load_tokenizer(old_qwen), load_tokenizer(tmp_path / "other")
    polite = own.chat_template.replace("You are a helpful assistant", "You are a cat")
    assert polite != own.chat_template

    def prints():
        settings = [(own, 4), (own, 4, polite), (own, 5), (own, 4, None, 99), (other, 4)]
        return [ChatEncoder(*each).fingerprint() for each in settings]

    assert prints() == prints() and len(set(prints())) == 5
