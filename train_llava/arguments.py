"""The flags of `python -m train_llava.train`: ours, and all of transformers' TrainingArguments."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from train_llava.command import InputError

MAX_BAD_IMAGES = 0.001  # the default of --max_bad_images


def flag(help: str, **kwargs) -> object:
    """A field with the text that --help shows."""
    return field(metadata={"help": help}, **kwargs)


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = flag("a LLaVA folder, as train_llava.build_model writes it")
    attn_implementation: Literal["sdpa", "flash_attention_2"] = flag(
        "attention of tower and language model: PyTorch's own, or the flash-attn package's (a GPU, --bf16 true)",
        default="sdpa",
    )
    train_type: Literal["use_lora", "freeze_vision", "none", "projector"] = flag(
        "use_lora: adapters in the language model's attention, and the projector; freeze_vision: projector and "
        "language model; none: nothing is frozen; projector: the projector alone",
        default="use_lora",
    )
    # the rest goes with use_lora
    train_projector: bool = flag("train the projector, and save it with the adapter", default=True)
    lora_r: int = flag("rank of the adapters", default=32)
    lora_alpha: int = flag("the adapters are scaled by lora_alpha / lora_r", default=64)
    lora_target_modules: list[str] | None = flag(
        "layers of the language model that get adapters; the matrices of its attention if not given", default=None
    )
    vision_lora: bool = flag("adapters in the vision tower's attention, too", default=False)
    lora_dropout: float = flag("dropout before the adapters", default=0.05)
    load_in_4bit: bool = flag("QLoRA: hold the language model in 4 bits; needs bitsandbytes", default=False)


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: list[str] = flag("one or more [format=]path[:weight]: a folder, a file or a dataset id of the hub")
    eval_data_path: list[str] | None = flag("held-out data, for --eval_strategy steps or epoch", default=None)
    caption_fields: list[str] | None = flag(
        "of caption records: answer=FIELD image=FIELD instruction=FIELD_OR_WORDS", default=None
    )
    on_bad_record: Literal["error", "skip"] = flag("what to do about records to learn nothing from", default="error")
    max_bad_images: float = flag(
        "unreadable pictures to pass over: a number, or below 1 a share", default=MAX_BAD_IMAGES
    )
    model_max_length: int | None = flag("cut longer conversations behind an answer; never a picture", default=None)
    packing: bool = flag("join the samples of a batch into one sequence instead of padding them", default=False)
    sample_steps: int = flag("show captions of a few held-out records every so many steps; 0: never", default=0)
    streaming: bool = flag("read while training, without a copy on the disk; needs --max_steps", default=False)


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """transformers' own flags; these differ in their default or are new."""

    remove_unused_columns: bool = flag("the collator needs every column", default=False)
    projector_learning_rate: float | None = flag("a rate of the projector's own", default=None)
    vision_learning_rate: float | None = flag("a rate of the vision tower's own, with --train_type none", default=None)
    logging_nan_inf_filter: bool = flag(
        # it would make the GPU and Python wait for each other after every batch
        "leave losses that are no numbers out of the log; the training ends at one anyway",
        default=False,
    )
    liger_kernel_config: dict[str, Any] | None = flag(
        # its forward pass would take the place of train_llava/forward.py's, and score every position
        "what --use_liger_kernel leaves out: its loss, so that its norms, rotary embeddings and MLPs are left",
        default_factory=lambda: {"fused_linear_cross_entropy": False},
    )
    check_resources: bool = flag("refuse to start where memory or the disk will not be enough", default=True)
    overwrite_output_dir: bool = flag("replace the run that --output_dir holds instead of refusing", default=False)


def parse_flags() -> tuple[ModelArguments, DataArguments, LlavaTrainingArguments]:
    """The command line's flags.

    Raises:
        InputError: TrainingArguments refuses one, such as --tf32 true on a machine that has no such units.
    """
    try:
        return HfArgumentParser((ModelArguments, DataArguments, LlavaTrainingArguments)).parse_args_into_dataclasses()
    except ValueError as error:
        raise InputError(str(error)) from error


def check_flags(model_args: ModelArguments, args: LlavaTrainingArguments) -> None:
    """Refuses flags that some other part would silently ignore.

    Raises:
        InputError: names the flag.
    """
    check_lora(model_args)
    if args.fsdp and (args.use_cpu or not torch.cuda.is_available()):
        raise InputError("--fsdp: on a CPU accelerate trains with DDP instead. Try --deepspeed ds_configs/zero3.json.")
    check_kernels(model_args, args)


def check_lora(model_args: ModelArguments) -> None:
    """Refuses flags of the adapters where there are none.

    Raises:
        InputError: names the flag.
    """
    for name, value in {"train_projector": False, "vision_lora": True, "load_in_4bit": True}.items():
        if model_args.train_type != "use_lora" and getattr(model_args, name) == value:
            raise InputError(f"--{name} {str(value).lower()} goes with --train_type use_lora alone.")


def check_kernels(model_args: ModelArguments, args: LlavaTrainingArguments) -> None:
    """Refuses kernels that this machine cannot run, before any weights are loaded.

    Raises:
        InputError: names the flag, and what to install or to leave out.
    """
    gpu = torch.cuda.is_available() and not args.use_cpu
    if model_args.attn_implementation == "flash_attention_2":
        if not (gpu and is_flash_attn_2_available()):
            need = "a GPU and pip install flash-attn --no-build-isolation"
            raise InputError(f"--attn_implementation flash_attention_2 needs {need}. Without them leave it at sdpa.")
        if not (args.bf16 or args.fp16):
            raise InputError("--attn_implementation flash_attention_2 computes in half precision: add --bf16 true.")
    if args.use_liger_kernel and not (gpu and is_liger_kernel_available()):
        raise InputError("--use_liger_kernel true needs a GPU and pip install liger-kernel. Without them leave it out.")
