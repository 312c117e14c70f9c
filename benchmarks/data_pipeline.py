"""How many samples per second one core turns from files into batches: ours, others' ways, and the limit.

    python -m benchmarks.data_pipeline [--json benchmarks/results/data_pipeline.json]

2,000 JPEG files of 224 px, brought to 336 px, with captions like CC3M's and the real Qwen vocabulary (pip install
dashscope); batches of 8; every contender on the same files, in the same process, taking turns, pinned to one core;
medians of the rounds. Then ours and the original's way in 1, 2 and 4 workers. TRL takes part where it is installed.

- limit: open, decode and resize with Pillow into an array; no text, no batch. Nothing can do less with these pixels.
- ours, zip: the images stay inside images.zip.
- original: a row of a pandas table; the processor for one sample at a time; prompt and answer ids joined, padded.
- processor: the Hugging Face processor, called once per batch.
- TRL: its DataCollatorForVisionLanguageModeling as SFTTrainer uses it, on opened images.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, LlavaProcessor

from benchmarks.machine import machine
from benchmarks.opening import WORDS
from benchmarks.qwen_tokenizer import qwen_tokenizer
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.processing.chat import IGNORE_INDEX
from train_llava.processing.chat_template import CONTENT_PARTS

BATCH, SIDE, TARGET = 8, 224, 336
SYSTEM = "You are a helpful assistant."


def write(folder: Path, count: int) -> None:
    """JPEGs with the detail of small photographs, in the layout of CC3M-595K."""
    rng, words = np.random.default_rng(0), random.Random(0)
    (folder / "images").mkdir(parents=True)
    chat = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.BICUBIC)
        fine = rng.normal(0, 8, (SIDE, SIDE, 3))
        photo = Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))
        photo.save(folder / "images" / f"{i:09}.jpg", quality=85)
        question = "Write a terse but informative summary of the image.\n<image>"
        answer = " ".join(words.choices(WORDS.split(), k=words.randint(5, 20)))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        chat.append({"id": f"{i:09}", "image": f"{i:09}.jpg", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(chat))


def zipped(folder: Path) -> Path:
    """The same data with the images left in images.zip."""
    other = folder.with_name("zipped")
    other.mkdir(exist_ok=True)
    shutil.copy(folder / "chat.json", other)
    with zipfile.ZipFile(other / "images.zip", "w") as archive:
        for path in sorted((folder / "images").iterdir()):
            archive.write(path, path.name)
    return other


def make_processor() -> LlavaProcessor:
    """CLIP-ViT-L/336's image processor and Qwen's tokenizer."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.pad_token, tokenizer.padding_side = "<|endoftext|>", "left"
    size = {"size": {"shortest_edge": TARGET}, "crop_size": {"height": TARGET, "width": TARGET}}
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    template = CONTENT_PARTS.read_text() + tokenizer.chat_template
    return LlavaProcessor(CLIPImageProcessorPil(**size), tokenizer, chat_template=template, **options)


class Original:
    """What the original repository's dataset and collator do for a batch, in our words."""

    def __init__(self, folder: Path, processor: LlavaProcessor) -> None:
        self.table = pd.DataFrame(json.loads((folder / "chat.json").read_text()))
        self.folder, self.processor = folder, processor

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[str, str, Path]:
        row = self.table.iloc[index]
        question, answer = (turn["value"] for turn in row["conversations"][:2])
        return question, answer, self.folder / "images" / row["image"]

    def sample(self, question: str, answer: str, path: Path) -> dict[str, torch.Tensor]:
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


