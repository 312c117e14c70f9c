"""scripts/accelerator.py on machines that the tests do not run on: a stand-in for torch, and one for nvidia-smi."""

import sys

import pytest
from conftest import ROOT, run

TORCH = """
import warnings
from types import SimpleNamespace as Names
__version__, version = "{version}", Names(cuda={cuda!r}, hip={hip!r})
kind, names = {kind!r}, {names!r}
def available():
    if {said!r}: warnings.warn({said!r})
    return bool(names)
accelerator = Names(is_available=available, device_count=lambda: len(names))
accelerator.current_accelerator = lambda: Names(type=kind)
get_device_module = lambda kind: Names(get_device_name=lambda i: names[i])
"""
NOT_TRIED = "; this project has not been tried on it"


def look(tmp_path, smi=None, **torch):
    """What is printed where torch is as the keywords say, and nvidia-smi prints `smi`."""
    options = {"version": "2.13.0", "cuda": None, "hip": None, "kind": None, "names": [], "said": ""}
    variables = {name: torch.pop(name) for name in [*torch] if name.isupper()}
    options |= torch
    (tmp_path / "torch.py").write_text(TORCH.format(**options))
    (tmp_path / "torch-1.dist-info").mkdir()
    (tmp_path / "torch-1.dist-info/METADATA").write_text(f"Name: torch\nVersion: {options['version']}\n")
    if smi is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<END\n{smi}\nEND\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    script = ROOT / "scripts/accelerator.py"
    return run(
        sys.executable, script, **{"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin", **variables}
    )


H100 = "NVIDIA H100 80GB HBM3"
MAC = f"the GPU of a Mac, in one process and without DeepSpeed{NOT_TRIED}"
NVIDIA = {"kind": "cuda", "cuda": "13.0", "names": [H100]}
SMI = "GPU 0: H100 (UUID: GPU-1)"
MACHINES = {
    "GPUs": ({**NVIDIA, "names": [H100] * 2}, f"cuda 2\n2 GPUs: {H100}\n"),
    "one": (NVIDIA, f"cuda 1\n1 GPU: {H100}\n"),
    "of two kinds": ({**NVIDIA, "names": [H100, "A10", H100]}, f"cuda 3\n3 GPUs: 2 x {H100}, 1 x A10\n"),
    "AMD": ({"kind": "cuda", "hip": "6.4", "names": ["MI300X"]}, f"cuda 1\n1 GPU: MI300X{NOT_TRIED}\n"),
    "Ascend": ({"kind": "npu", "names": ["910B"] * 8}, f"npu 8\n8 NPUs: 910B{NOT_TRIED}\n"),
    "Intel": ({"kind": "xpu", "names": ["Max 1550"]}, f"xpu 1\n1 GPU: Max 1550{NOT_TRIED}\n"),
    "a Mac": ({"kind": "mps", "names": ["M4"]}, f"mps 1\n{MAC}\n"),
    "none": ({}, "cpu 0\nno GPU\n"),
    "a torch for CPUs": ({"version": "2.13.0+cpu", "names": ["not looked at"]}, "cpu 0\nno GPU\n"),
    "a driver without devices": ({"smi": "No devices were found"}, "cpu 0\nno GPU\n"),
    "hidden": ({"smi": SMI, "CUDA_VISIBLE_DEVICES": ""}, "cpu 0\nno GPU\n"),
    "not wanted": ({**NVIDIA, "DS_ACCELERATOR": "cpu"}, "cpu 0\nDS_ACCELERATOR=cpu\n"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_found_is_said(tmp_path, machine):
    options, printed = MACHINES[machine]
    done = look(tmp_path, **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, "")


OLD_DRIVER = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020). Please update"
TWO = "GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)"
UNUSABLE = {
    "torch for the CPU": ({"smi": TWO}, "lists 2 GPUs, and torch 2.13.0 is not built for them"),
    "a build for CPUs": ({"smi": TWO, "version": "2.13.0+cpu"}, "lists 2 GPUs, and torch 2.13.0+cpu is not built for"),
    "an old driver": (
        {"smi": TWO, "cuda": "13.0", "said": OLD_DRIVER},
        "driver on your system is too old (found version",
    ),
    "all but hidden": ({"smi": TWO, "CUDA_VISIBLE_DEVICES": "1"}, "lists 2 GPUs"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_gpus_that_torch_cannot_use_are_not_left_out_in_silence(tmp_path, what):
    options, reason = UNUSABLE[what]
    done = look(tmp_path, **options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and reason in done.stderr
    assert "DS_ACCELERATOR=cpu in front of the command" in done.stderr


def test_a_torch_that_cannot_be_imported(tmp_path):
    (tmp_path / "torch-1.dist-info").mkdir()
    (tmp_path / "torch-1.dist-info/METADATA").write_text("Name: torch\nVersion: 2.13.0\n")
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    done = run(sys.executable, ROOT / "scripts/accelerator.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "cannot be imported (libcudart.so.12: cannot open" in done.stderr
