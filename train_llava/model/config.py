"""The config of a LLaVA, read from its folder or composed of two backbones: a vision tower and a chat model.

Whether a backbone fits is found out from its config, before any weight is loaded.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlavaConfig, PreTrainedConfig

from train_llava.cli import InputError
from train_llava.model.load import read_json
from train_llava.model.structure import CLIP, SIGLIP, image_config

SUPPORTED = (  # a test builds each of them
    "Supported are CLIP, SigLIP and SigLIP 2 of fixed size, and dense chat models such as Qwen1.5, Qwen2, Qwen2.5, "
    "Qwen3, Llama 2 and 3, SmolLM2, SmolLM3, Mistral, Gemma 1, Gemma 3, Phi-3, OLMo 2, Granite 3 and Command R; all of "
    "them: docs/models.md"
)


def read_config(name: str | Path, flag: str = "") -> PreTrainedConfig:
    """The config of a folder, of a config.json, or of a hub id, of which nothing else is downloaded.

    Raises:
        InputError: there is none, it is of an unknown kind, or it needs trust_remote_code, which is never given.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:100]
        if "trust_remote_code" in str(error):
            reason = "it wants code of its own to run, which is never done"
        hint = "Give a folder with one, a config.json or an id of the hub"
        raise InputError(f"{flag} {name}: no config to be read there ({reason}). {hint}.".strip()) from error


def read_vision_config(name: str | Path, flag: str = "") -> PreTrainedConfig:
    """The config of a vision tower, alone or as a part of a CLIP or SigLIP.

    Raises:
        InputError: it is of another kind, or without patches of a fixed size.
    """
    config = read_config(name, flag)
    config = getattr(config, "vision_config", config)
    sizes = {key: getattr(config, key, None) for key in ("image_size", "patch_size")}
    if config.model_type not in (CLIP, SIGLIP) or not all(isinstance(size, int) and size for size in sizes.values()):
        raise InputError(
            f"{flag} {name}: not a vision model that fits here ({config.model_type}, {sizes}). {SUPPORTED}.".strip()
        )
    return config


def read_text_config(name: str | Path, flag: str = "") -> PreTrainedConfig:
    """The config of a chat model.

    Raises:
        InputError: a LLaVA's class or training cannot hold such a model; says what is in the way.
    """
    config = read_config(name, flag)
    try:
        with torch.device("meta"):
            reason = incompatibility(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0][:100]
    if reason:
        raise InputError(
            f"{flag} {name}: not a language model that fits here ({config.model_type}: {reason}). {SUPPORTED}.".strip()
        )
    return config


def incompatibility(chat_model: nn.Module) -> str | None:
    """The reason why a chat model cannot be the language model of a LLaVA, or cannot be trained; None if there is none.

    LLaVA's class puts the last hidden states through a matrix. The training works on the layers' plain matrices
    (freeze.py, loss.py, activations.py).
    """
    config, head = chat_model.config, getattr(chat_model, "lm_head", None)
    inner = getattr(chat_model, "model", None)
    layers = getattr(inner, "layers", None)
    if not isinstance(head, nn.Linear) or not isinstance(layers, nn.ModuleList):
        return "it has no lm_head behind model.layers"
    if head.bias is not None:
        return "its lm_head has a bias, and LLaVA's has none"
    if getattr(config, "final_logit_softcapping", None):
        return "it caps its logits, and LLaVA does not"
    for layer in layers:
        if not (
            hasattr(layer, "mlp") and isinstance(getattr(getattr(layer, "self_attn", None), "o_proj", None), nn.Linear)
        ):
            return "a layer lacks self_attn.o_proj or mlp"
        plain = {id(module.weight) for module in layer.modules() if isinstance(module, nn.Linear)}
        for name, parameter in layer.named_parameters():
            if parameter.ndim > 1 and id(parameter) not in plain:
                return f"{name} is not a plain matrix, as in a mixture of experts or a convolution"
    return None if hasattr(inner, "norm") else "it has no model.norm"


def logit_scale(config: PreTrainedConfig) -> float:
    """The factor of a chat model's logits: Cohere's logit_scale, or one over Granite's logits_scaling."""
    return getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)


def compose_config(vision: PreTrainedConfig, text: PreTrainedConfig, **options) -> LlavaConfig:
    """The config of a LLaVA out of those of its two backbones.

    A LLaVA's class does not scale logits. So the scale becomes part of the head's weights (`backbones.scaled_head`),
    and the head is no longer the embedding table. Changes `text` in place.
    """
    tied = text.tie_word_embeddings and logit_scale(text) == 1
    for name in {"logit_scale", "logits_scaling"} & {*text.to_dict()}:
        setattr(text, name, 1.0)
    text.tie_word_embeddings = tied
    images = image_config(vision)
    return LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied, **images, **options)


def load_llava_config(name: str | Path) -> LlavaConfig:
    """The config of a whole LLaVA.

    Raises:
        InputError: there is none, or it is that of something else.
    """
    if (Path(name) / "adapter_config.json").is_file():
        hint = "Give --model_name_or_path a whole model; train_llava.merge_lora makes one of it"
        raise InputError(f"{name}: an adapter. {hint}.")
    if Path(name).is_dir():
        read_json(Path(name), "config.json")  # its error is clearer for a folder
    config = read_config(name, "--model_name_or_path")
    if config.model_type != "llava":
        hint = "Build one with python -m train_llava.build_model, or give both halves"
        raise InputError(f"{name}: a {config.model_type!r} model, not a LLaVA. {hint}.")
    return config


def max_positions(config: LlavaConfig) -> int | None:
    """The number of tokens that the language model was made for; None where its config does not say."""
    return getattr(config.text_config, "max_position_embeddings", None)
