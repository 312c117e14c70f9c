"""What the original repository (zero_nlp, train_llava) does from a chat.json to a batch, to compare with."""

import json
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from transformers import LlavaProcessor

from train_llava.processing.chat import IGNORE_INDEX

SYSTEM = "You are a helpful assistant."


class Original:
    """Its dataset and its collator in one, in our words: samples are made one by one, then padded on the left."""

    def __init__(self, folder: Path, processor: LlavaProcessor) -> None:
        self.table = pd.DataFrame(json.loads((folder / "chat.json").read_text()))
        self.folder, self.processor = folder, processor

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[str, str, Path]:
        """Question, answer and image file of a record."""
        row = self.table.iloc[index]
        question, answer = (turn["value"] for turn in row["conversations"][:2])
        return question, answer, self.folder / "images" / row["image"]

    def sample(self, question: str, answer: str, path: Path) -> dict[str, torch.Tensor]:
        """Ids and labels (1, length) and pixels (1, 3, height, width) of one record."""
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        text = self.processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(images=Image.open(path), text=text, return_tensors="pt")
        tokenizer = self.processor.tokenizer
        told = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        end = torch.tensor([[tokenizer.eos_token_id]])
        ids = torch.cat([inputs["input_ids"], told, end], dim=1)
        labels = torch.cat([torch.full_like(inputs["input_ids"], IGNORE_INDEX), told, end], dim=1)
        return {"input_ids": ids, "labels": labels, "pixel_values": inputs["pixel_values"]}

    def __call__(self, rows: list[tuple[str, str, Path]]) -> dict[str, torch.Tensor]:
        """A batch: ids, labels and mask (samples, length), pixels (samples, 3, height, width)."""
        samples = [self.sample(*row) for row in rows]
        longest = max(sample["input_ids"].shape[1] for sample in samples)
        pad = self.processor.tokenizer.pad_token_id

        def padded(name: str, value: int) -> torch.Tensor:
            fill = [torch.full((1, longest - sample[name].shape[1]), value) for sample in samples]
            return torch.cat([torch.cat([f, s[name]], dim=1) for f, s in zip(fill, samples, strict=True)])

        ids, labels = padded("input_ids", pad), padded("labels", IGNORE_INDEX)
        pixels = torch.cat([sample["pixel_values"] for sample in samples])
        mask = (ids != pad).long()
        return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}
