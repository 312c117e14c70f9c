"""Packs: whole conversations that share a row of at most so many tokens."""

import math
from collections import defaultdict
from itertools import chain

import numpy as np


class Packs:
    """The packs of an epoch, the fullest first: so many slots, each for a conversation of a certain length.

    How many there are and what they look like depends on how often each length occurs, and on nothing else.

    Args:
        lengths: (samples,), of each conversation of an epoch, in tokens.
        budget: the most tokens of a pack; no length is above it.
    """

    def __init__(self, lengths: np.ndarray, budget: int) -> None:
        packs = sorted(best_fit_decreasing(lengths, budget), key=sum, reverse=True)
        self.ends = np.cumsum([len(pack) for pack in packs])
        slots = np.fromiter(chain.from_iterable(packs), dtype=np.int64, count=len(lengths))
        self.by_length = np.argsort(slots, kind="stable")

    def __len__(self) -> int:
        return len(self.ends)

    def fill(self, lengths: np.ndarray) -> list[np.ndarray]:
        """The places in `lengths` of the conversations of each pack.

        `lengths` may have another order than those the packs were made of: which of equally long conversations comes
        into which slot follows from it.
        """
        places = np.empty(len(lengths), dtype=np.int64)
        places[self.by_length] = np.argsort(lengths, kind="stable")
        return np.split(places, self.ends[:-1])


def best_fit_decreasing(lengths: np.ndarray, budget: int) -> list[tuple[int, ...]]:
    """The lengths in each pack: the longest first, each goes into the fullest pack that has room for it.

    There are at most 11/9 as many packs as there must be, and a few (Johnson et al., 1974, doi:10.1137/0203025). Equal
    lengths and equal packs are handled together, so that this takes as long for a million records as for a thousand.
    """
    kinds: dict[int, list[tuple[tuple[int, ...], float]]] = defaultdict(list)  # of packs, by room: each how many times
    kinds[budget].append(((), math.inf))
    found, counts = np.unique(lengths, return_counts=True)
    for length, left in zip(found[::-1].tolist(), counts[::-1].tolist(), strict=True):
        for room in sorted(room for room, packs in kinds.items() if room >= length and packs):
            while left and kinds[room]:
                pack, number = kinds[room].pop()
                each = min(room // length, left)  # the first makes it the fullest, and so it gets the next ones, too
                taken = min(number, left // each)
                kinds[room - each * length].append((pack + (length,) * each, taken))
                if number > taken:
                    kinds[room].append((pack, number - taken))
                left -= taken * each
    return [pack for packs in kinds.values() for pack, number in packs if pack for _ in range(int(number))]
