"""What benchmarks/gpu.sh runs: each strategy at a few batch sizes, and what each flag for GPUs brings, one row each.

    python -m benchmarks.full_size.gpu [--name NAME] [--work_dir DIR]

Every row is one training under ZeRO-2 by run_zero2.sh, 30 steps without accumulation; samples and tokens per second and
MFU are medians of what it logged after the first ten, memory is the most that torch had allocated on the first GPU. A
row that runs out of memory says so, and the next one follows. `--smoke` tries the script itself, in minutes, on a
CPU with the demo's model: its numbers mean nothing.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from benchmarks.full_size.model import build_command, on_meta, write_images
from benchmarks.result import RESULTS, ROOT, head, parser, write
from benchmarks.script import read_log
from train_llava.planning.memory import MemoryModel, ZeroConfig

STEPS, EVERY = 30, 5
MEASURED = ("samples_per_second", "tokens_per_second", "mfu", "data_wait")
OFFLOAD = ("--deepspeed", str(ROOT / "ds_configs" / "zero2_offload.json"))


@dataclass
class Row:
    """One training."""

    train_type: str
    batch: int
    flags: tuple[str, ...] = ()
    plain: bool = False  # transformers' own loss


def rows(gpus: int) -> list[Row]:
    """What is measured on this machine; flags for packages that are not installed are left out."""
    found = [Row("use_lora", batch) for batch in (4, 8, 16)]
    found += [Row("use_lora", 4, plain=True), Row("use_lora", 8, ("--torch_compile", "true"))]
    if is_liger_kernel_available():
        found.append(Row("use_lora", 8, ("--use_liger_kernel", "true")))
    if is_flash_attn_2_available():
        found.append(Row("use_lora", 8, ("--attn_implementation", "flash_attention_2", "--packing", "true")))
    found += [Row("projector", batch) for batch in (4, 16)]
    flags = () if states_fit(gpus) else OFFLOAD
    found += [Row("freeze_vision", batch, flags) for batch in (4, 8)]
    found.append(Row("freeze_vision", 4, flags, plain=True))
    return [*found, Row("freeze_vision", 8, (*flags, "--gradient_checkpointing", "true"))]


def states_fit(gpus: int) -> bool:
    """Whether freeze_vision's states leave a tenth of each GPU for the rest."""
    if not torch.cuda.is_available():
        return False
    needed = MemoryModel.of(on_meta("freeze_vision")).states_at_step(ZeroConfig(stage=2, ranks=gpus))
    return needed < 0.9 * torch.cuda.get_device_properties(0).total_memory


def measure(row: Row, work: Path, gpus: int, smoke: bool) -> dict[str, Any]:
    """Trains; what the training logged, or why it did not end."""
    output = work / "output"
    flags = ["--max_steps", str(STEPS), "--logging_steps", str(EVERY), "--save_strategy", "no", "--report_to", "none"]
    flags += ["--per_device_train_batch_size", str(row.batch), "--gradient_accumulation_steps", "1", *row.flags]
    flags += ["--overwrite_output_dir", "true", "--save_only_model", "true", "--check_resources", "false"]
    names = {"MODEL": str(work / "llava"), "DATA": str(work / "data"), "OUTPUT_DIR": str(output)}
    names |= {"TRAIN_TYPE": row.train_type, "NUM_PROCESSES": str(gpus), "PYTHONPATH": str(ROOT)}
    command = plain_command(row, flags, names, gpus, smoke) if row.plain else ["bash", "run_zero2.sh", *flags]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **names}, capture_output=True, text=True)
    result = {"train_type": row.train_type, "per_device_train_batch_size": row.batch, "flags": " ".join(row.flags)}
    result |= {"flags": result["flags"].replace(f"{ROOT}/", ""), "loss": "transformers'" if row.plain else "ours"}
    if done.returncode:
        words = done.stdout + done.stderr
        lines = [line for line in words.splitlines() if re.search(r"error", line, re.I)]
        return result | {"failed": "out of memory" if "out of memory" in words else (lines or ["?"])[-1][-300:]}
    logs = [log for log in read_log(output) if "loss" in log]
    for name in MEASURED:
        values = [log[name] for log in logs[10 // EVERY :] if name in log]
        result[name] = round(statistics.median(values), 4) if values else None
    result["memory_gib"] = round(logs[-1]["memory_gb"] * 1e9 / 2**30, 2)
    return result | {"losses": [round(log["loss"], 4) for log in logs]}


def plain_command(row: Row, flags: list[str], names: dict[str, str], gpus: int, smoke: bool) -> list[str]:
    """run_zero2.sh's command for benchmarks/full_size/plain_loss.py."""
    ranks = ["--num_accelerators" if smoke else "--num_gpus", str(gpus)]
    mine = ["--deepspeed", "ds_zero2.json", "--model_name_or_path", names["MODEL"], "--data_path", names["DATA"]]
    mine += ["--output_dir", names["OUTPUT_DIR"], "--train_type", row.train_type, "--warmup_steps", "0.03"]
    mine += ["--learning_rate", "4e-4" if row.train_type == "use_lora" else "2e-5", "--lr_scheduler_type", "cosine"]
    workers = str(max(1, min(10, (os.cpu_count() or 1) // gpus)))
    where = ["--bf16", "true", "--dataloader_num_workers", workers, "--dataloader_persistent_workers", "true"]
    mine += ["--use_cpu", "true"] if smoke else where
    module = ["--module", "benchmarks.full_size.plain_loss"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *ranks, *module, *mine, *flags]


def estimated(row: Row, model: Path, gpus: int) -> list[str] | None:
    """What train_llava.estimate says of a row before it runs, in its own words; None where it says nothing."""
    flags = ["--model_name_or_path", str(model), "--train_type", row.train_type, "--num_gpus", str(gpus)]
    flags += ["--per_device_train_batch_size", str(row.batch)]
    command = [sys.executable, "-m", "train_llava.estimate", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else None


def small_model(folder: Path) -> list[str]:
    """The command that builds the demo's model."""
    halves = ["--vision_model_name_or_path", "demo/clip", "--language_model_name_or_path", "demo/qwen"]
    return [sys.executable, "-m", "train_llava.build_model", *halves, "--output_dir", str(folder / "llava")]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--name", help="of the result file; by default the GPU's name and number")
    flags.add_argument("--work_dir", help="a disk with 25 GB free; by default the temporary folder's")
    flags.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args()
    gpus = torch.cuda.device_count()
    if not gpus and not args.smoke:
        sys.exit("error: no GPU here")
    gpu = "cpu" if args.smoke else torch.cuda.get_device_name().replace("NVIDIA ", "").replace(" ", "-").lower()
    gpus, name = max(1, gpus), args.name or f"{gpu}-x{max(1, gpus)}"
    todo = [Row("use_lora", 2), Row("use_lora", 2, plain=True), Row("projector", 2)] if args.smoke else rows(gpus)
    result = head(__doc__) | {"command": "bash benchmarks/gpu.sh", "gpus": gpus, "rows": []}
    if args.smoke:
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        work = Path(folder)
        subprocess.run(small_model(work) if args.smoke else build_command(work), cwd=ROOT, check=True)
        write_images(work / "data", 64 if args.smoke else 16 * STEPS * gpus)
        for row in todo:
            estimate = {"estimate": estimated(row, work / "llava", gpus)}
            result["rows"].append(measure(row, work, gpus, args.smoke) | estimate)
            print(json.dumps(result["rows"][-1]), flush=True)
            write((work.parent if args.smoke else RESULTS) / f"gpu_{name}.json", result)


if __name__ == "__main__":
    main()
