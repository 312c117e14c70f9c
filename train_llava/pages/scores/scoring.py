"""Rows of answers -> figures: what a training logs of held-out records, and `evaluate` writes.

A record says by which of METRICS it is scored (its field `metric`; docs/evaluation.md), or the flag --metric does. To
add one, write a function of an answer and its references, 0 to 1, and its line below.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from train_llava.pages.scores.captions import caption_metrics
from train_llava.pages.scores.short_answers import accuracy, anls, choice_accuracy, letter_in, relaxed_accuracy
from train_llava.pages.scores.vqa import LEAST_PEOPLE, vqa_accuracy
from train_llava.pages.scores.yes_no import is_yes_or_no, yes_no_accuracy, yes_no_figures

Row = dict[str, Any]  # of model.generate.caption_rows: "caption" is the model's answer, "reference" the right one
CAPTION = "caption"  # for answers in sentences; all others are for a word or a few
METRICS: dict[str, tuple[str, Callable[[str, Sequence[str]], float]]] = {  # each with the name of its mean
    "exact": ("accuracy", accuracy),
    "vqa": ("vqa_accuracy", vqa_accuracy),
    "relaxed": ("relaxed_accuracy", relaxed_accuracy),
    "anls": ("anls", anls),
    "yes_no": ("yes_no_accuracy", yes_no_accuracy),
    "choice": ("choice_accuracy", choice_accuracy),
}
NAMES = (CAPTION, *METRICS)
MOST_CATEGORIES = 50  # with more, the field names records and not kinds of them
NO_CATEGORY = "(none)"


def score(rows: Sequence[Row], metric: str = CAPTION) -> dict[str, float]:
    """The figures of all rows, each by name: 0 to 1, but for CIDEr (see caption_metrics).

    `exact_match`, the share of answers equal to their reference, blanks at the ends aside, is always among them; the
    others are means over those rows that are scored by their metric.

    Args:
        rows: those of `caption_rows`, at least one.
        metric: of rows that do not say their own.
    """
    return score_each(rows, metric)[0]


def score_each(rows: Sequence[Row], metric: str = CAPTION) -> tuple[dict[str, float], list[Row]]:
    """The figures of all rows as `score`, and of each row its own: `metric`, `score` (0 to 1) and `exact`."""
    own = [{"metric": row.get("metric") or metric, "exact": is_exact(row)} for row in rows]
    figures = {"exact_match": sum(each["exact"] for each in own) / len(rows)}
    groups = defaultdict(list)
    for i, each in enumerate(own):
        groups[each["metric"]].append(i)
    for name in sorted(groups, key=NAMES.index):
        means, each = figures_by(name, [rows[i] for i in groups[name]])
        figures |= means
        for i, values in zip(groups[name], each, strict=True):
            own[i] |= values
    return figures, [{"score": float(each["exact"]), **each} for each in own]


def figures_by(metric: str, rows: Sequence[Row]) -> tuple[dict[str, float], list[Row]]:
    """The figures of rows that are all scored by one metric, and of each row its own."""
    answers, references = [row["caption"] for row in rows], [references_of(row) for row in rows]
    if metric == CAPTION:
        means, lists = caption_metrics(answers, references)
        each = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        return means, [{"score": values["rouge_l"], **values} for values in each] or [{} for _ in rows]
    name, function = METRICS[metric]
    scores = [function(answer, right) for answer, right in zip(answers, references, strict=True)]
    more = yes_no_figures(answers, [right[0] for right in references]) if metric == "yes_no" else {}
    return {name: sum(scores) / len(scores), **more}, [{"score": value} for value in scores]


def by_category(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each category, the largest first; none if no record has one, or there are too many."""
    parts = defaultdict(list)
    for row in rows:
        parts[row.get("category", NO_CATEGORY)].append(row)
    if parts.keys() <= {NO_CATEGORY} or len(parts) > MOST_CATEGORIES:
        return {}
    return {name: parts[name] for name in sorted(parts, key=lambda name: (-len(parts[name]), name))}


def score_of_categories(rows: Sequence[Row], each: Sequence[Row]) -> dict[str, float]:
    """The share of exact answers of each category, as `exact_match/<category>`, and the means of METRICS likewise.

    Args:
        each: what `score_each` says of each row.
    """
    figures = {}
    for category, part in by_category([row | own for row, own in zip(rows, each, strict=True)]).items():
        scores = {"exact_match": [row["exact"] for row in part]}
        for metric, (name, _) in METRICS.items():
            scores[name] = [row["score"] for row in part if row["metric"] == metric]
        figures |= {f"{name}/{category}": sum(some) / len(some) for name, some in scores.items() if some}
    return figures


def references_of(row: Row) -> Sequence[str]:
    """The answers that count as right: the record's `answers`, where it has some, or its only one."""
    return row.get("answers") or [row["reference"]]


def is_exact(row: Row) -> bool:
    """Whether the answer is one of its references, letter by letter."""
    return row["caption"].strip() in [reference.strip() for reference in references_of(row)]


def problem(metric: str, references: Sequence[str]) -> str | None:
    """Why a record with these references cannot be scored by a metric; None if it can."""
    if metric not in NAMES:
        return f"its metric {metric!r} is none of {', '.join(NAMES)}"
    if metric == "vqa" and len(references) < LEAST_PEOPLE:
        return f"the metric vqa is a vote over {LEAST_PEOPLE} answers or more, and it has {len(references)}; take exact"
    if metric == "yes_no" and not is_yes_or_no(references[0]):
        return f"the metric yes_no needs a right answer that begins with yes or no, and it has {references[0]!r}"
    if metric == "choice" and not any(map(letter_in, references)):
        return f"the metric choice needs a right answer with a letter, such as B, and it has {references[0]!r}"
    return None
