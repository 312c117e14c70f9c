"""Builds the real model's shapes with random weights, saves, reloads, trains and asks it: no download, no GPU.

    python -m benchmarks.full_size.cpu [--work_dir DIR] [--json FILE]

CLIP-ViT-L/336 and Qwen1.5-4B-Chat from their configs, in bf16, with Qwen's real vocabulary (pip install dashscope
for it). One LoRA step goes through run_zero2.sh on one rank, with real DeepSpeed. Writes
benchmarks/results/full_size.json, unless --json names another file. Needs 9 GB of disk, 20 GB of memory, and CPU
cores for some minutes.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.full_size.model import FULL_SIZE, write_images
from benchmarks.result import RESULTS, ROOT, head, parser, write
from benchmarks.script import read_log
from tests.qwen_tokenizer import qwen_tokenizer

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


def build_command(folder: Path) -> list[str]:
    """The words of the command that builds the model in `folder`/llava; lays Qwen's half ready."""
    vision, language = FULL_SIZE[0], folder / "qwen"
    shutil.copytree(FULL_SIZE[1], language)
    qwen_tokenizer().save_pretrained(language)
    flags = ["--vision_model_name_or_path", str(vision), "--random_weights"]
    flags += ["--language_model_name_or_path", str(language), "--dtype", "bfloat16"]
    return [sys.executable, "-m", "train_llava.build_model", *flags, "--output_dir", str(folder / "llava")]


def train_one_step(work: Path) -> tuple[dict[str, float], str]:
    """A LoRA step on one image and its caption, through the script that trains in earnest."""
    write_images(work / "data", 1)
    flags = ["--bf16", "true", "--max_steps", "1", "--logging_steps", "1", "--save_strategy", "no"]
    flags += ["--lr_scheduler_type", "constant", "--warmup_steps", "0"]  # so that the one step moves the adapter
    flags += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--report_to", "none"]
    names = {"MODEL": work / "llava", "DATA": work / "data", "OUTPUT_DIR": work / "adapter"}
    places = {name: str(path) for name, path in names.items()}
    return measured("bash", str(ROOT / "run_zero2.sh"), *flags, NUM_PROCESSES="1", TRAIN_TYPE="use_lora", **places)


def main() -> None:
    flags = parser(__doc__, "--json", RESULTS / "full_size.json")
    flags.add_argument("--work_dir", help="a disk with 9 GB free; by default the temporary folder's")
    args = flags.parse_args()
    result = head(__doc__)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        work = Path(folder)
        result["build_save_and_compare"], printed = measured(*build_command(work))
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
    write(args.json, result)
    print(json.dumps(result, indent=2))
    if result["peak_gb"] > LIMIT_GB:
        sys.exit(f"more than {LIMIT_GB} GB")


if __name__ == "__main__":
    main()
