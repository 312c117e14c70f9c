"""Where and when a result was measured, for the head of its file."""

import os
import platform
from datetime import date
from pathlib import Path

import torch


def machine() -> dict[str, str]:
    """Date, processor, number of threads, version of torch and, where there is one, the GPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    where = ", ".join([model, f"{os.cpu_count()} threads", f"torch {torch.__version__}", *gpu])
    return {"date": str(date.today()), "machine": where}
