"""What one training step holds in the memory of one GPU: weights, gradients, optimizer, activations.

Memory is fullest at one of two moments, and `MemoryModel.peak` looks at both: somewhere in the backward pass, where the
activations of the layers below and the gradients of those above meet, or in the optimizer's step. States are those of
ZeRO (Rajbhandari et al., arXiv:1910.02054, section 3.1 and figure 1), activations those of activations.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from train_llava.model.structure import count_trained, count_weights, llava_in
from train_llava.planning.activations import Batch, Stage, saved_activations, stages

SMALL = 2**28  # trained weights, whose gradients take 1 GB in fp32
# 4 bits, a scale of 8 bits for 64 of them, and one of 32 bits for 256 scales (QLoRA, arXiv:2305.14314, section 3)
FOUR_BIT = 4 / 8 + 1 / 64 + 4 / (64 * 256)


@dataclass
class ZeroConfig:
    """How DeepSpeed spreads weights, gradients and optimizer states over `ranks` GPUs.

    Stage 0 keeps all on each GPU, 2 shares out gradients and optimizer, 3 the weights as well. `bucket` and `gathered`
    are counts of elements: of DeepSpeed's buffers for gradients on their way, and of weights that ZeRO-3 has whole at
    a time.
    """

    stage: int = 0
    ranks: int = 1
    offload: bool = False  # gradients and optimizer in the host's memory
    deepspeed: bool = True
    fp32_sums: bool = False  # of the gradients of several micro-batches
    whole_sums: bool = False  # on each GPU, see `reduces_once`
    bucket: float = 0.0
    gathered: float = 0.0

    @classmethod
    def read(cls, config: dict[str, Any] | None, ranks: int, hidden_size: int = 0) -> "ZeroConfig":
        """Reads the JSON of --deepspeed, which is None without DeepSpeed.

        `overlap_comm` has two buffers of `reduce_bucket_size` take turns. "auto" is Trainer's hidden_size squared
        (transformers, integrations/deepspeed.py). ZeRO-3 keeps up to `stage3_max_live_parameters` weights whole,
        10^9 by default (DeepSpeed, runtime/zero/config.py).
        """
        if config is None:
            return cls(ranks=ranks, deepspeed=False)
        settings = config.get("zero_optimization", {})
        stage, bucket = settings.get("stage", 0), settings.get("reduce_bucket_size", 5e8)
        bucket = hidden_size**2 if bucket == "auto" else bucket
        live = settings.get("stage3_max_live_parameters", 1e9)
        return cls(
            stage=stage,
            ranks=ranks,
            offload=settings.get("offload_optimizer", {}).get("device", "none") != "none",
            fp32_sums=config.get("data_types", {}).get("grad_accum_dtype") == "fp32",
            bucket=bucket * (2 if settings.get("overlap_comm") else 1) * (stage > 0),
            gathered=(1e9 if live == "auto" else live) * (stage == 3),
        )

    def of_weights(self, size: float) -> float:
        """A GPU's part of the weights."""
        return size / self.ranks if self.stage == 3 else size

    def of_gradients(self, size: float) -> float:
        """A GPU's part of the gradients; with offload each goes to the host as soon as it is there."""
        return 0 if self.offload else size / self.ranks if self.stage >= 2 else size

    def of_optimizer(self, size: float) -> float:
        """A GPU's part of the optimizer's states."""
        return 0 if self.offload else size / self.ranks if self.stage >= 1 else size

    def copies_weights(self, element: int) -> bool:
        """Whether the optimizer works on an fp32 copy of trained weights, of so many bytes each: with DeepSpeed always,
        unless they are in fp32 and nothing is shared out (runtime/engine.py, `_do_optimizer_sanity_check`)."""
        return self.deepspeed and (self.stage > 0 or element < 4)


