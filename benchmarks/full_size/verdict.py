"""What limits a training step, in one sentence, from what was measured of the machine and of the step.

The rules, in this order:

1. host-bound: the kernels of a step take less than four fifths of its wall time. For the rest the GPU waits for the
   host. The sentence says how long the host takes to start a kernel, of which 3 to 5 us are usual and more than 10 a
   slow host, and how often it waits for the GPU by itself.
2. compute-bound: of the kernels' time, the step's FLOPs take at least half, at the rate that was measured of a product
   of this model on this machine.
3. memory-bound: all other kernels, which read and write but hardly compute, take more.

Beside it, a product that stays below SLOW_PRODUCT of the peak is mentioned, since clocks or the power cap then slow
down every kernel.
"""

from typing import Any

BUSY, COMPUTING = 0.8, 0.5  # shares: of the wall time that kernels take, of the kernels' time that products take
USUAL, SLOW_HOST = (3, 5), 10  # us to start a kernel
SLOW_PRODUCT = 0.5  # of the peak: an H100's large products in bf16 reach 60 to 80%


def verdict(machine: dict[str, Any], step: dict[str, Any]) -> str:
    """The sentence.

    Args:
        machine: `host_us_per_kernel`, `product_tflops` by its number of rows, `peak_tflops` or None.
        step: `step_ms` (wall time without the profiler), `kernel_ms`, `kernels`, `waits`, `tflop` of the whole step.
    """
    wall, kernel_ms, fastest = step["step_ms"], step["kernel_ms"], max(machine["product_tflops"].values())
    busy, computing = kernel_ms / wall, 1000 * step["tflop"] / fastest / kernel_ms
    if busy < BUSY:
        each = machine["host_us_per_kernel"]
        pace = "slow" if each > SLOW_HOST else "usual" if each <= USUAL[1] else "rather slow"
        waits = sum(step["waits"].values())
        why = f"the host takes {each:.1f} us to start each of {step['kernels']:,} ({pace}: {USUAL[0]} to {USUAL[1]} "
        why += f"are usual) and waits {waits:.0f} times for the GPU"
        kind = "host-bound"
    else:
        kind = "compute-bound" if computing >= COMPUTING else "memory-bound"
        why = f"products take {computing:.0%} of that time at the {fastest:.0f} TFLOP/s measured here"
    said = f"{kind}: kernels take {kernel_ms:.0f} of a step's {wall:.0f} ms ({busy:.0%}), {why}"
    if machine["peak_tflops"] and fastest < SLOW_PRODUCT * machine["peak_tflops"]:
        said += f"; products reach only {fastest / machine['peak_tflops']:.0%} of the peak: see nvidia_smi"
    return said
