"""How long a training step takes: the original's way, plain Hugging Face, TRL and ours on the same model and data.

    pip install trl==1.16.* dashscope
    python -m benchmarks.train_step [--json benchmarks/results/train_step.json]

A LLaVA with random weights in fp32: CLIP of 6 layers (hidden 256, 168 px: 144 image tokens), Qwen2 of 8 layers (hidden
512) with the real vocabulary of 151,936; JPEGs with captions like CC3M's, four a batch, in one order. Every run is a
process of its own and the contenders take turns; medians of all steps but the first three of each run. They train the same parameters with
the same optimizer, without dropout, so that their losses must agree.

- original: its collator (see benchmarks.data_pipeline) and transformers' Trainer, which computes every logit.
- plain: the processor's chat template on whole batches, and Trainer.
- TRL: SFTTrainer with its own collator; its gradient checkpointing and bf16, on by default, are off as for all. Its
  fused head scores every position on a CPU; with Triton it scores answers alone, so its ratio here is no GPU's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaProcessor, Qwen2Config, Trainer, TrainerCallback
from transformers.utils import logging

from benchmarks.data_pipeline import Original, write
from benchmarks.machine import machine
from benchmarks.qwen_tokenizer import qwen_tokenizer
from train_llava.arguments import LlavaTrainingArguments, ModelArguments
from train_llava.build_model import CONTENT_PARTS, build_llava, save_llava
from train_llava.callbacks import peak_memory_gb
from train_llava.chat import IGNORE_INDEX
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.load import load
from train_llava.train_type import apply_train_type
from train_llava.trainer import LlavaTrainer

ROOT = Path(__file__).parent.parent
WAYS = ("original", "plain", "TRL", "ours")
TRAIN_TYPES = ("use_lora", "freeze_vision", "projector")
BATCH, STEPS, WARM, ROUNDS = 4, 12, 3, 3
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


def messages_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Question and answer as chat messages whose content is a list of parts."""
    question, answer = (turn["value"] for turn in record["conversations"])
    parts = [{"type": "text", "text": question.removesuffix("\n<image>")}, {"type": "image"}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def trainer_of(way: str, train_type: str, folder: Path, callback: TrainerCallback) -> Trainer:
    """A contender, ready to train."""
    torch.manual_seed(0)
    model, processor = load(folder / "model", dtype=torch.float32)
    model = apply_train_type(model, ModelArguments("", train_type=train_type, lora_dropout=0.0))
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


def prompts_and_completions(folder: Path) -> datasets.Dataset:
    """The form of data for which SFTTrainer supervises answers alone."""
    rows = []
    for record in json.loads((folder / "chat.json").read_text()):
        prompt, completion = messages_of(record)
        images = [str(folder / "images" / record["image"])]
        rows.append({"prompt": [prompt], "completion": [completion], "images": images})
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


class Clock(TrainerCallback):
    """When each step began and ended; between two steps the next batch is made."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.began.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs) -> None:
        self.ended.append(time.perf_counter())


def run(way: str, train_type: str, folder: Path) -> dict[str, Any]:
    """One contender's steps, in this process."""
    logging.set_verbosity_error()
    clock = Clock()
    trainer = trainer_of(way, train_type, folder, clock)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    began, ended = clock.began[WARM:], clock.ended[WARM:]
    return {
        "step_seconds": [after - before for before, after in zip(began, began[1:], strict=False)],
        "data_seconds": [after - before for before, after in zip(ended, began[1:], strict=False)],
        "peak_memory_gb": peak_memory_gb(),
        "losses": losses[:5],
    }


def in_own_process(way: str, train_type: str, folder: Path) -> dict[str, Any]:
    """The same in a process of its own, which answers in its last line."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--run", way, train_type, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way}, {train_type}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table from a contender's runs."""
    seconds = statistics.median(second for found in runs for second in found["step_seconds"])
    data = statistics.median(second for found in runs for second in found["data_seconds"])
    return {
        "seconds_per_step": round(seconds, 3),
        "samples_per_second": round(BATCH / seconds, 2),
        "data_seconds_per_step": round(data, 4),
        "peak_memory_gb": round(max(found["peak_memory_gb"] for found in runs), 2),
        "losses": [round(loss, 5) for loss in runs[0]["losses"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=3, metavar=("WAY", "TRAIN_TYPE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.run:
        way, train_type, folder = args.run
        print(json.dumps(run(way, train_type, Path(folder))))
        return
    result: dict[str, Any] = {"command": "python -m benchmarks.train_step", **machine(), "rounds": ROUNDS}
    result |= {"torch_threads": torch.get_num_threads(), "batch": BATCH, "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        write(folder / "data", BATCH * STEPS)
        for train_type in TRAIN_TYPES:
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for _ in range(ROUNDS):
                for way in WAYS:
                    runs[way].append(in_own_process(way, train_type, folder))
            rows = {way: summary(found) for way, found in runs.items()}
            losses = [torch.tensor(row["losses"]) for row in rows.values()]
            for way, other in zip(WAYS, losses, strict=True):
                torch.testing.assert_close(other, losses[0], rtol=1e-3, atol=1e-3, msg=f"{way}: other losses")
            result[train_type] = rows
            report(train_type, rows)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def report(train_type: str, rows: dict[str, dict[str, Any]]) -> None:
    """Adds our ratio to each row, and prints them."""
    print(f"{train_type:<16}{'s/step':>8}{'samples/s':>11}{'data s':>9}{'GB':>7}{'ours / this':>13}   first losses")
    for way, row in rows.items():
        row["ours_over_this"] = round(rows["ours"]["seconds_per_step"] / row["seconds_per_step"], 3)
        numbers = (
            f"{row['seconds_per_step']:>8.3f}{row['samples_per_second']:>11.2f}{row['data_seconds_per_step']:>9.3f}"
        )
        numbers += f"{row['peak_memory_gb']:>7.2f}{row['ours_over_this']:>13.3f}"
        print(f"{way:<16}{numbers}   {' '.join(f'{loss:.4f}' for loss in row['losses'])}", flush=True)


if __name__ == "__main__":
    main()
