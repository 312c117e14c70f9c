"""How many samples per second one core turns from files into batches: ours, others' ways, and the limit.

    python -m benchmarks.speed.data_pipeline [--json benchmarks/results/data_pipeline.json]

2,000 JPEG files of 224 px, brought to 336 px, with captions like CC3M's and the real Qwen vocabulary (pip install
dashscope); batches of 8; every contender on the same files, in the same process, taking turns, pinned to one core;
medians of the rounds. Then ours and the original's way in 1, 2 and 4 workers. TRL takes part where it is installed.

- limit: open, decode and resize with Pillow into an array; no text, no batch. Nothing can do less with these pixels.
- ours, zip: the images stay inside images.zip.
- original: a row of a pandas table; the processor for one sample at a time; prompt and answer ids joined, padded.
- processor: the Hugging Face processor, called once per batch.
- TRL: its DataCollatorForVisionLanguageModeling as SFTTrainer uses it, on opened images.
"""

import importlib.util
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
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, LlavaProcessor

from benchmarks.inputs import write_photos
from benchmarks.result import head, parser, write
from benchmarks.speed.original_way import Original
from tests.qwen_tokenizer import qwen_tokenizer
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.processing.chat_template import CONTENT_PARTS

BATCH, TARGET = 8, 336  # samples, pixels
Way = Callable[[list[int]], Any]  # makes a batch of the records with these numbers


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


def contenders(folder: Path, processor: LlavaProcessor) -> dict[str, Way]:
    """All of them by name."""
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

    found: dict[str, Way] = {"limit": limit, "ours": ours, "ours, zip": ours_zip}
    found |= {"original": lambda indices: original([original[index] for index in indices]), "processor": per_batch}
    return found | ({"TRL": trl(dataset, processor)} if importlib.util.find_spec("trl") else {})


def trl(dataset: LlavaDataset, processor: LlavaProcessor) -> Way:
    """TRL's collator on our records."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    theirs = DataCollatorForVisionLanguageModeling(processor)

    def batch(indices: list[int]) -> dict[str, torch.Tensor]:
        rows = []
        for index in indices:
            record = dataset.records[index]
            # its own placeholder goes in; the text has none
            messages = [{**m, "content": m["content"].replace("\n<image>", "")} for m in record["messages"]]
            rows.append({"images": [Image.open(record["images"][0]["path"])], "messages": messages})
        return theirs(rows)

    return batch


def check_equal(ways: dict[str, Way], collator: LlavaCollator) -> None:
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


def one_core(ways: dict[str, Way], count: int, rounds: int) -> dict[str, list[float]]:
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
    loader = DataLoader(dataset, BATCH, num_workers=workers, collate_fn=collate, prefetch_factor=4)
    begun = iter(loader)
    for _ in range(min(4 * workers, len(loader) // 2)):  # the workers' start and what they make ready before
        next(begun)
    start = time.perf_counter()
    batches = sum(1 for _ in begun)
    return batches * BATCH / (time.perf_counter() - start)


def compared(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """A row for each way out of its milliseconds per sample: medians, beside the limit and the original."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: {
            "ms per sample": round(value, 2),
            "samples per second": round(1000 / value),
            "time over the limit": round(value / medians["limit"], 2),
            "speed over the original": round(medians["original"] / value, 2),
        }
        for name, value in medians.items()
    }


def show(rows: dict[str, dict[str, float]]) -> None:
    """Prints the rows."""
    print(f"{'one core':<12}{'ms/sample':>11}{'samples/s':>11}{'time / limit':>14}{'speed / original':>18}")
    for name, row in rows.items():
        print(f"{name:<12}{''.join(f'{v:>{w}}' for v, w in zip(row.values(), (11, 11, 14, 18), strict=True))}")


def main() -> None:
    flags = parser(__doc__, "--json")
    flags.add_argument("--images", type=int, default=2000)
    flags.add_argument("--rounds", type=int, default=10)
    args = flags.parse_args()
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0)
    result = head(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        write_photos(folder, args.images)
        processor = make_processor()
        ways = contenders(folder, processor)
        collator = LlavaCollator(processor, for_trainer=True)
        check_equal(ways, collator)
        os.sched_setaffinity(0, {min(cores)})
        result["one core"] = compared(one_core(ways, args.images, args.rounds))
        os.sched_setaffinity(0, cores)
        show(result["one core"])
        dataset, original = LlavaDataset(folder), Original(folder, processor)
        result["samples per second with workers"] = {
            str(workers): {
                "ours": round(with_workers(dataset, collator, workers)),
                "original": round(with_workers(original, original, workers)),
            }
            for workers in (1, 2, 4)
        }
        print(f"samples/s with workers (on {len(cores)} cores):", result["samples per second with workers"])
    write(args.json, result)


if __name__ == "__main__":
    main()
