"""What `generate` does, a step at a time: batches of prompts, one token more, and where the model looks."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from transformers import LlavaProcessor

from train_llava.data import LlavaCollator
from train_llava.ingest.conversation import IMAGE_TOKEN
from train_llava.model.generate import Example, ends_of_answer
from train_llava.model.load import Model

Batch = dict[str, torch.Tensor]


class Asker:
    """A model with its processor.

    `ends` are the ids that end an answer, `image_token` the id that stands for a patch.
    """

    def __init__(self, model: Model, processor: LlavaProcessor) -> None:
        self.model, self.processor = model, processor
        self.collator, self.ends = LlavaCollator(processor), ends_of_answer(model, processor)
        self.image_token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def batch(self, *examples: Example) -> Batch:
        """Prompts that wait for an answer, padded on the left, where the model is."""
        batch = {name: value.to(self.model.device) for name, value in self.collator.prompts(list(examples)).items()}
        return {**batch, "pixel_values": batch["pixel_values"].to(self.model.dtype)}

    def answers(self, batch: Batch, **options: Any) -> list[str]:
        """What `generate` writes behind a batch as it is, greedy and at most 40 tokens unless `options` differ."""
        pad = self.processor.tokenizer.pad_token_id
        options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": self.ends, "pad_token_id": pad, **options}
        ids = self.model.generate(**batch, **options)
        return [self.text(row) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]

    def text(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True).strip()

    @torch.no_grad()
    def image_attention(self, batch: Batch) -> torch.Tensor:
        """(layers, positions, patches): how much each position takes from each patch, as a mean over the heads."""
        self.model.set_attn_implementation("eager")  # the slow way, which shows its weights
        layers = self.model(**batch, output_attentions=True).attentions
        patches = batch["input_ids"][0] == self.image_token
        return torch.stack([layer[0].float().mean(0) for layer in layers])[..., patches].cpu()


def seconds(call: Callable, *arguments: Any, **options: Any) -> float:
    """How long a call takes; the shortest of three, as the first is slower, whatever it does."""
    times = []
    for _ in range(3):
        start = perf_counter()
        call(*arguments, **options)
        times.append(perf_counter() - start)
    return min(times)


def longer(batch: Batch, new: torch.Tensor) -> Batch:
    """The batch with one token more behind each prompt: `new` (batch, 1)."""
    more = {"input_ids": new, "attention_mask": torch.ones_like(new)}
    return {**batch, **{name: torch.cat([batch[name], one], 1) for name, one in more.items()}}


def with_answer(batch: Batch, ids: list[int]) -> Batch:
    """One prompt with these tokens behind it."""
    for token in ids:
        batch = longer(batch, batch["input_ids"].new_tensor([[token]]))
    return batch


def padded_right(batch: Batch) -> Batch:
    """The same prompts, with the padding behind them."""
    lengths = batch["attention_mask"].sum(1).tolist()
    moved = {
        name: torch.stack([row.roll(length) for row, length in zip(batch[name], lengths, strict=True)])
        for name in ("input_ids", "attention_mask")
    }
    return {**batch, **moved}
