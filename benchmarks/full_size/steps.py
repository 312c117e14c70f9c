"""The steps of one row: their speed, then their memory, then what the GPU does in them.

Each row trains in a process of its own, by the code that `python -m train_llava.train` runs, but for where the weights
come from and what the row replaces.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from benchmarks.full_size.ladder import Row
from benchmarks.full_size.model import DEMO, FULL_SIZE, QUESTION, lay_out_llava, load_random, write_images
from benchmarks.full_size.plain_lora import use_plain_lora
from benchmarks.full_size.plain_loss import use_plain_loss
from benchmarks.full_size.process import Tell
from benchmarks.full_size.trace import profiler, read_trace
from benchmarks.full_size.verdict import verdict
from benchmarks.result import ROOT
from train_llava import train
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.freeze import LoraSettings, apply_train_type
from train_llava.model.generate import ask, generate
from train_llava.model.load import load_processor
from train_llava.planning.budget import zero_of_run
from train_llava.planning.flops import StepFlops, peak_flops
from train_llava.planning.memory import MemoryModel
from train_llava.planning.workload import longest_batch
from train_llava.processing.images import open_image
from train_llava.training.callbacks import peak_memory_gb, synchronize
from train_llava.training.fault_tolerance import PreemptionCallback
from train_llava.training.flag_checks import check_flags
from train_llava.training.renamed import parse_flags
from train_llava.training.trainer import LlavaTrainer

PROFILED = 3  # steps after the timed ones
RECORDS = 16 * 33  # one epoch of the largest row
NEW_TOKENS = 64  # of each answer
RATES = {"use_lora": "4e-4", "freeze_vision": "2e-5"}  # as in run_zero2.sh; speed does not depend on them


class StepClock(TrainerCallback):
    """Times `row.steps` steps after `row.warm`, the GPU's work included, and then profiles PROFILED more."""

    def __init__(self, tell: Tell, row: Row, machine: dict[str, Any], flops: float) -> None:
        self.tell, self.row, self.machine, self.flops = tell, row, machine, flops
        self.figures: dict[str, Any] = {"tflop": flops / 1e12}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs) -> None:
        done = state.global_step - self.row.warm
        if done == 0:
            synchronize()
            self.began = time.perf_counter()
        elif done == self.row.steps:
            synchronize()
            self.tell_speed((time.perf_counter() - self.began) / self.row.steps)
            self.profiler = profiler(not args.use_cpu)
            self.profiler.start()
        elif done == self.row.steps + PROFILED:
            synchronize()
            self.profiler.stop()
            self.tell_kernels(Path(args.output_dir) / "trace.json")

    def tell_speed(self, seconds: float) -> None:
        """What one step's seconds come to."""
        self.figures["step_ms"] = round(1000 * seconds, 2)
        self.tell("step_ms", self.figures["step_ms"])
        self.tell("samples_per_second", round(self.row.samples / seconds, 2))
        self.tell("mfu", peak_flops() and round(self.flops / seconds / peak_flops(), 4))
        self.tell("memory_gib", round(peak_memory_gb() * 1e9 / 2**30, 2))

    def tell_kernels(self, file: Path) -> None:
        """What the profiler saw, and the verdict."""
        self.profiler.export_chrome_trace(str(file))
        self.figures |= read_trace(file, PROFILED)
        for name in ("kernel_ms", "kernels", "waits", "largest"):
            self.tell(name, self.figures[name])
        self.tell("verdict", verdict(self.machine, self.figures))


def lay_out(tell: Tell, work: Path, on_gpu: bool) -> None:
    """The model's folder, and images with captions, for all rows."""
    lay_out_llava(work / "llava", *(FULL_SIZE if on_gpu else DEMO))
    write_images(work / "data", RECORDS if on_gpu else 64)


def our_steps(tell: Tell, row: Row, machine: dict[str, Any], work: Path, on_gpu: bool) -> None:
    """A row that our own training runs.

    Raises:
        InputError: the training refuses the row's flags here.
    """
    train.load = load_random
    if not row.fused_lora:
        use_plain_lora()
    if row.plain_loss:
        use_plain_loss()
    be_the_only_rank()
    with tempfile.TemporaryDirectory(dir=work) as output:
        sys.argv[1:] = flags_of(row, work, output, on_gpu)
        model_args, data_args, args = parse_flags()
        check_flags(model_args, data_args, args)
        trainer = train.prepare(model_args, data_args, args, None, PreemptionCallback())
        if not row.plain_loss:
            tell("memory_gib_by_estimate", round(estimated(trainer) / 2**30, 2))
        trainer.add_callback(StepClock(tell, row, machine, step_flops(trainer.model, work, row.samples)))
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        tell("loss", round(logs[-1]["loss"], 4))
        tell("data_wait", round(logs[-1]["data_wait"], 4))


