"""How long a step takes however fast the GPU is: Python, autograd and DeepSpeed, which start its operations one by one.

    python -m benchmarks.host_time [--json benchmarks/results/host_time.json]

A model as deep as CLIP-ViT-L/336 + Qwen1.5-4B, but 32 wide and with images of 16 patches, trains under ZeRO-2 on one
core with 2, 4 and 8 samples a step; "fixed" is the straight line through these (least squares) at no samples at all,
where no arithmetic is left. A GPU's driver adds some microseconds for each operation. Eager and with --torch_compile.
Eight minutes; needs a C++ compiler.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inference import random_halves
from benchmarks.machine import machine
from benchmarks.script import short_run
from demo.make_data import write_split
from train_llava.build_model import build_llava
from train_llava.model.folder import save_llava

SIZES, STEPS, EVERY, SIDE = (2, 4, 8), 60, 10, 56
ZERO_CONFIGS: dict[str, dict[str, str]] = {"eager": {}, "compiled": {"torch_compile": "true"}}


def deep_and_narrow(folder: Path) -> None:
    """The model, with random weights."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision, language = size | {"num_hidden_layers": 24}, size | {"num_hidden_layers": 40}
    save_llava(*build_llava(*random_halves(folder, SIDE, vision, language), random_weights=True), folder / "llava")


def seconds_per_step(work: Path, train_type: str, samples: int, flags: dict[str, str]) -> float:
    """Of the fastest ten steps, as others compile or are disturbed."""
    sizes = {"max_steps": STEPS, "logging_steps": EVERY, "per_device_train_batch_size": samples}
    variables = {"TRAIN_TYPE": train_type, "NUM_PROCESSES": 1, "OMP_NUM_THREADS": 1}
    logs = short_run(work / "llava", work / "data", work / "out", variables, sizes | {"bf16": "true"} | flags)
    return samples / max(log["samples_per_second"] for log in logs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"command": "python -m benchmarks.host_time", **machine(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        deep_and_narrow(work)
        write_split(work / "data", "train", STEPS * max(SIZES), 0)
        for train_type in ("use_lora", "freeze_vision", "projector"):
            for way, flags in ZERO_CONFIGS.items():
                seconds = [seconds_per_step(work, train_type, samples, flags) for samples in SIZES]
                each, fixed = np.polyfit(SIZES, seconds, 1)
                row = {"train_type": train_type, "way": way, "fixed_ms": round(1000 * fixed)}
                row |= {"ms_per_step": {n: round(1000 * s) for n, s in zip(SIZES, seconds, strict=True)}}
                result["rows"].append(row | {"ms_per_sample": round(1000 * float(each), 1)})
                print(result["rows"][-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
