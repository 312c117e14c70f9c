"""How long a training step takes: the original's way, plain Hugging Face, TRL and ours on the same model and data.

    pip install trl==1.16.* dashscope
    python -m benchmarks.speed.train_step [--json benchmarks/results/train_step.json] [--profile FILE]

A LLaVA with random weights in fp32: CLIP of 6 layers (hidden 256, 168 px: 144 image tokens), Qwen2 of 8 layers (hidden
512) with the real vocabulary of 151,936; JPEGs with captions like CC3M's, four a batch, in one order. Every run is a
process of its own and the contenders take turns; medians of all steps but the first three of each run. All train the
same parameters with the same optimizer, without dropout, so that their losses must agree. The memory is the process's
most, of which some 0.6 GB are Python and its libraries.

- original: its collator (benchmarks/speed/original_way.py) and transformers' Trainer, which computes every logit.
- plain: the processor's chat template on whole batches, and Trainer.
- TRL: SFTTrainer with its own collator; its gradient checkpointing and bf16, on by default, are off as for all. Its
  fused head computes logits at every position on a CPU, with Triton only at supervised ones, so this ratio does not
  carry over to GPUs.

--profile writes where the time of our own steps goes, by operation and then by shape, as torch's profiler sees it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaProcessor, Qwen2Config, Trainer, TrainerCallback
from transformers.utils import logging

from benchmarks.inputs import write_photos
from benchmarks.result import head, parser, table, write
from benchmarks.script import last_line
from benchmarks.speed.messages import messages_of, prompts_and_completions
from benchmarks.speed.original_way import Original
from tests.qwen_tokenizer import qwen_tokenizer
from train_llava.build_model import build_llava
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.folder import save_llava
from train_llava.model.freeze import LoraSettings, apply_train_type
from train_llava.model.load import load
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.processing.chat import IGNORE_INDEX
from train_llava.training.callbacks import peak_memory_gb
from train_llava.training.trainer import LlavaTrainer

CONTENDERS = ("original", "plain", "TRL", "ours")
TRAIN_TYPES = ("use_lora", "freeze_vision", "projector")
BATCH, STEPS, WARM, ROUNDS = 4, 10, 3, 2
# ChatML that ends at end-of-turn, with answers marked: all contenders then supervise the same tokens.
TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{%- if not loop.last or add_generation_prompt %}{{- '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def build(folder: Path) -> None:
    """The model's folder, from configs alone."""
    vision, language = folder / "vision", folder / "language"
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    CLIPVisionConfig(**size, image_size=168, patch_size=14).save_pretrained(vision)
    CLIPImageProcessorPil(size={"shortest_edge": 168}, crop_size={"height": 168, "width": 168}).save_pretrained(vision)
    size = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    Qwen2Config(**size, num_key_value_heads=8, vocab_size=151_936, tie_word_embeddings=False).save_pretrained(language)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(language)
    torch.manual_seed(0)
    save_llava(*build_llava(vision, language, torch.float32, random_weights=True), folder / "model")


class Plain:
    """Records as they are, and a collator that leaves all to the processor."""

    def __init__(self, folder: Path, processor: LlavaProcessor) -> None:
        self.records, self.folder, self.processor = json.loads((folder / "chat.json").read_text()), folder, processor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        chats = []
        for record in records:
            path = str(self.folder / "images" / record["image"])
            prompt, answer = messages_of(record)
            prompt["content"][1]["image"] = path
            chats.append([prompt, answer])
        batch = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
        answers = torch.as_tensor(batch.pop("assistant_masks")).bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~answers, IGNORE_INDEX)}


def trainer_of(way: str, train_type: str, folder: Path, callback: TrainerCallback) -> Trainer:
    """A contender, ready to train."""
    torch.manual_seed(0)
    model, processor = load(folder / "model", dtype=torch.float32)
    model = apply_train_type(model, train_type, LoraSettings(lora_dropout=0.0))
    flags: dict[str, Any] = {"output_dir": str(folder / "out"), "max_steps": STEPS, "learning_rate": 1e-4}
    flags |= {"per_device_train_batch_size": BATCH, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    flags |= {"use_cpu": True, "disable_tqdm": True, "train_sampling_strategy": "sequential"}
    flags |= {"dataloader_pin_memory": False, "remove_unused_columns": False}
    data, common = folder / "data", {"processing_class": processor, "callbacks": [callback]}
    if way == "TRL":
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(**flags, gradient_checkpointing=False, bf16=False)
        return SFTTrainer(model, args, train_dataset=prompts_and_completions(data), **common)
    args = LlavaTrainingArguments(**flags)
    if way == "ours":
        dataset, collator, kind = LlavaDataset(data), LlavaCollator(processor, for_trainer=True), LlavaTrainer
    else:
        collator = dataset = (Original if way == "original" else Plain)(data, processor)
        kind = Trainer
    return kind(model, args, train_dataset=dataset, data_collator=collator, **common)


class Clock(TrainerCallback):
    """When each step began and ended, and the processor's time by then; between two steps the next batch is made."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended: list[float] = []
        self.processor: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.began.append(time.perf_counter())
        self.processor.append(time.process_time())

    def on_step_end(self, *args, **kwargs) -> None:
        self.ended.append(time.perf_counter())


def run(way: str, train_type: str, folder: Path) -> dict[str, Any]:
    """One contender's steps, in this process."""
    logging.set_verbosity_error()
    clock = Clock()
    trainer = trainer_of(way, train_type, folder, clock)
    trainer.train()
    began, ended = clock.began[WARM:], clock.ended[WARM:]
    return {
        "step_seconds": [after - before for before, after in pairwise(began)],
        "cpu_seconds": [after - before for before, after in pairwise(clock.processor[WARM:])],
        "data_seconds": [after - before for before, after in zip(ended, began[1:], strict=False)],
        "peak_memory_gb": peak_memory_gb(),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log][:5],
    }


