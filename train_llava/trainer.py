"""The HF Trainer with a loss that computes logits only where a token is to be learned."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from train_llava.chat import IGNORE_INDEX


class LlavaTrainer(Trainer):
    """Trainer whose loss and gradients equal the plain ones at a fraction of the work in the head."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args, **kwargs) -> Any:
        """Cross-entropy over the supervised tokens of the whole global batch.

        The head maps each position to the vocabulary (151,936 logits for Qwen), but prompts, image tokens and padding
        ask for none. `logits_to_keep` lets transformers compute the others alone, and `shift_labels` hands its loss
        the tokens they must predict. Everything else, such as the division by `num_items_in_batch`, is Trainer's.
        """
        following = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # (batch, length)
        predicts = following != IGNORE_INDEX
        inputs = {**inputs, "logits_to_keep": predicts, "shift_labels": following[predicts]}
        return super().compute_loss(model, inputs, *args, **kwargs)
