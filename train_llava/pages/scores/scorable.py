"""Which figures there will be of held-out records, and whether every record can be scored: known before any answer."""

from train_llava.cli import InputError
from train_llava.data import LlavaDataset
from train_llava.ingest.conversation import first_answer
from train_llava.pages.scores.scoring import CAPTION, problem, references_of, score


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
    """The names of the figures that `score` gives of such records, in order."""
    kinds = {name or CAPTION for name in dataset.records["metric"]}
    return sorted(score([{"caption": "yes", "reference": "yes", "metric": kind} for kind in kinds]))
