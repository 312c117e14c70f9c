"""The parts of a LLaVA, counted: for the table after a build and the one before a training."""

from torch import nn
from transformers import LlavaForConditionalGeneration


def llava_in(model: nn.Module) -> LlavaForConditionalGeneration:
    """The model itself, without what PEFT puts around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name."""
    for mark, part in (("lora_", "LoRA adapters"), ("projector", "projector"), ("vision_tower", "vision tower")):
        if mark in name:
            return part
    return "head" if "lm_head" in name else "language model"


def weights_in(parameter: nn.Parameter) -> int:
    """How many: ZeRO-3 leaves a rank only its share of a parameter, and two weights of 4 bits lie in a byte."""
    if hasattr(parameter, "quant_state"):
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def parts_table(model: nn.Module) -> str:
    """Parameters, trained ones and dtype of every part, as text."""
    parts: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        if "original_module" in name:  # PEFT keeps the projector it started from beside the one it trains
            continue
        for part in (part_of(name), "together"):
            count, trained, dtypes = parts.setdefault(part, [0, 0, set()])
            size = weights_in(parameter)
            parts[part] = [count + size, trained + size * parameter.requires_grad, dtypes | {str(parameter.dtype)[6:]}]
    if llava_in(model).config.tie_word_embeddings:
        table = llava_in(model).get_input_embeddings().weight
        parts["head"] = [0, weights_in(table) * table.requires_grad, {"the embedding table, counted there"}]
    parts["together"] = parts.pop("together")  # to the end
    rows = [f"{'part':<15}{'parameters':>15}{'trained':>15}  dtype"]
    for part, (count, trained, dtypes) in parts.items():
        rows.append(f"{part:<15}{count:>15,}{f'{trained:,}' if trained else 'frozen':>15}  {', '.join(sorted(dtypes))}")
    return "\n".join(rows)


CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"


def unread_layers(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    """The tower's layers beyond the one LLaVA reads: CLIP's last."""
    wanted, layers = model.config.vision_feature_layer, model.model.vision_tower.encoder.layers
    wanted = [wanted] if isinstance(wanted, int) else wanted
    return [*layers[max(i if i >= 0 else len(layers) + 1 + i for i in wanted) :]]


def unread_modules(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    """What lies in the tower beyond the layer LLaVA reads: CLIP's last layer and its final norm.

    Their gradient is always zero. They are frozen all the same, because an optimizer that is handed a zero gradient
    still applies weight decay, and because DDP waits for gradients that never come.
    """
    after = [module for name, module in model.model.vision_tower.named_children() if name in ("post_layernorm", "head")]
    return [*unread_layers(model), *after]
