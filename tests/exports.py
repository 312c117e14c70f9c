"""Models built and exported."""

import torch
from conftest import call
from gguf import GGUFReader

from train_llava.build_model import build_llava
from train_llava.export import main
from train_llava.model.folder import save_llava


def export(model, output, kind="gguf"):
    return call(main, "--model_name_or_path", model, "--format", kind, "--output_dir", output)


def build(vision, language, folder, dtype=torch.float32):
    torch.manual_seed(3)
    save_llava(*build_llava(vision, language, dtype=dtype), folder)
    return folder


def keys_of(path):
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}
