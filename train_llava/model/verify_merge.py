"""The checks of a merge: every weight is that of the base with the adapter added, computed from the two folders.

The sums follow the papers' formulas, in fp64: a reference for PEFT's merge.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from train_llava.cli import InputError
from train_llava.model.adapters import BEFORE, read_adapter
from train_llava.model.load import read_json
from train_llava.model.weights import canonical, stored_tensors

BEYOND = ("layer_replication", "target_parameters", "trainable_token_indices")  # of LoraConfig


def check_mergeable(adapter: Path, base: Path) -> None:
    """Refuses what cannot become one plain model, or whose sum nobody could check, before any weight is read.

    Raises:
        InputError: names what it is.
    """
    settings, reason = read_json(adapter, "adapter_config.json"), None
    start = settings.get("init_lora_weights", True)
    if (kind := settings.get("peft_type")) != "LORA":
        reason = f"an adapter of the type {kind}, and only LoRA becomes part of the weights"
    elif start not in (True, False, "gaussian", "orthogonal", "eva"):
        reason = f"its init_lora_weights {start!r} changes the base; have PEFT convert it to plain LoRA"
    elif changes := [name for name in BEYOND if settings.get(name)]:
        reason = f"its {changes[0]} is of a kind whose sum is not known here"
    elif LlavaConfig.from_pretrained(base).tie_word_embeddings:
        tables = [name for name in read_adapter(adapter) if "lm_head" in name or "embed_tokens" in name]
        if tables:
            reason = f"it changes {tables[0]}, and its base has one table for embeddings and head"
    if reason:
        raise InputError(f"{adapter}: cannot be merged: {reason}. Use it beside its base.")


def check_merge(merged: LlavaForConditionalGeneration, base: Path, adapter: Path) -> int:
    """Compares a model with the files of the two folders: weights with an adapter are sums within roundings (see
    `lora_sum`), all others equal the adapter's (the projector) or the base's bit for bit. Returns how many are sums.

    Raises:
        RuntimeError: names a weight that differs, or a tensor of the adapter that no weight has taken in.
    """
    settings, taken, sums = read_json(adapter, "adapter_config.json"), set(), 0
    old = {canonical(name): value for name, value in stored_tensors(base)}
    new: dict[str, dict[str, torch.Tensor]] = {}  # a layer's matrices, or a tensor that replaces the base's
    layers: dict[str, str] = {}  # how the adapter's config calls them
    for name, value in read_adapter(adapter).items():
        written, _, part = name.removeprefix(BEFORE).replace(".base_layer.", ".").partition(".lora_")
        new.setdefault(canonical(written), {})[f"lora_{part}"] = value
        layers[canonical(written)] = written
    for name, value in merged.named_parameters():
        name = canonical(name)
        layer, _, kind = name.rpartition(".")
        own = new.get(name, {}).get("lora_")
        expected = (old[name] if own is None else own).to(value.dtype)
        lora = new.get(layer, {})
        if (kind == "weight" and lora) or "lora_B.bias" in lora:
            expected, error = lora_sum(expected, lora, settings, layers[layer])
            same, sums = ((expected - value.double()).abs() <= error).all(), sums + 1
        else:
            same = torch.equal(expected, value)
        if not same:
            raise RuntimeError(f"{name} is not that of {base} with {adapter} added")
        taken |= {name, layer}
    if lost := sorted(new.keys() - taken):
        raise RuntimeError(f"{adapter}: {len(lost)} tensors were not merged, such as {lost[0]}")
    return sums


SINGLE = torch.finfo(torch.float32).eps
Tensors = dict[str, torch.Tensor]


def scale_of(settings: dict[str, Any], layer: str, rank: int) -> float:
    """What B A is multiplied with in a layer: alpha / r (arXiv:2106.09685, section 4.1), or alpha / sqrt(r) in
    rank-stabilised LoRA (arXiv:2312.03732). `settings` are an adapter_config.json, `layer` is the name there."""
    patterns = (settings.get("alpha_pattern") or {}).items()
    own = [alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", layer)]
    return [*own, settings["lora_alpha"]][0] / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def factors(lora: Tensors, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, inputs) and B (outputs, r) in fp64, those of a convolution flattened, those of an embedding turned round;
    of a bias, which has no inputs, 1 and what is added to it."""
    if bias:
        return torch.ones(1, 1, dtype=torch.float64), lora["lora_B.bias"].double()[:, None]
    if "lora_embedding_A" in lora:
        return lora["lora_embedding_B"].double().T, lora["lora_embedding_A"].double().T
    return lora["lora_A.weight"].double().flatten(1), lora["lora_B.weight"].double().flatten(1)


def lora_sum(start: torch.Tensor, lora: Tensors, settings: dict[str, Any], layer: str) -> tuple[torch.Tensor, ...]:
    """A layer's weight or bias W + scale B A, and how far one may be from it that was worked out in fp32.

    With a magnitude m, DoRA's, each output of the sum V (each column of an embedding's table) gets that length:
    m V / |V| (arXiv:2402.09353, section 4.1). The bound is that of two roundings to the weight's dtype, of the product
    and of the sum, and of the r fp32 sums in B A (Higham, Accuracy and Stability, section 3.5), carried on through the
    division.
    """
    bias = start.ndim == 1
    a, b = factors(lora, bias)
    scale = scale_of(settings, layer, len(lora.get("lora_A.weight", lora.get("lora_embedding_A"))))
    rounding, weight = torch.finfo(start.dtype).eps + len(a) * SINGLE, start.double()
    total = weight + scale * (b @ a).reshape(weight.shape)
    error = rounding * (weight.abs() + scale * (b.abs() @ a.abs()).reshape(weight.shape))
    if "lora_magnitude_vector" in lora and not bias:
        across = 0 if "lora_embedding_A" in lora else tuple(range(1, weight.ndim))
        length = torch.linalg.vector_norm(total, dim=across, keepdim=True)
        factor = lora["lora_magnitude_vector"].double().reshape(length.shape) / length
        of_length = torch.linalg.vector_norm(error, dim=across, keepdim=True) / length
        of_length = of_length + weight.numel() / length.numel() * SINGLE
        total, error = factor * total, (factor * error).abs() + (factor * total).abs() * (of_length + rounding)
    return total, error
