"""How right a short answer is, 0 to 1, given the answers that count as right."""

import math
import re
from collections.abc import Sequence

TOLERANCE = 0.05  # of a number, relative to the right one
LEAST_SIMILAR = 0.5  # below, an answer is wrong, and not a right one misread
LETTER = re.compile(r"^\(?([A-Z])(?:[.):]|$)|(?i:the answer is) \(?([A-Z])\b")


def accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, in small letters and without a full stop at its end: as LLaVA-1.5
    (arXiv:2310.03744) scores GQA, whose own evaluator compares letter by letter."""

    def plain(text: str) -> str:
        return text.strip().removesuffix(".").lower()

    return float(plain(answer) in map(plain, references))


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if a number is within 5% of a reference, or a text is equal to it in small letters (ChartQA, Masry et al.,
    arXiv:2203.10244, section 5.1; 0.5 and 50% are the same number, as in pix2struct's evaluator)."""
    return float(any(is_near(answer.strip(), reference.strip()) for reference in references))


def is_near(answer: str, reference: str) -> bool:
    """Whether a number is within TOLERANCE of another; texts, and what is compared with 0, must be equal."""
    number, right = number_in(answer), number_in(reference)
    if number is not None and right:
        return abs(number - right) <= TOLERANCE * abs(right)
    return answer.lower() == reference.lower()


def number_in(text: str) -> float | None:
    """The number that a text is, if it is one; of percent, as a share."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity, of one answer: 1 - distance / length of the longer text, to the
    reference that is nearest; 0 if that is below 0.5 (Biten et al., arXiv:1905.13648, equation 1; exactly 0.5
    counts, as in the evaluator of DocVQA's server). Capitals and the number of blanks do not matter."""
    return max(similarity(as_compared(answer), as_compared(reference)) for reference in references)


def as_compared(text: str) -> str:
    """Small letters, single blanks."""
    return " ".join(text.lower().split())


def similarity(one: str, other: str) -> float:
    """1 - distance / length of the longer text, or 0 if that is below LEAST_SIMILAR."""
    longer, shorter = max(len(one), len(other)), min(len(one), len(other))
    if shorter < LEAST_SIMILAR * longer:  # so many characters are to be put in: long answers need not be compared
        return 0.0
    value = 1 - edit_distance(one, other) / longer if longer else 1.0
    return value if value >= LEAST_SIMILAR else 0.0


def edit_distance(one: str, other: str) -> int:
    """The least number of characters to put in, take out or change (Levenshtein, 1966)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def choice_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if the answer chooses the letter of the reference, as LLaVA reads ScienceQA (Lu et al., arXiv:2209.09513)."""
    chosen = letter_in(answer)
    return float(chosen is not None and chosen in map(letter_in, references))


def letter_in(text: str) -> str | None:
    """The letter of a choice: of `B`, `B.`, `(B) the words`, `The answer is B.`; None in any other text."""
    found = LETTER.search(text.strip())
    return found[1] or found[2] if found else None
