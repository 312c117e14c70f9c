"""What a merge must prove: every weight is that of the base with the adapter added, worked out from the two folders."""

from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from train_llava.adapter import BEFORE, read_adapter
from train_llava.command import InputError
from train_llava.load import read_json
from train_llava.lora_sum import lora_sum
from train_llava.weight_files import canonical, stored_tensors

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
    """Compares a model with what the two folders' files say: weights with an adapter are sums within roundings (see
    lora_sum.py), all others equal the adapter's (the projector) or the base's bit for bit. Returns how many are sums.

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
