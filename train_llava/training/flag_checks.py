"""Flags that are refused, because some part would ignore them or do them wrong: found out before anything is loaded."""

from importlib import import_module
from pathlib import Path
from typing import Any

from deepspeed.git_version_info import installed_ops
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.utils import cpp_extension
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from train_llava.cli import InputError
from train_llava.model.load import gpu
from train_llava.planning.arguments import DataArguments, LlavaTrainingArguments, ModelArguments
from train_llava.processing.images import FRAMINGS

SAMPLING = ("random", "sequential", "group_by_length")  # of --train_sampling_strategy
# Flags of TrainingArguments that are refused, the value that is not, and why; tests/flag_classes.py has all flags
REFUSED: dict[str, tuple[Any, str]] = {
    "accelerator_config": (None, "the order of records is worked out for the defaults. Leave it out"),
    "auto_find_batch_size": (False, "it would lower the batch in silence. Use --per_device_train_batch_size auto"),
    "batch_eval_metrics": (False, "the held-out loss is a mean over all records. Leave it out"),
    "bf16_full_eval": (False, "it would round the weights that are saved. Use --bf16 true"),
    "dataloader_in_order": (True, "a resumed run could not go on exactly. Leave it out"),
    "do_predict": (False, "a training answers no questions. Use python -m train_llava.evaluate"),
    "enable_jit_checkpoint": (False, "SIGTERM saves a checkpoint of the same step on all ranks anyway. Leave it out"),
    "eval_do_concat_batches": (True, "the held-out loss is a mean over all records. Leave it out"),
    "eval_use_gather_object": (False, "the held-out loss is gathered as numbers. Leave it out"),
    "fp16_full_eval": (False, "it would round the weights that are saved. Use --fp16 true"),
    "hub_strategy": ("end", "what is uploaded on the way is not whole, and lacks its card. Leave it out"),
    "ignore_data_skip": (False, "a resumed run would see its first records again. Leave it out"),
    "include_for_metrics": ([], "no metric here reads it. Use --eval_generate true"),
    "include_num_input_tokens_seen": ("no", "padding would be counted as tokens. The log has tokens_per_second"),
    "label_names": (None, "the labels are those of the collator. Leave it out"),
    "length_column_name": ("length", "lengths are counted when the data is opened. Leave it out"),
    "optim_target_modules": (None, "GaLore and APOLLO have not been tried here. Leave it out"),
    "parallelism_config": (None, "records are shared out among all ranks. Use --deepspeed ds_configs/zero3.json"),
    "remove_unused_columns": (False, "the collator needs every column. Leave it out"),
}


def check_flags(model_args: ModelArguments, data_args: DataArguments, args: LlavaTrainingArguments) -> None:
    """Refuses flags that some other part would silently ignore or do wrong, before anything is loaded.

    Raises:
        InputError: names the flag.
    """
    defaults = LlavaTrainingArguments(output_dir="", use_cpu=True)  # some are replaced when they are made
    for name, (fine, reason) in REFUSED.items():
        if (value := getattr(args, name)) not in (fine, getattr(defaults, name)):
            raise InputError(f"--{name} {getattr(value, 'value', value)}: {reason}.")
    check_lora(model_args)
    check_adapters(model_args, args)
    if args.fsdp and (args.use_cpu or not gpu()):
        raise InputError("--fsdp: on a CPU accelerate trains with DDP instead. Try --deepspeed ds_configs/zero3.json.")
    check_one_gpu(args)
    if args.deepspeed and {"optimizer", "scheduler"} & {*args.hf_deepspeed_config.config}:
        raise InputError(f"--deepspeed {args.deepspeed}: leave optimizer and scheduler out of it, they are flags here.")
    check_offload(args)
    if args.train_sampling_strategy not in SAMPLING:
        raise InputError(f"--train_sampling_strategy {args.train_sampling_strategy}: there are {', '.join(SAMPLING)}.")
    if data_args.streaming and args.train_sampling_strategy == "group_by_length":
        raise InputError("--train_sampling_strategy group_by_length would read row groups all over. Leave it out.")
    if args.deepspeed and args.save_only_model and args.load_best_model_at_end:
        raise InputError("--save_only_model and --load_best_model_at_end: DeepSpeed needs its own files to load again.")
    best = args.load_best_model_at_end or args.save_strategy == "best"
    if (best or args.eval_on_start or args.eval_strategy != "no") and not data_args.eval_data_path:
        flags = "--eval_strategy, --eval_on_start, --load_best_model_at_end and --save_strategy best"
        raise InputError(f"{flags} need --eval_data_path.")
    check_score(data_args, args)
    check_packs(data_args, args)
    check_services(args)
    check_kernels(model_args, args)


