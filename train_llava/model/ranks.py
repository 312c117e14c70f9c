"""What ranks that work on records of their own tell each other."""

from collections.abc import Iterable
from typing import Any

from accelerate.utils import gather_object

from train_llava.cli import InputError


def gather(items: Iterable[Any]) -> list[Any]:
    """What all ranks have made, those of the first rank first, on every rank.

    Args:
        items: of this rank, made while they are taken.

    Raises:
        InputError: the one that a rank has met while it made its items; on all ranks, or the others would wait.
    """
    own: list[Any] = []
    try:
        own += items
    except InputError as error:
        own = [error]
    found = gather_object(own)
    for item in found:
        if isinstance(item, InputError):
            raise item
    return found
