"""The command line of a training, in which flags of older scripts are named with what became of them."""

from train_llava.planning.arguments import DataArguments, FlagParser, LlavaTrainingArguments, ModelArguments

# Flags of transformers 4 and of LLaVA. scripts/check_flags.py reads them here, too
RENAMED = {
    "evaluation_strategy": "is now --eval_strategy",
    "warmup_ratio": "is now --warmup_steps (below 1: a share of all steps)",
    "group_by_length": "is now --train_sampling_strategy group_by_length",
    "per_gpu_train_batch_size": "is now --per_device_train_batch_size",
    "per_gpu_eval_batch_size": "is now --per_device_eval_batch_size",
    "no_cuda": "is now --use_cpu",
    "adafactor": "is now --optim adafactor",
    "logging_dir": "is gone: logs are in runs/ of --output_dir",
    "save_safetensors": "is gone: weights are always safetensors",
    "include_tokens_per_second": "is gone: every progress line has it",
    "push_to_hub_token": "is now --hub_token",
    "push_to_hub_model_id": "is now --hub_model_id",
    "mm_projector_lr": "is here --projector_learning_rate",
    "mm_vision_tower_lr": "is here --vision_learning_rate",
    "tune_mm_mlp_adapter": "is here --train_type projector",
    "freeze_backbone": "is here --train_type projector",
    "lora_enable": "is here --train_type use_lora",
    "bits": "is here --load_in_4bit true",
    "group_by_modality_length": "is here --train_sampling_strategy group_by_length",
    "vision_tower": "is chosen when the model is built: python -m train_llava.build_model --vision_model_name_or_path",
    "pretrain_mm_mlp_adapter": "is not needed: a run goes on from the --output_dir of the one before it",
    "version": "is not needed: the chat template is the model's own",
    "lazy_preprocess": "is not needed: images are always read when their batch is made",
}


def parse_flags() -> tuple[ModelArguments, DataArguments, LlavaTrainingArguments]:
    """The command line's flags.

    Raises:
        InputError: see FlagParser.
    """
    return FlagParser((ModelArguments, DataArguments, LlavaTrainingArguments)).parse(RENAMED)
