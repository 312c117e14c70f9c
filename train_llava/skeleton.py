"""Configs -> the model that a training would hold, frozen and adapted alike, but without a single weight in memory."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig

from train_llava.arguments import ModelArguments
from train_llava.command import InputError
from train_llava.load import read_json
from train_llava.train_type import apply_train_type


def skeleton(config: LlavaConfig, args: ModelArguments, dtype: torch.dtype) -> nn.Module:
    """The model of a training on torch's meta device: shapes, dtypes and what is trained, without any storage.

    Raises:
        InputError: the language model has no layer of a name in --lora_target_modules.
    """
    with torch.device("meta"):
        return apply_train_type(LlavaForConditionalGeneration(config), args).to(dtype)


def read_config(name: str | Path, flag: str) -> PreTrainedConfig:
    """The config of a folder, of a config.json, or of a hub id, of which nothing else is downloaded.

    Raises:
        InputError: there is none, or of an unknown kind.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:100]
        hint = "Give a folder with one, a config.json or an id of the hub"
        raise InputError(f"{flag} {name}: no config to be read there ({reason}). {hint}.") from error


def whole_config(name: str | Path) -> LlavaConfig:
    """The config of a LLaVA.

    Raises:
        InputError: there is none, or not that of a whole LLaVA.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise InputError(f"{name}: an adapter; give --model_name_or_path a whole model.")
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
        read_config(vision, "--vision_model_name_or_path"),
        read_config(language, "--language_model_name_or_path"),
    )
    tower = getattr(tower, "vision_config", tower)
    if tower.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise InputError(f"--vision_model_name_or_path {vision}: a {tower.model_type!r}, neither CLIP nor SigLIP.")
    if not hasattr(text, "num_key_value_heads") or not hasattr(text, "intermediate_size"):
        raise InputError(f"--language_model_name_or_path {language}: a {text.model_type!r}, neither Qwen2 nor Llama.")
    return join(tower, text)


def join(tower: PreTrainedConfig, text: PreTrainedConfig) -> LlavaConfig:
    """Both halves' configs as one, with all of CLIP's features but CLS, or all of SigLIP's."""
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_seq_length=(tower.image_size // tower.patch_size) ** 2,
        vision_feature_select_strategy="default" if tower.model_type == "clip_vision_model" else "full",
        tie_word_embeddings=text.tie_word_embeddings,
    )
