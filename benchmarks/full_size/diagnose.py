"""The machine alone, in seconds, before any model is built: is the host or the GPU slow by itself?"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.full_size.process import Tell
from benchmarks.result import machine

SHAPES = {2480: 4, 9920: 16}  # rows of a product: tokens of a batch, and how many samples of 620 these are
WIDTH, INSIDE = 2560, 6912  # Qwen1.5-4B's
LAUNCHES, CHAIN, REPEATS = 10_000, 1000, 20
SMALLER = 16  # how much smaller each side is on a CPU
PACKAGES = {"torch": "torch", "transformers": "transformers", "deepspeed": "deepspeed", "peft": "peft",
            "accelerate": "accelerate", "datasets": "datasets", "triton": "triton", "liger_kernel": "liger-kernel",
            "flash_attn": "flash-attn", "trl": "trl"}  # fmt: skip
NVIDIA_SMI = ("nvidia-smi", "-q", "-i", "0", "-d", "CLOCK,POWER,PERFORMANCE,TEMPERATURE,UTILIZATION")


def diagnose(tell: Tell, on_gpu: bool) -> None:
    """Tells each figure of this machine; times are medians of three."""
    device = torch.device("cuda" if on_gpu else "cpu")
    tell("machine", machine()["machine"])
    tell("load_average", Path("/proc/loadavg").read_text().strip())
    tell("cores", len(os.sched_getaffinity(0)))
    tell("gpu_memory_gib", round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if on_gpu else None)
    one = torch.zeros(1, device=device)
    tell("host_us_per_kernel", round(1e6 * seconds_of(lambda: launch(one), on_gpu) / LAUNCHES, 2))
    # forward and backward
    tell("host_us_per_autograd_operation", round(1e6 * seconds_of(lambda: chain(device), on_gpu) / CHAIN / 2, 2))
    products, rates = {}, {}
    for rows in SHAPES:
        products[rows] = product(rows, device)
        sides = [side // (1 if on_gpu else SMALLER) for side in (rows, WIDTH, INSIDE)]
        flops = 2 * sides[0] * sides[1] * sides[2] * REPEATS
        rates[str(rows)] = round(flops / seconds_of(products[rows], on_gpu) / 1e12, 4)
        tell("product_tflops", dict(rates))
    if on_gpu:
        tell("nvidia_smi", smi_while(products[max(SHAPES)]))


def product(rows: int, device: torch.device) -> Callable[[], None]:
    """REPEATS times the product of the MLP's shape in bf16; on a CPU a smaller one stands in."""
    scale = SMALLER if device.type == "cpu" else 1
    left = torch.randn(rows // scale, WIDTH // scale, device=device, dtype=torch.bfloat16)
    right = torch.randn(WIDTH // scale, INSIDE // scale, device=device, dtype=torch.bfloat16)

    def run() -> None:
        for _ in range(REPEATS):
            left @ right

    return run


def launch(one: torch.Tensor) -> None:
    """As many of the smallest kernels, one after the other."""
    for _ in range(LAUNCHES):
        one.add_(1)


def chain(device: torch.device) -> None:
    """Small operations with a gradient, and their backward pass."""
    value = start = torch.zeros(1, device=device, requires_grad=True)
    for _ in range(CHAIN):
        value = value + start
    value.sum().backward()


def seconds_of(work: Callable[[], None], on_gpu: bool) -> float:
    """The median of three runs after one to warm up, all of the GPU's work included."""
    times = []
    for _ in range(4):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[1]


def smi_while(work: Callable[[], None]) -> list[str]:
    """What nvidia-smi says of clocks, power cap and throttling while the GPU works: idle, it says nothing of them."""
    for _ in range(50):  # a second
        work()
    try:
        process = subprocess.Popen(NVIDIA_SMI, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return [f"not there: {error}"]
    while process.poll() is None:
        work()
        torch.cuda.synchronize()
    return [line.strip() for line in process.stdout.read().splitlines() if line.strip()]


def look_at_packages(tell: Tell, on_gpu: bool) -> None:
    """Tells what the trainings will work with; fails where this process cannot use the GPU."""
    from train_llava.planning.flops import peak_flops  # transformers, which a diagnosis should not wait for

    torch.zeros(1, device="cuda" if on_gpu else "cpu")
    peak = peak_flops()
    tell("peak_tflops", peak and peak / 1e12)
    tell("versions", versions())


def versions() -> dict[str, str]:
    """Of what is really imported, with the name of the folder that it is imported from; and Python's."""
    found = {"python": sys.version.split()[0]}
    for module, name in PACKAGES.items():
        try:
            where = Path(import_module(module).__file__).parent.parent
            found[module] = f"{version(name)} in {where.name}"
        except Exception as error:
            found[module] = f"not to be imported ({type(error).__name__})"
    return found