def check_offload(args: LlavaTrainingArguments) -> None:
    """Refuses an optimizer in host memory where DeepSpeed could not compile its Adam: torch writes its own folder into
    the linker's command without quotation marks (2.13, utils/cpp_extension.py).

    Raises:
        InputError: this folder has a blank in its name.
    """
    compiles = args.deepspeed and args.hf_deepspeed_config.is_offload() and not installed_ops.get("cpu_adam")
    if compiles and " " in cpp_extension.TORCH_LIB_PATH:
        raise InputError(
            f"--deepspeed {args.deepspeed}: DeepSpeed's Adam for the CPU cannot be compiled, as PyTorch lies in a "
            f"folder with a blank in its name, {cpp_extension.TORCH_LIB_PATH}. Run this from a folder without, or give "
            "an environment that lies in one, as in PYTHON=/opt/venv/bin/python bash run_zero2.sh."
        )


def check_one_gpu(args: LlavaTrainingArguments) -> None:
    """Refuses torch's DataParallel, whose copies of the model would all use the first one's forward pass.

    Raises:
        InputError: there are several GPUs in this process.
    """
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs in one process: start a process for each with bash run_zero2.sh or torchrun."
        )


def check_framing(framing: str, model_args: ModelArguments) -> None:
    """Refuses a model that was built to see images in another way than --image_aspect_ratio says.

    Args:
        framing: what the model's image processor does, see `FastImageProcessor.framing`.

    Raises:
        InputError: names the model, and what becomes of images that are not square.
    """
    if model_args.image_aspect_ratio == "pad" != framing:
        raise InputError(
            f"--image_aspect_ratio pad: of images that are not square, {model_args.model_name_or_path} sees "
            f"{FRAMINGS[framing]}. Build it with train_llava.build_model --image_aspect_ratio pad, or train it as it "
            "is with --image_aspect_ratio as_built."
        )


def check_packs(data_args: DataArguments, args: LlavaTrainingArguments) -> None:
    """Refuses flags that do not go with --packing or --tokens_per_batch.

    Raises:
        InputError: names both.
    """
    if data_args.packing and args.neftune_noise_alpha is not None:
        reason = "its noise is scaled by the length of a row, and a packed row is as long as all its conversations"
        raise InputError(f"--neftune_noise_alpha {args.neftune_noise_alpha:g}: {reason}. Leave out --packing true.")
    if args.tokens_per_batch is None:
        return
    if args.tokens_per_batch < 1:
        raise InputError("--tokens_per_batch starts at 1.")
    if not data_args.packing:
        raise InputError("--tokens_per_batch: padded batches have no such bound. Add --packing true, or leave it out.")
    if args.train_sampling_strategy != "random":
        strategy = f"--train_sampling_strategy {args.train_sampling_strategy}"
        raise InputError(f"{strategy}: --tokens_per_batch itself chooses what shares a batch. Leave one of them out.")
    if data_args.streaming:
        reason = "takes the records of a batch from all over the data, not row group by row group"
        raise InputError(f"--streaming true: --tokens_per_batch {reason}. Leave one of them out.")


def shares_weights(args: LlavaTrainingArguments) -> bool:
    """Whether each rank holds a part of the weights alone: under FSDP and ZeRO-3."""
    return bool(args.fsdp or (args.deepspeed and args.hf_deepspeed_config.is_zero3()))


def check_score(data_args: DataArguments, args: LlavaTrainingArguments) -> None:
    """Refuses --eval_generate where nothing can be asked, and a best model by a score without it. Which scores there
    are depends on the records, see held_out.check_scores.

    Raises:
        InputError: names the flag.
    """
    if args.eval_generate and not data_args.eval_data_path:
        raise InputError("--eval_generate true needs --eval_data_path, whose questions are asked.")
    if args.eval_generate and shares_weights(args):
        reason = "each rank answers other records, and here it holds a part of the weights alone"
        raise InputError(f"--eval_generate true: {reason}. Use ds_zero2.json, or train_llava.evaluate afterwards.")
    metric, greater = args.metric_for_best_model, args.greater_is_better
    if args.save_strategy == "best" and not metric:
        with_score = "eval_loss, or with --eval_generate true exact_match"
        raise InputError(f"--save_strategy best: add --metric_for_best_model {with_score}.")
    by_score = metric not in (None, "loss", "eval_loss")
    if by_score and not args.eval_generate:
        raise InputError(f"--metric_for_best_model {metric}: add --eval_generate true, or leave it at loss.")
    if greater not in (None, by_score):
        reason = "the best model has the least loss, or the greatest score"
        raise InputError(f"--greater_is_better {str(greater).lower()}: {reason}. Leave it out.")


