"""What a merge must prove: every weight is that of the base with the adapter added, worked out from the two folders."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from train_llava.adapter import BEFORE, read_adapter
from train_llava.load import read_json
from train_llava.weight_files import canonical, stored_tensors

PARTS = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$")


def check_merge(merged: LlavaForConditionalGeneration, base: Path, adapter: Path) -> int:
    """Compares a model with its base and an adapter, in fp64 from the two folders.

    An adapted weight may differ by two roundings to its dtype, of the product and of the sum, and by those of the r
    fp32 sums in B A (Higham, Accuracy and Stability, section 3.5); all others are equal bit for bit to the adapter's
    (the projector) or the base's. Returns how many are adapted.

    Raises:
        RuntimeError: names a weight that differs, or a tensor of the adapter that no weight has taken in.
    """
    config = read_json(adapter, "adapter_config.json")
    old = {canonical(name): value for name, value in stored_tensors(base)}
    new: dict[str, torch.Tensor] = {}
    added: dict[str, dict[str, Any]] = {}  # of each adapted layer: A, B, magnitudes, scale
    for name, value in read_adapter(adapter).items():
        name = name.removeprefix(BEFORE)
        if part := PARTS.search(name):
            layer = name[: part.start()]
            parts = added.setdefault(canonical(layer), {"scale": scale_of(layer, config)})
            parts[part[1].replace("_embedding", "")] = value.double()
        else:
            new[canonical(name.replace(".base_layer.", "."))] = value
    adapted = len(added)
    for name, value in merged.named_parameters():
        name = canonical(name)
        parts = added.pop(name.removesuffix(".weight"), None) if name.endswith(".weight") else None
        start = new.pop(name) if name in new else old[name] if name in old else old["language: embed_tokens.weight"]
        if parts:
            expected, size = with_lora(start.double(), **parts)
            rounding = torch.finfo(value.dtype).eps + len(parts["lora_A"]) * torch.finfo(torch.float32).eps
            same = ((expected - value.double()).abs() <= rounding * size).all()
        else:
            same = torch.equal(start.to(value.dtype), value)
        if not same:
            raise RuntimeError(f"{name} is not that of {base} with {adapter} added")
    if left := [*added, *(name for name in new if "lm_head" not in name or not merged.config.tie_word_embeddings)]:
        raise RuntimeError(f"{adapter}: {len(left)} tensors were not merged, such as {left[0]}")
    return adapted


def scale_of(layer: str, config: dict[str, Any]) -> float:
    """lora_alpha / r (arXiv:2106.09685, section 4.1), or over the root of r (rsLoRA, arXiv:2312.03732), with the
    layer's own alpha and r where the config has a pattern for it."""

    def own(pattern: str, default: int) -> int:
        matches = (value for key, value in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
        return next(matches, default)

    rank, alpha = own("rank_pattern", config["r"]), own("alpha_pattern", config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def with_lora(
    start: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float,
    lora_magnitude_vector: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """W + scale x B A, (outputs, inputs), with A (r, inputs) and B (outputs, r), of an embedding transposed; and the
    sum of sizes that its rounding is measured by.

    DoRA gives each row the length m: m (W + scale x B A) / |W + scale x B A| (arXiv:2402.09353, equation 5).
    """
    product, size = lora_B @ lora_A, lora_B.abs() @ lora_A.abs()
    if product.shape != start.shape:
        product, size = product.T, size.T
    total, size = start + scale * product, start.abs() + abs(scale) * size
    if lora_magnitude_vector is None:
        return total, size
    factor = (lora_magnitude_vector.flatten() / total.norm(dim=1))[:, None]
    # the length of a row is a sum of as many squares as it has inputs, in fp32
    return factor * total, 2 * factor.abs() * size * (1 + math.sqrt(start.shape[1]))
