"""The chat template of a LLaVA, proven to give the same prompt in training and in generation.

For training a template renders the whole conversation, for generation a prompt that ends where the answer begins.
Before every answer of every round the two must agree, or the model gets prompts that it never saw in training. Where
they differ, or where the template writes the day's date, it is replaced by one in the same words: `write_out`.
"""

import re
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from train_llava.cli import InputError
from train_llava.ingest.conversation import is_answer
from train_llava.ingest.limits import TEMPLATE_BYTES
from train_llava.ingest.limits import TEMPLATE_SECONDS as SECONDS

CONTENT_PARTS = Path(__file__).with_name("content_parts.jinja")
WRITTEN_OUT = Path(__file__).with_name("written_out.jinja").read_text()
MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters: no tokenizer or template gives them a meaning
SWITCH = re.compile(r"\b(enable_thinking|thinking)\b")  # Qwen3, SmolLM3, GLM-4.5; DeepSeek-V3.1, Granite 3.2
CHANGING = re.compile(r"\bstrftime_now\b|\|\s*random\b")  # another text tomorrow
THOUGHT = re.compile("</?think>")
ROUNDS = 3  # by which a self-test proves a template; longer conversations are proven when they come


def strip_lines(text: str) -> str:
    """A text without line breaks at both ends, as some templates render a message."""
    return text.strip("\n")


FILTERS = (str, str.strip, str.lstrip, str.rstrip, strip_lines)  # what templates apply to a message's text
PROBES = (
    "  a\n b  ",
    "\n\na\n\n",
    " \n a \t\n ",
    "\u3000a\u00a0",
    "<think>\nb\n</think>\n\na",
    "b</think>\n\na",
    "<image>\na",
)


