"""The loss of training, and a forward pass that computes what the loss needs and nothing else.

The plain model computes logits for every token, a last layer of the vision tower that it then does not read, a last
layer of the language model of which only the answers' positions are read, and a cache of keys and values for tokens to
come. docs/performance.md explains what is left, and why.

What is changed in transformers' model, without a public hook: `forward` of the LLaVA (read by Trainer and generate), of
the unused layers of the vision tower, within one pass (read by CLIPEncoder and SiglipEncoder), the search for packed
conversations, within one pass (masking_utils.find_packed_sequence_indices), and the keyword `ROWS`, which the language
model's layers pass on to their attention (seen in transformers 5.23). Where a version lacks one of them,
tests/test_hooks.py fails by its name.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration, masking_utils
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from train_llava.model.structure import unused_vision_layers
from train_llava.processing.rows import rows_of_answers, rows_of_images

ROWS = "answer_rows"  # the keyword under which layers receive them
CHUNK = 512  # rows of logits at a time: 0.3 GB of them in fp32 with Qwen's vocabulary


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
    options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in it is random
    return torch.stack([checkpoint(loss_of, *chunk, **options) for chunk in chunks]).sum()


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
    compute_at_rows(llava.model.language_model.layers[-1], after_last_attention(llava))
    plain: Callable[..., Any] = llava.forward

    @wraps(plain)  # transformers reads from the signature what a model takes
    def forward(
        *args, labels: torch.Tensor | None = None, num_items_in_batch: torch.Tensor | int | None = None, **inputs
    ) -> Any:
        if labels is None:
            return plain(*args, **inputs)
        if "answer_rows" in inputs:  # LlavaCollator has looked, and knows what is packed, too
            rows, targets = inputs.pop("answer_rows"), inputs.pop("targets")
            known = sequences_told(inputs.pop("sequence_ids", None))
        else:
            (rows, targets), known = rows_of_answers(labels), nullcontext()
        with known:
            hidden = hidden_states(llava, rows, *args, **inputs).flatten(0, 1).index_select(0, rows)  # (answers, width)
        if not llava.training:
            records = rows // labels.shape[1]
            table = record_losses(llava.lm_head, hidden, targets, records, len(labels))
            return LlavaCausalLMOutputWithPast(loss=table[:, 0].sum() / table[:, 1].sum(), logits=table)
        loss = chunked_cross_entropy(llava.lm_head, hidden, targets, smoothing)
        count = torch.as_tensor(len(rows) if num_items_in_batch is None else num_items_in_batch)
        return LlavaCausalLMOutputWithPast(loss=loss / count.clamp(min=1))  # without answers 0, not 0 / 0

    llava.forward = forward


def hidden_states(
    llava: LlavaForConditionalGeneration,
    rows: torch.Tensor,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    image_rows: torch.Tensor | None = None,
    **inputs,
) -> torch.Tensor:
    """Ids (batch, length) and images -> the language model's last states (batch, length, width), which are whole at
    the rows of answers alone.

    As LlavaModel.forward, but the images' features are copied to rows that are known, where that one looks for them.
    """
    inner = llava.model
    embeds = inner.get_input_embeddings()(input_ids)
    if pixel_values is not None:
        with skip_layers(unused_vision_layers(llava)):
            features = torch.cat(inner.get_image_features(pixel_values, return_dict=True).pooler_output)
        if image_rows is None:
            image_rows = rows_of_images(input_ids, llava.config.image_token_id)
        embeds = embeds.flatten(0, 1).index_copy(0, image_rows, features.to(embeds.dtype)).view_as(embeds)
    inputs |= {"inputs_embeds": embeds, "use_cache": False, "return_dict": True, ROWS: rows}
    return inner.language_model(**inputs).last_hidden_state


@contextmanager
def sequences_told(ids: torch.Tensor | None) -> Iterator[None]:
    """Within this block transformers takes `ids` (1, length) for what it would look for in positions: of each token the
    number of its conversation; None where nothing is packed."""
    plain = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda positions: ids
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = plain


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


def compute_at_rows(layer: nn.Module, modules: list[nn.Module]) -> None:
    """Lets modules of a layer, which work on each position alone and after its attention, compute some rows of the
    flattened batch; the others get zeros.

    The attention receives the rows with its other inputs. So checkpointing, which runs the layer once more, passes the
    same rows, whatever passes there were meanwhile; and a layer without them computes every row. (The layer's own hooks
    would not do: transformers runs them outside of the checkpoint.)
    """
    now: dict[str, Any] = {"rows": None}

    def begin(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        now["rows"], now["shape"] = kwargs.pop(ROWS, None), hidden.shape[:2]
        return args, kwargs

    def end(*args) -> None:
        now["rows"] = None

    def choose(module: nn.Module, args: tuple) -> tuple | None:
        return None if now["rows"] is None else (args[0].flatten(0, 1).index_select(0, now["rows"]),)

    def spread(module: nn.Module, args: tuple, chosen: torch.Tensor) -> torch.Tensor:
        if now["rows"] is None:
            return chosen
        every = chosen.new_zeros(now["shape"].numel(), chosen.shape[-1])
        return every.index_copy(0, now["rows"], chosen).unflatten(0, now["shape"])

    layer.self_attn.register_forward_pre_hook(begin, with_kwargs=True)
    for module in modules:
        module.register_forward_pre_hook(choose)
        module.register_forward_hook(spread)
    modules[-1].register_forward_hook(end)
    layer.register_forward_hook(end, always_call=True)
