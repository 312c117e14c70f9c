"""A config -> the model that a training would hold, frozen and adapted alike, but without a single weight in memory."""

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from train_llava.model.freeze import LoraSettings, apply_train_type


def meta_model(config: LlavaConfig, dtype: torch.dtype, train_type: str, lora: LoraSettings | None = None) -> nn.Module:
    """The model of a training on torch's meta device: shapes, dtypes and what is trained, without any storage.

    Raises:
        InputError: --lora_target_modules names no layer, or one that gets no adapter.
    """
    with torch.device("meta"):
        return apply_train_type(LlavaForConditionalGeneration(config), train_type, lora).to(dtype)
