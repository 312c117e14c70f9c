"""How fast a training will be on a kind of GPU, as the code stands and at best.

While a GPU works, the host starts kernel after kernel, and the slower of the two decides. To that come the optimizer's
step, and what of ZeRO-2's sending the backward pass does not hide. At best there are products of matrices and
attention, and nothing else.

Assumed: data arrive in time (docs/training.md says how a run shows that), all GPUs are in one machine.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from transformers import LlavaConfig

from train_llava.planning.activations import Batch
from train_llava.planning.kernels import Kernel, Way, count_kernels
from train_llava.planning.meta_model import meta_model
from train_llava.planning.roofline import GPUS, REACHED, gpu_seconds, limit_seconds

# Seconds of a host for each kernel, Python, PyTorch and driver together: 98 ms for the 8,080 kernels of a step of
# another model (github.com/modelscope/FunASR, pull request 3705, 2026)
HOST = 98e-3 / 8080
FIXED = 5e-3  # seconds of a micro-step in which a GPU waits for Trainer and DeepSpeed: an assumption
ACCUMULATION = 8  # micro-steps in a step, over which the optimizer's work is spread; as the original's
# What DeepSpeed 0.19.8 does beside (runtime/zero/stage_1_and_2.py): bytes that it moves per trained weight, in a step
# (the norm in fp64 18, AdamW 28, a look for overflow 4, copies 34) and in a micro-step (a copy to the bucket 4, adding
# up a GPU's share in fp32 10); kernels per trained tensor, in a step (norm, overflow) and in a micro-step
STEP_BYTES, COPY_BYTES, SUM_BYTES, STEP_KERNELS, MICRO_KERNELS = 84, 4, 10, 5, 1


@dataclass
class Speed:
    """The speed of one training, on any kind of GPU."""

    kernels: Counter[Kernel]  # of a micro-step
    samples: float  # in it, on each GPU
    trained: int  # weights
    tensors: int  # that these are in
    ranks: int  # GPUs
    accumulation: int

    @classmethod
    def of(
        cls,
        config: LlavaConfig,
        train_type: str,
        batch: Batch,
        ranks: int = 1,
        way: Way | None = None,
        accumulation: int = ACCUMULATION,
    ) -> "Speed":
        """Counts the kernels of a micro-step with such a batch on each GPU; half a second."""
        way = way or Way()
        model = meta_model(config, torch.bfloat16, train_type, way.lora)
        trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        kernels = count_kernels(config, train_type, batch, way)
        return cls(kernels, batch.samples, sum(trained), len(trained), ranks, accumulation)

    def on_gpu(self, kind: str) -> float:
        """Seconds of a micro-step in which a GPU of a kind works."""
        moved = (COPY_BYTES + SUM_BYTES / self.ranks) * self.trained
        return gpu_seconds(self.kernels, GPUS[kind]) + moved / (REACHED * GPUS[kind].bandwidth)

    def on_host(self) -> float:
        """Seconds that a host takes to start the kernels of a micro-step."""
        return HOST * (self.kernels.total() + MICRO_KERNELS * self.tensors)

    def at_step(self, kind: str) -> float:
        """Seconds of the optimizer's step: its work, shared out over the GPUs, and gathering the new weights."""
        work = STEP_BYTES * self.trained / self.ranks / (REACHED * GPUS[kind].bandwidth)
        return max(work, HOST * STEP_KERNELS * self.tensors) + self.gathering(kind)

    def gathering(self, kind: str) -> float:
        """Seconds in which each GPU gets all bf16 weights of the others; reducing their gradients takes twice that.

        In a ring of N, a gathering of n bytes makes each GPU send n (N - 1) / N, an all-reduce 2 n (N - 1) / N (ZeRO,
        arXiv:1910.02054, section 7.1).
        """
        return 2 * self.trained * (self.ranks - 1) / self.ranks / (REACHED * GPUS[kind].link)

    def samples_per_second(self, kind: str) -> float:
        """Of all GPUs together, as the code stands. Gradients travel during the backward pass, at least half of a
        micro-step, and only what is left of that counts."""
        busy = max(self.on_gpu(kind), self.on_host()) + FIXED
        seconds = busy + max(0.0, 2 * self.gathering(kind) - busy / 2) + self.at_step(kind) / self.accumulation
        return self.ranks * self.samples / seconds

    def limit(self, kind: str) -> float:
        """Samples per second of all GPUs together if each did nothing but products of matrices and attention."""
        return self.ranks * self.samples / limit_seconds(self.kernels, GPUS[kind])


def hours(
    config: LlavaConfig,
    train_type: str,
    batch: Batch,
    records: float,
    epochs: float,
    kind: str,
    ranks: int = 1,
    way: Way | None = None,
    accumulation: int = ACCUMULATION,
) -> float:
    """Hours of a training as the code stands, saving and evaluating apart.

    Args:
        batch: an average one of each GPU, see `Workload.typical`.
        records: in an epoch.
        kind: of GPU, in roofline.GPUS; see `kind_of_gpu`.
        ranks: GPUs.
        way, accumulation: how it runs.
    """
    speed = Speed.of(config, train_type, batch, ranks, way, accumulation)
    return records * epochs / speed.samples_per_second(kind) / 3600
