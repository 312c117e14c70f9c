"""Trainers of the small LLaVA: ours, and transformers' own with equal weights; and their gradients compared."""

from dataclasses import fields

import pytest
import torch
from transformers import Trainer

from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.freeze import LoraSettings, apply_train_type
from train_llava.model.load import load
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.training.trainer import LlavaTrainer

TRAIN_TYPES = ["use_lora", "freeze_vision", "none", "projector"]
SLOW = [pytest.param(train_type, marks=pytest.mark.slow) for train_type in ("freeze_vision", "projector")]


def trainer_of(cls, llava, data, tmp_path, train_type, **flags):
    torch.manual_seed(0)
    model, processor = load(llava, dtype=torch.float32)
    own = {field.name: flags.pop(field.name) for field in fields(LoraSettings) if field.name in flags}
    model = apply_train_type(model, train_type, LoraSettings(**{"lora_dropout": 0.0, **own}))
    flags = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "save_strategy": "no", **flags}
    flags = LlavaTrainingArguments(disable_tqdm=True, **flags)
    return cls(model, flags, data_collator=LlavaCollator(processor), train_dataset=LlavaDataset(data))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, plain):
    assert ours.keys() == plain.keys() and len(ours) > 0
    scale = max(value.abs().max() for value in plain.values())
    for name, value in ours.items():
        # relative to the tensor's own size, down to where fp32 sums are noise
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=float(1e-6 * scale), msg=name)


def plain_and_ours(llava, data, tmp_path, train_type, **flags):
    """transformers' own Trainer and ours, with equal weights."""
    trainers = [trainer_of(cls, llava, data, tmp_path, train_type, **flags) for cls in (Trainer, LlavaTrainer)]
    for trainer in trainers:
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # starts at zero, which hides A's gradient
                torch.nn.init.normal_(parameter, std=0.05)
            elif "lora_magnitude" in name:  # starts at the length that the layer has
                parameter.data *= 1 + torch.rand_like(parameter)
        trainer.model.train()
    return trainers


def mixed_examples(data):
    """Two with an image, two without."""
    dataset = LlavaDataset(data)
    talk = [{"role": "user", "content": "How are you today?"}, {"role": "assistant", "content": "Fine, thank you."}]
    texts = [{"id": str(i), "messages": talk[:2] * (i + 1), "images": []} for i in range(2)]
    return [dataset[0], texts[0], dataset[1], texts[1]]
