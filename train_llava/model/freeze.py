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

To add a strategy, add its name to `structure.Strategy` and what it trains to `train_only`. One with adapters also needs
what the code does where it compares with "use_lora" (here, resume.py, flag_checks.py, estimate.py).
"""

import re
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlavaForConditionalGeneration

from train_llava.cli import InputError
from train_llava.model.structure import STRATEGIES, count_trained, unused_vision_modules, used_vision_layers

VISION_ATTENTION = "q_proj|k_proj|v_proj|out_proj"  # CLIP's and SigLIP's names


@dataclass
class LoraSettings:
    """What use_lora adapts, and how; see the flags of the same names in arguments.py."""

    lora_r: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = None  # None: the matrices of the language model's attention
    train_projector: bool = True
    vision_lora: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "true"


def apply_train_type(
    model: LlavaForConditionalGeneration, train_type: str, lora: LoraSettings | None = None
) -> nn.Module:
    """Freezes and adapts a model in place; returns the model to train, a PeftModel for use_lora.

    Raises:
        InputError: an unknown strategy; see also `lora_targets`.
    """
    if train_type not in STRATEGIES:
        raise InputError(f"--train_type {train_type}: there are {', '.join(STRATEGIES)}.")
    tower = model.model.vision_tower
    if train_type == "use_lora":
        model.requires_grad_(False)
        model = add_lora(model, lora or LoraSettings())
    else:
        train_only(model, train_type)
    if not count_trained(tower):
        # --gradient_checkpointing turns gradients on at every embedding, also at that of the patches (transformers'
        # enable_input_require_grads). A frozen tower would then be computed twice and get a backward pass. (Hooks could
        # do this, too, but torch runs none after a KeyboardInterrupt: gradients would stay off.)
        tower.forward = torch.no_grad()(tower.forward)
    return model


def train_only(model: LlavaForConditionalGeneration, train_type: str) -> None:
    """Gives gradients to what a strategy without adapters trains, and to nothing else."""
    inner = model.model
    trained = {
        "projector": [inner.multi_modal_projector],
        "freeze_vision": [inner.multi_modal_projector, inner.language_model, model.lm_head],
        "none": [model],
    }
    model.requires_grad_(False)
    for module in trained[train_type]:
        module.requires_grad_(True)
    for module in unused_vision_modules(model):
        module.requires_grad_(False)


def add_lora(model: LlavaForConditionalGeneration, settings: LoraSettings) -> nn.Module:
    """Puts LoRA adapters on a frozen model.

    Raises:
        InputError: see `lora_targets`.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init_lora_weights == "true" or settings.init_lora_weights,  # PEFT's own is True
        target_modules=lora_targets(model, settings),
        modules_to_save=["multi_modal_projector"] if settings.train_projector else None,
    )
    # in the dtype of the model: PEFT would hold them in fp32, which ZeRO-2 casts and ZeRO-3 refuses
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def lora_targets(model: LlavaForConditionalGeneration, settings: LoraSettings) -> str:
    """A regular expression on the whole name, since the suffixes q_proj, k_proj, v_proj also occur in CLIP.

    Raises:
        InputError: there is no layer of a name that was asked for, or none that can have an adapter.
    """
    attention = model.model.language_model.layers[0].self_attn
    own = [name for name, module in attention.named_children() if isinstance(module, nn.Linear)]  # Phi-3 has qkv_proj
    wanted = settings.lora_target_modules or own
    if len(wanted) == 1 and not re.fullmatch(r"[\w.]+", wanted[0]):
        targets = checked_pattern(model, wanted[0])
    else:
        names = [name for name, _ in model.model.language_model.named_modules()]
        for target in wanted:
            if not any(name.endswith(f".{target}") for name in names):
                raise InputError(f"--lora_target_modules {target}: no such layer; there are {usual_layers(model)}.")
        targets = rf".*language_model.*\.({'|'.join(map(re.escape, wanted))})"
    if settings.vision_lora:
        layers = "|".join(map(str, range(len(used_vision_layers(model)))))
        targets = rf"{targets}|.*vision_tower.*layers\.({layers})\..*\.({VISION_ATTENTION})"
    return targets


def checked_pattern(model: LlavaForConditionalGeneration, pattern: str) -> str:
    """PEFT's own way to name layers: a regular expression on whole names, of linear layers of tower and language model.

    Raises:
        InputError: it is not a valid pattern, matches no layer, or matches one that cannot have an adapter.
    """
    try:
        found = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    except re.error as error:
        raise InputError(f"--lora_target_modules {pattern}: not a regular expression ({error}).") from error
    prefixes = ("model.vision_tower.", "model.language_model.")
    wrong = [n for n in found if not (n.startswith(prefixes) and isinstance(model.get_submodule(n), nn.Linear))]
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
