"""What is asked equals what was taught, with templates drawn at random and with publishers' own.

The reference is plain transformers: `apply_chat_template` with the template in use, tokenised whole.
"""

import signal
import time
from collections import Counter
from datetime import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from publishers import PUBLISHED, published
from small_world import make_tokenizer
from transformers.utils import chat_template_utils

from train_llava.cli import InputError
from train_llava.model.backbones import load_tokenizer
from train_llava.processing import chat_template
from train_llava.processing.chat import IGNORE_INDEX, ChatEncoder
from train_llava.processing.chat_template import CONTENT_PARTS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The demo's: byte-level BPE with ChatML's special tokens, and <image>."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return load_tokenizer(folder)


def ids_of(tokenizer, template, messages, add_generation_prompt=False, **options):
    """As plain transformers has it."""
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt, **options
    )
    return text, tokenizer(text, add_special_tokens=False).input_ids


CHATML = "<|im_start|>{}\n"
BLOCK = "<think>\\n\\n</think>\\n\\n"
HEADS = st.sampled_from([CHATML, "<|im_start|>{}<|im_start|>\n\n", "[{}] ", "<|im_start|>{}: "])
FILTERS = st.sampled_from(["", "|trim", ".strip('\\n')", ".lstrip()", ".rstrip()", "|upper", "|replace('a', 'b')"])
SYSTEMS = st.sampled_from(["first", "with the first question", "with the last question", "last", "dropped", "refused"])
DEFAULTS = st.sampled_from(
    ["", "", "Be kind.", "Today is {{ strftime_now('%d %b %Y') }}.", "{{ messages|length }} messages."]
)
THOUGHTS = st.sampled_from(["none", "none", "always asked", "switched", "switched, kept", "last alone", "dropped"])
ASKS = st.sampled_from(["head", "head", "head", "stripped head", "nothing", "another"])
ENDS = st.sampled_from(["<|im_end|>\n", "<|im_end|>", "<|im_end|>\n", "\n", "\n<|im_end|>", "only the last"])


@st.composite
def templates(draw):
    """A legal chat template, and what it is made of."""
    parts = {"head": draw(HEADS), "system": draw(SYSTEMS), "default": draw(DEFAULTS), "thoughts": draw(THOUGHTS)}
    parts |= {"asks": draw(ASKS), "end": draw(ENDS), "strict": draw(st.booleans())}
    parts |= {"user": draw(FILTERS), "assistant": draw(FILTERS)}
    return parts, jinja(**parts)


def jinja(head, system, default, thoughts, asks, end, strict, user, assistant):
    """A template of these parts, in the manner of those that are published."""
    quoted = {name: repr(text) for name, text in (("head", head), ("end", end))}
    user_head, answer_head, system_head = (repr(head.format(role)) for role in ("user", "assistant", "system"))
    stop = "'<|im_end|>'" if end == "only the last" else quoted["end"]
    lines = ["{%- set ns = namespace(system='', last=-1) -%}"]
    lines += ["{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"]
    lines += ["{%- if m.role == 'system' -%}{%- set ns.system = m.content -%}{%- endif -%}{%- endfor -%}"]
    if system == "refused":
        lines += ["{%- if ns.system -%}{{ raise_exception('System role not supported') }}{%- endif -%}"]
    if system == "first":
        default_block = f"{{{{- {system_head} -}}}}{default}{{{{- {quoted['end']} -}}}}" if default else ""
        own = f"{{{{- {system_head} + ns.system + {quoted['end']} -}}}}"
        lines += [f"{{%- if ns.system -%}}{own}{{%- else -%}}{default_block}{{%- endif -%}}"]
    lines += ["{%- for m in messages -%}"]
    if strict:
        lines += ["{%- if m.role not in ['system', 'user', 'assistant'] -%}{{ raise_exception('who?') }}{%- endif -%}"]
    where = {"with the first question": "loop.first or loop.previtem.role == 'system'"}
    where |= {"with the last question": "loop.index0 == ns.last"}
    fold = f"(ns.system + '\\n' if ns.system and ({where[system]}) else '')" if system in where else "''"
    closing = f"{stop}" if end != "only the last" else f"({stop} if loop.last else '')"
    lines += ["{%- if m.role == 'user' -%}"]
    lines += [f"{{{{- {user_head} + {fold} + (m.content{user}) + {stop} -}}}}"]
    lines += ["{%- elif m.role == 'assistant' -%}", "{%- set c = m.content -%}"]
    if thoughts in ("switched", "last alone", "dropped"):
        lines += ["{%- if '</think>' in c -%}{%- set c = c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"]
    thought = {
        "switched": f"('{BLOCK}' if loop.index0 > ns.last else '')",
        "last alone": f"('{BLOCK}' if loop.last else '')",
        "switched, kept": f"('{BLOCK}' if enable_thinking is defined and not enable_thinking else '')",
    }.get(thoughts, "''")
    lines += [f"{{{{- {answer_head} + {thought} + (c{assistant}) + {closing} -}}}}", "{%- endif -%}", "{%- endfor -%}"]
    if system == "last":
        lines += ["{{- ns.system -}}"]
    ask = {"head": answer_head, "stripped head": repr(head.format("assistant").rstrip()), "nothing": "''"}
    off = "enable_thinking is defined and not enable_thinking"
    opened = {"switched": f"('{BLOCK}' if {off} else '')", "always asked": "'<think>\\n'"}
    opened["switched, kept"] = opened["switched"]
    prompt = f"{ask.get(asks, repr(head.format('model')))} + {opened.get(thoughts, repr(''))}"
    lines += [f"{{%- if add_generation_prompt -%}}{{{{- {prompt} -}}}}{{%- endif -%}}"]
    return "".join(lines)


