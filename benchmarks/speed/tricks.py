"""What each of the usual training tricks does on this machine: speed, time spent waiting for data, memory.

    python -m benchmarks.speed.tricks [--output benchmarks/results/tricks]

Two tables, as one load would hide the other. In the first the images are the work: the demo's own little model and
large JPEGs, in short epochs, so that workers which do not persist are started again and again. In the second the model
is: a larger one with random weights, on answers of very different lengths.

Every row is one change to the table's first, every run one process with one thread; where there is a second core, it is
left to the workers. The rows take turns, and each run is compared with the first row's of the same round: medians of
these ratios are shown, with the smallest and the largest. About ten minutes on two CPU cores. Writes .md and .json.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

import train_llava.train
from benchmarks.inputs import SIDE, middle_size
from benchmarks.result import RESULTS, ROOT, head, parser, table, write
from benchmarks.script import read_log
from train_llava.build_model import build_llava
from train_llava.model.folder import save_llava

ROUNDS, BATCH = 3, 8
Runs = dict[str, list[dict[str, float]]]  # of each row, one a round


@dataclass
class Load:
    """Rows with their flags, and what all of them train on."""

    title: str
    image: tuple[int, int]  # pixels
    longest: int  # how often the longest answer says its seven words
    records: int
    epochs: int
    rows: dict[str, list[str]]


LOADS = {
    "loading": Load(
        "little model, large images",
        image=(1024, 768),
        longest=1,
        records=72,
        epochs=4,
        rows={
            "plain": [],
            "1 worker": ["--dataloader_num_workers", "1"],
            "2 workers": ["--dataloader_num_workers", "2"],
            "2 persistent workers": ["--dataloader_num_workers", "2", "--dataloader_persistent_workers", "true"],
            "pinned memory": ["--dataloader_pin_memory", "true"],
        },
    ),
    "model": Load(
        "larger model, small images",
        image=(SIDE, SIDE),
        longest=30,
        records=64,  # Trainer's groups of length then are of two batches; of fewer than 64, of one
        epochs=1,
        rows={
            "plain": [],
            "accumulation, 8 x 1": ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"],
            "gradient checkpointing": ["--gradient_checkpointing", "true"],
            "bf16": ["--bf16", "true"],
            "length grouping": ["--train_sampling_strategy", "group_by_length"],
            "packing": ["--packing", "true"],
        },
    ),
}


def write_data(folder: Path, load: Load) -> None:
    """Images with the detail of photographs; most answers are far shorter than the longest."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(load.records):
        coarse = rng.integers(0, 256, (load.image[1] // 16, load.image[0] // 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(load.image, Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{i}.jpg", quality=90)
        words = " ".join(["a red seven at the top left"] * int(1 + load.longest * rng.random() ** 3))
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": words}]
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))


def prepare(folder: Path) -> None:
    """A model and its data for each load."""
    halves = {"loading": (ROOT / "demo" / "clip", ROOT / "demo" / "qwen"), "model": middle_size(folder, layers=2)}
    for name, load in LOADS.items():
        save_llava(*build_llava(*halves[name], random_weights=name == "model"), folder / name / "model")
        write_data(folder / name / "data", load)


def measure(folder: Path, load: Load, flags: list[str]) -> dict[str, float]:
    """One run: its speed and waiting over all steps, and its memory."""
    words = {"model_name_or_path": folder / "model", "data_path": folder / "data", "output_dir": folder / "out"}
    words |= {"train_type": "freeze_vision", "learning_rate": 1e-4, "per_device_train_batch_size": BATCH}
    words |= {"num_train_epochs": load.epochs, "logging_steps": load.epochs * load.records // BATCH}
    words |= {"use_cpu": "true", "dataloader_pin_memory": "false", "overwrite_output_dir": "true"}
    words |= {"save_strategy": "no", "report_to": "none"}
    apart(train, [str(text) for name, value in words.items() for text in (f"--{name}", value)] + flags)
    log = next(log for log in read_log(folder / "out") if "loss" in log)
    return {name: round(log[name], 3) for name in ("samples_per_second", "data_wait", "memory_gb")}


def apart(function: Callable[..., None], *args: Any) -> None:
    """Calls it in a process of its own, whose memory can be told; a fork, which need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def train(flags: list[str]) -> None:
    """train_llava.train with one thread, silent but for errors."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["train_llava.train", *flags]
    train_llava.train.main()


def markdown(title: str, runs: Runs) -> str:
    """Medians of the rounds."""
    rows = []
    for name, found in runs.items():
        pairs = zip(found, next(iter(runs.values())), strict=True)
        ratios = [run["samples_per_second"] / plain["samples_per_second"] for run, plain in pairs]
        speed, wait, memory = (median(run[key] for run in found) for key in found[0])
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if name != "plain" else "1"
        rows.append([name, f"{speed:.1f}", spread, f"{wait:.0%}", f"{memory:.2f}"])
    return table([title, "samples/s", "times as fast", "waiting for data", "memory, GB"], rows)


def both_tables(runs: dict[str, Runs]) -> str:
    """What the page in docs/ shows."""
    return "\n".join(markdown(load.title, runs[name]) for name, load in LOADS.items())


def main() -> None:
    output = parser(__doc__, "--output", RESULTS / "tricks").parse_args().output
    runs: dict[str, Runs] = {name: {row: [] for row in load.rows} for name, load in LOADS.items()}
    with tempfile.TemporaryDirectory() as scratch:
        apart(prepare, Path(scratch))
        for _ in range(ROUNDS):
            for name, load in LOADS.items():
                for row, flags in load.rows.items():
                    runs[name][row].append(measure(Path(scratch) / name, load, flags))
                    print(f"{row}: {runs[name][row][-1]}", flush=True)
    write(output, head(__doc__) | {"samples_a_step": BATCH, "rows": runs}, both_tables(runs))


if __name__ == "__main__":
    main()
