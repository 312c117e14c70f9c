"""The kernels of one micro-step, forward and backward pass, counted on torch's meta device: shapes without memory.

Every ATen call that is neither a view nor a mere allocation is one kernel, as on a GPU in eager mode. A kernel has
FLOPs, as torch.utils.flop_counter counts them, and bytes: it reads its inputs and writes its outputs, once each.

Without a public promise: torch's TorchDispatchMode, which alone sees every operation, and its pytree
(tests/test_hooks.py).
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import LlavaConfig

from train_llava.model.freeze import LoraSettings
from train_llava.model.fused_lora import fuse_lora
from train_llava.model.loss import patch_forward
from train_llava.model.structure import llava_in, used_vision_depth
from train_llava.planning.activations import Batch
from train_llava.planning.memory import FOUR_BIT, four_bit_weights
from train_llava.planning.meta_model import meta_model
from train_llava.planning.stand_ins import like_on_gpu, with_liger

aten = torch.ops.aten
# No work on a GPU: an allocation, and a view that is not declared as one
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}
# These read, of their first input, only what they give
GATHERS = {aten.embedding, aten.index, aten.index_select, aten.gather}
# These write their first input without reading it
FILLS = {aten.zero_, aten.fill_, aten.copy_, aten.bernoulli_}
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addmm_, aten.baddbmm_}
IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}  # whose FLOPs torch's registry has


@dataclass(frozen=True)
class Kernel:
    """One kernel: what it does and what it moves."""

    name: str  # of the ATen operation
    flops: int
    bytes: int  # read and written
    sides: tuple[int, int, int] | None = None  # (m, n, k) of a product of an m x k and a k x n matrix


class KernelCounter(TorchDispatchMode):
    """Counts, within its block, how often each kernel would run."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[Kernel] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view and function.overloadpacket not in FREE:
            self.kernels[kernel_of(function.overloadpacket, args, kwargs or {}, out)] += 1
        return out


