"""The messages of a conversation, as every format is read into and every chat template writes.

`{"role": "system" | "user" | "assistant", "content": text}`; `<image>` in the text stands for an image.
"""

from collections.abc import Sequence

from train_llava.cli import InputError
from train_llava.ingest.limits import MOST_CHARACTERS, MOST_TURNS

IMAGE_TOKEN = "<image>"
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text with <image> placeholders}


def is_answer(roles: Sequence[str], i: int) -> bool:
    """Whether a message answers a question. What the assistant says before the first question is read, not learned."""
    return roles[i] == "assistant" and "user" in roles[:i]


def first_answer(messages: list[Message]) -> int | None:
    """The index of the first answer to a question; a conversation may begin with words of the assistant."""
    roles = [message["role"] for message in messages]
    return next((i for i in range(len(roles)) if is_answer(roles, i)), None)


def check_conversation_size(messages: list[Message]) -> None:
    """Refuses a conversation beyond the bounds of limits.py, before any work is spent on it.

    Raises:
        InputError: see there.
    """
    characters = sum(len(message["content"]) for message in messages)
    if len(messages) > MOST_TURNS or characters > MOST_CHARACTERS:
        raise InputError(
            f"a conversation of {len(messages):,} turns and {characters:,} characters; {MOST_TURNS} and "
            f"{MOST_CHARACTERS:,} are the most"
        )
