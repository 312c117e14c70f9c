"""How long a step takes however fast the GPU is: Python, autograd and DeepSpeed, which start its operations one by one.

    python -m benchmarks.host_time [--json benchmarks/results/host_time.json]

A model as deep as CLIP-ViT-L/336 + Qwen1.5-4B, but 32 wide and with pictures of 16 patches, trains under ZeRO-2 on one
core with 2, 4 and 8 samples a step; "fixed" is the straight line through these (least squares) at no samples at all,
where no arithmetic is left. A GPU's driver adds some microseconds for each operation. Eager and with --torch_compile.
Eight minutes; needs a C++ compiler.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, Qwen2Config

from benchmarks.machine import machine
from demo.make_data import write_split
from demo.tokenizer import make_tokenizer
from train_llava.build_model import build_llava, save_llava

ROOT = Path(__file__).parent.parent
SIZES, STEPS, EVERY, SIDE = (2, 4, 8), 60, 10, 56
WAYS: dict[str, list[str]] = {"eager": [], "compiled": ["--torch_compile", "true"]}


def deep_and_narrow(folder: Path) -> None:
    """The model, with random weights."""
    vision, language = folder / "vision", folder / "language"
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    CLIPVisionConfig(**size, num_hidden_layers=24, image_size=SIDE, patch_size=14).save_pretrained(vision)
    shape = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=shape[0], crop_size=shape[1]).save_pretrained(vision)
    size |= {"num_hidden_layers": 40, "num_key_value_heads": 2, "vocab_size": 448, "tie_word_embeddings": False}
    Qwen2Config(**size).save_pretrained(language)
    make_tokenizer().save_pretrained(language)
    save_llava(*build_llava(vision, language, random_weights=True), folder / "llava")


def seconds_per_step(work: Path, train_type: str, samples: int, flags: list[str]) -> float:
    """Of the fastest ten steps, as others compile or are disturbed."""
    words = {"max_steps": STEPS, "logging_steps": EVERY, "per_device_train_batch_size": samples, "bf16": "true"}
    words |= {
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "overwrite_output_dir": True,
    }
    command = ["bash", str(ROOT / "run_zero2.sh"), *flags]
    command += [str(text) for name, value in words.items() for text in (f"--{name}", value)]
    names = {"MODEL": work / "llava", "DATA": work / "data", "OUTPUT_DIR": work / "out", "TRAIN_TYPE": train_type}
    names |= {"NUM_PROCESSES": 1, "OMP_NUM_THREADS": 1, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment = os.environ | {name: str(value) for name, value in names.items()}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    history = json.loads((work / "out" / "trainer_state.json").read_text())["log_history"]
    return samples / max(log["samples_per_second"] for log in history if "loss" in log)


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
            for way, flags in WAYS.items():
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