@dataclass
class MemoryModel:
    """The memory of a training step of one model, whatever the batch and the number of GPUs."""

    element: int  # bytes
    weights: float  # bytes of all
    all_weights: int
    trained: int
    on_gpu: bool = True
    stages: list[Stage] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, in_4bit: bool = False, on_gpu: bool = True) -> "MemoryModel":
        """For a model that is frozen and adapted as it will be in training; it may be on the meta device."""
        llava = llava_in(model)
        packed = {id(p) for p in four_bit_weights(llava)} if in_4bit else set()
        parameters = [*model.parameters()]
        element = llava.dtype.itemsize
        return cls(
            element=element,
            weights=sum(count_weights(p) * (FOUR_BIT if id(p) in packed else p.element_size()) for p in parameters),
            all_weights=sum(map(count_weights, parameters)),
            trained=count_trained(model),
            on_gpu=on_gpu,
            stages=[*stages(llava, element, 1 if on_gpu else element)],
        )

    def activations(self, batch: Batch, checkpointing: bool, until: int | None = None) -> float:
        """Bytes that the first stages save, by default all stages but the head, whose logits are counted apart."""
        chosen = self.stages[: -1 if until is None else until]
        return sum(saved_activations(stage, batch, checkpointing) for stage in chosen)

    def logits(self, batch: Batch) -> float:
        """Bytes that the head and the loss save and need: see `head_stage`."""
        return batch.units("logits") * (self.stages[-1].saved + self.stages[-1].workspace)

    def gradients(self, zero: ZeroConfig) -> float:
        """Bytes of a GPU's gradients at the end of the backward pass."""
        return self.sums(self.trained, zero)

    def sums(self, trained: int, zero: ZeroConfig) -> float:
        """Bytes of the gradients of so many weights that wait on a GPU for the optimizer's step."""
        size = trained * (4 if zero.fp32_sums or zero.whole_sums else self.element)
        if zero.fp32_sums and zero.stage == 1 and self.element < 4:
            size += trained * self.element  # DeepSpeed's BF16_Optimizer keeps the gradients beside their sums
        return size if zero.whole_sums else zero.of_gradients(size)

    def optimizer(self, zero: ZeroConfig) -> float:
        """Bytes of a GPU's part of the optimizer's states."""
        return zero.of_optimizer(optimizer_bytes(self.trained, zero.copies_weights(self.element)))

    def temporary(self, zero: ZeroConfig) -> float:
        """Bytes that the optimizer's step and DeepSpeed need beside the states: fp32 gradients, and buffers."""
        return self.fp32_gradients(zero) + self.buffers(zero)

    def fp32_gradients(self, zero: ZeroConfig) -> float:
        """Bytes of DeepSpeed's copy of the gradients for the optimizer's step (stage_1_and_2.py, `step`): of those that
        its part of the optimizer needs, also under ZeRO-1, where each GPU holds all."""
        return zero.of_optimizer(4 * self.trained) if zero.copies_weights(self.element) else 0

    def on_host(self, zero: ZeroConfig) -> float:
        """Bytes that a rank with offload holds in the host's memory: optimizer states and fp32 gradients (ZeRO-Offload,
        Ren et al., arXiv:2101.06840, section 4.1)."""
        return (optimizer_bytes(self.trained, True) + 4 * self.trained) / zero.ranks if zero.offload else 0

    def buffers(self, zero: ZeroConfig) -> float:
        """Bytes of DeepSpeed's buckets, and of weights that ZeRO-3 has gathered. A CPU's bucket takes what is in it."""
        bucket = zero.bucket if self.on_gpu else min(zero.bucket, self.trained)
        return self.element * (bucket + min(zero.gathered, self.all_weights))

    def states_at_step(self, zero: ZeroConfig) -> float:
        """All states while the optimizer works; under ZeRO-2 and bf16 2 + 18 / ranks bytes per weight, as DeepSpeed's
        own estimate_zero2_model_states_mem_needs has it."""
        states = zero.of_weights(self.weights) + self.gradients(zero) + self.optimizer(zero)
        return states + self.fp32_gradients(zero)

    def backward(self, batch: Batch, zero: ZeroConfig, checkpointing: bool) -> float:
        """The most bytes that activations, gradients and temporaries take at once in the backward pass.

        When the gradients of a stage are there, the activations of the stages above it are gone.
        """
        most, gradients = 0.0, 0.0
        held = self.activations(batch, checkpointing, until=len(self.stages))
        for stage in reversed(self.stages):
            gradients += self.sums(stage.trained, zero)
            units, saved = batch.units(stage.unit), saved_activations(stage, batch, checkpointing)
            recomputed = units * stage.saved if saved < units * stage.saved else 0  # what was not saved
            most = max(most, held + recomputed + units * stage.workspace + gradients)
            held -= saved
        return most

    def peak(self, batch: Batch, zero: ZeroConfig, checkpointing: bool) -> float:
        """The most bytes that the step uses at once, on each GPU."""
        states = zero.of_weights(self.weights) + self.optimizer(zero)
        backward = states + self.backward(batch, zero, checkpointing)
        return max(backward, self.states_at_step(zero)) + self.buffers(zero)

    def largest_batch(self, sample: Batch, zero: ZeroConfig, checkpointing: bool, budget: float) -> int:
        """The largest number of such samples whose peak is within `budget` bytes."""
        fits, over = 0, 1
        while over <= 65536 and self.peak(sample.times(over), zero, checkpointing) <= budget:
            fits, over = over, over * 2
        while over - fits > 1:
            middle = (fits + over) // 2
            enough = self.peak(sample.times(middle), zero, checkpointing) <= budget
            fits, over = (middle, over) if enough else (fits, middle)
        return fits


def reduces_once(trained: int, accumulation: int, stage: int, offload: bool) -> bool:
    """Whether the gradients of a step's micro-batches are reduced over the ranks once, not after each.

    Until then each rank holds all of them, so this is for a `SMALL` number of trained weights; and for ZeRO-2, since
    ZeRO-1 does so by itself.
    """
    return accumulation > 1 and trained <= SMALL and stage == 2 and not offload


def optimizer_bytes(trained: int, deepspeed: bool) -> int:
    """Bytes of AdamW's states for the trained weights, on all ranks together.

    Two fp32 moments of each, and with DeepSpeed an fp32 master copy: 8 or 12 bytes (ZeRO, arXiv:1910.02054,
    section 3.1).
    """
    return (12 if deepspeed else 8) * trained


def four_bit_weights(llava: nn.Module) -> Iterator[nn.Parameter]:
    """The matrices that --load_in_4bit packs: those of the language model's layers, adapters excluded."""
    for name, module in llava.model.language_model.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            yield module.weight
