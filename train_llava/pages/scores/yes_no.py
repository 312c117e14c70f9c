"""Questions of yes or no: what POPE tells of a model that sees things which are not there.

Li et al., arXiv:2305.10355, section 5: "yes" is the positive class; a share of yes far above the data's own means that
the model says yes to anything.
"""

import re
from collections.abc import Sequence

NO = {"no", "not"}


def says_yes(answer: str) -> bool:
    """Unless its first sentence holds "no" or "not", an answer counts as yes: the rule of POPE's evaluator, which knows
    "No", "no" and "not" and takes "Not" and "NO" for yes; here capitals do not matter."""
    return not NO & set(answer.lower().partition(".")[0].replace(",", "").split())


def is_yes_or_no(reference: str) -> bool:
    """Whether a right answer begins with yes or no."""
    return re.match(r"(yes|no)\b", reference.strip(), re.IGNORECASE) is not None


def yes_no_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if the answer says what the reference, the first one, does."""
    return float(says_yes(answer) == says_yes(references[0]))


def yes_no_figures(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Precision, recall and F1 of yes, 0 where nothing or nothing right is yes, and the share of answers that are."""
    said, right = [says_yes(answer) for answer in answers], [says_yes(reference) for reference in references]
    hits = sum(a and b for a, b in zip(said, right, strict=True))
    precision, recall = hits / max(1, sum(said)), hits / max(1, sum(right))
    f1 = 2 * hits / max(1, sum(said) + sum(right))
    return {"yes_precision": precision, "yes_recall": recall, "yes_f1": f1, "yes_share": sum(said) / len(said)}
