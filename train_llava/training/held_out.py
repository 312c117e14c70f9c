"""What held-out records say of a model while it is trained: their loss, and with --eval_generate a score."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from accelerate.utils import gather_object
from transformers import EvalPrediction, LlavaProcessor

from train_llava.cli import InputError
from train_llava.data import LlavaDataset
from train_llava.model.generate import MAX_NEW_TOKENS, SORTED, caption_rows
from train_llava.model.image_use import figures, losses_by_image, sample
from train_llava.model.load import Model
from train_llava.pages.scores.scorable import check_metrics, score_names
from train_llava.pages.scores.scoring import CAPTION, score
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
    own = range(args.process_index, len(dataset), args.world_size)
    window, options = args.eval_batch_size * SORTED, {"batch_size": args.eval_batch_size}

    def rows() -> Iterator[dict[str, Any]]:
        for start in range(0, len(own), window):
            some = own[start : start + window]
            examples = [dataset[index] for index in some]
            asked = caption_rows(model, processor, examples, max_new_tokens=MAX_NEW_TOKENS, **options)
            for index, row in zip(some, asked, strict=True):
                yield {"index": index, **row, "image": None}
            alive()

    return score(gather_rows(rows())) | image_use(model, processor, dataset, args)


def image_use(
    model: Model, processor: LlavaProcessor, dataset: LlavaDataset, args: LlavaTrainingArguments
) -> dict[str, float]:
    """What `train_llava.evaluate` says of how much the images matter; nothing where all look alike."""
    share = slice(args.process_index, None, args.world_size)
    losses = losses_by_image(model, processor, dataset, sample(dataset), args.eval_batch_size, share)
    losses = gather_object(losses)
    return figures(losses) if losses else {}


def gather_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all ranks, on every rank, by their `index`.

    Raises:
        InputError: the one that a rank has met while it made its rows; the same on all ranks, or the others would wait.
    """
    own: list[Any] = []
    try:
        own += rows
    except InputError as error:
        own = [error]
    found = gather_object(own)
    for row in found:
        if isinstance(row, InputError):
            raise row
    return sorted(found, key=lambda row: row["index"])


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
