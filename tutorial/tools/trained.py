"""The demo's trained LLaVA, for lessons that look into one."""

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from train_llava.build_model import build_llava
from tutorial.tools.quiet import quiet

DEMO = Path(__file__).parents[2] / "demo"


def trained_llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """What `bash run_zero2.sh` trains, with its adapter merged into it, and its processor.

    It is in float32, so that two ways to compute the same can be compared; no weight asks for a gradient.
    """
    quiet()
    from peft import PeftModel  # importing it is what makes other packages give their hints

    built, processor = build_llava(DEMO / "clip", DEMO / "qwen", dtype=torch.float32)
    llava = PeftModel.from_pretrained(built, DEMO / "trained").merge_and_unload()
    return llava.requires_grad_(False).eval(), processor
