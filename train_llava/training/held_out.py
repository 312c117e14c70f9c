"""What held-out records say of a model while it is trained: their loss, and with --eval_generate a score."""

from collections.abc import Callable, Iterator
from typing import Any

from transformers import EvalPrediction, LlavaProcessor

from train_llava.cli import InputError
from train_llava.data import LlavaDataset
from train_llava.model.generate import MAX_NEW_TOKENS, SORTED, caption_rows
from train_llava.model.image_use import image_use
from train_llava.model.load import Model
from train_llava.model.ranks import gather
from train_llava.pages.scores.scorable import check_metrics, score_names
from train_llava.pages.scores.scoring import CAPTION, score_each, score_of_categories
from train_llava.planning.arguments import LlavaTrainingArguments


def mean_loss(held_out: EvalPrediction) -> dict[str, float]:
    """The mean of -log p over all supervised tokens, from a row per record of `loss.record_losses`."""
    loss, tokens = held_out.predictions.sum(axis=0)
    return {"loss": float(loss / tokens)}


def held_out_score(
    model: Model,
    processor: LlavaProcessor,
    dataset: LlavaDataset,
    args: LlavaTrainingArguments,
    alive: Callable[[], Any],
) -> dict[str, float]:
    """What `train_llava.evaluate` says of these weights and records, but for the loss: the model's own answer to each
    first question, greedily, beside the reference; and how much the images matter.

    Rank r answers records r, r + ranks, ..., and every rank gets the score of all: each decides which model is best. A
    rank works through its records on its own, so its weights must be whole (not under ZeRO-3 or FSDP). In memory at a
    time are the images of SORTED batches of --per_device_eval_batch_size. Nothing random is drawn.

    Args:
        alive: called from time to time, so that nobody takes this for a rank that hangs.

    Raises:
        InputError: a record of any rank cannot be asked; on all ranks.
    """
    share = slice(args.process_index, None, args.world_size)
    own = range(len(dataset))[share]
    window, options = args.eval_batch_size * SORTED, {"batch_size": args.eval_batch_size}

    def rows() -> Iterator[dict[str, Any]]:
        for start in range(0, len(own), window):
            some = own[start : start + window]
            examples = [dataset[index] for index in some]
            asked = caption_rows(model, processor, examples, max_new_tokens=MAX_NEW_TOKENS, **options)
            for index, row in zip(some, asked, strict=True):
                yield {"index": index, **row, "image": None}
            alive()

    answered = sorted(gather(rows()), key=lambda row: row["index"])
    figures, each = score_each(answered)
    figures |= score_of_categories(answered, each)
    return figures | image_use(model, processor, dataset, args.eval_batch_size, share)


def check_scores(dataset: LlavaDataset, args: LlavaTrainingArguments) -> None:
    """Checks, before weights are loaded, that the held-out records can be scored, and have the figure that the best
    model is chosen by. Trainer would look for that at the first evaluation.

    Raises:
        InputError: names the record, or the figures that there are.
    """
    check_metrics(dataset, CAPTION)
    metric, names = args.metric_for_best_model or "loss", score_names(dataset)
    if metric.removeprefix("eval_") not in ("loss", *names):
        figures = ", ".join(["loss", *names])
        raise InputError(f"--metric_for_best_model {metric}: of these held-out records there are {figures}.")
