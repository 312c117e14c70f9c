"""Records on disk -> examples -> batches.

`LlavaDataset` reads the layout of LLaVA-CC3M-Pretrain-595K: a folder with `chat.json` and the pictures in `images/`,
`images_dl/` or beside it. Reading ends in one normal form, whatever the source looks like:

    {"id": "0001", "images": ["/data/images/a.jpg"], "messages": [{"role": "user", "content": "<image>\\nWhat?"}, ...]}

so another source is one more function that yields such records.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from PIL import Image
from transformers import LlavaProcessor

from train_llava.chat import IGNORE_INDEX, IMAGE_TOKEN, ChatEncoder
from train_llava.command import InputError
from train_llava.images import open_image

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant")}
IMAGE_FOLDERS = ("images", "images_dl", ".")  # the last: pictures beside the JSON
STRING = Value("string")
RECORD = Features({"id": STRING, "images": List(STRING), "messages": List({"role": STRING, "content": STRING})})


class LlavaDataset(torch.utils.data.Dataset):
    """Examples of a data folder (or its JSON file): `{"id", "messages", "images": [RGB pictures]}`.

    Records are checked once, when the data is first opened, and kept as an Arrow file in the cache of `datasets`,
    so that every process maps the same file instead of holding a copy.

    Raises:
        InputError: no data here, or a record that cannot be trained on; names file, record and reason.
    """

    def __init__(self, data_path: str | Path) -> None:
        file = Path(data_path) / "chat.json" if Path(data_path).is_dir() else Path(data_path)
        if not file.is_file():
            raise InputError(f"{file}: no such file. Give a folder with a chat.json, or a JSON file of LLaVA records.")
        file, stat = file.resolve(), file.stat()
        # size and time are part of the cache's key, so a changed file is read anew
        key = {"file": str(file), "size": stat.st_size, "modified": stat.st_mtime_ns}
        try:
            self.records = Dataset.from_generator(read_llava, features=RECORD, gen_kwargs=key)
        except DatasetGenerationError as error:
            raise error.__cause__ if isinstance(error.__cause__, InputError) else error from None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        try:
            return {**record, "images": [open_image(path) for path in record["images"]]}
        except InputError as error:
            raise InputError(f"record {record['id']!r}: {error}") from error


def read_llava(file: str, size: int, modified: int) -> Iterator[dict[str, Any]]:
    """Normal records of a LLaVA JSON file; `size` and `modified` only tell one version of it from another."""
    try:
        records = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(records, list) or not records:
        raise InputError(f"{file}: expected a JSON list of records.")
    folder: Path | None = None
    for number, record in enumerate(records):
        try:
            messages, images = normalise(record)
            if images and folder is None:
                folders = [Path(file).parent / name for name in IMAGE_FOLDERS]
                folder = next((f for f in folders if (f / images[0]).is_file()), folders[0])
            paths = [folder / image for image in images]
            if missing := [path for path in paths if not path.is_file()]:
                raise InputError(f"no such picture file: {missing[0]}")
        except InputError as error:
            name = record.get("id") if isinstance(record, dict) else None
            raise InputError(f"{file}, record {name!r} (number {number}): {error}") from error
        yield {"id": str(record.get("id", number)), "images": [str(path) for path in paths], "messages": messages}


def normalise(record: Any) -> tuple[list[dict[str, str]], list[str]]:
    """Messages and picture names of one LLaVA record.

    Raises:
        InputError: says why nothing can be learned from it.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise InputError('no list of "conversations"')
    messages = []
    for turn in record["conversations"]:
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(text, str):
            raise InputError(f"a turn from {role!r} with {type(text).__name__} as text; known are {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": text})
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise InputError("no answer to learn from")
    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    placeholders = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
    if placeholders != len(images):
        raise InputError(f"{placeholders} {IMAGE_TOKEN} in the text, {len(images)} pictures")
    for image in images:
        if "://" in image or Path(image).is_absolute() or ".." in Path(image).parts:
            raise InputError(f"the picture {image!r} must be a path inside the data folder")
    return messages, images


class LlavaCollator:
    """Examples -> one padded batch.

    `collator(examples)` gives, for `batch` conversations with `images` pictures in all and a longest one of `length`:
    input_ids, attention_mask and labels (batch, length) int64; pixel_values (images, 3, height, width) float32.
    """

    def __init__(self, processor: LlavaProcessor) -> None:
        self.image_processor, self.tokenizer = processor.image_processor, processor.tokenizer
        self.encoder = ChatEncoder(processor.tokenizer, tokens_per_image(processor), processor.chat_template)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, labels = zip(*(self.encoder.encode(example["messages"]) for example in examples), strict=True)
        side = self.tokenizer.padding_side
        return {**self._inputs(ids, examples, side), "labels": pad(labels, IGNORE_INDEX, side)}

    def prompts(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The same for conversations that wait for an answer: no labels, padded on the left for `generate`."""
        ids = [self.encoder.encode(example["messages"], add_generation_prompt=True)[0] for example in examples]
        return self._inputs(ids, examples, "left")

    def _inputs(self, ids: list[list[int]], examples: list[dict[str, Any]], side: str) -> dict[str, torch.Tensor]:
        mask = [[1] * len(row) for row in ids]  # from lengths: the pad token may also be a real one
        batch = {"input_ids": pad(ids, self.tokenizer.pad_token_id, side), "attention_mask": pad(mask, 0, side)}
        images = [image for example in examples for image in example["images"]]
        return {**batch, **self.image_processor(images, return_tensors="pt")} if images else batch


def pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    """Rows of ids as (rows, longest) int64, filled up with `value` on one side."""
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def tokens_per_image(processor: LlavaProcessor) -> int:
    """How many `<image>` ids stand for one picture; fixed, since every picture is brought to one size."""
    pixels = processor.image_processor(Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
    patches = (pixels.shape[-2] // processor.patch_size) * (pixels.shape[-1] // processor.patch_size)
    return patches + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
