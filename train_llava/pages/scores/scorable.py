"""Which figures there will be of held-out records, and whether every record can be scored: known before any answer."""

from train_llava.cli import InputError
from train_llava.data import LlavaDataset
from train_llava.ingest.conversation import first_answer
from train_llava.pages.scores.scoring import CAPTION, problem, references_of, score_each, score_of_categories


def check_metrics(dataset: LlavaDataset, metric: str) -> None:
    """Refuses, before any answer is worked out, a record that cannot be scored.

    Raises:
        InputError: names the record.
    """
    for record in dataset.records.remove_columns("images"):
        messages, name = record["messages"], record["metric"] or metric
        if name != CAPTION:
            right = references_of(record | {"reference": messages[first_answer(messages)]["content"]})
            if why := problem(name, right):
                hint = "Mend it; where a record names no metric, --metric does"
                raise InputError(f"record {record['id']!r}: {why}. {hint}.")


def score_names(dataset: LlavaDataset) -> list[str]:
    """The names of the figures that there will be of such records and their categories, in order."""
    rows = []
    for metric, category in dict.fromkeys(zip(dataset.records["metric"], dataset.records["category"], strict=True)):
        row = {"caption": "yes", "reference": "yes", "metric": metric or CAPTION}
        rows.append(row | {"category": category} if category else row)
    figures, each = score_each(rows)
    return sorted(figures | score_of_categories(rows, each))
