"""Messages -> token ids and labels, in one place, for training and for generation alike.

The model's own chat template renders a conversation with a mark in place of each message's text. So the template's
text and the messages' text stay apart: special tokens count in the template alone, and the spans to supervise are
known by construction, never searched for afterwards.
"""

import hashlib
import re
import string
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from train_llava.cli import InputError
from train_llava.ingest.conversation import IMAGE_TOKEN, Message, check_conversation_size, is_answer
from train_llava.ingest.limits import LONGEST_KNOWN, MOST_KNOWN, MOST_PLANNED
from train_llava.processing.chat_template import THOUGHT, ChatTemplate

IGNORE_INDEX = -100  # what the loss skips, as everywhere in transformers
PROBE = ["What is this?\nSay it in 3 words.", "A small house.", "Where?", "By the sea, I think!"]  # for the self-test


class ChatEncoder:
    """Turns conversations into ids and labels for one tokenizer and its chat template.

    Args:
        tokenizer: has `<image>` as one token.
        tokens_per_image: how many ids each `<image>` becomes, the number of features of the vision tower.
        template: Jinja text, as `processor.chat_template` holds it; None for the tokenizer's own. ChatTemplate may
            replace it by one whose prompt is the same in training and generation; `chat_template` is the one in use.
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
        self.backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)  # the Rust one inside
        self.special_ids = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.image_ids = [self.special_ids[IMAGE_TOKEN]] * tokens_per_image
        self.known_ids: dict[str, list[int]] = {}  # of the template's words and of instructions, which come often
        self.plans: dict[tuple, list[tuple[str, Any]]] = {}
        self.planned = 0  # turns in these
        try:
            self.template = ChatTemplate(tokenizer, template or tokenizer.chat_template)
            self.chat_template = self.template.text
            self.special = re.compile(f"({self.template.special.pattern})")  # splits, and keeps what it splits at
            self.end_of_turn_id = self._self_test()
        except InputError as error:
            raise InputError(
                f"{tokenizer.name_or_path}: this chat template or tokenizer is not supported, because its answers "
                f"cannot be told apart exactly: {error}. A template must write every message as it is, ask for answers "
                "where it teaches them, and close each with one special token, as those of Qwen and Llama 3 do."
            ) from error
        self.max_length = max_length

    def encode(self, messages: list[Message], add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation, two lists of one length.

        Labels are the ids at each answer to a question and its end-of-turn token, IGNORE_INDEX everywhere else. Text
        that looks like a special token inside a message stays text; `<image>` alone is a placeholder for the ids of an
        image. What is longer than `max_length` ends behind the last answer that fits; if not even one does, both
        lists are empty.

        Raises:
            InputError: see `check_conversation_size`; or an answer to learn has thoughts, where none are asked for.
        """
        check_conversation_size(messages)
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
            elif kind == "answer":
                index, lead = value
                # apart from the text before it, where generation starts: training sees what generation will see
                add(self._tokenize(lead + self._content(messages[index], add_generation_prompt)), supervised=True)
                answered = True
            else:
                for i, text in enumerate(self._content(messages[value]).split(IMAGE_TOKEN)):
                    if i:
                        add(self.image_ids)
                    run += text
        add([])
        if self.max_length and not add_generation_prompt and len(ids) > self.max_length:
            fits = max(end for end in ends if end <= self.max_length)
            return ids[:fits], labels[:fits]
        return ids, labels

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the chat template renders it."""
        return self.template.render(messages, add_generation_prompt)

    def ends(self, known: int | list[int] | None) -> list[int]:
        """The ids that end an answer: the template's first, then those of a model's generation config."""
        known = known if isinstance(known, list) else [] if known is None else [known]
        return [*dict.fromkeys([self.end_of_turn_id, *known])]

    def fingerprint(self) -> str:
        """A digest that changes when the ids of some conversation would change."""
        words = self.backend.to_str() if self.backend else str(sorted(self.tokenizer.get_vocab().items()))
        settings = f"{words}{self.chat_template}{len(self.image_ids)} {self.max_length}"
        return hashlib.sha256(settings.encode()).hexdigest()

    def _plan(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list[tuple[str, Any]]:
        """What the template writes for messages with these roles, in order: ("text", its own text), ("special", an id),
        ("message", its index), ("answer", its index and the blanks that the template puts in front of it). It is worked
        out once for the same roles, and proven: see ChatTemplate.outline."""
        key = (roles, add_generation_prompt)
        plan = self.plans.get(key)
        if plan is None:
            plan = []
            for i, text in enumerate(self.template.outline(roles, add_generation_prompt)):
                lead, answers = "", i < len(roles) and is_answer(roles, i)
                if answers:  # as its prompt ends, also where a later question looks back on it
                    prompt_end = self.template.prompt_end(roles[:i])
                    text, lead = prompt_end, text.removeprefix(prompt_end)
                for part in filter(None, self.special.split(text)):
                    special = part in self.special_ids
                    plan.append(("special", self.special_ids[part]) if special else ("text", part))
                if i < len(roles):
                    plan.append(("answer", (i, lead)) if answers else ("message", i))
            self.planned += len(roles)
            if self.planned > MOST_PLANNED:
                self.plans, self.planned = {}, len(roles)
            self.plans[key] = plan  # only now that it is whole: other threads ask, too
        return plan

    def _content(self, message: Message, asking: bool = False) -> str:
        """A message's text as the template renders it.

        Raises:
            InputError: an answer to be learned thinks, where no thoughts are asked for.
        """
        content = message["content"]
        if message["role"] == "assistant" and self.template.thoughtless and not asking and THOUGHT.search(content):
            raise InputError(
                "an answer has <think> in it, and this model is asked for answers without thoughts. Take the thoughts "
                "out of the data, or build on a chat model whose template has no switch for thinking"
            )
        return self.template.filters.get(message["role"], str)(content)

    def _tokenize(self, text: str) -> list[int]:
        ids = self.known_ids.get(text)
        if ids is None:
            ids = self._tokenize_anew(text) if text else []
            if len(text) <= LONGEST_KNOWN:
                if len(self.known_ids) >= MOST_KNOWN:
                    self.known_ids.clear()
                self.known_ids[text] = ids
        return ids

    def _tokenize_anew(self, text: str) -> list[int]:
        if self.backend is None:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        # a tenth of the time of a call through transformers, which sets these three before each of its own calls. They
        # are not set back: another thread may be between these lines.
        self.backend.encode_special_tokens = True  # text that looks like a special token stays text
        self.backend.no_truncation()
        self.backend.no_padding()
        return self.backend.encode(text, add_special_tokens=False).ids

    def _self_test(self) -> int:
        """Compares ids with those of the template's whole text, tokenised at once; returns the end-of-turn id."""
        probe = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(PROBE)]
        _, labels = self.encode(probe)
        spans = zip(labels, [*labels[1:], IGNORE_INDEX], strict=True)
        ends = {label for label, after in spans if label != IGNORE_INDEX and after == IGNORE_INDEX}
        if len(ends) != 1 or not ends <= set(self.special_ids.values()):
            raise InputError("an answer does not end with a special token")
        for first in string.ascii_letters + string.digits:  # a prompt that ends in a blank would join some of these
            probe[1]["content"] = first + PROBE[1]
            whole = self.tokenizer(self.render(probe), add_special_tokens=False).input_ids
            if self.encode(probe)[0] != whole:
                raise InputError("its ids differ when prompt and answer are tokenised one by one")
        return ends.pop()
