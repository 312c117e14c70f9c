"""Every flag of a training in one class: what it does to what is learned, and how that is known.

- EQUAL: a short run with these flags, ours beside transformers' own Trainer, has equal losses and weights; `seen` says
  whether they differ from a run without the flag.
- refused: `flag_checks.REFUSED`, by name and with the way out.
- NO_EFFECT: on what is learned: paths, logs, how often something is saved or scored, how fast data comes.
- OURS: the test that proves it; `gpu`: it cannot run on a CPU and is refused there, or has not run on a GPU yet.
"""

from train_llava.training.flag_checks import REFUSED

SEEN, UNSEEN = True, False
COSINE = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.9}}
CHECKPOINT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
OLD_CHECKPOINT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
EQUAL = {
    "per_device_train_batch_size": ({"per_device_train_batch_size": 2}, SEEN),
    "num_train_epochs": ({"num_train_epochs": 0.2, "max_steps": -1}, SEEN),
    "max_steps": ({"max_steps": 2}, SEEN),
    "learning_rate": ({"learning_rate": 3e-3}, SEEN),
    "lr_scheduler_type": ({"lr_scheduler_type": "constant"}, SEEN),
    "lr_scheduler_kwargs": (COSINE, SEEN),
    "warmup_steps": ({"warmup_steps": 2}, SEEN),
    "optim": ({"optim": "adafactor"}, SEEN),
    "optim_args": ({"optim": "adamw_bnb_8bit", "optim_args": "percentile_clipping=5"}, SEEN),
    "weight_decay": ({"weight_decay": 0.5}, SEEN),
    "adam_beta1": ({"adam_beta1": 0.5}, SEEN),
    "adam_beta2": ({"adam_beta2": 0.5}, SEEN),
    "adam_epsilon": ({"adam_epsilon": 1e-2}, SEEN),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, SEEN),
    "average_tokens_across_devices": ({"average_tokens_across_devices": False}, UNSEEN),
    "max_grad_norm": ({"max_grad_norm": 0.01, "optim": "sgd"}, SEEN),
    "bf16": ({"bf16": True}, SEEN),
    "activation_checkpointing": ({"activation_checkpointing": True}, UNSEEN),
    "activation_checkpointing_kwargs": (CHECKPOINT, UNSEEN),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, UNSEEN),
    "gradient_checkpointing_kwargs": (OLD_CHECKPOINT, UNSEEN),
    "neftune_noise_alpha": ({"neftune_noise_alpha": 50.0}, SEEN),
    "use_cache": ({"use_cache": True}, UNSEEN),
    "full_determinism": ({"full_determinism": True}, UNSEEN),
    "dataloader_drop_last": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 24, "num_train_epochs": 1, "max_steps": -1},
        SEEN,
    ),
    "dataloader_num_workers": ({"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3}, UNSEEN),
    "torch_empty_cache_steps": ({"torch_empty_cache_steps": 1}, UNSEEN),
    "logging_nan_inf_filter": ({"logging_nan_inf_filter": True}, UNSEEN),
    "skip_memory_metrics": ({"skip_memory_metrics": False}, UNSEEN),
}
OURS = {
    "label_smoothing_factor": "test_smoothed_labels",
    "seed": "test_an_epoch_has_every_record_once_in_an_order_fixed_by_seed_and_epoch",
    "data_seed": "test_the_data_seed_alone_decides_where_it_is_given",
    "global_batch_size": "test_the_global_batch_on_two_ranks",
    "train_sampling_strategy": "test_groups_need_less_padding",
    "deepspeed": "test_two_ranks_with_zero2",
    "torch_compile": "test_compiled_layers_give_the_same_losses",
    "torch_compile_backend": "test_compiled_layers_give_the_same_losses",
    "torch_compile_mode": "test_compiled_layers_give_the_same_losses",
    "use_liger_kernel": "test_liger_leaves_the_loss_to_us",
    "liger_kernel_config": "test_liger_leaves_the_loss_to_us",
    "load_best_model_at_end": "test_two_ranks",
    "metric_for_best_model": "test_the_best_is_kept_and_training_goes_on_as_without",
    "greater_is_better": "test_scores_that_nobody_measures",
    "save_only_model": "test_services_and_files_that_are_not_there",
    "resume_from_checkpoint": "test_resume_is_exact",
    "fp16": "gpu",
    "tf32": "gpu",
    "fsdp": "gpu",
    "fsdp_config": "gpu",
    # this repository's own
    "model_name_or_path": "test_script_trains_with_zero2_on_two_ranks",
    "image_aspect_ratio": "test_a_training_and_a_merge_keep_it",
    "attn_implementation": "test_the_attention_reaches_the_tower_and_the_language_model",
    "train_type": "test_exactly_the_promised_parameters_move",
    "train_projector": "test_lora_may_leave_the_projector",
    "lora_r": "test_lora_adapts_the_language_model_alone",
    "lora_alpha": "test_adapter_and_merged_model_answer_alike",
    "lora_dropout": "test_resume_is_exact",
    "lora_target_modules": "test_lora_in_other_layers_and_in_the_tower",
    "vision_lora": "test_lora_in_other_layers_and_in_the_tower",
    "use_rslora": "test_loss_and_gradients_equal_peft",
    "use_dora": "test_loss_and_gradients_equal_peft",
    "init_lora_weights": "test_a_model_starts_as_peft_makes_it",
    "loraplus_lr_ratio": "test_lora_plus_has_the_rates_of_peft",
    "load_in_4bit": "test_four_bits",
    "data_path": "test_four_formats_are_mixed_on_two_ranks",
    "eval_data_path": "test_two_ranks",
    "eval_generate": "test_the_best_is_kept_and_training_goes_on_as_without",
    "caption_fields": "test_the_example_of_an_own_format_in_the_docs",
    "image_folder": "test_images_elsewhere",
    "on_bad_record": "test_bad_records_are_skipped_on_request",
    "max_bad_images": "test_broken_images_are_passed_over_and_listed",
    "model_max_length": "test_what_is_too_long_is_cut_or_left_out",
    "packing": "test_packing_and_bytes_give_the_plain_gradients",
    "tokens_per_batch": "test_an_epoch_has_the_losses_of_the_plain_model",
    "sample_steps": "test_sample_captions_do_not_change_the_run",
    "streaming": "test_the_same_with_a_kill_in_the_middle",
    "projector_learning_rate": "test_parts_have_learning_rates_of_their_own",
    "vision_learning_rate": "test_parts_have_learning_rates_of_their_own",
    "check_resources": "test_what_does_not_fit_into_memory_is_refused_before_the_weights_are_loaded",
    "overwrite_output_dir": "test_a_run_is_not_written_over",
}
NO_EFFECT = [
    *("output_dir", "use_cpu", "local_rank", "do_train", "do_eval", "debug", "restore_callback_states_from_checkpoint"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica"),
    *("disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
    *("per_device_eval_batch_size", "eval_accumulation_steps", "prediction_loss_only", "save_strategy", "save_steps"),
    *("save_total_limit", "save_on_each_node", "push_to_hub", "hub_model_id", "hub_token"),
    *("hub_private_repo", "hub_always_push", "hub_revision", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_persistent_workers", "dataloader_multiprocessing_context", "ddp_find_unused_parameters"),
    *("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout"),
]


def table() -> str:
    """What docs/flags.md shows."""

    def flags(names: list[str]) -> str:
        return ", ".join(f"`--{name}`" for name in sorted(names))

    proven = [name for name, test in OURS.items() if test != "gpu"]
    gpu = [name for name, test in OURS.items() if test == "gpu"]
    lines = ["| class | flags |", "|---|---|"]
    lines += [f"| equal to plain Trainer, in a run beside it | {flags([*EQUAL])} |"]
    lines += [f"| proven by a test of its own | {flags(proven)} |"]
    lines += [f"| not run by us yet, for want of a GPU | {flags(gpu)} |"]
    lines += [f"| no effect on what is learned | {flags(NO_EFFECT)} |", "", "| refused | because |", "|---|---|"]
    return "\n".join([*lines, *(f"| `--{name}` | {reason}. |" for name, (_, reason) in sorted(REFUSED.items()))])