def profiled(train_type: str, folder: Path) -> str:
    """Our own steps by operation: a table of torch's profiler."""
    steps = schedule(wait=0, warmup=WARM, active=STEPS - WARM + 1)  # one more than there are: it would start anew
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, schedule=steps) as profiler:

        class Steps(TrainerCallback):
            def on_step_end(self, *args, **kwargs) -> None:
                profiler.step()

        trainer_of("ours", train_type, folder, Steps()).train()
    parts = [f"{train_type}: share of the time, milliseconds a step, calls a step, operation, shapes of its inputs"]
    for by_shape in (False, True):
        events = profiler.key_averages(group_by_input_shape=by_shape)
        total = sum(event.self_cpu_time_total for event in events)
        for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:15]:
            milliseconds, calls = event.self_cpu_time_total / 1000 / (STEPS - WARM), event.count / (STEPS - WARM)
            shapes = " ".join(str(shape) for shape in event.input_shapes if shape)[:80] if by_shape else ""
            share = f"{event.self_cpu_time_total / total:>6.1%}{milliseconds:>9.1f}{calls:>7.0f}"
            parts.append(f"{share}  {event.key.removeprefix('aten::')[:44]:<44}  {shapes}".rstrip())
        parts.append("")
    return "\n".join(parts) + "\n"


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table from a contender's runs."""

    def middle(name: str) -> float:
        return statistics.median(value for found in runs for value in found[name])

    return {
        "seconds_per_step": round(middle("step_seconds"), 3),
        "cpu_seconds_per_step": round(middle("cpu_seconds"), 3),
        "samples_per_second": round(BATCH / middle("step_seconds"), 2),
        "data_seconds_per_step": round(middle("data_seconds"), 4),
        "peak_memory_gb": round(max(found["peak_memory_gb"] for found in runs), 2),
        "losses": [round(loss, 5) for loss in runs[0]["losses"]],
    }


def compare(train_type: str, folder: Path) -> dict[str, Any]:
    """All contenders with one train_type, in turns; their losses must agree."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in CONTENDERS}
    for _ in range(ROUNDS):
        for way in CONTENDERS:
            runs[way].append(last_line("benchmarks.speed.train_step", "--run", way, train_type, folder))
    rows = {way: summary(found) for way, found in runs.items()}
    for way, row in rows.items():
        same = [abs(a - b) <= 1e-3 * b for a, b in zip(row["losses"], rows["plain"]["losses"], strict=True)]
        if not all(same):
            raise RuntimeError(f"{way}: losses {row['losses']}, and of plain {rows['plain']['losses']}")
        for name in ("seconds_per_step", "cpu_seconds_per_step"):
            row[f"ours_over_this, {name}"] = round(rows["ours"][name] / row[name], 3)
    return rows


def report(train_type: str, rows: dict[str, Any]) -> None:
    """Prints a table."""
    heads = ("s/step", "CPU s", "samples/s", "data s", "GB", "ours/this", "CPU")
    print(f"{train_type:<14}{''.join(f'{head:>11}' for head in heads)}   first losses")
    for way, row in rows.items():
        numbers = [value for value in row.values() if not isinstance(value, list)]
        print(f"{way:<14}{''.join(f'{number:>11.3f}' for number in numbers)}   {row['losses']}", flush=True)


def markdown(result: dict[str, Any]) -> str:
    """Seconds per step and memory of all contenders, a row per train_type."""
    heads = ["seconds per step, GB", "the original's way", "Trainer", "TRL", "ours", "ours / original", "ours / TRL"]
    lines = []
    for train_type in TRAIN_TYPES:
        rows = result[train_type]
        cells = [f"{rows[way]['seconds_per_step']:.2f}, {rows[way]['peak_memory_gb']:.2f}" for way in CONTENDERS]
        cells += [f"{rows[way]['ours_over_this, seconds_per_step']:.2f}" for way in ("original", "TRL")]
        lines.append([f"`{train_type}`", *cells])
    return table(heads, lines)


def main() -> None:
    flags = parser(__doc__, "--json")
    flags.add_argument("--run", nargs=3, metavar=("WAY", "TRAIN_TYPE", "FOLDER"), help=argparse.SUPPRESS)
    flags.add_argument("--profile", type=Path)
    args = flags.parse_args()
    if args.run:
        way, train_type, folder = args.run
        print(json.dumps(run(way, train_type, Path(folder))))
        return
    result = head(__doc__) | {"rounds": ROUNDS, "torch_threads": torch.get_num_threads(), "batch": BATCH}
    result["load_average_at_start"] = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        write_photos(folder / "data", BATCH * STEPS)
        if args.profile:
            args.profile.write_text("".join(profiled(train_type, folder) for train_type in TRAIN_TYPES))
            return
        for train_type in TRAIN_TYPES:
            result[train_type] = compare(train_type, folder)
            report(train_type, result[train_type])
    print(markdown(result))
    write(args.json, result)


if __name__ == "__main__":
    main()
