"""Trains the demo's two halves from nothing: a CLIP on images with captions, a Qwen2 chat model on text alone.

    python -m demo.pretrain

writes `demo/clip/` (a `CLIPModel` folder with its image processor), `demo/qwen/` (a Qwen2 chat folder with its own
byte-level BPE) and `demo/pretrain.json` (command, machine, time, figures). The committed weights come from this
command, both halves at a time with --only on one core each. Neither half has met the other, a held-out scan or a
held-out pair of shape and colour.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.result import machine
from demo.language_half import train_language_model
from demo.tokenizer import make_tokenizer
from demo.vision_half import train_clip

FOLDER = Path(__file__).parent
VOCAB_ROWS = 896  # like Qwen's, the table has more rows than tokens, so `<image>` finds a free one


def figures(model: nn.Module, started: float, half: str, steps: int, measured: dict[str, Any]) -> dict:
    """What is kept beside the weights of one half."""
    return {
        "command": f"python -m demo.pretrain --only {half}",
        "seed": 0,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        **measured,
        "seconds": round(time.perf_counter() - started),
        **machine(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="where clip/, qwen/ and pretrain.json go")
    parser.add_argument("--only", choices=["clip", "qwen"], help="train one half and leave the other as it is")
    parser.add_argument("--clip_steps", type=int, default=8000)
    parser.add_argument("--language_steps", type=int, default=9000)
    args = parser.parse_args()

    tokenizer = make_tokenizer()
    report = {}
    args.output_dir.mkdir(parents=True, exist_ok=True)

    if args.only != "clip":
        torch.manual_seed(0)
        started = time.perf_counter()
        print("Qwen2 on text alone")
        model, measured = train_language_model(args.language_steps, VOCAB_ROWS, tokenizer)
        model.to(torch.bfloat16).save_pretrained(args.output_dir / "qwen")  # bf16, as Qwen1.5 is published
        tokenizer.save_pretrained(args.output_dir / "qwen")
        report["qwen"] = figures(model, started, "qwen", args.language_steps, measured)

    if args.only != "qwen":
        torch.manual_seed(0)
        started = time.perf_counter()
        print("CLIP on images and captions")
        model, processor, measured = train_clip(args.clip_steps, VOCAB_ROWS, tokenizer)
        model.save_pretrained(args.output_dir / "clip")
        processor.save_pretrained(args.output_dir / "clip")
        report["clip"] = figures(model, started, "clip", args.clip_steps, measured)

    report_file = args.output_dir / "pretrain.json"  # read now: the other half may have ended meanwhile
    report = (json.loads(report_file.read_text()) if report_file.is_file() else {}) | report
    report_file.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
