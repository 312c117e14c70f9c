"""What is not exported: refused by name, before any weight is loaded and before anything is written."""

import json
import re
import shutil
from importlib.util import find_spec

import pytest
from conftest import call
from exports import build, export
from families import SUPPORTED, chat_folder
from folders import changed, make_adapter, padding, snapshot
from transformers import LlavaForConditionalGeneration

import train_llava.export

FAMILIES = {each.name: each for each in SUPPORTED}


@pytest.mark.parametrize(
    "part, settings, message",
    [
        ("text_config", {"hidden_act": "gelu"}, "its language model computes gelu"),
        ("text_config", {"layer_types": ["full_attention", "sliding_attention"]}, "a sliding window"),
        ("text_config", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "kind linear"),
        ("vision_config", {"hidden_act": "relu"}, "cannot compute relu in a tower"),
        (None, {"projector_hidden_act": "relu"}, "and relu behind it"),
        (None, {"multimodal_projector_bias": False}, "no bias"),
        (None, {"vision_feature_layer": [-2, -1]}, "several layers"),
        (None, {"vision_feature_select_strategy": "full"}, "the class token"),
        ("image_processor", {"do_normalize": False}, "does not normalise"),
        ("image_processor", {"rescale_factor": 1 / 127.5}, "does not normalise"),
        ("image_processor", {"resample": 2}, "resizes by BILINEAR"),
        ("pre_tokenizer", {"type": "Whitespace"}, "in a way that is not known here: .*Whitespace"),
        ("normalizer", {"type": "Lowercase"}, "changes text .Lowercase"),
        ("model", {"byte_fallback": True}, "no byte-level BPE"),
        ("model", {"ignore_merges": True}, "whole words in another way"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_in_another_way(llava, tmp_path, part, settings, message):
    """Before any weight is loaded, and before anything is written."""
    folder = shutil.copytree(llava, tmp_path / "other")
    (folder / "model.safetensors").write_bytes(b"")
    file = {"image_processor": "processor_config.json"}.get(part, "config.json")
    if part in ("pre_tokenizer", "normalizer", "model"):
        file = "tokenizer.json"
    content = json.loads((folder / file).read_text())
    if part in ("pre_tokenizer", "normalizer"):
        content[part] = settings
    else:
        (content[part] if part else content).update(settings)
    (folder / file).write_text(json.dumps(content))
    if file == "tokenizer.json":  # whose class would else make its own parts
        changed(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    done = export(folder, tmp_path / "gguf")
    assert done.returncode == 2 and "docs/serving.md" in done.stderr, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "gguf").exists()


def test_other_refusals(llava, old_clip, tmp_path, monkeypatch):
    gemma = build(old_clip, chat_folder(FAMILIES["Gemma 1"], tmp_path / "chat"), tmp_path / "gemma")
    done = export(gemma, tmp_path / "new")
    assert done.returncode == 2 and "of kind gemma, and only qwen2, qwen3, llama are exported" in done.stderr
    assert export(gemma, tmp_path / "vllm", "vllm").returncode == 0
    adapter = make_adapter(LlavaForConditionalGeneration.from_pretrained(llava), tmp_path / "adapter")
    changed(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    done = export(adapter, tmp_path / "new")
    assert done.returncode == 2 and "say where its base is" in done.stderr and not (tmp_path / "new").exists()
    assert f"--model_name_or_path BASE --adapter_name_or_path {adapter}" in done.stderr
    told = ("--model_name_or_path", llava, "--adapter_name_or_path", adapter)
    done = call(train_llava.export.main, *told, "--format", "vllm", "--output_dir", tmp_path / "told")
    assert done.returncode == 0, done.stderr
    before = snapshot(adapter)
    done = export(llava, adapter)
    assert done.returncode == 2 and "is not empty" in done.stderr and snapshot(adapter) == before
    done = export(llava, llava.parent)
    assert done.returncode == 2
    done = export(llava, tmp_path / "new", "ollama")
    assert done.returncode == 2 and "mixes the patches of a CLIP tower up" in done.stderr
    warned = export(llava, tmp_path / "clip").stderr
    assert "warning: llama.cpp mixes" in warned and "has learned to see their middle square alone" in warned
    padded = padding(shutil.copytree(llava, tmp_path / "padded"))
    assert "has learned to see whole, padded to a square" in export(padded, tmp_path / "padded-gguf").stderr
    many = shutil.copytree(llava, tmp_path / "many")
    changed(many / "generation_config.json", eos_token_id=[1, 2, 3, 4])
    done = export(many, tmp_path / "new")
    assert done.returncode == 2 and "5 tokens end an answer" in done.stderr
    monkeypatch.setattr(train_llava.export, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    done = export(llava, tmp_path / "new")
    assert done.returncode == 2 and "pip install gguf" in done.stderr
    assert export(llava, tmp_path / "vllm2", "vllm").returncode == 0
    assert not (tmp_path / "new").exists()
