"""The training with transformers' own loss, which scores every position, to compare with."""

from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import Trainer

from train_llava.training import trainer
from train_llava.training.trainer import LlavaTrainer


def plain_loss(self: LlavaTrainer, model: nn.Module, inputs: dict[str, torch.Tensor], *args, **kwargs) -> Any:
    """Trainer's compute_loss on the same batch, counted in the same way, with a mask as in the plain way."""
    plain = {name: inputs[name] for name in ("input_ids", "labels")}
    plain["attention_mask"] = (plain["input_ids"] != self.data_collator.tokenizer.pad_token_id).long()
    plain["pixel_values"] = inputs["pixel_values"].normalise()
    self.throughput.add(len(inputs["input_ids"]), inputs["counts"])
    return Trainer.compute_loss(self, model, plain, *args, **kwargs)


def use_plain_loss() -> None:
    """From now on, this process trains so."""
    mock.patch.object(LlavaTrainer, "compute_loss", plain_loss).start()
    mock.patch.object(trainer, "patch_forward", lambda model, smoothing: None).start()
