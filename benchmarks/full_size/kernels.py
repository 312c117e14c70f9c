"""Kernels of a micro-step of the real model, and the speed that follows from them on an H100: a roofline, not a run.

    python -m benchmarks.full_size.kernels [--json benchmarks/results/kernels.json]

CLIP-ViT-L/336 + Qwen1.5-4B, forward and backward pass of batches of 4 and 16 samples of 620 tokens, 20 of them learned
(train_llava/planning/kernels.py, speed.py). The limit is what products of matrices and attention take alone. Then the
operations that are left in greatest number. Takes half a minute.
"""

from collections import Counter
from typing import Any

import torch
from transformers import LlavaConfig

from benchmarks.full_size.model import CONFIGS
from benchmarks.result import head, parser, table, write
from train_llava.model.config import compose_config, read_config, read_vision_config
from train_llava.model.freeze import LoraSettings
from train_llava.model.structure import STRATEGIES
from train_llava.planning.activations import Batch
from train_llava.planning.flops import PEAKS, StepFlops
from train_llava.planning.kernels import Way
from train_llava.planning.meta_model import meta_model
from train_llava.planning.roofline import GPUS, gpu_seconds, limit_seconds
from train_llava.planning.speed import Speed

KIND, TOKENS, ANSWER = "h100-80g", 620, 20
NO_DROPOUT = LoraSettings(lora_dropout=0.0)
WAYS = {
    "eager": Way(liger=False, fused_lora=False),
    "Liger": Way(fused_lora=False),
    "Liger, fused LoRA": Way(),
    "the same, `--lora_dropout 0`": Way(lora=NO_DROPOUT),
}


def ways_of(strategy: str) -> list[str]:
    """The rows of a strategy; without adapters the last two are as the second."""
    return [*WAYS] if strategy == "use_lora" else [*WAYS][:2]


def speed_of(strategy: str, batch: int, way: str) -> Speed:
    """Counts one row's kernels."""
    sizes = Batch(batch, TOKENS, batch, batch * ANSWER)
    return Speed.of(full_size(), strategy, sizes, 1, WAYS[way])


def full_size() -> LlavaConfig:
    """The config of the real model."""
    return compose_config(read_vision_config(CONFIGS / "clip"), read_config(CONFIGS / "qwen"))


def row(strategy: str, batch: int, way: str) -> dict[str, Any]:
    """One row: kernels, what they move, and times of a micro-step."""
    speed, gpu = speed_of(strategy, batch, way), GPUS[KIND]
    model = meta_model(full_size(), torch.bfloat16, strategy)
    flops = StepFlops.count(model).of(batch, batch * TOKENS, batch * TOKENS**2, batch * ANSWER)
    samples = speed.samples_per_second(KIND)
    seconds, limit = gpu_seconds(speed.kernels, gpu), limit_seconds(speed.kernels, gpu)
    return {
        "strategy": strategy,
        "batch": batch,
        "way": way,
        "kernels": speed.kernels.total(),
        "gb": round(sum(times * kernel.bytes for kernel, times in speed.kernels.items()) / 1e9, 1),
        "gpu_ms": round(seconds * 1e3, 1),
        "host_ms": round(speed.on_host() * 1e3, 1),
        "limit_ms": round(limit * 1e3, 1),
        "gpu_over_limit": round(seconds / limit, 3),
        "samples_per_second": round(samples, 1),
        "mfu": round(samples * flops / batch / PEAKS[gpu.name], 3),
    }


def leftovers(strategy: str, way: str, most: int = 8) -> dict[str, int]:
    """The operations but products and attention that a micro-step has most of."""
    names: Counter[str] = Counter()
    for kernel, times in speed_of(strategy, 4, way).kernels.items():
        names[kernel.name] += 0 if kernel.flops else times
    return dict(names.most_common(most))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table that docs/performance.md shows."""
    heads = ["strategy, batch", "how", "kernels", "GB", "GPU, ms", "limit, ms", "GPU / limit", "host, ms", "samples/s"]
    lines = []
    for each in rows:
        times = [each[name] for name in ("gpu_ms", "limit_ms", "gpu_over_limit", "host_ms", "samples_per_second")]
        first = [f"`{each['strategy']}`, {each['batch']}", each["way"], f"{each['kernels']:,}", each["gb"]]
        lines.append([*first, *times, f"{each['mfu']:.0%}"])
    return table([*heads, "MFU"], lines)


def main() -> None:
    args = parser(__doc__, "--json").parse_args()
    rows = [row(name, batch, way) for name in STRATEGIES for batch in (4, 16) for way in ways_of(name)]
    print(markdown(rows))
    left = {name: leftovers(name, ways_of(name)[-1]) for name in STRATEGIES}
    for name, operations in left.items():
        print(f"{name}: {', '.join(f'{operation} {times}' for operation, times in operations.items())}")
    write(args.json, head(__doc__) | {"gpu": KIND, "rows": rows, "most_numerous_leftovers": left})


if __name__ == "__main__":
    main()
