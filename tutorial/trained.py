"""The demo's trained LLaVA, for lessons that look into one."""

import logging
from pathlib import Path

import torch
import transformers
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from train_llava.build_model import build_llava

# a lesson's output is what the lesson prints: no bars, and no hints about packages that it does not use
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from peft import PeftModel  # noqa: E402

DEMO = Path(__file__).parent.parent / "demo"


def trained_llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """What `bash run_zero2.sh` trains, with its adapter merged into it, and its processor.

    It is in float32, so that two ways to compute the same can be compared; no weight asks for a gradient.
    """
    built, processor = build_llava(DEMO / "clip", DEMO / "qwen", dtype=torch.float32)
    llava = PeftModel.from_pretrained(built, DEMO / "trained").merge_and_unload()
    return llava.requires_grad_(False).eval(), processor