class ChatTemplate:
    """A template's text, proven for its tokenizer.

    Args:
        text: Jinja, as `processor.chat_template` holds it. Thinking is switched off in it, where it has a switch.

    Raises:
        InputError: training and generation cannot get the same prompt; says why.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.tokenizer = tokenizer
        special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        self.text, self.parts = text, False
        try:
            self._texts(["user"], True)
        except InputError:
            self.parts = True  # as llava-hf's, which read a list of parts and no text
        switches = [] if text.endswith(WRITTEN_OUT) else sorted({*SWITCH.findall(text)})
        off = "".join(f"{{%- set {name} = false -%}}" for name in switches)
        if not text.startswith(off):
            self.text = off + text
            try:
                self.outline(["user", "assistant"])
            except InputError:
                self.text = text  # there are templates that are right only with the switch left alone
        self.outline(["user", "assistant"])
        try:
            if CHANGING.search(self.text) or self.parts:
                raise InputError("it writes the day's date, or does not read text")
            self._check()
        except InputError:
            self.text, self.parts = self.write_out(), False
            self._check()
        self.thoughtless = bool(THOUGHT.search(self.outline(["user"], True)[-1]))

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """The conversation as the template renders it.

        Raises:
            InputError: the template refuses it, fails, or does not end.
        """
        options = {"chat_template": self.text, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        if self.parts:
            messages = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
        try:
            with time_limit(SECONDS), memory_limit(TEMPLATE_BYTES):
                return self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # templates are programs: whatever Python can raise, and words of their own
            roles = ", ".join(message["role"] for message in messages[:6])
            reason = str(error) or type(error).__name__
            raise InputError(f"the chat template fails on messages of {roles}: {reason}") from error

    def outline(self, roles: Sequence[str], add_generation_prompt: bool = False) -> list[str]:
        """The template's text before, between and behind messages of these roles: one more than there are messages.

        Raises:
            InputError: a message is dropped, repeated or moved; or the text before an answer differs from the end of
                its prompt. Blanks that follow the prompt count as the beginning of the answer.
        """
        texts = self._texts(roles, add_generation_prompt)
        for i in (i for i in range(len(roles)) if is_answer(roles, i)):
            *before, asked = self._texts(roles[:i], True)
            if before != texts[:i] or not texts[i].startswith(asked) or texts[i].removeprefix(asked).strip():
                hint = f"asks for an answer behind {asked[-60:]!r}, and teaches it behind {texts[i][-60:]!r}"
                raise InputError(f"the chat template {hint}")
        return texts

    def prompt_end(self, roles: Sequence[str]) -> str:
        """The template's text behind the last of these messages, at the end of a prompt."""
        return self._texts(roles, True)[-1]

    def _texts(self, roles: Sequence[str], add_generation_prompt: bool) -> list[str]:
        marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
        pieces = MARK.split(self.render(marked, add_generation_prompt))
        if pieces[1::2] != [str(i) for i in range(len(roles))]:
            raise InputError("the chat template leaves out, repeats or moves messages")
        return pieces[::2]

    def filter_of(self, role: str) -> Any:
        """The one of FILTERS that the template applies to messages of this role.

        Raises:
            InputError: none of them is.
        """
        roles = ["system", "user", "assistant"] if role == "system" else ["user", "assistant"]
        texts, place = self.outline(roles), roles.index(role)
        before, behind = "A".join(texts[: place + 1]), "A".join(texts[place + 1 :])
        written = {probe: self._with(roles, place, probe) for probe in PROBES}
        for each in FILTERS:
            if all(text == before + each(probe) + behind for probe, text in written.items()):
                return each
        raise InputError(f"the chat template changes what the {role} says")

    def end_of_turn(self, text: str) -> str:
        """The special token with which the text behind an answer begins.

        Raises:
            InputError: it begins with something else.
        """
        token = self.special.match(text)
        if token is None:
            raise InputError("an answer does not end with a special token")
        return token[0]

    def takes_system(self) -> bool:
        """Whether a conversation may begin with a system message."""
        try:
            return bool(self.outline(["system", "user", "assistant"]))
        except InputError:
            return False

    def write_out(self) -> str:
        """A template that renders one round as this one does, and further rounds like a first.

        The text before a message depends on the role of the message before it, and on nothing else. Where the last
        answer of a conversation has no end, or another one, it gets the token that ends an answer in the middle.

        LLaVA-1.5 learned to end its answers, which llava-hf's template leaves out: the tokenizer's end is used there.

        Raises:
            InputError: no special token ends an answer in the middle, or only one that begins messages, too.
        """
        first, answer, end = self.outline(["user", "assistant"])
        openings = {"first user": first, "user assistant": answer}
        openings["assistant user"] = self._texts(["user", "assistant", "user"], True)[2]
        if self.takes_system():
            openings["first system"], openings["system user"], *_ = self.outline(["system", "user"], True)
        if self.parts and not self.special.match(openings["assistant user"]):
            end = str(self.tokenizer.eos_token)
            openings["assistant user"] = end + openings["assistant user"].lstrip()
        token = self.end_of_turn(openings["assistant user"])
        if token in self.special.findall(openings.get("first system", first)):
            raise InputError("no special token ends an answer")
        end = end if end.startswith(token) else token
        unasked, asked = (self.outline(["user"], asking)[1] for asking in (False, True))
        words = {"openings": openings, "end": end, "asked": asked, "unasked": unasked}
        words["strips"] = {role: "yes" for role in ("system", "user", "assistant") if self._strips(role)}
        lines = "".join(f"{{%- set {name} = {literal(value)} -%}}\n" for name, value in words.items())
        return CONTENT_PARTS.read_text() + lines + WRITTEN_OUT

    def _strips(self, role: str) -> bool:
        try:
            return self.filter_of(role) is str.strip
        except InputError:
            return False

    def _check(self) -> None:
        """Proves the template on several rounds and on messages of several kinds."""
        starts = [[], ["system"]] if self.takes_system() else [[]]
        for start in starts:
            for rounds in range(1, ROUNDS + 1):
                texts = self.outline(start + ["user", "assistant"] * rounds)
                if len({self.end_of_turn(text) for text in texts[len(start) + 2 :: 2]}) > 1:
                    raise InputError("the last answer ends with another token than those before it")
        self.filters = {role: self.filter_of(role) for role in [*starts[-1], "user", "assistant"]}

    def _with(self, roles: list[str], place: int, content: str) -> str:
        return self.render([{"role": role, "content": content if i == place else "A"} for i, role in enumerate(roles)])


def literal(value: str | dict[str, str]) -> str:
    """Text, or a dictionary of texts, as a literal of Jinja."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(name)}: {literal(text)}" for name, text in value.items()) + "}"
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends what takes longer with a TimeoutError. Signals reach the main thread alone, so others are not limited."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*args) -> None:
        raise TimeoutError(f"it does not end within {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    left = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)  # of somebody else's alarm
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


@contextmanager
def memory_limit(bytes: int) -> Iterator[None]:
    """Ends what takes more new memory with a MemoryError; in the main thread alone, like time_limit. The limit is that
    of the whole process, for a millisecond."""
    state = Path("/proc/self/statm")
    if threading.current_thread() is not threading.main_thread() or not state.exists():
        yield
        return
    used = int(state.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + bytes if soft == resource.RLIM_INFINITY else min(soft, used + bytes)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
