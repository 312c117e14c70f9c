"""Messages -> token ids and label mask, in one place, for training and for asking alike.

A conversation is rendered by the model's own chat template with a mark in place of each message's text. So the text
that the template wrote and the text that people wrote stay apart: special tokens count in the template alone, and the
spans to supervise are known by construction, never searched for afterwards.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from train_llava.command import InputError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text with <image> placeholders}

IGNORE_INDEX = -100  # what the loss skips, as everywhere in transformers
IMAGE_TOKEN = "<image>"
CONTENT_PARTS = Path(__file__).with_name("content_parts.jinja")
MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters: no tokenizer or template gives them a meaning
MOST_KNOWN = 1000  # texts whose ids are remembered
PROBE = ["What is this?\nSay it in 3 words.", "A small house.", "Where?", "By the sea, I think!"]  # for the self-test


class ChatEncoder:
    """Turns conversations into ids and labels for one tokenizer and its chat template.

    Args:
        tokenizer: has `<image>` as one token.
        tokens_per_image: how many ids each `<image>` becomes, the number of features of the vision tower.
        template: Jinja text, as `processor.chat_template` holds it; None for the tokenizer's own.
        max_length: conversations with more ids are cut behind an answer.

    Raises:
        InputError: the template or tokenizer is of a kind whose answers cannot be told apart exactly.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_image: int,
        template: str | None = None,
        max_length: int | None = None,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, None
        self.chat_template = template or tokenizer.chat_template
        self.special_ids = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.image_ids = [self.special_ids[IMAGE_TOKEN]] * tokens_per_image
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self.special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.known: dict[str, list[int]] = {}  # the template's words and the instructions come again and again
        self.plans: dict[tuple, list[tuple[str, Any]]] = {}
        # Llama 3's template strips every message, Qwen's does not
        self.strips = "  a  " not in self.render([{"role": "user", "content": "  a  "}])
        self.end_of_turn_id = self._self_test()
        self.max_length = max_length

    def encode(self, messages: list[Message], add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation, two lists of one length.

        Labels are the ids at each answer and its end-of-turn token, IGNORE_INDEX everywhere else. Text that looks like
        a special token inside a message stays text; `<image>` alone is a placeholder for the ids of a picture. What is
        longer than `max_length` ends behind the last answer that fits; if not even one does, both lists are empty.
        """
        ids: list[int] = []
        labels: list[int] = []
        run = ""  # ordinary text not yet tokenised: it may join template and message, as in "user\n" + "Hello"
        answered = False  # an answer has been written and waits for its end-of-turn token
        ends = [0]  # lengths at which an answer is complete

        def add(new: list[int], supervised: bool = False) -> None:
            nonlocal run
            before = self._tokenize(run)
            run = ""
            ids.extend(before + new)
            labels.extend([IGNORE_INDEX] * len(before) + (new if supervised else [IGNORE_INDEX] * len(new)))

        for kind, value in self._plan(tuple(message["role"] for message in messages), add_generation_prompt):
            if kind == "text":
                run += value
            elif kind == "special":
                add([value], supervised=answered)
                ends += [len(ids)] * answered
                answered = False
            else:
                content = messages[value]["content"]
                content = content.strip() if self.strips else content
                if kind == "assistant":
                    add([])  # a cut where generation starts, so that training sees what generation will see
                    add(self._tokenize(content), supervised=True)
                    answered = True
                    continue
                for i, text in enumerate(content.split(IMAGE_TOKEN)):
                    if i:
                        add(self.image_ids)
                    run += text
        add([])
        if self.max_length and not add_generation_prompt and len(ids) > self.max_length:
            fits = max(end for end in ends if end <= self.max_length)
            return ids[:fits], labels[:fits]
        return ids, labels

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the chat template writes it."""
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)

    def fingerprint(self) -> str:
        """Changes when the ids of some conversation would."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend else str(sorted(self.tokenizer.get_vocab().items()))
        settings = f"{words}{self.chat_template}{len(self.image_ids)} {self.max_length}"
        return hashlib.sha256(settings.encode()).hexdigest()

    def _plan(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list[tuple[str, Any]]:
        """What the template makes of messages with these roles: ("text", its own text), ("special", an id),
        (a role, the index of the message that stands there). Rendered once, since marks stand in for all contents."""
        key = (roles, add_generation_prompt)
        if key not in self.plans:
            marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
            plan = []
            for k, piece in enumerate(MARK.split(self.render(marked, add_generation_prompt))):
                if k % 2:
                    plan.append((roles[int(piece)], int(piece)))
                    continue
                for text in filter(None, self.special.split(piece)):
                    special = text in self.special_ids
                    plan.append(("special", self.special_ids[text]) if special else ("text", text))
            self.plans[key] = plan  # only now that it is whole: other threads ask, too
        return self.plans[key]

    def _tokenize(self, text: str) -> list[int]:
        ids = self.known.get(text)
        if ids is None:
            if len(self.known) >= MOST_KNOWN:
                self.known.clear()
            self.known[text] = ids = self._tokenize_anew(text) if text else []
        return ids

    def _tokenize_anew(self, text: str) -> list[int]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        # straight to the Rust tokenizer: a tenth of the time. These three settings are whatever the last call left.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        return backend.encode(text, add_special_tokens=False).ids

    def _self_test(self) -> int:
        """Compares PROBE's ids with the template's whole text tokenised at once; returns the end-of-turn id."""
        probe = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(PROBE)]
        ids, labels = self.encode(probe)
        whole = self.tokenizer(self.render(probe), add_special_tokens=False).input_ids
        spans = zip(labels, [*labels[1:], IGNORE_INDEX], strict=True)
        ends = {label for label, after in spans if label != IGNORE_INDEX and after == IGNORE_INDEX}
        if ids != whole or len(ends) != 1 or not ends <= set(self.special_ids.values()):
            raise InputError(
                f"{self.tokenizer.name_or_path}: this chat template or tokenizer is not supported, because its answers "
                "cannot be told apart exactly. It must write every message as it is and close every answer with one "
                "special token, as those of Qwen and Llama 3 do."
            )
        return ends.pop()
