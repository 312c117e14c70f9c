"""What a weight is with an adapter in it, by the papers' formulas and in fp64: the reference for PEFT's merge."""

import math
import re
from typing import Any

import torch

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
