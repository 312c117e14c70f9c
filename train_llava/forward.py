"""The forward pass of training: what the loss needs, and nothing else.

The plain model works out logits for every token, a last layer of the vision tower that it then does not read, a last
layer of the language model of which only the answers' positions are read, and a cache of keys and values for tokens to
come. docs/performance.md tells what is left, and why.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from train_llava.chat import IGNORE_INDEX
from train_llava.train_type import unread_layers

CHUNK = 512  # rows of logits at a time: 0.3 GB of them in fp32 with Qwen's vocabulary


def predicting(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (batch, length) -> where in the flattened batch a token is to be predicted, and which: both (answers,)."""
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    rows = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return rows, following[rows]


def answer_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Sum of -log p(target) over rows of hidden states (answers, width) and targets (answers,), in fp32.

    `smoothing` gives that share of the target's probability to all tokens alike (Szegedy et al., arXiv:1512.00567,
    section 7), as --label_smoothing_factor asks.

    Rows go through the head in chunks. With more than one, logits are not kept but worked out again in the backward
    pass (Chen et al., arXiv:1604.06174), so memory does not grow with the answers. The price, one more product with
    the head, is below 2% of a step whose answers are half of its tokens.
    """

    def loss_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum", label_smoothing=smoothing)

    if len(targets) <= CHUNK:
        return loss_of(hidden, targets)
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.stack([checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def record_losses(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, records: torch.Tensor, batch: int
) -> torch.Tensor:
    """(batch, 2) in fp64: -log p of each record's answers summed up, and how many tokens these are.

    `records` (answers,) says which record a row is of. Rows go through the head in chunks, too.
    """
    table = torch.zeros(batch, 2, dtype=torch.float64, device=hidden.device)
    for chunk, target, record in zip(hidden.split(CHUNK), targets.split(CHUNK), records.split(CHUNK), strict=True):
        losses = nn.functional.cross_entropy(head(chunk).float(), target, reduction="none").double()
        table.index_add_(0, record, torch.stack([losses, torch.ones_like(losses)], dim=1))
    return table


def after_last_attention(llava: LlavaForConditionalGeneration) -> list[nn.Module]:
    """What works on each position alone and is read where a token is to be predicted, but for norms and the head: the
    output projection and the MLP of the language model's last layer."""
    last = llava.model.language_model.layers[-1]
    return [last.self_attn.o_proj, last.mlp]


def trim_forward(llava: LlavaForConditionalGeneration, smoothing: float = 0.0) -> None:
    """Changes a model in place: asked with `labels`, it gives the plain model's loss without the plain model's waste.

    In training mode the loss may be smoothed (see `answer_loss`). In eval mode it is the plain mean over the batch's
    tokens, and `logits` holds what a mean over many batches is made of: (batch, 2), see `record_losses`. Without
    labels, as in `generate`, the model answers as before. What is saved does not change.
    """
    for layer in unread_layers(llava):
        layer.forward = lambda hidden, *args, **kwargs: hidden
    places: dict[str, torch.Tensor | None] = {"rows": None}  # of the batch at hand; checkpointing asks once more
    for module in after_last_attention(llava):
        only_there(module, places)
    plain: Callable[..., Any] = llava.forward

    @wraps(plain)  # transformers reads from the signature what a model takes
    def forward(
        *args, labels: torch.Tensor | None = None, num_items_in_batch: torch.Tensor | int | None = None, **inputs
    ) -> Any:
        if labels is None:
            places["rows"] = None
            return plain(*args, **inputs)
        # counted before the layers: a GPU must be waited for, and here it has nothing to do yet
        rows, targets = predicting(labels)
        places["rows"] = rows
        hidden = llava.model(*args, **inputs | {"use_cache": False}).last_hidden_state  # (batch, length, width)
        hidden = hidden.flatten(0, 1)[rows]
        if not llava.training:
            table = record_losses(llava.lm_head, hidden, targets, rows // labels.shape[1], len(labels))
            return LlavaCausalLMOutputWithPast(loss=table[:, 0].sum() / table[:, 1].sum(), logits=table)
        loss = answer_loss(llava.lm_head, hidden, targets, smoothing)
        count = len(rows) if num_items_in_batch is None else num_items_in_batch
        return LlavaCausalLMOutputWithPast(loss=loss / count)

    llava.forward = forward


def only_there(module: nn.Module, places: dict[str, torch.Tensor | None]) -> None:
    """Lets a module that works on each position alone do so at `rows` of the flattened batch; zeros stand elsewhere."""
    plain = module.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        rows = places["rows"]
        if rows is None:
            return plain(hidden)
        flat = hidden.flatten(0, 1)
        chosen = plain(flat[rows])
        return chosen.new_zeros(len(flat), chosen.shape[-1]).index_copy(0, rows, chosen).unflatten(0, hidden.shape[:2])

    module.forward = forward