WORDS = st.sampled_from(["a red seven", "  two\n", "\nWhere?", "blue and green ", "7", "a\n\nb", "What is this?"])


@st.composite
def conversations(draw, system):
    messages = [{"role": "system", "content": draw(WORDS).strip()}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [{"role": "user", "content": draw(WORDS)}, {"role": "assistant", "content": draw(WORDS)}]
    return messages


SEEN = Counter()


def assert_asked_as_taught(encoder, tokenizer, messages):
    ids, labels = encoder.encode(messages)
    whole = tokenizer.apply_chat_template(messages, chat_template=encoder.chat_template, tokenize=False)
    assert tokenizer.decode(ids) == whole
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text, asked = ids_of(tokenizer, encoder.chat_template, messages[:i], add_generation_prompt=True)
        assert encoder.encode(messages[:i], add_generation_prompt=True)[0] == asked == ids[: len(asked)], text
        assert labels[len(asked)] != IGNORE_INDEX and labels[len(asked) - 1] == IGNORE_INDEX
        rest = labels[len(asked) :]
        answer = rest[: rest.index(IGNORE_INDEX)] if IGNORE_INDEX in rest else rest
        assert answer[-1] == encoder.end_of_turn_id
        assert tokenizer.decode(answer[:-1]).strip() == message["content"].strip()


@settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=templates(), data=st.data())
def test_a_template_asks_what_it_taught_or_is_refused(tokenizer, made, data):
    parts, template = made
    ids_of(tokenizer, template, [{"role": "user", "content": "a"}])  # it is legal
    spoiled = {parts["user"], parts["assistant"]} & {"|upper", "|replace('a', 'b')"}
    clean = parts["asks"] in ("head", "stripped head") and parts["thoughts"] != "always asked"
    clean &= parts["end"] in ("<|im_end|>\n", "<|im_end|>")
    clean &= parts["thoughts"] != "last alone" and parts["head"].endswith("\n")
    clean &= parts["asks"] == "head" or parts["thoughts"] == "none"
    clean &= "length" not in parts["default"] or parts["system"] != "first"  # where a default is written
    try:
        encoder = ChatEncoder(tokenizer, 1, template)
    except InputError as error:
        SEEN["refused"] += 1
        assert "\n" not in str(error) and (not clean or spoiled), (parts, error)
        return
    SEEN["accepted"] += 1
    SEEN["written out"] += encoder.chat_template != template
    assert tokenizer.convert_ids_to_tokens(encoder.end_of_turn_id) == "<|im_end|>"
    assert_asked_as_taught(encoder, tokenizer, data.draw(conversations(encoder.template.takes_system())))
    # one round is what the template makes of it, with thinking off in transformers' own way, where that is right
    if not spoiled and "strftime" not in template:
        plain = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "a red seven"}]
        theirs = [ids_of(tokenizer, template, plain, **off)[0] for off in ({"enable_thinking": False}, {})]
        assert ids_of(tokenizer, encoder.chat_template, plain)[0] in theirs


def test_all_kinds_were_drawn():
    assert SEEN["accepted"] > 150 and SEEN["refused"] > 150 and SEEN["written out"] > 50, SEEN


