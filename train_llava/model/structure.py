"""What is known of a LLaVA's structure: its components, the geometry of its images, the layers that it never uses.

A LLaVA is a vision tower, a projector, and a language model with its head (LlavaForConditionalGeneration):

    model.vision_tower  model.multi_modal_projector  model.language_model  lm_head

To add a kind of vision tower: add its name below, and check `has_cls` and `unused_vision_modules` here, SUPPORTED and
`read_vision_config` in config.py, VISION_ATTENTION in freeze.py, IGNORED in weights.py, `skip_layers` in loss.py,
`vision_layer` in planning/activations.py. Then add a row to tests/test_families.py, which builds and trains each kind.
"""

from typing import Any, Literal, get_args

from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig

Strategy = Literal["use_lora", "freeze_vision", "none", "projector"]  # of --train_type, see freeze.py
STRATEGIES: tuple[str, ...] = get_args(Strategy)
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"  # the supported kinds of vision tower
VISION, PROJECTOR, LANGUAGE, HEAD, ADAPTERS = "vision tower", "projector", "language model", "head", "LoRA adapters"

LORA_B = "matrices B of the adapters"


# ---------------------------------------------------------------- the geometry of an image


def patches_per_image(vision: PreTrainedConfig) -> int:
    """How many patches a vision tower cuts an image into: the number of tokens that stand for it."""
    return (vision.image_size // vision.patch_size) ** 2


def has_cls(vision: PreTrainedConfig) -> bool:
    """Whether a tower puts a class token in front of the patches: CLIP does, SigLIP does not."""
    return vision.model_type == CLIP


def positions_per_image(vision: PreTrainedConfig) -> int:
    """Positions that the tower's layers work on: the patches, and CLIP's class token."""
    return patches_per_image(vision) + has_cls(vision)


def image_config(vision: PreTrainedConfig) -> dict[str, Any]:
    """The part of a LlavaConfig that says which of the tower's features are read: all patches, no class token."""
    strategy = "default" if has_cls(vision) else "full"  # "default" drops the first feature
    return {"image_seq_length": patches_per_image(vision), "vision_feature_select_strategy": strategy}


def processor_config(config: LlavaConfig) -> dict[str, Any]:
    """The part of a LlavaProcessor that says how many image tokens an image becomes."""
    return {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(has_cls(config.vision_config)),
    }


# ---------------------------------------------------------------- components and weights


def llava_in(model: nn.Module) -> LlavaForConditionalGeneration:
    """The LLaVA itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def component_of(name: str) -> str:
    """The component that a parameter or module is in, by its name in any version of transformers."""
    marks = {"vision_tower": VISION, "multi_modal_projector": PROJECTOR, "lm_head": HEAD}
    return next((component for mark, component in marks.items() if mark in name), LANGUAGE)


def component_or_adapter(name: str) -> str:
    """The component of a parameter, where LoRA adapters are a component of their own."""
    return ADAPTERS if "lora_" in name else component_of(name)


def learning_rate_group(name: str) -> str:
    """The component of a parameter, where of adapters LoRA+ sets LORA_B apart: the matrices that start at zero, and the
    lengths of DoRA (as PEFT's optimizers/loraplus.py; Hayou et al., arXiv:2402.12354)."""
    component = component_or_adapter(name)
    return LORA_B if component == ADAPTERS and ("lora_B" in name or "lora_magnitude" in name) else component


def count_weights(parameter: nn.Parameter) -> int:
    """Number of weights. ZeRO-3 leaves a rank only its share of a parameter, and a byte holds two weights of 4 bits."""
    if hasattr(parameter, "quant_state"):
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def count_trained(module: nn.Module) -> int:
    """Number of weights with a gradient."""
    return sum(count_weights(parameter) for parameter in module.parameters() if parameter.requires_grad)


def components_table(model: nn.Module) -> str:
    """Weights, trained weights and dtype of every component, as text."""
    counts: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        if "original_module" in name:  # PEFT keeps the projector it started from beside the one it trains
            continue
        for component in (component_or_adapter(name), "total"):
            count, trained, dtypes = counts.setdefault(component, [0, 0, set()])
            size, dtype = count_weights(parameter), str(parameter.dtype).removeprefix("torch.")
            counts[component] = [count + size, trained + size * parameter.requires_grad, dtypes | {dtype}]
    if llava_in(model).config.tie_word_embeddings:
        table = llava_in(model).get_input_embeddings().weight
        counts[HEAD] = [0, count_weights(table) * table.requires_grad, {"the embedding table, counted there"}]
    counts["total"] = counts.pop("total")  # to the end
    rows = [f"{'component':<15}{'parameters':>15}{'trained':>15}  dtype"]
    for component, (count, trained, dtypes) in counts.items():
        trained = f"{trained:,}" if trained else "frozen"
        rows.append(f"{component:<15}{count:>15,}{trained:>15}  {', '.join(sorted(dtypes))}")
    return "\n".join(rows)


# ---------------------------------------------------------------- the layers of the tower that nobody reads


def used_vision_depth(config: LlavaConfig) -> int:
    """The number of the tower's layers up to the one that LLaVA reads (`vision_feature_layer`)."""
    wanted, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    wanted = [wanted] if isinstance(wanted, int) else wanted
    return max(i if i >= 0 else depth + 1 + i for i in wanted)


def unused_vision_layers(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    """The tower's layers behind the one that LLaVA reads (-2 in CLIP: the last is unused)."""
    return [*model.model.vision_tower.encoder.layers[used_vision_depth(model.config) :]]


def used_vision_layers(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    """The tower's layers up to the one that LLaVA reads."""
    layers = model.model.vision_tower.encoder.layers
    return [*layers[: len(layers) - len(unused_vision_layers(model))]]


def unused_vision_modules(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    """The unused layers, and what follows them in the tower: CLIP's final norm, SigLIP's norm and pooling head.

    Their gradient is always zero. They are frozen all the same, because an optimizer that is handed a zero gradient
    still applies weight decay, and because DDP waits for gradients that never come.
    """
    after = [module for name, module in model.model.vision_tower.named_children() if name in ("post_layernorm", "head")]
    return [*unused_vision_layers(model), *after]
