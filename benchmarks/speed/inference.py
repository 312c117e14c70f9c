"""How fast train_llava.infer answers, beside transformers' pipeline("image-text-to-text") called one by one.

    python -m benchmarks.speed.inference [--json benchmarks/results/inference.json]

Two models: the demo's halves with an untrained projector, and one of middle size with random weights. Every answer has
the same number of tokens, the end of turn being forbidden, so both sides do the same work; their answers are compared,
too. The two sides take turns, and medians are shown.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import pipeline
from transformers.utils import logging

from benchmarks.inputs import middle_size
from benchmarks.result import ROOT, head, parser, write
from train_llava.build_model import build_llava
from train_llava.model.folder import save_llava
from train_llava.model.generate import answers, ask, generate
from train_llava.model.load import load
from train_llava.processing.images import open_image

IMAGES = 200
QUESTION = "What do you see in this image?"
ROUNDS = {"single": 15, "folder": 3}


def compared(ways: dict[str, Callable[[], list[str]]], rounds: int) -> dict[str, Any]:
    """Median seconds of each way, run in turns, and how many of the answers agree."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    said = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            said[name] = way()
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = said.values()
    same = sum(one == other for one, other in zip(ours, theirs, strict=True))
    times = {name: round(median(values), 4) for name, values in seconds.items()}
    return {**times, "same_answers": f"{same} of {len(ours)}"}


def measured(model_folder: Path, files: list[Path], tokens: int, batch_size: int) -> dict[str, Any]:
    """One question and a folder of them, from image files to text."""
    model, processor = load(model_folder, dtype=torch.float32)
    pipe = pipeline("image-text-to-text", model=str(model_folder), dtype=torch.float32, device=model.device)
    options = {"max_new_tokens": tokens, "suppress_tokens": model.generation_config.eos_token_id}

    def by_pipeline(some: list[Path]) -> list[str]:
        said = []
        for file in some:
            content = [{"type": "image", "image": str(file)}, {"type": "text", "text": QUESTION}]
            chat = [{"role": "user", "content": content}]
            said += pipe(text=chat, return_full_text=False, generate_kwargs={"do_sample": False, **options})
        return [answer["generated_text"].strip() for answer in said]

    def by_us(some: list[Path]) -> list[str]:
        examples = (ask(QUESTION, [open_image(file)]) for file in some)
        return [answer for _, answer in sorted(answers(model, processor, examples, batch_size, **options))]

    by_us(files[:2]), by_pipeline(files[:2])  # warm
    single = {
        "train_llava": lambda: generate(model, processor, [ask(QUESTION, [open_image(files[0])])], **options),
        "pipeline": lambda: by_pipeline(files[:1]),
    }
    folder = {"train_llava": lambda: by_us(files), "pipeline": lambda: by_pipeline(files)}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_answer": tokens,
        "batch_size": batch_size,
        "one_question_seconds": compared(single, ROUNDS["single"]),
        f"folder_of_{len(files)}_seconds": compared(folder, ROUNDS["folder"]),
    }


def write_images(folder: Path) -> list[Path]:
    """JPEG files of soft noise, 320 x 240 pixels."""
    rng, files = np.random.default_rng(0), []
    for i in range(IMAGES):
        low = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        files.append(folder / f"{i:03}.jpg")
        low.resize((320, 240), Image.Resampling.BICUBIC).save(files[-1])
    return files


def show(kind: str, rows: dict[str, Any]) -> None:
    """Works out and prints how many times as fast ours is."""
    for name, row in rows.items():
        if isinstance(row, dict):
            row["times_as_fast"] = round(row["pipeline"] / row["train_llava"], 2)
            times = f"{row['train_llava']:>10.3f} s{row['pipeline']:>10.3f} s{row['times_as_fast']:>15.2f}"
            print(f"{kind:<14}{name:<24}{times}   {row['same_answers']}", flush=True)


def main() -> None:
    args = parser(__doc__, "--json").parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result = head(__doc__) | {"torch_threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_images(folder)
        halves = {"demo": (ROOT / "demo" / "clip", ROOT / "demo" / "qwen"), "middle size": middle_size(folder)}
        print(f"{'model':<14}{'':<24}{'train_llava':>12}{'pipeline':>12}{'times as fast':>15}   same answers")
        for kind, (vision, language) in halves.items():
            torch.manual_seed(0)
            built = build_llava(vision, language, torch.float32, random_weights=kind != "demo")
            save_llava(*built, folder / kind)
            result[kind] = measured(folder / kind, files, tokens=16, batch_size=16)
            show(kind, result[kind])
    write(args.json, result)


if __name__ == "__main__":
    main()