def kernel_of(operation: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Kernel:
    """The kernel of one call."""
    read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    sides = None
    if operation in PRODUCTS:
        first, second = read[-2:]
        sides = (first.shape[:-1].numel(), second.shape[-1], first.shape[-1])
    elif operation is aten.convolution:
        images, channels, *positions = out.shape
        sides = (images * torch.Size(positions).numel(), channels, args[1].shape[1:].numel())
    count = flop_registry.get(IN_PLACE.get(operation, operation))
    flops = count(*args, **kwargs, out_val=out) if count else 0
    moved = sum(map(size, written))
    moved += moved + sum(map(size, read[1:])) if operation in GATHERS else sum(map(size, read[operation in FILLS :]))
    name = args[0] if operation is torch.ops.train_llava.kernel else str(operation).removeprefix("aten.")
    return Kernel(name, flops, moved, sides)


def size(tensor: torch.Tensor) -> int:
    """Bytes that a kernel moves of a tensor; of one that is expanded, what is there."""
    there = [length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return prod(there) * tensor.element_size()


# ---------------------------------------------------------------- a micro-step


@dataclass
class Way:
    """How a model runs; the default is what run_zero2.sh does on a GPU."""

    checkpointing: bool = False
    liger: bool = True  # its kernels, where it knows the language model
    fused_lora: bool = True
    in_4bit: bool = False
    lora: LoraSettings = field(default_factory=LoraSettings)


def count_kernels(config: LlavaConfig, train_type: str, batch: Batch, way: Way | None = None) -> Counter[Kernel]:
    """The kernels of a micro-step, and how often each runs.

    Layers of a kind run the same kernels. So a model is counted that has the first layer, the last and one of each kind
    in between, and then with one more of a kind: the difference stands for every other layer of that kind.
    """
    way = way or Way()
    if any(re.search(r"[^A-Za-z_]", target) for target in way.lora.lora_target_modules or []):
        return micro_step(config, train_type, batch, way)  # a pattern, which may choose single layers
    layers = layer_kinds(config.text_config)
    inner, last = Counter(layers[1:-1]), len(layers) - 1
    few = sorted({0, last, *(layers.index(kind, 1) for kind in inner)})
    used = used_vision_depth(config)
    few_used = min(used, 2)
    base = micro_step(shallow(config, few_used, few), train_type, batch, way)
    total = Counter(base)
    for kind, number in inner.items():
        if number > 1:
            more = sorted([*few, layers.index(kind, 1)])
            add_difference(total, base, micro_step(shallow(config, few_used, more), train_type, batch, way), number - 1)
    if used > few_used:
        more = micro_step(shallow(config, few_used + 1, few), train_type, batch, way)
        add_difference(total, base, more, used - few_used)
    return +total


def add_difference(total: Counter, base: Counter, more: Counter, times: int) -> None:
    """Adds to `total`, so many times, what `more` has beyond `base`."""
    for kernel in more.keys() | base.keys():
        total[kernel] += times * (more[kernel] - base[kernel])


def layer_kinds(text: Any) -> list[tuple]:
    """What the config says of each layer of a language model, such as whether its attention slides."""
    lists = per_layer(text)
    return [tuple(values[i] for values in lists.values()) for i in range(text.num_hidden_layers)]


def per_layer(text: Any) -> dict[str, list]:
    """The settings of a config that have a value for each layer."""
    depth = text.num_hidden_layers
    return {name: each for name, each in text.to_dict().items() if isinstance(each, list) and len(each) == depth}


def shallow(config: LlavaConfig, vision_layers: int, layers: list[int]) -> LlavaConfig:
    """The config with so many layers of the tower that are read, and these of the language model."""
    config = deepcopy(config)
    vision, text = config.vision_config, config.text_config
    wanted = config.vision_feature_layer
    config.vision_feature_layer = vision_layers if isinstance(wanted, int) else [vision_layers] * len(wanted)
    vision.num_hidden_layers = vision_layers
    for name, values in per_layer(text).items():
        setattr(text, name, [values[i] for i in layers])
    text.num_hidden_layers = len(layers)
    return config


def micro_step(config: LlavaConfig, train_type: str, batch: Batch, way: Way) -> Counter[Kernel]:
    """The kernels of a micro-step of the model as it is, all layers simulated."""
    model = meta_model(config, torch.bfloat16, train_type, way.lora).train()
    llava = llava_in(model)
    if way.checkpointing:
        llava.gradient_checkpointing_enable()
    patch_forward(llava)
    if way.fused_lora and not way.in_4bit:
        fuse_lora(model)
    inputs = inputs_of(config, batch)
    elementwise = with_liger(llava) if way.liger else nullcontext()
    with elementwise, torch.device("meta"), like_on_gpu(), KernelCounter() as counter:
        model(**inputs).loss.backward()
    if way.in_4bit:
        counter.kernels.update(unpacking(llava, way.checkpointing))
    return counter.kernels


def unpacking(llava: nn.Module, checkpointing: bool) -> Iterator[Kernel]:
    """One kernel for each pass through a matrix that --load_in_4bit packs: it reads 4 bits and writes 16."""
    for weight in four_bit_weights(llava):
        moved = int((FOUR_BIT + weight.element_size()) * weight.numel())
        yield from [Kernel("dequantize", 0, moved)] * (3 if checkpointing else 2)


def inputs_of(config: LlavaConfig, batch: Batch) -> dict[str, torch.Tensor]:
    """What LlavaCollator gives and LlavaTrainer normalises, of such sizes."""
    images, side = round(batch.images), config.vision_config.image_size
    ids = torch.empty(round(batch.samples), batch.length, dtype=torch.long, device="meta")
    answers = ids.new_empty(round(batch.answers))
    inputs = {"input_ids": ids, "labels": ids, "answer_rows": answers, "targets": answers}
    if images:
        inputs["pixel_values"] = ids.new_empty(images, 3, side, side, dtype=torch.bfloat16)
        inputs["image_rows"] = ids.new_empty(images * config.image_seq_length)
    return inputs
