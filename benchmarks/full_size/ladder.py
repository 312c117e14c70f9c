"""The rows of benchmarks/gpu.sh: what each changes. The most telling ones come first, for the time may run out."""

from dataclasses import dataclass, replace

BEFORE = "benchmarks/full_size/configs/zero2_before.json"  # ds_zero2.json until 2026-11-26
OFFLOAD = "ds_configs/zero2_offload.json"
LIGER, COMPILE = ("--use_liger_kernel", "true"), ("--torch_compile", "true")
ROOMY = 100  # GiB on which freeze_vision's states fit (docs/gpu.md)


@dataclass(frozen=True)
class Row:
    """One measurement."""

    name: str
    measure: str = "our_steps"  # a function of steps.py
    train_type: str = "use_lora"
    batch: int = 4
    accumulation: int = 1
    flags: tuple[str, ...] = ()
    deepspeed: str = "ds_zero2.json"
    fused_lora: bool = True
    plain_loss: bool = False  # transformers' own
    warm: int = 10  # steps before the timed ones
    steps: int = 20  # timed

    @property
    def samples(self) -> int:
        """Of one optimizer step."""
        return self.batch * self.accumulation


ROWS = (
    Row("use_lora as before: adapters as PEFT computes them, overlap_comm, DeepSpeed's timers", deepspeed=BEFORE,
        fused_lora=False),
    Row("use_lora as it is now"),
    Row("use_lora as it is now, Liger", flags=LIGER),
    Row("use_lora as it is now, Liger, batch 16", flags=LIGER, batch=16),
    Row("use_lora as before, today's ds_zero2.json", fused_lora=False),
    Row("use_lora as before, today's ds_zero2.json, Liger", fused_lora=False, flags=LIGER),
    Row("use_lora as it is now, batch 16", batch=16),
    Row("use_lora as it is now, Liger, 4 micro-batches in a step", flags=LIGER, accumulation=4, warm=4, steps=8),
    Row("use_lora by Trainer, transformers' loss", fused_lora=False, plain_loss=True),
    Row("answers", measure="answers", batch=16),
    Row("use_lora as it is now, torch.compile", flags=COMPILE),
    Row("use_lora by TRL", measure="trl_steps"),
    Row("freeze_vision", train_type="freeze_vision"),
)  # fmt: skip


def rows(gpu_memory: float | None) -> list[Row]:
    """Those for a GPU of so many GiB. On a CPU (None) a few steps stand in, and nothing is generated for a compiler."""
    if gpu_memory is None:
        fewer = {"warm": 1, "steps": 2}
        eager = (*COMPILE, "--torch_compile_backend", "aot_eager")
        return [replace(row, **fewer, flags=eager if row.flags == COMPILE else row.flags) for row in ROWS]
    slow = {"deepspeed": OFFLOAD, "warm": 2, "steps": 5}  # the host's AdamW takes seconds for a step
    small = gpu_memory < ROOMY
    return [replace(row, **slow) if small and row.train_type == "freeze_vision" else row for row in ROWS]