def contenders(folder: Path, processor: LlavaProcessor) -> dict[str, Callable[[list[int]], Any]]:
    """Name -> what makes a batch of the records with these numbers."""
    dataset, original = LlavaDataset(folder), Original(folder, processor)
    collator = LlavaCollator(processor, for_trainer=True)
    files = sorted((folder / "images").iterdir())

    def limit(indices: list[int]) -> None:
        for index in indices:
            with Image.open(files[index]) as image:
                np.asarray(image.convert("RGB").resize((TARGET, TARGET), Image.BICUBIC))

    def ours(indices: list[int]) -> dict[str, torch.Tensor]:
        return collator([dataset[index] for index in indices])

    packed = LlavaDataset(zipped(folder))

    def ours_zip(indices: list[int]) -> dict[str, torch.Tensor]:
        return collator([packed[index] for index in indices])

    def per_batch(indices: list[int]) -> dict[str, torch.Tensor]:
        records = [dataset.records[index] for index in indices]
        images = [Image.open(record["images"][0]["path"]) for record in records]
        text = [processor.apply_chat_template(record["messages"]) for record in records]
        return processor(images=images, text=text, padding=True, return_tensors="pt")

    found = {
        "limit": limit,
        "ours": ours,
        "ours, zip": ours_zip,
        "original": lambda i: original([original[k] for k in i]),
    }
    found["processor"] = per_batch
    if importlib.util.find_spec("trl"):
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        theirs = DataCollatorForVisionLanguageModeling(processor)

        def trl(indices: list[int]) -> dict[str, torch.Tensor]:
            rows = []
            for index in indices:
                record = dataset.records[index]
                # its own placeholder goes in; the text has none
                messages = [{**m, "content": m["content"].replace("\n<image>", "")} for m in record["messages"]]
                rows.append({"images": [Image.open(record["images"][0]["path"])], "messages": messages})
            return theirs(rows)

        found["TRL"] = trl
    return found


def check_equal(ways: dict[str, Callable], collator: LlavaCollator) -> None:
    """The comparison is only fair if pixels, ids and labels are the same, whichever side is padded."""
    indices, pad = list(range(BATCH)), collator.tokenizer.pad_token_id
    ours, processor, original = ways["ours"](indices), ways["processor"](indices), ways["original"](indices)
    pixels = ours["pixel_values"].normalise()
    assert torch.equal(pixels, processor["pixel_values"]) and torch.equal(pixels, original["pixel_values"])

    def rows(batch: dict[str, torch.Tensor], name: str) -> list[list[int]]:
        return [row[ids != pad].tolist() for row, ids in zip(batch[name], batch["input_ids"], strict=True)]

    assert rows(ours, "input_ids") == rows(processor, "input_ids")
    for name in ("input_ids", "labels"):  # the original ends at end-of-turn, the template adds a line break
        assert [row[:-1] for row in rows(ours, name)] == rows(original, name)


def one_core(ways: dict[str, Callable], count: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time per sample, one figure per round; the ways take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0).sample(range(count), count)
    batches = [order[i : i + BATCH] for i in range(0, count, BATCH)]
    share = len(batches) // rounds
    for turn in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            for batch in batches[turn * share : (turn + 1) * share]:
                way(batch)
            times[name].append((time.process_time() - start) * 1000 / (share * BATCH))
    return times


def with_workers(dataset: Any, collate: Callable, workers: int) -> float:
    """Samples per second of a DataLoader; its start does not count."""
    loader = iter(DataLoader(dataset, BATCH, num_workers=workers, collate_fn=collate, prefetch_factor=4))
    for _ in range(4 * workers):
        next(loader)
    start, batches = time.perf_counter(), 0
    for _ in loader:
        batches += 1
    return batches * BATCH / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        write(folder, args.photos)
        processor = make_processor()
        ways = contenders(folder, processor)
        collator = LlavaCollator(processor, for_trainer=True)
        check_equal(ways, collator)
        os.sched_setaffinity(0, {min(cores)})
        times = one_core(ways, args.photos, args.rounds)
        os.sched_setaffinity(0, cores)
        medians = {name: statistics.median(values) for name, values in times.items()}
        result: dict[str, Any] = {"command": "python -m benchmarks.data_pipeline", **machine()}
        result["one core"] = {
            name: {
                "ms per sample": round(value, 2),
                "samples per second": round(1000 / value),
                "time over the limit": round(value / medians["limit"], 2),
                "speed over the original": round(medians["original"] / value, 2),
            }
            for name, value in medians.items()
        }
        print(f"{'one core':<12}{'ms/sample':>11}{'samples/s':>11}{'time / limit':>14}{'speed / original':>18}")
        for name, row in result["one core"].items():
            print(f"{name:<12}{''.join(f'{v:>{w}}' for v, w in zip(row.values(), (11, 11, 14, 18), strict=True))}")
        dataset, original = LlavaDataset(folder), Original(folder, processor)
        result["samples per second with workers"] = {
            str(workers): {
                "ours": round(with_workers(dataset, collator, workers)),
                "original": round(with_workers(original, original, workers)),
            }
            for workers in (1, 2, 4)
        }
        print(f"samples/s with workers (on {len(cores)} cores):", result["samples per second with workers"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
