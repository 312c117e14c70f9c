"""Rows of answers -> figures: what a training logs of held-out records, and `evaluate` writes."""

from typing import Any

from train_llava.scores.captions import caption_metrics

Row = dict[str, Any]  # of model.generate.caption_rows: "caption" is the model's answer, "reference" the right one


def score(rows: list[Row]) -> dict[str, float]:
    """The metrics of all rows. `exact_match`, the share of answers equal to their reference, is always one of them;
    the others are 0 to 1, too, but for CIDEr (see caption_metrics).

    Args:
        rows: those of `caption_rows`, at least one.
    """
    return caption_metrics([row["caption"] for row in rows], [row["reference"] for row in rows])[0]
