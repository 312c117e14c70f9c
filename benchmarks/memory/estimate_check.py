"""Compares every number of train_llava.estimate's memory with something that is not its formulas.

    python -m benchmarks.memory.estimate_check [--json FILE]

- simulation: a whole training step on fake tensors at full size (benchmarks/memory/simulate.py), in bf16
- CPU: real training steps of LlavaTrainer in fp32 at three sizes, in a process of their own: its largest resident
  memory (VmHWM) above what it had before the model was built
- DeepSpeed: its own estimators of model states, without their safety factor
- GPU: the peak of benchmarks/results/gpu_h100.json

Then estimate's answers for eight pairs of tower and language model on all kinds of GPU, with the seconds they took.
Prints tables and writes benchmarks/results/estimate_check.json, unless --json names another file. Takes some minutes
and 8 GB of memory.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from benchmarks.memory.simulate import peak_of_step
from benchmarks.result import RESULTS, head, parser, write
from train_llava.cli import command
from train_llava.estimate import memory_budget, used_on_device, zero_config
from train_llava.model.config import compose_config
from train_llava.model.structure import STRATEGIES
from train_llava.planning.activations import Batch
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.planning.memory import MemoryModel, ZeroConfig
from train_llava.planning.meta_model import meta_model
from train_llava.planning.roofline import GPUS
from train_llava.planning.workload import DEFAULT_TOKENS, Workload

GIB = 2**30


def clip(size: int) -> CLIPVisionConfig:
    """openai/clip-vit-large-patch14 and its 336 px version."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPVisionConfig(**shape, image_size=size, patch_size=14)


def siglip(width: int, inside: int, layers: int, heads: int, size: int, patch: int) -> SiglipVisionConfig:
    """google/siglip-*."""
    shape = {"hidden_size": width, "intermediate_size": inside, "num_hidden_layers": layers}
    return SiglipVisionConfig(**shape, num_attention_heads=heads, image_size=size, patch_size=patch)


def chat(kind: type, width: int, inside: int, layers: int, heads: int, kv: int, words: int, **more) -> PreTrainedConfig:
    """A language model's config."""
    shape = {"hidden_size": width, "intermediate_size": inside, "num_hidden_layers": layers, "vocab_size": words}
    return kind(**shape, num_attention_heads=heads, num_key_value_heads=kv, **{"tie_word_embeddings": False, **more})