def flags_of(row: Row, work: Path, output: str, on_gpu: bool) -> list[str]:
    """Those that run_zero2.sh gives, on one GPU, and the row's own."""
    steps = row.warm + row.steps
    flags = {"model_name_or_path": work / "llava", "data_path": work / "data", "output_dir": output}
    flags |= {"train_type": row.train_type, "deepspeed": ROOT / row.deepspeed, "learning_rate": RATES[row.train_type]}
    flags |= {"per_device_train_batch_size": row.batch, "gradient_accumulation_steps": row.accumulation}
    flags |= {"max_steps": steps + PROFILED}
    flags |= {"logging_steps": row.steps // 2, "save_strategy": "no", "report_to": "none", "check_resources": "false"}
    flags |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.03}
    if on_gpu:
        workers = min(10, len(os.sched_getaffinity(0)))
        flags |= {"bf16": "true", "dataloader_num_workers": workers, "dataloader_persistent_workers": "true"}
    else:
        flags |= {"use_cpu": "true", "dataloader_pin_memory": "false"}
    return [*(word for name, value in flags.items() for word in (f"--{name}", str(value))), *row.flags]


def be_the_only_rank() -> None:
    """What a launcher would set; any free port."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def estimated(trainer: LlavaTrainer) -> float:
    """Bytes of the step's peak, as train_llava.estimate works them out."""
    args, collator = trainer.args, trainer.data_collator
    batch = longest_batch(trainer.train_dataset, collator.encoder, args.train_batch_size)
    memory = MemoryModel.of(trainer.model, on_gpu=not args.use_cpu)
    zero = zero_of_run(args, memory, trainer.model.config.text_config.hidden_size)
    return memory.peak(batch, zero, args.gradient_checkpointing)


def step_flops(model: nn.Module, work: Path, batch: int) -> float:
    """FLOPs that a step cannot do without; all samples are of one size."""
    collator = LlavaCollator(load_processor(work / "llava"), for_trainer=True)
    counts = collator([LlavaDataset(work / "data")[0]] * batch)["counts"]
    return StepFlops.count(model).of(**counts)


def trl_steps(tell: Tell, row: Row, machine: dict[str, Any], work: Path, on_gpu: bool) -> None:
    """The same batches by TRL's SFTTrainer, with its own collator and loss. Its gradient checkpointing, on by default,
    is off as for all."""
    from trl import SFTConfig, SFTTrainer

    from benchmarks.speed.messages import prompts_and_completions

    be_the_only_rank()
    with tempfile.TemporaryDirectory(dir=work) as output:
        flags: dict[str, Any] = {"output_dir": output, "max_steps": row.warm + row.steps + PROFILED}
        flags |= {"per_device_train_batch_size": row.batch, "deepspeed": str(ROOT / row.deepspeed), "bf16": on_gpu}
        flags |= {"use_cpu": not on_gpu, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}
        flags |= {"learning_rate": float(RATES[row.train_type]), "logging_steps": row.steps, "disable_tqdm": True}
        args = SFTConfig(**flags, dataloader_num_workers=min(10, len(os.sched_getaffinity(0))) if on_gpu else 0)
        train.set_up_deepspeed(args, row.train_type)
        model, processor = load_random(work / "llava", dtype=torch.bfloat16 if on_gpu else torch.float32)
        model = apply_train_type(model, row.train_type, LoraSettings())
        clock = StepClock(tell, row, machine, step_flops(model, work, row.batch))
        data = prompts_and_completions(work / "data")
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=processor, callbacks=[clock])
        trainer.train()
        tell("loss", round(next(log["loss"] for log in trainer.state.log_history[::-1] if "loss" in log), 4))


def answers(tell: Tell, row: Row, machine: dict[str, Any], work: Path, on_gpu: bool) -> None:
    """Answers to a batch of questions, from images to text: train_llava's `generate`, and transformers' own."""
    model, processor = load_random(work / "llava", dtype=torch.bfloat16 if on_gpu else torch.float32)
    images = [open_image(file) for file in sorted((work / "data" / "images").iterdir())[: row.batch]]
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

    def ours() -> None:
        generate(model, processor, [ask(QUESTION, [image]) for image in images], **length)

    @torch.inference_mode()
    def plain() -> None:
        batch = processor(images=images, text=[prompt] * len(images), return_tensors="pt")
        ids = model.generate(**batch.to(model.device, model.dtype), do_sample=False, **length)
        processor.batch_decode(ids, skip_special_tokens=True)

    for name, way in (("train_llava", ours), ("transformers", plain)):
        way()
        synchronize()
        began = time.perf_counter()
        way()
        synchronize()
        tell(f"tokens_per_second, {name}", round(len(images) * NEW_TOKENS / (time.perf_counter() - began), 1))
    tell("memory_gib", round(peak_memory_gb() * 1e9 / 2**30, 2))
