"""Folders of models: made, changed, spoiled and compared."""

import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file


def changed(file, **changes):
    """Sets keys of a JSON file, or takes those away that are to be None."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def padding(folder):
    """Has the model in a folder see whole images, as build_model --image_aspect_ratio pad does."""
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    changed(folder / "processor_config.json", image_processor=settings)
    return folder


def equal(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def save_safe(tensors, path):
    save_file(tensors, path, {"format": "pt"})


def in_float32(base):
    """So that a merge rounds nothing away."""
    changed(base / "config.json", torch_dtype="float32", dtype=None)
    for part in ("text_config", "vision_config"):
        content = json.loads((base / "config.json").read_text())
        content[part].pop("torch_dtype", None)
        (base / "config.json").write_text(json.dumps(content))
    weights = load_file(base / "model.safetensors")
    save_file({name: value.float() for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})


SETTINGS = {"r": 4, "lora_alpha": 12, "target_modules": r".*language_model.*q_proj"}


def make_adapter(model, folder):
    """As use_lora saves one: B is not zero, the projector is not the base's."""
    torch.manual_seed(0)
    settings = LoraConfig(**SETTINGS, init_lora_weights=False, modules_to_save=["multi_modal_projector"])
    model = get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