ROUNDS = [
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": "A red seven."},
    {"role": "user", "content": "<image>\nWhere is it?"},
    {"role": "assistant", "content": "At the top."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_publishers_templates(name):
    tokenizer, template, what = published(name)
    if what not in ("as it is", "written out"):
        with pytest.raises(InputError, match=what):
            ChatEncoder(tokenizer, 1, template)
        return
    encoder = ChatEncoder(tokenizer, 1, CONTENT_PARTS.read_text() + template)
    assert (encoder.chat_template == CONTENT_PARTS.read_text() + template) == (what == "as it is")
    system = [{"role": "system", "content": "Be kind."}] if encoder.template.takes_system() else []
    assert_asked_as_taught(encoder, tokenizer, system + ROUNDS)
    # one round as the publisher's own template asks for it, with thinking off in transformers' own way
    today = {"enable_thinking": False, "thinking": False}
    theirs = ids_of(tokenizer, template, [*system, ROUNDS[0]], add_generation_prompt=True, **today)[0]
    assert ids_of(tokenizer, encoder.chat_template, [*system, ROUNDS[0]], add_generation_prompt=True)[0] == theirs
    again = ChatEncoder(tokenizer, 1, encoder.chat_template)
    assert again.chat_template == encoder.chat_template  # a saved one stays as it is


def test_a_date_stays_that_of_the_build(monkeypatch):
    """What was taught on one day is asked on the next."""
    tokenizer, template, _ = published("granite3.3")
    encoder = ChatEncoder(tokenizer, 1, template)
    before = encoder.encode(ROUNDS[:1], add_generation_prompt=True)[0]
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    chat_template_utils._compile_jinja_template.cache_clear()  # private: it holds today's clock
    assert ids_of(tokenizer, template, ROUNDS[:1])[0] != ids_of(tokenizer, encoder.chat_template, ROUNDS[:1])[0]
    assert ChatEncoder(tokenizer, 1, encoder.chat_template).encode(ROUNDS[:1], add_generation_prompt=True)[0] == before


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime(2031, 7, 8, tzinfo=tz)


def test_answers_that_think():
    """Refused where thinking is off; plain text where the template knows no thoughts."""
    thinking = [ROUNDS[0], {"role": "assistant", "content": "<think>\nRed?\n</think>\n\nA red seven."}]
    tokenizer, template, _ = published("qwen3")
    encoder = ChatEncoder(tokenizer, 1, template)
    with pytest.raises(InputError, match="an answer has <think> in it"):
        encoder.encode(thinking)
    assert encoder.encode([*thinking, ROUNDS[2]], add_generation_prompt=True)[0]  # what a model said is no reason
    tokenizer, template, _ = published("qwen2.5")
    assert_asked_as_taught(ChatEncoder(tokenizer, 1, template), tokenizer, thinking)


@pytest.mark.parametrize("where", ["first", "system", "later"])
def test_a_template_without_end_is_ended(tokenizer, where, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    loop = "{%- for a in range(99999) -%}{%- for b in range(99999) -%}{%- endfor -%}{%- endfor -%}"
    test = {"first": "true", "system": "messages[0].role == 'system'", "later": "messages|length > 3"}[where]
    template = f"{{%- if {test} -%}}{loop}{{%- endif -%}}" + jinja(
        **{"head": CHATML, "system": "first", "default": "", "thoughts": "none", "asks": "head", "end": "<|im_end|>\n"},
        **{"strict": False, "user": "", "assistant": ""},
    )
    started = time.monotonic()
    try:
        encoder = ChatEncoder(tokenizer, 1, template)
    except InputError as error:
        assert where == "first" and "does not end within" in str(error)
    else:  # written out without what does not end, or without a system message
        assert_asked_as_taught(encoder, tokenizer, ROUNDS)
        assert not encoder.template.takes_system() or where == "later"
    assert time.monotonic() - started < 20
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_template_that_fails_is_a_sentence(tokenizer):
    for template in (
        "{{ 1 / 0 }}",
        "{{ raise_exception('No.') }}",
        "{% for %}",
        "{{ messages[9].content }}",
        "{{ x.y }}",
    ):
        with pytest.raises(InputError, match="not supported"):
            ChatEncoder(tokenizer, 1, template)
    encoder = ChatEncoder(tokenizer, 1, published("mistral-v0.1")[1].replace("eos_token", "'<|im_end|>'"))
    with pytest.raises(InputError, match=r"fails on messages of system, user.*roles must alternate"):
        encoder.encode([{"role": "system", "content": "Be kind."}, *ROUNDS[:2]])
