"""The HF Trainer with a loss that computes logits only where a token is to be learned."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from train_llava.chat import IGNORE_INDEX
from train_llava.data import LlavaDataset
from train_llava.sampling import LlavaSampler


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
        if inputs["pixel_values"].dtype == torch.uint8:  # travelled as bytes, see images.Pixels
            inputs["pixel_values"] = self.data_collator.pixels.normalise(inputs["pixel_values"])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset, args = train_dataset or self.train_dataset, self.args
        grouped = args.train_sampling_strategy == "group_by_length"
        if not isinstance(dataset, LlavaDataset) or not (grouped or args.train_sampling_strategy == "random"):
            return super()._get_train_sampler(train_dataset)
        weights = [source.weight for source in dataset.sources]
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return LlavaSampler(dataset.sizes, weights, dataset.lengths, batch, grouped, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return SequentialSampler(eval_dataset)
