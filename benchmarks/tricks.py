"""What each of the usual training tricks does on this machine: speed, time spent waiting for data, memory.

    python -m benchmarks.tricks [--json benchmarks/results/tricks.json]

One process on one core trains a middle-sized model with random weights (benchmarks.inference), freeze_vision,
eight samples a step, on JPEGs of 640 px with captions of very different lengths; a second core is left to the workers.
Every trick is one change to the first row. They take turns, and medians of the rounds are shown. Half of each run's
steps are one epoch, so that workers which do not persist are started twice.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from benchmarks.inference import middle_size
from benchmarks.machine import machine
from train_llava.build_model import build_llava, save_llava

ROOT = Path(__file__).parent.parent
ROUNDS, STEPS, RECORDS = 2, 12, 48
TRICKS = {
    "nothing": [],
    "1 worker": ["--dataloader_num_workers", "1"],
    "2 workers": ["--dataloader_num_workers", "2"],
    "2 persistent workers": ["--dataloader_num_workers", "2", "--dataloader_persistent_workers", "true"],
    "pinned memory": ["--dataloader_pin_memory", "true"],
    "accumulation, 8 x 1": ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"],
    "gradient checkpointing": ["--gradient_checkpointing", "true"],
    "bf16": ["--bf16", "true"],
    "length grouping": ["--train_sampling_strategy", "group_by_length"],
    "packing": ["--packing", "true"],
}


def write_data(folder: Path) -> None:
    """Pictures with the detail of photographs; answers of 5 to 120 words, most of them short."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(RECORDS):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        coarse.resize((640, 640), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.jpg", quality=90)
        words = " ".join(["a red seven at the top left"] * int(1 + 16 * rng.random() ** 3))
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": words}]
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))


def measure(model: Path, data: Path, output: Path, flags: list[str]) -> dict[str, float]:
    """One run: its speed and waiting over all steps, and its memory."""
    words = {"model_name_or_path": model, "data_path": data, "output_dir": output, "overwrite_output_dir": "true"}
    words |= {"train_type": "freeze_vision", "use_cpu": "true", "max_steps": STEPS, "logging_steps": STEPS}
    words |= {"per_device_train_batch_size": 8, "save_strategy": "no", "report_to": "none", "learning_rate": 1e-4}
    words |= {"dataloader_pin_memory": "false"}
    command = [sys.executable, "-m", "train_llava.train"]
    command += [str(text) for name, value in words.items() for text in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([*command, *flags], check=True, cwd=ROOT, env=environment, capture_output=True)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    log = next(log for log in history if "loss" in log)
    return {name: log[name] for name in ("samples_per_second", "tokens_per_second", "data_wait", "memory_gb")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in TRICKS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vision, language = middle_size(folder)
        save_llava(*build_llava(vision, language, random_weights=True), folder / "model")
        write_data(folder / "data")
        for _ in range(ROUNDS):
            for name, flags in TRICKS.items():
                runs[name].append(measure(folder / "model", folder / "data", folder / "out", flags))
                print(name, runs[name][-1], flush=True)
    rows = {
        name: {key: round(median(run[key] for run in found), 3) for key in found[0]} for name, found in runs.items()
    }
    print(f"{'':<24}{'samples/s':>10}{'ratio':>7}{'data wait':>11}{'GB':>6}")
    for name, row in rows.items():
        ratio = row["samples_per_second"] / rows["nothing"]["samples_per_second"]
        row["speed_over_nothing"] = round(ratio, 2)
        print(
            f"{name:<24}{row['samples_per_second']:>10.2f}{ratio:>7.2f}{row['data_wait']:>11.0%}{row['memory_gb']:>6.1f}"
        )
    if args.json:
        head = {"command": "python -m benchmarks.tricks", **machine(), "rounds": ROUNDS, "steps": STEPS}
        args.json.write_text(json.dumps(head | {"medians": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
