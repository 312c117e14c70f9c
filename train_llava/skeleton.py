"""Configs -> the model that a training would hold, frozen and adapted alike, but without a single weight in memory."""

from pathlib import Path

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from train_llava.arguments import ModelArguments
from train_llava.backbones import join, read_config, text_config, tower_config
from train_llava.command import InputError
from train_llava.load import read_json
from train_llava.train_type import apply_train_type


def skeleton(config: LlavaConfig, args: ModelArguments, dtype: torch.dtype) -> nn.Module:
    """The model of a training on torch's meta device: shapes, dtypes and what is trained, without any storage.

    Raises:
        InputError: --lora_target_modules names no layer, or one that gets no adapter.
    """
    with torch.device("meta"):
        return apply_train_type(LlavaForConditionalGeneration(config), args).to(dtype)


def whole_config(name: str | Path) -> LlavaConfig:
    """The config of a LLaVA.

    Raises:
        InputError: there is none, or not that of a whole LLaVA.
    """
    if (Path(name) / "adapter_config.json").is_file():
        hint = "Give --model_name_or_path a whole model; train_llava.merge_lora makes one of it"
        raise InputError(f"{name}: an adapter. {hint}.")
    if Path(name).is_dir():
        read_json(Path(name), "config.json")  # whose error knows more about folders
    config = read_config(name, "--model_name_or_path")
    if config.model_type != "llava":
        hint = "Build one with python -m train_llava.build_model, or give both halves"
        raise InputError(f"{name}: a {config.model_type!r} model, not a LLaVA. {hint}.")
    return config


def joined_config(vision: str | Path, language: str | Path) -> LlavaConfig:
    """The config of the LLaVA that train_llava.build_model would make of two halves.

    Raises:
        InputError: one of them is not of a supported kind.
    """
    tower, text = (
        tower_config(vision, "--vision_model_name_or_path"),
        text_config(language, "--language_model_name_or_path"),
    )
    return join(tower, text)


def positions_of(config: LlavaConfig) -> int | None:
    """The most tokens that the language model was made for; None where its config does not say."""
    return getattr(config.text_config, "max_position_embeddings", None)
