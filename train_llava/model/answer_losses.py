"""The loss of each record's answers, of any number of records that fit into a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlavaProcessor

from train_llava.model.generate import collator_of
from train_llava.model.load import Model
from train_llava.model.loss import record_losses
from train_llava.model.structure import llava_in
from train_llava.processing.rows import rows_of_answers


@torch.inference_mode()
def answer_losses(
    model: Model, processor: LlavaProcessor, examples: Sequence[dict[str, Any]]
) -> list[tuple[float, int]]:
    """For each example the sum of -log p over its answers' tokens (all turns, each given what precedes it), and the
    number of these tokens. Logits are computed only where a token is to be predicted."""
    batch = {name: value.to(model.device) for name, value in collator_of(processor)(examples).items()}
    labels = batch.pop("labels")
    rows, targets = rows_of_answers(labels)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    llava = llava_in(model)
    hidden = llava.model(**batch, use_cache=False).last_hidden_state.flatten(0, 1)[rows]  # (answer tokens, width)
    table = record_losses(llava.lm_head, hidden, targets, rows // labels.shape[1], len(labels))
    return [(loss, int(tokens)) for loss, tokens in table.tolist()]
