"""An adapter and its base: put on no other, and resumed from nothing less than a whole one."""

import json
import shutil

import pytest
import torch
from folders import save_safe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from trainers import trainer_of
from transformers import LlavaForConditionalGeneration

from train_llava.cli import InputError
from train_llava.model.adapters import RECORD
from train_llava.model.load import load
from train_llava.model.weights import fingerprint
from train_llava.training.trainer import LlavaTrainer


def test_resuming(llava, data, tmp_path):
    """A training goes on from its adapter, and not from a part of it, nor on another base."""
    flags = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    trainer_of(LlavaTrainer, llava, data, tmp_path, "use_lora", **flags).train()
    checkpoint = tmp_path / "checkpoint-1"

    def resume(base):
        trainer = trainer_of(LlavaTrainer, base, data, tmp_path / "again", "use_lora", **flags)
        trainer.train(resume_from_checkpoint=str(checkpoint))

    resume(llava)
    again, first = (
        load_file(folder / "checkpoint-2" / "adapter_model.safetensors") for folder in (tmp_path / "again", tmp_path)
    )
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)
    other = tmp_path / "other"
    shutil.copytree(llava, other)
    weights = load_file(llava / "model.safetensors")
    save_safe({name: value * 1.01 for name, value in weights.items()}, other / "model.safetensors")
    with pytest.raises(InputError, match=f"trained on {llava}, whose weights were not those of {other}"):
        resume(other)
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    tensors.popitem()
    save_safe(tensors, checkpoint / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"--resume_from_checkpoint .*1 tensors of .* are missing"):
        resume(llava)


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


def test_a_base_with_a_relative_name_is_found_from_anywhere(llava, tmp_path, monkeypatch):
    monkeypatch.chdir(llava.parent)
    get_peft_model(load(llava.name)[0], LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert load("adapter")[0].get_base_model().name_or_path == str(llava)


def test_the_template_beside_an_adapter_is_its_own(runs, llava, tmp_path):
    shutil.copytree(runs("use_lora")[0], tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    template = tmp_path / "adapter" / "chat_template.jinja"
    template.write_text(template.read_text().replace("You are a helpful assistant", "You are a cat"))
    question = [{"role": "user", "content": "What?"}]
    for folders, words in (
        ((tmp_path / "adapter",), "a cat"),
        ((llava, tmp_path / "adapter"), "a cat"),
        ((llava,), "a helpful"),
    ):
        assert f"You are {words}" in load(*folders)[1].apply_chat_template(question)


@pytest.mark.parametrize("place", [0, 5000, -1])
def test_a_model_that_differs_in_one_place_is_another(place):
    """At the beginning, in the middle or at the end of a tensor; a copy in another order of tensors is the same."""
    tensors = {"a.weight": torch.zeros(10_000), "b.weight": torch.ones(3)}
    other = {"b.weight": torch.ones(3), "a.weight": torch.zeros(10_000)}
    assert fingerprint(tensors.items()) == fingerprint(other.items())
    other["a.weight"][place] = 1
    assert fingerprint(tensors.items()) != fingerprint(other.items())