def check_services(args: LlavaTrainingArguments) -> None:
    """Checks that reporters, optimizer and hub are there; Trainer would find out only after weights are loaded.

    Raises:
        InputError: names the flag.
    """
    for name in args.report_to:
        try:
            [callback() for callback in get_reporting_integration_callbacks([name])]
        except (ValueError, RuntimeError, ImportError) as error:
            raise InputError(f"--report_to {name}: {error}") from error
    if "swanlab" in args.report_to:
        try:  # transformers' callback (5.23) asks so before there is a run; swanlab 0.10 then raises, 0.7 did not
            import_module("swanlab").get_run()
        except RuntimeError as error:
            hint = "pip install 'swanlab<0.8', or another tracker"
            raise InputError(
                f"--report_to swanlab: transformers cannot start a run of this version. Try {hint}."
            ) from error
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"--optim {args.optim.value}: {error}") from error
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_model_id or Path(args.output_dir).absolute().name)
        except HFValidationError as error:
            raise InputError(f"--push_to_hub true: {error} Give --hub_model_id USER/NAME.") from error
        try:
            HfApi(token=args.hub_token).whoami()
        except Exception as error:  # without a network that of the HTTP library
            raise InputError("--push_to_hub true: not logged in, or no network. Try hf auth login.") from error


STARTS = ("true", "gaussian", "orthogonal")  # of --init_lora_weights
# Kinds of PEFT's that take their start from the base's weights or from data, and what is in the way
OTHER_STARTS = {
    "pissa": "changes the frozen weights, and the saved adapter would not fit its base",
    "olora": "changes the frozen weights, and the saved adapter would not fit its base",
    "loftq": "changes the frozen weights, and the saved adapter would not fit its base",
    "corda": "needs a pass over the data first, and changes the frozen weights",
    "lora_ga": "needs a pass over the data first, and changes the frozen weights",
    "eva": "needs a pass over the data first",
}


def check_lora(model_args: ModelArguments) -> None:
    """Refuses flags of adapters in a run without adapters, and starts of adapters that are not done here.

    Raises:
        InputError: names the flag.
    """
    flags = {"train_projector": False, "vision_lora": True, "load_in_4bit": True, "use_rslora": True, "use_dora": True}
    for name, value in flags.items():
        if model_args.train_type != "use_lora" and getattr(model_args, name) == value:
            raise InputError(f"--{name} {str(value).lower()} goes with --train_type use_lora alone.")
    start = model_args.init_lora_weights
    if start not in STARTS:
        why = next((f"it {why}" for name, why in OTHER_STARTS.items() if start.startswith(name)), "not known here")
        raise InputError(f"--init_lora_weights {start}: {why}. There are {', '.join(STARTS)}.")
    if start != "true" and model_args.train_type != "use_lora":
        raise InputError(f"--init_lora_weights {start} goes with --train_type use_lora alone.")
    if start == "orthogonal" and model_args.lora_r % 2:
        raise InputError(f"--init_lora_weights orthogonal halves the rank: --lora_r {model_args.lora_r} is not even.")
    if start == "orthogonal" and model_args.load_in_4bit:
        raise InputError(
            "--init_lora_weights orthogonal and --load_in_4bit: PEFT would round the adapters to integers."
        )


def check_adapters(model_args: ModelArguments, args: LlavaTrainingArguments) -> None:
    """Refuses kinds of adapters that the rest of the flags do not go with.

    Raises:
        InputError: names both.
    """
    if args.loraplus_lr_ratio is not None and model_args.train_type != "use_lora":
        raise InputError(f"--loraplus_lr_ratio {args.loraplus_lr_ratio:g} goes with --train_type use_lora alone.")
    if model_args.use_dora and shares_weights(args):
        where = "--fsdp" if args.fsdp else f"--deepspeed {args.deepspeed} (ZeRO-3)"
        reason = "it reads frozen matrices outside of their layers, where each rank has a share of them alone"
        raise InputError(f"--use_dora true does not go with {where}: {reason}. Use --deepspeed ds_zero2.json.")


def check_kernels(model_args: ModelArguments, args: LlavaTrainingArguments) -> None:
    """Refuses kernels that this machine cannot run, before any weights are loaded.

    Raises:
        InputError: names the flag, and what to install or to leave out.
    """
    on_gpu = gpu() is not None and not args.use_cpu
    if args.fp16 and not on_gpu:
        raise InputError("--fp16 true needs a GPU. On a CPU use --bf16 true or neither.")
    if model_args.attn_implementation == "flash_attention_2":
        if not (on_gpu and is_flash_attn_2_available()):
            need = "a GPU and pip install flash-attn --no-build-isolation"
            raise InputError(f"--attn_implementation flash_attention_2 needs {need}. Without them leave it at sdpa.")
        if not (args.bf16 or args.fp16):
            raise InputError("--attn_implementation flash_attention_2 computes in half precision: add --bf16 true.")
    if args.use_liger_kernel and not (on_gpu and is_liger_kernel_available()):
        raise InputError("--use_liger_kernel true needs a GPU and pip install liger-kernel. Without them leave it out.")
