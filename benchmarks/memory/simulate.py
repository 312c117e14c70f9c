"""A whole training step on fake tensors: every allocation that autograd makes at full size, and none of the memory."""

import weakref
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlavaConfig

from train_llava.model.freeze import LoraSettings
from train_llava.model.loss import patch_forward
from train_llava.model.structure import llava_in
from train_llava.planning.activations import Batch
from train_llava.planning.meta_model import meta_model


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        """From now on until it dies."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or tensor.is_meta:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        """A storage has died."""
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result


def peak_of_step(
    config: LlavaConfig,
    train_type: str,
    batch: Batch,
    checkpointing: bool,
    dtype: torch.dtype = torch.bfloat16,
    lora: LoraSettings | None = None,
) -> dict[str, int]:
    """Bytes of `weights`, of what is `kept` between forward and backward pass, and at the `peak`, without optimizer.

    The step is that of training (train_llava/model/loss.py), told as there where images and answers stand. Attention is
    torch's fused one for the CPU, which saves what the GPU's does; dropout keeps a mask of bytes as on a GPU.
    """
    model = meta_model(config, dtype, train_type, lora).train()
    llava = llava_in(model)
    if checkpointing:
        llava.gradient_checkpointing_enable()
    patch_forward(llava)
    size = config.vision_config.image_size
    memory = LiveStorages()
    with FakeTensorMode(), mock.patch.object(nn.functional, "dropout", dropout_on_gpu):
        fill(model)
        for parameter in model.parameters():
            memory.add(parameter)
        weights = memory.live
        inputs = token_inputs(batch, config.image_seq_length)
        pixels = torch.zeros(int(batch.images), 3, size, size, dtype=dtype)
        with memory:
            loss = model(**inputs, pixel_values=pixels).loss
            kept = memory.live - weights
            loss.backward()
    return {"weights": weights, "kept": kept, "peak": memory.peak}


def token_inputs(batch: Batch, image_tokens: int) -> dict[str, torch.Tensor]:
    """What the collator gives of ids and labels, with any values."""
    ids = torch.zeros(int(batch.samples), batch.length, dtype=torch.long)
    answers = torch.zeros(int(batch.answers), dtype=torch.long)
    images = torch.zeros(int(batch.images) * image_tokens, dtype=torch.long)
    return {"input_ids": ids, "labels": ids, "answer_rows": answers, "targets": answers, "image_rows": images}


def dropout_on_gpu(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """It keeps a mask of bytes there."""
    return torch.native_dropout(x, p, training)[0]


def fill(model: nn.Module) -> None:
    """Puts fake tensors, which act as if on a CPU, in place of those on the meta device; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
                module._parameters[name] = made.setdefault(id(old), new)
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
