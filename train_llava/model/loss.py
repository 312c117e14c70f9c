"""The loss of training, and a forward pass that computes what the loss needs and nothing else.

The plain model computes logits for every token, a last layer of the vision tower that it then does not read, a last
layer of the language model of which only the answers' positions are read, and a cache of keys and values for tokens to
come. docs/performance.md explains what is left, and why.

What is changed in transformers' model, without a public hook: `forward` of the LLaVA (read by Trainer and generate), of
the unused layers of the vision tower, within one pass (read by CLIPEncoder and SiglipEncoder), and the keyword
`POSITIONS`, which the language model's layers pass on to their attention (seen in transformers 5.23). Where a version
lacks one of them, tests/test_hooks.py fails by its name.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from train_llava.data import PACKED
from train_llava.model.structure import unused_vision_layers
from train_llava.processing.chat import IGNORE_INDEX

POSITIONS = "answer_positions"  # the keyword under which layers receive them
CHUNK = 512  # rows of logits at a time: 0.3 GB of them in fp32 with Qwen's vocabulary


def shift_labels(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (batch, length) -> positions in the flattened batch at which a token is to be predicted, and these tokens:
    both (answers,)."""
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    positions = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, following[positions]


def chunked_cross_entropy(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
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
    """(batch, 2) in fp64: of each record, the sum of -log p over its answers' tokens, and the number of these tokens.

    `records` (answers,) is the number of each row's record. Rows go through the head in chunks, too.
    """
    table = torch.zeros(batch, 2, dtype=torch.float64, device=hidden.device)
    for chunk, target, record in zip(hidden.split(CHUNK), targets.split(CHUNK), records.split(CHUNK), strict=True):
        losses = nn.functional.cross_entropy(head(chunk).float(), target, reduction="none").double()
        table.index_add_(0, record, torch.stack([losses, torch.ones_like(losses)], dim=1))
    return table


def after_last_attention(llava: LlavaForConditionalGeneration) -> list[nn.Module]:
    """The modules that work on each position alone and are read only where a token is to be predicted: the output
    projection and the MLP of the language model's last layer."""
    last = llava.model.language_model.layers[-1]
    return [last.self_attn.o_proj, last.mlp]


def patch_forward(llava: LlavaForConditionalGeneration, smoothing: float = 0.0) -> None:
    """Changes a model in place: called with `labels`, it computes the plain model's loss, and no more than that needs.

    In training mode the loss may be smoothed (see `chunked_cross_entropy`). In eval mode it is the plain mean over the
    batch's tokens, and `logits` holds what a mean over many batches is made of: (batch, 2), see `record_losses`.
    Without labels, as in `generate`, the model answers as before. What is saved does not change.
    """
    compute_at_positions(llava.model.language_model.layers[-1], after_last_attention(llava))
    llava.model.vision_tower.register_forward_pre_hook(without_lengths_of_texts, with_kwargs=True)
    plain: Callable[..., Any] = llava.forward

    @wraps(plain)  # transformers reads from the signature what a model takes
    def forward(
        *args, labels: torch.Tensor | None = None, num_items_in_batch: torch.Tensor | int | None = None, **inputs
    ) -> Any:
        if labels is None:
            return plain(*args, **inputs)
        # before the layers: this waits for the GPU, which has nothing to do yet
        positions, targets = shift_labels(labels)
        with skip_layers(unused_vision_layers(llava)):
            outputs = llava.model(*args, **inputs | {"use_cache": False, POSITIONS: positions})
        hidden = outputs.last_hidden_state.flatten(0, 1)[positions]  # (answers, width)
        if not llava.training:
            records = positions // labels.shape[1]
            table = record_losses(llava.lm_head, hidden, targets, records, len(labels))
            return LlavaCausalLMOutputWithPast(loss=table[:, 0].sum() / table[:, 1].sum(), logits=table)
        loss = chunked_cross_entropy(llava.lm_head, hidden, targets, smoothing)
        count = torch.as_tensor(len(positions) if num_items_in_batch is None else num_items_in_batch)
        return LlavaCausalLMOutputWithPast(loss=loss / count.clamp(min=1))  # without answers 0, not 0 / 0

    llava.forward = forward


def without_lengths_of_texts(tower: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook of the tower: transformers 5.24 passes on to it where packed conversations end, and FlashAttention would
    cut its images there."""
    return args, {name: value for name, value in kwargs.items() if name not in PACKED}


@contextmanager
def skip_layers(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within this block, layers return their input. Nobody reads that, so it is never recomputed either."""
    plain = {layer: layer.forward for layer in layers}
    for layer in plain:
        layer.forward = lambda hidden, *args, **kwargs: hidden
    try:
        yield
    finally:
        for layer, forward in plain.items():
            layer.forward = forward


def compute_at_positions(layer: nn.Module, modules: list[nn.Module]) -> None:
    """Lets modules of a layer, which work on each position alone and after its attention, compute some positions of the
    flattened batch; the others get zeros.

    The attention receives the positions with its other inputs. So checkpointing, which runs the layer once more, passes
    the same positions, whatever passes there were meanwhile; and a layer without them computes every position. (The
    layer's own hooks would not do: transformers runs them outside of the checkpoint.)
    """
    now: dict[str, Any] = {"positions": None}

    def begin(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        now["positions"], now["shape"] = kwargs.pop(POSITIONS, None), hidden.shape[:2]
        return args, kwargs

    def end(*args) -> None:
        now["positions"] = None

    def choose(module: nn.Module, args: tuple) -> tuple | None:
        return None if now["positions"] is None else (args[0].flatten(0, 1)[now["positions"]],)

    def spread(module: nn.Module, args: tuple, chosen: torch.Tensor) -> torch.Tensor:
        if now["positions"] is None:
            return chosen
        every = chosen.new_zeros(now["shape"].numel(), chosen.shape[-1])
        return every.index_copy(0, now["positions"], chosen).unflatten(0, now["shape"])

    layer.self_attn.register_forward_pre_hook(begin, with_kwargs=True)
    for module in modules:
        module.register_forward_pre_hook(choose)
        module.register_forward_hook(spread)
    modules[-1].register_forward_hook(end)
    layer.register_forward_hook(end, always_call=True)
