"""The flags of `python -m train_llava.train`: ours, and all of transformers' TrainingArguments.

To add a flag, add a field here. If it changes what is learned, add it to FLAGS in training/resume.py; if it does not go
with another flag, say so in training/flag_checks.py. Then name its test in tests/flag_classes.py.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import DeepSpeedPlugin
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from train_llava.cli import InputError, number, positive
from train_llava.model.freeze import LoraSettings
from train_llava.model.structure import Strategy

MAX_BAD_IMAGES = 0.001  # the default of --max_bad_images


def flag(help: str, read: Callable[[str], Any] | None = None, **kwargs) -> object:
    """A field with the text that --help shows; `read` makes its value of a word, where the type alone does not."""
    return field(metadata={"help": help} | ({"read": read} if read else {}), **kwargs)


AUTO = "auto"  # a value of --per_device_train_batch_size


def number_or_auto(word: str) -> int | str:
    """Reads --per_device_train_batch_size."""
    return word if word == AUTO else positive(word)


@dataclass
class ModelArguments:
    """The flags of the model and of what is trained."""

    model_name_or_path: str = flag("a LLaVA folder, as train_llava.build_model writes it")
    image_aspect_ratio: Literal["as_built", "pad"] = flag(
        "pad: refuse a model that was not built with --image_aspect_ratio pad, where this is chosen",
        default="as_built",
    )
    attn_implementation: Literal["sdpa", "flash_attention_2"] = flag(
        "attention of tower and language model: PyTorch's own, or the flash-attn package's (a GPU, --bf16 true)",
        default="sdpa",
    )
    train_type: Strategy = flag(
        "use_lora: adapters in the language model's attention, and the projector; freeze_vision: projector and "
        "language model; none: nothing is frozen; projector: the projector alone",
        default="use_lora",
    )
    # the rest goes with use_lora
    train_projector: bool = flag(
        "train the projector, and save it with the adapter", default=LoraSettings.train_projector
    )
    lora_r: int = flag("rank of the adapters", default=LoraSettings.lora_r)
    lora_alpha: int = flag("the adapters are scaled by lora_alpha / lora_r", default=LoraSettings.lora_alpha)
    lora_target_modules: list[str] | None = flag(
        "layers of the language model that get adapters, or one regular expression on whole names as PEFT takes it, "
        "for those of the vision tower, too; the matrices of the language model's attention if not given",
        default=None,
    )
    vision_lora: bool = flag("adapters in the vision tower's attention, too", default=LoraSettings.vision_lora)
    lora_dropout: float = flag("dropout before the adapters", default=LoraSettings.lora_dropout)
    use_rslora: bool = flag("scale the adapters by lora_alpha / sqrt(lora_r) instead", default=LoraSettings.use_rslora)
    use_dora: bool = flag("DoRA: a trained length for each output of an adapted layer", default=LoraSettings.use_dora)
    init_lora_weights: str = flag(
        "how the adapters start, without effect at first: true (PEFT's default), gaussian or orthogonal",
        default=LoraSettings.init_lora_weights,
    )
    load_in_4bit: bool = flag("QLoRA: hold the language model in 4 bits; needs bitsandbytes", default=False)

    @property
    def lora(self) -> LoraSettings:
        """Those of these flags that freeze.py wants to know."""
        return LoraSettings(**{each.name: getattr(self, each.name) for each in fields(LoraSettings)})


@dataclass
class DataArguments:
    """The flags of the data."""

    data_path: list[str] = flag("one or more [format=]path[:weight]: a folder, a file or a dataset id of the hub")
    eval_data_path: list[str] | None = flag("held-out data, for --eval_strategy steps or epoch", default=None)
    caption_fields: list[str] | None = flag(
        "of caption records: answer=FIELD image=FIELD instruction=FIELD_OR_WORDS", default=None
    )
    image_folder: str | None = flag(
        "folder of the images that records name, if they are not beside the data", default=None
    )
    on_bad_record: Literal["error", "skip"] = flag("what to do with records that cannot be trained on", default="error")
    max_bad_images: float = flag("unreadable images to pass over: a number, or below 1 a share", default=MAX_BAD_IMAGES)
    model_max_length: int | None = flag("cut longer conversations after an answer, never inside an image", default=None)
    packing: bool = flag("join the samples of a batch into one sequence instead of padding them", default=False)
    sample_steps: int = flag("show captions of a few held-out records every so many steps; 0: never", default=0)
    streaming: bool = flag("leave images in their parquet files, here or on the hub, instead of copying", default=False)


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """transformers' own flags; these differ in their default or are new."""

    remove_unused_columns: bool = flag("the collator needs every column", default=False)
    log_level_replica: str = flag("log level of all ranks but the first", default="error")
    global_batch_size: int | None = flag("samples in a step of all ranks together", default=None, read=positive)
    per_device_train_batch_size: int | str = flag(
        "samples that a rank takes at a time, or auto: the most that fit into its memory, with --global_batch_size",
        default=8,
        read=number_or_auto,
    )
    gradient_accumulation_steps: int | None = flag(
        "how often a rank does so in a step; by default as --global_batch_size asks, or 1", default=None, read=positive
    )
    projector_learning_rate: float | None = flag("learning rate of the projector, if another one", default=None)
    loraplus_lr_ratio: float | None = flag(
        "LoRA+: the learning rate of the adapters' matrices B over that of A; with --train_type use_lora",
        default=None,
        read=number(float, 1, 1e6, "a number from 1 on"),
    )
    tokens_per_batch: int | None = flag(
        "with --packing true: a batch of a GPU is whole conversations of at most so many tokens together",
        default=None,
    )
    vision_learning_rate: float | None = flag(
        "learning rate of the vision tower, if another one; with --train_type none", default=None
    )
    logging_nan_inf_filter: bool = flag(
        # the filter would wait for the GPU after every batch
        "leave losses that are no numbers out of the log; the training ends at one anyway",
        default=False,
    )
    liger_kernel_config: dict[str, Any] | None = flag(
        # its forward pass would take the place of train_llava/model/loss.py's, and score every position
        "options of --use_liger_kernel; by default its loss is off, its norms, rotary embeddings and MLPs are on",
        default_factory=lambda: {"fused_linear_cross_entropy": False},
    )
    eval_generate: bool = flag("at each evaluation ask the held-out questions and score the answers", default=False)
    hub_strategy: str = flag("what --push_to_hub uploads: the whole model, at the end", default="end")
    check_resources: bool = flag("refuse to start where memory or the disk will not be enough", default=True)
    overwrite_output_dir: bool = flag("replace the run that --output_dir holds instead of refusing", default=False)

    def __post_init__(self) -> None:
        """Works out the accumulation, and sets `auto_batch`: whether the micro-batch is still to be chosen; it is 1
        until then. Moves --torch_compile into `compile_options` (None without the flag) for train.compile_layers:
        Trainer would compile the whole model.

        Raises:
            InputError: see `_share_out`.
        """
        accumulation, self.auto_batch = self.gradient_accumulation_steps, self.per_device_train_batch_size == AUTO
        self.per_device_train_batch_size = 1 if self.auto_batch else self.per_device_train_batch_size
        self.gradient_accumulation_steps = accumulation or 1
        super().__post_init__()
        self._share_out(accumulation)
        self.compile_options: dict[str, str | None] | None = None
        if self.torch_compile:
            self.compile_options = {"backend": self.torch_compile_backend, "mode": self.torch_compile_mode}
            self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None

    def _share_out(self, accumulation: int | None) -> None:
        """Shares --global_batch_size out among the ranks, which are known now; `accumulation` is the flag's.

        Raises:
            InputError: it cannot be shared out, or the three flags do not fit.
        """
        samples, ranks, size = self.global_batch_size, self.world_size, self.per_device_train_batch_size
        if self.auto_batch and (samples is None or accumulation):
            raise InputError(
                "--per_device_train_batch_size auto: give --global_batch_size with it, from which the accumulation "
                "follows, and no --gradient_accumulation_steps."
            )
        if samples is None:
            return
        if self.tokens_per_batch is not None:
            raise InputError(f"--global_batch_size {samples}: --tokens_per_batch makes packs. Leave one of them out.")
        if samples % ranks:
            near = [str(n) for n in (samples // ranks * ranks, -(-samples // ranks) * ranks) if n]
            raise InputError(
                f"--global_batch_size {samples} cannot be shared out among {ranks} ranks: give {' or '.join(near)}."
            )
        if accumulation and self.step_size != samples:
            raise InputError(
                f"--gradient_accumulation_steps {accumulation}: {size} x {accumulation} x {ranks} ranks are "
                f"{self.step_size} samples in a step, and --global_batch_size says {samples}. Leave one of them out."
            )
        if size not in self.micro_batches:
            fitting = ", ".join(map(str, self.micro_batches))
            raise InputError(
                f"--per_device_train_batch_size {size} does not divide the {samples // ranks} samples of each of "
                f"{ranks} ranks in a step. Give one of {fitting}, or auto, or another --global_batch_size."
            )
        self.set_micro_batch(size)

    @property
    def micro_batches(self) -> list[int]:
        """The micro-batches that --global_batch_size allows: the divisors of a rank's samples in a step."""
        samples = self.global_batch_size // self.world_size
        return [size for size in range(1, samples + 1) if samples % size == 0]

    def set_micro_batch(self, size: int) -> None:
        """Takes one of `micro_batches`, and accumulates as often as --global_batch_size asks.

        DeepSpeed's settings have read the former numbers. They are made anew as transformers does it when it tries out
        flags (`Trainer._hp_search_setup`).
        """
        self.per_device_train_batch_size = size
        self.gradient_accumulation_steps = self.global_batch_size // (size * self.world_size)
        if self.deepspeed:
            self.hf_deepspeed_config = HfTrainerDeepSpeedConfig(self.deepspeed)
            self.hf_deepspeed_config.trainer_config_process(self)
            self.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=self.hf_deepspeed_config)

    @property
    def order_seed(self) -> int:
        """The seed of the order of records, and of the substitutes for records that cannot be read."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def step_factors(self) -> dict[str, int]:
        """The factors whose product is `step_size`."""
        packs = self.tokens_per_batch is not None
        return {
            "per_device_train_batch_size": 1 if packs else self.train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "ranks": self.world_size,
        }

    @property
    def step_size(self) -> int:
        """Samples in a step of all ranks; with --tokens_per_batch packs."""
        return prod(self.step_factors.values())

    @property
    def step_unit(self) -> str:
        """What `step_size` counts."""
        return "samples" if self.tokens_per_batch is None else "packs"


class FlagParser(HfArgumentParser):
    """A parser whose errors are one sentence each; it takes no abbreviations of flags."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_argument(self, *names, **options) -> argparse.Action:
        """HfArgumentParser takes the type of a field for what reads its value; here `flag` may name something else."""
        if read := options.pop("read", None):
            options["type"] = read
        return super().add_argument(*names, **options)

    def error(self, message: str) -> None:
        """argparse's own would print every flag first."""
        raise InputError(f"{message} (--help lists all flags)")

    def parse(self, renamed: dict[str, str] | None = None) -> tuple[Any, ...]:
        """An instance of each dataclass; `renamed` says what became of flags that are not known any more.

        Raises:
            InputError: a word is unknown, or a value refused, such as --tf32 true where no GPU has such units.
        """
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(return_remaining_strings=True)
        except json.JSONDecodeError as error:
            files = {word: Path(word).read_text(errors="replace") for word in sys.argv if Path(word).is_file()}
            culprit = next((word for word in sys.argv if error.doc in (word, files.get(word))), "a flag")
            raise InputError(f"{culprit}: not JSON ({error})") from error
        except (ValueError, ImportError, OSError) as error:
            raise InputError(str(error)) from error
        if unknown:
            renamed = renamed or {}
            flags = [word[2:].partition("=")[0].replace("-", "_") for word in unknown if word.startswith("--")]
            today = "".join(f"--{name} {renamed[name]}; " for name in flags if name in renamed)
            raise InputError(f"not known: {' '.join(unknown)} ({today}--help lists all flags)")
        return (*parsed,)