CLIP_336, CLIP_224 = clip(336), clip(224)
SO400M, SIGLIP_BASE = siglip(1152, 4304, 27, 16, 384, 14), siglip(768, 3072, 12, 12, 224, 16)
QWEN_4B = chat(Qwen2Config, 2560, 6912, 40, 20, 20, 151936)
QWEN25_15B = chat(Qwen2Config, 1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True)
LLAMA_8B = chat(LlamaConfig, 4096, 14336, 32, 32, 8, 128256)
PAIRS = {  # shapes as published
    "CLIP-L/336 + Qwen1.5-4B": (CLIP_336, QWEN_4B),
    "CLIP-L/336 + Qwen1.5-7B": (CLIP_336, chat(Qwen2Config, 4096, 11008, 32, 32, 32, 151936)),
    "CLIP-L/336 + Vicuna-7B": (CLIP_336, chat(LlamaConfig, 4096, 11008, 32, 32, 32, 32000)),
    "CLIP-L/336 + Llama-3.1-8B": (CLIP_336, LLAMA_8B),
    "CLIP-L/224 + Qwen1.5-1.8B": (CLIP_224, chat(Qwen2Config, 2048, 5504, 24, 16, 16, 151936)),
    "SigLIP-so400m/384 + Qwen2.5-7B": (SO400M, chat(Qwen2Config, 3584, 18944, 28, 28, 4, 152064)),
    "SigLIP-so400m/384 + Qwen2.5-1.5B": (SO400M, QWEN25_15B),
    "SigLIP-B/224 + Llama-3.2-1B": (
        SIGLIP_BASE,
        chat(LlamaConfig, 2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    ),
}
SIZES = {  # for real steps on a CPU, of tower and language model: width, MLP, layers, heads
    "small": ((256, 1024, 6, 8), (384, 1024, 6, 6)),
    "medium": ((384, 1536, 8, 6), (512, 1376, 8, 8)),
    "large": ((512, 2048, 8, 8), (768, 2048, 12, 12)),
}
CPU_CASES = [(size, kind, False) for size in SIZES for kind in ("use_lora", "none")]
CPU_CASES += [("large", "freeze_vision", True)]
TEXT = 60  # tokens beside the image's in these


def row(against: str, what: str, reference: float, estimate: float) -> dict[str, Any]:
    """One comparison, in GiB."""
    difference = estimate / reference - 1
    print(f"{against:<12}{what:<58}{reference / GIB:>10.3f}{estimate / GIB:>10.3f}{difference:>+8.1%}", flush=True)
    sizes = {"reference_gib": round(reference / GIB, 3), "estimate_gib": round(estimate / GIB, 3)}
    return {"against": against, "what": what, **sizes, "difference": round(difference, 4)}


def simulated() -> Iterator[dict[str, Any]]:
    """Full-size steps on fake tensors: the peak with weights and gradients, and what is kept for the backward pass."""
    main, gqa = compose_config(CLIP_336, QWEN_4B), compose_config(SO400M, QWEN25_15B)
    cases = [
        (main, "4B", kind, size, None, again)
        for kind in STRATEGIES
        for again in (False, True)
        for size in ((1, 620), (4, 636), (16, 640))
    ]
    cases += [(main, "4B, all logits", kind, (4, 636), 635, False) for kind in ("freeze_vision", "none")]
    cases += [
        (gqa, "so400m + Qwen2.5-1.5B", kind, (4, 800), None, again) for kind in STRATEGIES for again in (False, True)
    ]
    cases += [
        (compose_config(CLIP_336, LLAMA_8B), "Llama-3.1-8B", kind, (4, 636), None, False)
        for kind in ("use_lora", "none")
    ]
    for config, name, kind, (samples, length), answers, again in cases:
        batch = Batch(samples, length, samples, samples * (answers or 40))
        real = peak_of_step(config, kind, batch, again)
        step = MemoryModel.of(meta_model(config, torch.bfloat16, kind))
        what = f"{name}, {kind}, {samples} x {length}{', checkpointing' * again}"
        kept = step.activations(batch, again, until=len(step.stages))
        yield row("simulation", f"kept: {what}", real["kept"], kept)
        peak = step.weights + step.backward(batch, ZeroConfig(deepspeed=False), again)
        yield row("simulation", f"peak: {what}", real["peak"], peak)


def of_deepspeed() -> Iterator[dict[str, Any]]:
    """States of the whole model while all of it is trained."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    model = meta_model(compose_config(CLIP_336, QWEN_4B), torch.bfloat16, "none")
    step = MemoryModel.of(model.requires_grad_(True))
    for gpus in (1, 8, 64):
        _, reference = zero2(step.all_weights, gpus, cpu_offload=False)
        yield row("DeepSpeed", f"ZeRO-2, {gpus} GPUs", reference, step.states_at_step(ZeroConfig(2, gpus)))
        # 18 bytes per weight; its stage3.py also keeps the bf16 gradients (grad_partitions_flat_buffer), as ours does
        _, reference, _ = zero3(step.all_weights, 0, gpus, cpu_offload=False)
        ours = step.states_at_step(ZeroConfig(3, gpus)) - step.gradients(ZeroConfig(3, gpus))
        yield row("DeepSpeed", f"ZeRO-3, {gpus} GPUs, without bf16 gradients", reference, ours)
    host, reference = zero2(step.all_weights, 4, cpu_offload=True, additional_buffer_factor=1)
    offload = ZeroConfig(2, 4, offload=True)
    yield row("DeepSpeed", "ZeRO-2 with offload, 4 GPUs, each GPU", reference, step.states_at_step(offload))
    yield row("DeepSpeed", "ZeRO-2 with offload, 4 GPUs, the host", host, 4 * step.on_host(offload))


def on_cpu() -> Iterator[dict[str, Any]]:
    """Real steps, in a process that does nothing else."""
    # glibc would keep what was freed for later; so resident is what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "benchmarks.memory.estimate_check", "--measure"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    measured = (int(line.split()[1]) for line in process.stdout if line.startswith("measured "))
    for (size, kind, again), reference in zip(CPU_CASES, measured, strict=True):
        config, batch = small(size)
        step = MemoryModel.of(meta_model(config, torch.float32, kind), on_gpu=False)
        peak = step.peak(batch, ZeroConfig(deepspeed=False), again)
        what = f"{size}, {kind}, {batch.samples} x {batch.length}{', checkpointing' * again}"
        yield row("CPU", what, reference, peak)


def small(size: str) -> tuple[LlavaConfig, Batch]:
    """A model and a batch for real steps."""
    (width, inside, layers, heads), (text_width, text_inside, text_layers, text_heads) = SIZES[size]
    shape = {"hidden_size": width, "intermediate_size": inside, "num_hidden_layers": layers}
    tower = CLIPVisionConfig(**shape, num_attention_heads=heads, image_size=224, patch_size=14)
    config = compose_config(
        tower, chat(Qwen2Config, text_width, text_inside, text_layers, text_heads, text_heads, 32000)
    )
    config.image_token_id = 7
    return config, Batch(4, config.image_seq_length + TEXT, 4, 4 * (TEXT - 10))


def measure() -> None:
    """Two steps of LlavaTrainer for each case; prints the bytes they took at most."""
    steps(*small("small"), "projector", False)  # what libraries load and keep at their first use is not the step's
    for size, kind, again in CPU_CASES:
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        steps(*small(size), kind, again)
        print(f"measured {status('VmHWM') - before}", flush=True)


def steps(config: LlavaConfig, batch: Batch, kind: str, again: bool) -> None:
    """Two real steps with random weights."""
    from transformers import LlavaForConditionalGeneration

    from train_llava.model.freeze import apply_train_type
    from train_llava.training.trainer import LlavaTrainer

    model = apply_train_type(LlavaForConditionalGeneration(config), kind)
    ids = torch.tensor([1] * 5 + [config.image_token_id] * config.image_seq_length + [9] * (TEXT - 5))
    labels = torch.where(torch.arange(len(ids)) < len(ids) - (TEXT - 10), -100, ids)
    size = config.vision_config.image_size
    record = {"input_ids": ids, "labels": labels, "pixel_values": torch.zeros(3, size, size)}
    with tempfile.TemporaryDirectory() as folder:
        args = LlavaTrainingArguments(
            folder,
            max_steps=2,
            per_device_train_batch_size=int(batch.samples),
            gradient_checkpointing=again,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
            check_resources=False,
        )
        LlavaTrainer(model, args, train_dataset=[record] * 16).train()


def status(name: str) -> int:
    """Bytes of an entry of this process's status."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def on_a_gpu() -> Iterator[dict[str, Any]]:
    """The kept run on an H100, ZeRO-2 on one GPU; captions of the demo have about 20 tokens to learn. Its buckets were
    those of all strategies then, two of 2e8."""
    kept = json.loads((RESULTS / "gpu_h100.json").read_text())["use_lora"]
    step = MemoryModel.of(meta_model(compose_config(CLIP_336, QWEN_4B), torch.bfloat16, "use_lora"))
    peak = step.peak(Batch(4, DEFAULT_TOKENS, 4, 80), zero_config("ZeRO-2", 1, 2560, "freeze_vision"), False)
    reference = kept["peak_gpu_memory_mib"] * 2**20
    yield row("GPU", "4B, use_lora, 4 x 620, one H100, as the driver counts", reference, used_on_device(peak))


def answers() -> Iterator[dict[str, Any]]:
    """What the command says of each pair for use_lora on 8 GPUs, and how long it takes from its start to its end."""
    for name, (tower, text) in PAIRS.items():
        config = compose_config(tower, text)
        tokens = config.image_seq_length + DEFAULT_TOKENS - 576
        flags = ["--train_type", "use_lora", "--num_gpus", "8", "--tokens_per_sample", str(tokens)]
        with tempfile.TemporaryDirectory() as folder:
            for half, of in (("vision", tower), ("language", text)):
                of.save_pretrained(Path(folder, half))
                flags += [f"--{half}_model_name_or_path", str(Path(folder, half))]
            start = time.perf_counter()
            words = [sys.executable, "-m", "train_llava.estimate", *flags]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            seconds = time.perf_counter() - start
        step = MemoryModel.of(meta_model(config, torch.bfloat16, "use_lora"))
        zero = zero_config("ZeRO-2", 8, text.hidden_size, "use_lora")
        sample = Workload.assumed(1, tokens, config.image_seq_length)
        most = {kind: step.largest_batch(sample.batch, zero, False, memory_budget(kind)) for kind in GPUS}
        print(f"{name:<36}{step.all_weights / 1e9:>7.2f} B{seconds:>8.1f} s  {most}", flush=True)
        yield {
            "pair": name,
            "parameters": step.all_weights,
            "seconds": round(seconds, 1),
            "largest_batch": most,
            "report": done.stdout.splitlines(),
        }


@command
def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    flags = parser(__doc__, "--json", RESULTS / "estimate_check.json")
    flags.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.measure:
        return measure()
    print(f"{'against':<12}{'GiB':<58}{'reference':>10}{'estimate':>10}{'':>8}")
    rows = [row for part in (of_deepspeed, on_a_gpu, on_cpu, simulated) for row in part()]
    pairs = list(answers())
    worst = max(rows, key=lambda row: abs(row["difference"]))
    write(args.json, head(__doc__) | {"worst": worst, "rows": rows, "pairs": pairs})
    print(f"worst of {len(rows)} rows: {worst['difference']:+.1%} ({worst['what']})")


if __name__ == "__main__":
    main()
