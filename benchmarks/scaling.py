"""Cost against size: records, ranks, tokens and batch, each beside what theory says.

    python -m benchmarks.scaling {records,ranks,steps} [--results benchmarks/results]

Writes scaling_<what>.json and .png. `records` opens chat.json files of 10^3 to 5 x 10^6 records for the first time and
later (5 minutes, 4 GB of temporary disk). `ranks` trains the demo and a middle-sized model (benchmarks.inference) by
the real script under ZeRO-2, with one rank and with two, in turns (9 minutes). `steps` times forward and backward
pass of the middle-sized model (a minute). Two CPU cores each.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.inference import SIDE, middle_size
from benchmarks.machine import machine
from benchmarks.opening import open_anew, written
from benchmarks.script import ROOT, short_run
from benchmarks.tricks import TABLES, write_data
from demo.make_data import write_split
from train_llava.build_model import build_llava
from train_llava.model.folder import save_llava
from train_llava.model.freeze import apply_train_type
from train_llava.model.loss import patch_forward
from train_llava.planning.flops import StepFlops
from train_llava.processing.chat import IGNORE_INDEX

RECORDS = (1_000, 10_000, 100_000, 1_000_000, 5_000_000)
IMAGES = 10_000  # files; the records share them
RANKS = {"1 rank, 1 thread": (1, 1), "1 rank, 2 threads": (1, 2), "2 ranks, 1 thread each": (2, 1)}
ROUNDS = 3
LENGTHS, BATCHES = (128, 256, 512, 1024, 1536, 2048), (1, 2, 4, 8, 12)
LENGTH, ANSWER = 256, 20  # tokens of a sample while the batch grows; learned tokens of each sample
BLUE, ORANGE, GREY = "#1f3f73", "#d07020", "#999999"


def records(work: Path) -> list[dict[str, Any]]:
    """Opening: the first time, and the median of three later ones."""
    rows = []
    for number in RECORDS:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            data, cache = Path(folder, "data"), Path(folder, "cache")
            data.mkdir()
            written(data, number, False, min(number, IMAGES))
            first = open_anew(data, cache)
            later = [open_anew(data, cache) for _ in range(ROUNDS)]
        row = {"records": number, "first": first}
        rows.append(row | {"later": {name: median(one[name] for one in later) for name in first}})
        print(rows[-1], flush=True)
    return rows


def ranks(work: Path) -> list[dict[str, Any]]:
    """Samples per second under ZeRO-2 with eight samples a rank and step; medians of what each run logged."""
    vision, language = middle_size(work)
    save_llava(*build_llava(vision, language, random_weights=True), work / "middle")
    write_data(work / "middle_data", TABLES["model"])
    save_llava(*build_llava(ROOT / "demo" / "clip", ROOT / "demo" / "qwen"), work / "demo")
    write_split(work / "demo_data", "train", 2000, 0)
    models = {"demo": 300, "middle": 12}  # and steps
    found: dict[tuple[str, str], list[float]] = {(model, way): [] for model in models for way in RANKS}
    for _ in range(ROUNDS):
        for (model, way), speeds in found.items():
            speeds.append(trained(work, model, models[model], *RANKS[way]))
            print(model, way, speeds[-1], flush=True)
    return [
        {"model": model, "way": way, "samples_per_second": round(median(speeds), 2), "runs": speeds}
        for (model, way), speeds in found.items()
    ]


def trained(work: Path, model: str, steps: int, processes: int, threads: int) -> float:
    """Samples per second of one run, after its first third."""
    flags = {"max_steps": steps, "logging_steps": steps // 3, "learning_rate": 1e-4, "per_device_train_batch_size": 8}
    variables = {"TRAIN_TYPE": "freeze_vision", "NUM_PROCESSES": processes, "OMP_NUM_THREADS": threads}
    logs = short_run(work / model, work / f"{model}_data", work / "out", variables, flags)
    return round(median([log["samples_per_second"] for log in logs][1:]), 2)


def steps(work: Path) -> list[dict[str, Any]]:
    """CPU seconds of forward and backward pass on one thread, freeze_vision, against tokens and against samples."""
    torch.set_num_threads(1)
    model, _ = build_llava(*middle_size(work), random_weights=True)
    model = apply_train_type(model, "freeze_vision").train()
    patch_forward(model)
    flops = StepFlops.count(model)
    rows = []
    for kind, batch, length in [*(("tokens", 1, n) for n in LENGTHS), *(("batch", n, LENGTH) for n in BATCHES)]:
        step = one_step(model, batch, length)
        step()
        seconds = []
        for _ in range(ROUNDS):
            start = time.process_time()  # of one thread, so other programs on the machine disturb it little
            step()
            seconds.append(time.process_time() - start)
        counted = flops.of(batch, batch * length, batch * length**2, batch * ANSWER)
        rows.append({"kind": kind, "batch": batch, "tokens": length, "seconds": round(median(seconds), 4)})
        rows[-1] |= {"flops": counted, "linear_flops": counted - flops.per_token_pair * batch * length**2}
        print(rows[-1], flush=True)
    return rows


def one_step(model: LlavaForConditionalGeneration, batch: int, length: int) -> Callable[[], None]:
    """Forward and backward pass over samples of one image, words, and an answer at their end."""
    ids = torch.full((batch, length), 100)
    ids[:, : model.config.image_seq_length] = model.config.image_token_id
    labels = torch.where(torch.arange(length) < length - ANSWER, IGNORE_INDEX, ids)
    inputs = {"input_ids": ids, "labels": labels, "pixel_values": torch.rand(batch, 3, SIDE, SIDE)}

    def step() -> None:
        model.zero_grad()
        model(**inputs).loss.backward()

    return step


def draw_records(rows: list[dict[str, Any]], axes: Any) -> None:
    """Time and memory of opening, and time of a random record, over the number of records."""
    x = [row["records"] for row in rows]
    panels = [("seconds", "seconds to open"), ("own_memory_mb", "memory of its own, MB")]
    panels += [("microseconds_per_random_record", "microseconds for a random record")]
    for panel, (name, label) in zip(axes, panels, strict=True):
        for when, color in (("first", BLUE), ("later", ORANGE)):
            y = [row[when][name] for row in rows]
            panel.plot(x, y, "o-", color=color, label=f"{when} opening", clip_on=False)
            slope = 0 if panel is axes[2] else (y[-1] - y[0]) / (x[-1] - x[0])
            panel.plot(x, [y[0] + slope * (n - x[0]) for n in x], "--", color=GREY, zorder=0)
        panel.lines[-1].set_label("theory: constant" if panel is axes[2] else "theory: constant + linear")
        panel.set(xscale="log", xlabel="records", ylabel=label, ylim=(0, None))
    axes[0].set(yscale="log", ylim=(0.01, 100))
    axes[1].set(yscale="log", ylim=(1, 200))


def draw_ranks(rows: list[dict[str, Any]], axes: Any) -> None:
    """Samples per second by ranks and threads; the line is twice what one rank on one thread does."""
    for panel, model in zip(axes, ("demo", "middle"), strict=True):
        speeds = {row["way"]: row for row in rows if row["model"] == model}
        for x, row in enumerate(speeds.values()):
            panel.bar(x, row["samples_per_second"], color="#9db9df", width=0.6)
            panel.plot([x] * len(row["runs"]), row["runs"], "o", color=BLUE, markersize=5)
        panel.set_xticks(range(len(speeds)), [way.replace(", ", ",\n") for way in speeds])
        twice = 2 * speeds["1 rank, 1 thread"]["samples_per_second"]
        panel.axhline(twice, ls="--", color=GREY, label="theory: twice one rank on one thread")
        panel.set(title=f"{model} model", ylabel="samples per second: median and runs", ylim=(0, 1.2 * twice))


def draw_steps(rows: list[dict[str, Any]], axes: Any) -> None:
    """Seconds over tokens and over samples, with FLOPs at one speed for all points."""
    speed = median(row["flops"] / row["seconds"] for row in rows)
    names = {"tokens": "tokens of one sample", "batch": f"samples of {LENGTH} tokens"}
    for panel, (kind, label) in zip(axes, names.items(), strict=True):
        some = [row for row in rows if row["kind"] == kind]
        x = [row[kind] for row in some]
        panel.plot(x, [row["seconds"] for row in some], "o", color=BLUE, label="measured (median)")
        theory = "linear + quadratic attention" if kind == "tokens" else "linear"
        panel.plot(x, [row["flops"] / speed for row in some], "--", color=GREY, label=f"theory: {theory}")
        if kind == "tokens":
            panel.plot(x, [row["linear_flops"] / speed for row in some], ":", color=GREY, label="its linear part")
        panel.set(xlabel=label, ylabel="CPU seconds, forward and backward", ylim=(0, None), xlim=(0, None))
    axes[0].set_title(f"the line: StepFlops at {speed / 1e9:.0f} GFLOP/s", fontsize=10)


def draw(what: str, rows: list[dict[str, Any]], path: Path) -> None:
    """One image of a table."""
    import matplotlib.pyplot as plt

    drawn, panels = {"records": (draw_records, 3), "ranks": (draw_ranks, 2), "steps": (draw_steps, 2)}[what]
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 3.8), layout="constrained")
    drawn(rows, axes)
    for panel in axes:
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    measures = {"records": records, "ranks": ranks, "steps": steps}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=measures)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    result = {"command": f"python -m benchmarks.scaling {args.what}", **machine(), "rounds": ROUNDS}
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as work:
        rows = measures[args.what](Path(work))
    loads.append(os.getloadavg()[0])
    result |= {"load_average_before_and_after": [round(load, 1) for load in loads], "rows": rows}
    (args.results / f"scaling_{args.what}.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(args.what, rows, args.results / f"scaling_{args.what}.png")


if __name__ == "__main__":
    main()
