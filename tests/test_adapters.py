"""Adapters as old versions and other people saved them, damaged ones, and adapters whose base has changed.

The references are the logits of the old versions themselves, and plain PEFT.
"""

import json
import shutil

import pytest
import torch
from conftest import ROOT, call
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_load import changed
from transformers import LlavaForConditionalGeneration

from train_llava import evaluate, infer, merge_lora
from train_llava.adapter import RECORD
from train_llava.command import InputError
from train_llava.load import load

VERSIONS = ("4.41.2", "4.53")


@pytest.fixture(params=VERSIONS)
def old(request, llava, tmp_path):
    """Base and adapter of an old version, the base with the processor of the tests' LLaVA; and what they answered."""
    shutil.copytree(ROOT / "tests" / "old_adapters" / request.param, tmp_path / "old")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(llava / name, tmp_path / "old" / "base")
    answers = torch.load(tmp_path / "old" / "logits.pt")
    ids = answers["ids"]
    at = int((ids[0] == 421).nonzero()[0])
    text = ids[0][ids[0] != 421]
    ids = torch.cat([text[:at], torch.full((4,), 421), text[at:]])[None]  # one per patch, as today
    asked = {"input_ids": ids, "pixel_values": answers["pixels"], "attention_mask": torch.ones_like(ids)}
    return tmp_path / "old" / "base", tmp_path / "old" / "adapter", asked, answers


def logits(model, asked):
    with torch.no_grad():
        return model.float().eval()(**asked).logits


def assert_same(ours, theirs):
    """Of 4.41.2 the logits behind the picture: it spread one token over the patches."""
    behind = min(ours.shape[1], theirs.shape[1]) - 4
    torch.testing.assert_close(ours[:, -behind:], theirs[:, -behind:], rtol=1e-4, atol=2e-5)


def test_logits_of_old_versions(old, tmp_path):
    base, adapter, asked, answers = old
    assert_same(logits(load(base, dtype=torch.float32)[0], asked), answers["base"])
    assert_same(logits(load(base, adapter, dtype=torch.float32)[0], asked), answers["adapter"])
    with pytest.raises(AssertionError):
        assert_same(answers["base"], answers["adapter"])
    changed(base / "config.json", torch_dtype="float32", dtype=None)
    for part in ("text_config", "vision_config"):
        content = json.loads((base / "config.json").read_text())
        content[part].pop("torch_dtype", None)
        (base / "config.json").write_text(json.dumps(content))
    weights = load_file(base / "model.safetensors")
    save_file({name: value.float() for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    where = ("--adapter_name_or_path", adapter, "--model_name_or_path", base, "--output_dir", tmp_path / "merged")
    done = call(merge_lora.main, *where)
    assert done.returncode == 0, done.stderr
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_same(logits(merged, asked), answers["adapter"])


def test_every_command_takes_them(old, files, data, tmp_path):
    base, adapter, *_ = old
    model = ("--model_name_or_path", base, "--adapter_name_or_path", adapter)
    done = call(infer.main, *model, "--image", files[0], "--max_new_tokens", 2)
    assert done.returncode == 0, done.stderr
    done = call(evaluate.main, *model, "--data_path", data, "--max_new_tokens", 1, "--output_dir", tmp_path / "scores")
    assert done.returncode == 0, done.stderr
    changed(adapter / "adapter_config.json", base_model_name_or_path=str(base))  # an adapter that knows its base
    assert call(infer.main, "--model_name_or_path", adapter, "--image", files[0], "--max_new_tokens", 2).returncode == 0


def test_pickled_weights(old):
    base, adapter, asked, answers = old
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert_same(logits(load(base, adapter, dtype=torch.float32)[0], asked), answers["adapter"])


@pytest.fixture
def adapter(llava, tmp_path):
    torch.manual_seed(0)
    settings = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["multi_modal_projector"]
    )
    get_peft_model(LlavaForConditionalGeneration.from_pretrained(llava), settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


DAMAGE = {
    "a tensor less": (lambda tensors: tensors.popitem(), "1 tensors of .* are missing"),
    "no projector": (
        lambda tensors: [tensors.pop(name) for name in [*tensors] if "projector" in name],
        "4 tensors of .* are missing",
    ),
    "a tensor more": (
        lambda tensors: tensors.update({"base_model.model.model.x.weight": torch.ones(2)}),
        "fit nowhere",
    ),
    "another shape": (
        lambda tensors: tensors.update({name: torch.ones(3, 3) for name in [*tensors][:1]}),
        "of another shape",
    ),
    "NaN": (lambda tensors: next(iter(tensors.values())).fill_(float("nan")), "hold NaN or infinite values"),
    "infinite": (lambda tensors: [*tensors.values()][-1].view(-1)[-1:].fill_(float("inf")), "hold NaN or infinite"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapters(llava, adapter, tmp_path, damage):
    assert load(llava, adapter)
    spoil, message = DAMAGE[damage]
    tensors = load_file(adapter / "adapter_model.safetensors")
    spoil(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message):
        load(llava, adapter)
    where = ("--adapter_name_or_path", adapter, "--output_dir", tmp_path / "merged")
    done = call(merge_lora.main, *where)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_that_are_no_numbers(llava, tmp_path, value, dtype):
    shutil.copytree(llava, tmp_path / "llava")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(llava / "model.safetensors").items()}
    name = next(name for name in weights if "o_proj" in name)
    weights[name][-1, -1] = float(value)
    save_file(weights, tmp_path / "llava" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"1 of its tensors hold NaN or infinite values, such as {name}"):
        load(tmp_path / "llava")


def test_configs_that_are_none(llava, adapter, tmp_path):
    config = (adapter / "adapter_config.json").read_text()
    for text in ("{", "[]", json.dumps({"peft_type": "LORA"}), config.replace("LORA", "UNHEARD_OF")):
        (adapter / "adapter_config.json").write_text(text)
        done = call(infer.main, "--model_name_or_path", adapter, "--prompt", "What?")
        assert done.returncode == 2 and "Traceback" not in done.stderr, text


def test_a_base_that_has_changed(runs, llava, tmp_path):
    """A training writes down what tells its base; plain PEFT does not mind."""
    output, _ = runs("use_lora")
    for folder in (output, output / "checkpoint-3"):
        assert json.loads((folder / RECORD).read_text())["base_model_name_or_path"] == str(llava)
        assert load(folder) and load(llava, folder)
    PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(llava), output)

    other = tmp_path / "other"
    shutil.copytree(llava, other)
    weights = load_file(llava / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    save_file({**weights, name: weights[name] * 1.01}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"trained on {llava}, whose weights were not those of {other}"):
        load(other, output)
    model = LlavaForConditionalGeneration.from_pretrained(llava)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")  # the same model, in other files
    for path in llava.glob("*.json*"):
        if not (tmp_path / "shards" / path.name).exists():
            shutil.copy(path, tmp_path / "shards")
    shutil.copy(llava / "chat_template.jinja", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert load(tmp_path / "shards", output)
