"""Which parameters each --train_type trains.

| train_type    | vision tower | projector          | language model and head        |
|---------------|--------------|--------------------|--------------------------------|
| use_lora      | frozen       | trained, see below | frozen, adapters in attention  |
| freeze_vision | frozen       | trained            | trained                        |
| none          | trained      | trained            | trained                        |
| projector     | frozen       | trained            | frozen                         |

With use_lora, `--train_projector false` leaves the projector as it is, `--lora_target_modules` names other layers of
the language model (or, as a regular expression, of the tower and the language model), and `--vision_lora true` adapts
the vision tower's attention too.
"""

import re

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlavaForConditionalGeneration

from train_llava.arguments import ModelArguments
from train_llava.cli import InputError
from train_llava.model.structure import unread_layers, unread_modules

VISION_ATTENTION = "q_proj|k_proj|v_proj|out_proj"  # CLIP's and SigLIP's names


def apply_train_type(model: LlavaForConditionalGeneration, args: ModelArguments) -> nn.Module:
    """Freezes and adapts in place; returns the model to train, a PeftModel for use_lora."""
    model.requires_grad_(args.train_type == "none")
    tower = model.model.vision_tower
    if args.train_type == "use_lora":
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=lora_targets(model, args),
            modules_to_save=["multi_modal_projector"] if args.train_projector else None,
        )
        model = get_peft_model(model, config)
    else:
        model.model.multi_modal_projector.requires_grad_(True)
        if args.train_type == "freeze_vision":
            model.model.language_model.requires_grad_(True)
            model.lm_head.requires_grad_(True)
        for module in unread_modules(model):
            module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        # --gradient_checkpointing asks for gradients at every embedding, the patches' among them, and so would run a
        # frozen tower twice and send gradients through it (transformers' enable_input_require_grads)
        tower.forward = torch.no_grad()(tower.forward)
    return model


def lora_targets(model: LlavaForConditionalGeneration, args: ModelArguments) -> str:
    """A regular expression on the whole name, since the suffixes q_proj, k_proj, v_proj also occur in CLIP.

    Raises:
        InputError: there is no layer of a name that was asked for, or none that can have an adapter.
    """
    attention = model.model.language_model.layers[0].self_attn
    own = [name for name, module in attention.named_children() if isinstance(module, nn.Linear)]  # Phi-3 has qkv_proj
    wanted = args.lora_target_modules or own
    if len(wanted) == 1 and not re.fullmatch(r"[\w.]+", wanted[0]):
        targets = checked_pattern(model, wanted[0])
    else:
        names = [name for name, _ in model.model.language_model.named_modules()]
        for target in wanted:
            if not any(name.endswith(f".{target}") for name in names):
                raise InputError(f"--lora_target_modules {target}: no such layer; there are {usual_layers(model)}.")
        targets = rf".*language_model.*\.({'|'.join(map(re.escape, wanted))})"
    if args.vision_lora:
        read = len(model.model.vision_tower.encoder.layers) - len(unread_layers(model))
        layers = "|".join(map(str, range(read)))
        targets = rf"{targets}|.*vision_tower.*layers\.({layers})\..*\.({VISION_ATTENTION})"
    return targets


def checked_pattern(model: LlavaForConditionalGeneration, pattern: str) -> str:
    """PEFT's own way to name layers: a regular expression on whole names, of linear layers of tower and language model.

    Raises:
        InputError: it is not one, matches nothing, or something that adapters are not made for here.
    """
    try:
        found = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    except re.error as error:
        raise InputError(f"--lora_target_modules {pattern}: not a regular expression ({error}).") from error
    parts = ("model.vision_tower.", "model.language_model.")
    wrong = [n for n in found if not (n.startswith(parts) and isinstance(model.get_submodule(n), nn.Linear))]
    if not found:
        hint = f"Give names with blanks between them ({usual_layers(model)}), or one regular expression on whole names"
        raise InputError(f"--lora_target_modules {pattern}: matches no layer. {hint}.")
    if wrong:
        hint = "Adapters go into linear layers of the vision tower and the language model"
        raise InputError(f"--lora_target_modules {pattern}: matches {wrong[0] or 'the whole model'}. {hint}.")
    return pattern


def usual_layers(model: LlavaForConditionalGeneration) -> str:
    """The layers of the language model that adapters are usual in, for an error."""
    names = [name for name, _ in model.model.language_model.named_modules()]
    return ", ".join(sorted({name.split(".")[-1] for name in names if name.endswith("_proj")}))
