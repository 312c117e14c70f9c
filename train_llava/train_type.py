"""Which parameters each --train_type trains.

| train_type    | vision tower | projector          | language model and head        |
|---------------|--------------|--------------------|--------------------------------|
| use_lora      | frozen       | trained, see below | frozen, adapters in q, k, v, o |
| freeze_vision | frozen       | trained            | trained                        |
| none          | trained      | trained            | trained                        |
| projector     | frozen       | trained            | frozen                         |

With use_lora, `--train_projector false` leaves the projector as it is.
"""

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlavaForConditionalGeneration

from train_llava.arguments import ModelArguments

# a regular expression on the whole name, since the suffixes q_proj, k_proj, v_proj also occur in CLIP
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"


def apply_train_type(model: LlavaForConditionalGeneration, args: ModelArguments) -> nn.Module:
    """Freezes and adapts in place; returns the model to train, a PeftModel for use_lora."""
    model.requires_grad_(args.train_type == "none")
    if args.train_type == "use_lora":
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=LORA_TARGETS,
            modules_to_save=["multi_modal_projector"] if args.train_projector else None,
        )
        return get_peft_model(model, config)
    model.model.multi_modal_projector.requires_grad_(True)
    if args.train_type == "freeze_vision":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    for module in unread_modules(model):
        module.requires_grad_(False)
    return model


def unread_modules(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    """What lies in the tower beyond the layer LLaVA reads: CLIP's last layer and its final norm.

    Their gradient is always zero. They are frozen all the same, because an optimizer that is handed a zero gradient
    still applies weight decay, and because DDP waits for gradients that never come.
    """
    tower, layers = model.model.vision_tower, model.config.vision_feature_layer
    count = len(tower.encoder.layers)
    read = max(i if i >= 0 else count + 1 + i for i in ([layers] if isinstance(layers, int) else layers))
    after = [module for name, module in tower.named_children() if name in ("post_layernorm", "head")]
    return [*tower.encoder.layers[read:], *after]
