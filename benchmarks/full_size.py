"""Builds the real model's shapes with random weights, saves, reloads and runs it: the whole build without a download.

    python -m benchmarks.full_size [--work_dir DIR]

CLIP-ViT-L/336 and Qwen1.5-4B-Chat from their configs, in bf16, with Qwen's real vocabulary (pip install dashscope
for it). Writes benchmarks/results/full_size.json; needs 9 GB of disk, and CPU cores for some minutes.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.qwen_tokenizer import qwen_tokenizer

HERE = Path(__file__).parent
FORWARD = """
import sys, time, torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from PIL import Image
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
content = [{"type": "image"}, {"type": "text", "text": "Describe this picture. " * 9}]
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


def timed(*command: str) -> tuple[float, str]:
    """Seconds and output of a command that must succeed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", help="a disk with 9 GB free; by default the temporary folder's")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        language, model = f"{work}/qwen", f"{work}/llava"
        shutil.copytree(HERE / "full_size_configs" / "qwen", language)
        qwen_tokenizer().save_pretrained(language)
        flags = ("--vision_model_name_or_path", str(HERE / "full_size_configs" / "clip"), "--random_weights")
        flags += ("--language_model_name_or_path", language, "--dtype", "bfloat16", "--output_dir", model)
        build_seconds, printed = timed("-m", "train_llava.build_model", *flags)
        print(printed)
        build_peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        forward_seconds, printed = timed("-c", FORWARD, model)
        counts = {name: int(count) for name, count in map(str.split, printed.splitlines())}
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    result = {
        "command": "python -m benchmarks.full_size",
        **machine(),
        "parameters": counts["all"],
        "vision_parameters": counts["vision"],
        "projector_parameters": counts["projector"],
        "tokens_of_the_forward_pass": counts["tokens"],
        "build_save_compare_and_answer_seconds": round(build_seconds),
        "build_peak_gb": round(build_peak * 1024 / 1e9, 2),
        "reload_and_forward_seconds": round(forward_seconds),
        "peak_gb": round(peak * 1024 / 1e9, 2),
    }
    (HERE / "results" / "full_size.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
