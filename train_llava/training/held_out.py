"""What held-out records say of a model while it is trained: their loss, and with --eval_generate a score."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import EvalPrediction, LlavaProcessor, TrainingArguments

from train_llava.model.generate import MAX_NEW_TOKENS, SORTED, caption_rows, gather_rows
from train_llava.model.load import Model
from train_llava.scores.scoring import score


def mean_loss(held_out: EvalPrediction) -> dict[str, float]:
    """The mean of -log p over all supervised tokens, from a row per record of `loss.record_losses`."""
    loss, tokens = held_out.predictions.sum(axis=0)
    return {"loss": float(loss / tokens)}


def held_out_score(
    model: Model,
    processor: LlavaProcessor,
    dataset: Sequence[dict[str, Any]],
    args: TrainingArguments,
    alive: Callable[[], Any],
) -> dict[str, float]:
    """What `train_llava.evaluate` says of these weights and records, but for the loss: the model's own answer to each
    first question, greedily, beside the reference.

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

    return score(gather_rows(rows()))
