"""What a GPU did in some training steps, from the trace of torch's profiler (Chrome's format, one event an object)."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # the trace's categories of what takes the GPU's time
CALLS = ("cuda_runtime", "cuda_driver")
# Calls in which the host waits for the GPU; on a CPU, where nothing is waited for, torch's operations that would
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
WOULD_WAIT = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
LARGEST = 10


def profiler(on_gpu: bool) -> profile:
    """One that records the GPU's work and CUDA's calls alone: recording torch's operations, too, would slow the host
    down. On a CPU these stand in for kernels."""
    return profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])


def read_trace(file: Path, steps: int) -> dict[str, Any]:
    """The figures of one of `steps` steps alike: the kernels' time (their sum, in ms) and number, how often the host
    waits in which call, and the kernels with the largest shares of the time.

    Raises:
        RuntimeError: there is no kernel in it.
    """
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") in ON_GPU]
    calls = [event for event in events if event.get("cat") in CALLS and event["name"] in WAITS]
    if not kernels:
        operations = [event for event in events if event.get("cat") == "cpu_op"]
        kernels, calls = outermost(operations), [event for event in operations if event["name"] in WOULD_WAIT]
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    times: Counter[str] = Counter()
    for event in kernels:
        times[event["name"]] += event["dur"]
    total = sum(times.values())
    return {
        "kernel_ms": round(total / steps / 1000, 2),
        "kernels": round(len(kernels) / steps),
        "waits": {name: round(count / steps, 1) for name, count in Counter(call["name"] for call in calls).items()},
        "largest": {name[:100]: f"{time / total:.1%}" for name, time in times.most_common(LARGEST)},
    }


def outermost(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a thread's operations, which call one another, those that no other one has called."""
    found, ends = [], Counter[int]()
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] >= ends[event["tid"]]:
            found.append(event)
            ends[event["tid"]] = event["ts"] + event["dur"]
    return found
