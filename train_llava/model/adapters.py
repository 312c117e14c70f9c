"""Puts an adapter on its base: every tensor of its file in its place, whichever version wrote the file.

PEFT writes the names that layers have in its version of transformers, into the weights and into the config:

| 4.36 to 4.51 | 4.52 to 5.0 | now |
|---|---|---|
| `language_model.model.layers` | `model.language_model.layers` | the same |
| `language_model.lm_head` | `lm_head` | the same |
| `multi_modal_projector` | `model.multi_modal_projector` | the same |
| `vision_tower.vision_model` | `model.vision_tower.vision_model` | `model.vision_tower` |
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)

# PEFT's own rules of what a name in a config means; it has no other door to them
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from transformers import LlavaForConditionalGeneration

from train_llava.cli import InputError
from train_llava.model.weights import finite

BEFORE = "base_model.model."  # every name in an adapter's file
RECORD = "adapter_base.json"  # beside the adapter: PEFT's own files stay as they are
Names = Callable[[str], str]


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by the names in its file.

    Raises:
        ValueError: some hold NaN or infinite values.
    """
    return dict(finite(load_peft_weights(str(folder), device="cpu").items()))  # of pickles the weights alone


def add_adapter(model: LlavaForConditionalGeneration, folder: Path) -> PeftModel:
    """Puts an adapter on a model as PEFT itself does, but every tensor must find its place, and every place its tensor.

    Raises:
        ValueError: an adapter of another kind, a damaged one, or one of another model.
    """
    tensors, config = read_adapter(folder), PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise ValueError(f"{config.peft_type.value}: not an adapter of layers, but tokens before the prompt")
    written = naming_of(tensors)
    translate(config, {name: written(name) for name, _ in model.named_modules()})
    config.base_model_name_or_path, config.inference_mode = model.name_or_path, True
    model = get_peft_model(model, config)
    set_peft_model_state_dict(model, match_tensors(tensors, model))
    return model


def match_tensors(tensors: dict[str, torch.Tensor], model: PeftModel) -> dict[str, torch.Tensor]:
    """An adapter's tensors, by the names that they have in a model with such an adapter.

    Raises:
        ValueError: some are missing, some have no place there, or one of another shape; says how many, and names one.
    """
    written, state = naming_of(tensors), model.state_dict(keep_vars=True)
    own = get_peft_model_state_dict(model, state, save_embedding_layers=False)
    places = {**state, **own}  # into the base go embeddings, which PEFT saves beside some adapters
    ours = {written(name): name for name in places}
    found = {ours[name]: value for name, value in tensors.items() if name in ours}
    # ZeRO-3 leaves a rank only its share of a tensor
    other = [name for name in found if found[name].shape != getattr(places[name], "ds_shape", places[name].shape)]
    for names, problem in (
        (sorted(tensors.keys() - ours), "fit nowhere into its base, which is of another architecture"),
        (sorted(own.keys() - found), f"of {len(own)} are missing; the file is damaged or of another adapter"),
        (other, "are of another shape than in its base"),
    ):
        if names:
            raise ValueError(f"{len(names)} tensors {problem}, such as {names[0]}")
    return found


def naming_of(tensors: Iterable[str]) -> Names:
    """A function that turns a name of today into the name that the writer of these names would have given it."""
    names = [name.removeprefix(BEFORE) for name in tensors]
    old = any(name.startswith(("language_model.", "vision_tower.", "multi_modal_projector.")) for name in names)
    nested = old or any("vision_tower.vision_model." in name for name in names)

    def written(name: str) -> str:
        before, name = BEFORE * name.startswith(BEFORE), name.removeprefix(BEFORE)
        name = re.sub(r"(vision_tower\.)(vision_model\.)?", r"\1vision_model." if nested else r"\1", name)
        if old:
            name = re.sub(r"^model\.language_model(?=\.|$)", "language_model.model", name)
            name = re.sub(r"^model\.(?=vision_tower|multi_modal_projector)", "", name)
            name = re.sub(r"^lm_head", "language_model.lm_head", name)
        return before + name

    return written


def translate(config: PeftConfig, modules: dict[str, str]) -> None:
    """Puts today's names of layers into a config with those of another version of transformers.

    `modules` maps the name of every module of the base to the name in the config.
    """
    if all(name == old for name, old in modules.items()):
        return
    targets = [name for name, old in modules.items() if check_target_module_exists(config, old)]
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field, None) or {}
        keys = {name: get_pattern_key(pattern, modules[name]) for name in targets}
        setattr(config, field, {name: pattern[key] for name, key in keys.items() if key in pattern})
    if saved := config.modules_to_save:
        config.modules_to_save = [name for name, old in modules.items() if old.endswith(tuple(saved))]
    config.target_modules = targets
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None  # all said by now


def record_base(adapter: Path, model: PeftModel) -> None:
    """Writes a file beside an adapter that names its base, if the base was loaded by train_llava.model.load."""
    base = model.get_base_model()
    if print_of_base := getattr(base, "fingerprint", None):
        content = {"base_model_name_or_path": base.name_or_path, "fingerprint": print_of_base}
        (adapter / RECORD).write_text(json.dumps(content, indent=2) + "\n")


def check_resumable_adapter(checkpoint: Path, model: PeftModel) -> None:
    """Checks that a training resumes with the whole adapter: PEFT would resume with whatever it finds.

    Raises:
        InputError: the checkpoint's adapter is damaged, or of another model.
    """
    check_base(checkpoint, model.get_base_model())
    try:
        match_tensors(read_adapter(checkpoint), model)
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(f"--resume_from_checkpoint {checkpoint}: cannot be gone on with ({error}).") from error


def check_base(adapter: Path, model: LlavaForConditionalGeneration) -> None:
    """Checks that an adapter is put on the model that it was trained on. Adapters of other programs do not say.

    Raises:
        InputError: it was trained on another one.
    """
    if not (adapter / RECORD).is_file():
        return
    try:
        trained_on = json.loads((adapter / RECORD).read_text())
        name, wanted = trained_on["base_model_name_or_path"], trained_on["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{adapter / RECORD}: not readable ({error!r}). Delete it to do without.") from error
    if wanted != model.fingerprint:
        hint = f"Give that one with --model_name_or_path, or delete {adapter / RECORD} to use this one all the same"
        raise InputError(f"{adapter}: trained on {name}, whose weights were not those of {model.name_or_path}. {hint}.")
