"""Builds the real model's shapes with random weights, saves, reloads, trains and asks it: no download, no GPU.

    python -m benchmarks.full_size [--work_dir DIR]

CLIP-ViT-L/336 and Qwen1.5-4B-Chat from their configs, in bf16, with Qwen's real vocabulary (pip install dashscope
for it). One LoRA step goes through run_zero2.sh on one rank, with real DeepSpeed. Writes
benchmarks/results/full_size.json; needs 9 GB of disk, 20 GB of memory, and CPU cores for some minutes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.machine import machine
from benchmarks.qwen_tokenizer import qwen_tokenizer
from benchmarks.script import read_log

HERE = Path(__file__).parent
ROOT = HERE.parent
LIMIT_GB = 20
EVERY = 0.5  # seconds between two looks at the memory
FORWARD = """
import sys, time, torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from PIL import Image
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
content = [{"type": "image"}, {"type": "text", "text": "Describe this image. " * 9}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=Image.new("RGB", (640, 480), "teal"), text=text, return_tensors="pt").to(dtype=model.dtype)
with torch.no_grad():
    logits = model(**inputs).logits
assert torch.isfinite(logits).all()
inner = model.model
for name, part in (("all", model), ("vision", inner.vision_tower), ("projector", inner.multi_modal_projector)):
    print(name, sum(p.numel() for p in part.parameters()))
print("tokens", inputs.input_ids.shape[1])
"""


def make_full_size(folder: Path) -> list[str]:
    """The words of the command that builds the full-size model in `folder`/llava; lays Qwen's half ready."""
    language = folder / "qwen"
    shutil.copytree(HERE / "full_size_configs" / "qwen", language)
    qwen_tokenizer().save_pretrained(language)
    flags = ["--vision_model_name_or_path", str(HERE / "full_size_configs" / "clip"), "--random_weights"]
    flags += ["--language_model_name_or_path", str(language), "--dtype", "bfloat16"]
    return [sys.executable, "-m", "train_llava.build_model", *flags, "--output_dir", str(folder / "llava")]


def make_images(folder: Path, count: int) -> None:
    """`count` JPEG images of 336 x 336 noise with captions of 20 words, as LLaVA-CC3M-Pretrain-595K lays them out."""
    rng, records = np.random.default_rng(0), []
    words = ["a", "house", "beside", "the", "river", "under", "tall", "green", "trees", "and", "blue", "sky"]
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(0, 256, (21, 21, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((336, 336)).save(folder / "images" / f"{i}.jpg")
        question = {"from": "human", "value": "<image>\nProvide a brief description of the given image."}
        answer = {"from": "gpt", "value": " ".join(rng.choice(words, 20))}
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": [question, answer]})
    (folder / "chat.json").write_text(json.dumps(records))


def measured(*command: str, **variables: str) -> tuple[dict[str, float], str]:
    """Runs a command that must succeed: its seconds, the most memory that it and its children held together (GB), and
    its output. Memory shared by several processes is counted once (proportional set size, Linux's proc(5))."""
    start, most = time.perf_counter(), 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            most = max(most, memory_of(psutil.Process(process.pid)))
            time.sleep(EVERY)
        output.seek(0)
        printed = output.read()
    if process.returncode:
        sys.exit(printed)
    return {"seconds": round(time.perf_counter() - start), "peak_gb": round(most / 1e9, 2)}, printed


def memory_of(process: psutil.Process) -> int:
    """Bytes that a process and all that it started hold now."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_full_info().pss
    except psutil.Error:  # one has just ended
        pass
    return total


def train_one_step(work: Path) -> tuple[dict[str, float], str]:
    """A LoRA step on one image and its caption, through the script that trains in earnest."""
    make_images(work / "data", 1)
    flags = ["--bf16", "true", "--max_steps", "1", "--logging_steps", "1", "--save_strategy", "no"]
    flags += ["--lr_scheduler_type", "constant", "--warmup_steps", "0"]  # so that the one step moves the adapter
    flags += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--report_to", "none"]
    names = {"MODEL": work / "llava", "DATA": work / "data", "OUTPUT_DIR": work / "adapter"}
    places = {name: str(path) for name, path in names.items()}
    return measured("bash", str(ROOT / "run_zero2.sh"), *flags, NUM_PROCESSES="1", TRAIN_TYPE="use_lora", **places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", help="a disk with 9 GB free; by default the temporary folder's")
    args = parser.parse_args()
    result: dict[str, Any] = {"command": "python -m benchmarks.full_size", **machine()}
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        work = Path(folder)
        result["build_save_and_compare"], printed = measured(*make_full_size(work))
        print(printed)
        result["reload_and_forward"], printed = measured(sys.executable, "-c", FORWARD, str(work / "llava"))
        counts = {words[0]: int(words[1]) for line in printed.splitlines() if len(words := line.split()) == 2}
        result["one_lora_step"], printed = train_one_step(work)
        print(printed)
        (log,) = (log for log in read_log(work / "adapter") if "loss" in log)
        result["one_lora_step"] |= {"loss": round(log["loss"], 4), "gradient_norm": round(log["grad_norm"], 4)}
        ask = ("--model_name_or_path", str(work / "adapter"), "--image", str(work / "data" / "images" / "0.jpg"))
        ask += ("--prompt", "What is this?", "--max_new_tokens", "8")
        result["one_answer_of_8_tokens"], printed = measured(sys.executable, "-m", "train_llava.infer", *ask)
        print(printed)
    for name, count in (("parameters", "all"), ("vision_parameters", "vision"), ("projector_parameters", "projector")):
        result[name] = counts[count]
    result["tokens_of_the_forward_pass"] = counts["tokens"]
    result["peak_gb"] = max(stage["peak_gb"] for stage in result.values() if isinstance(stage, dict))
    (HERE / "results" / "full_size.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if result["peak_gb"] > LIMIT_GB:
        sys.exit(f"more than {LIMIT_GB} GB")


if __name__ == "__main__":
    main()
