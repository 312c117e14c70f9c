#!/usr/bin/env bash
# LLaVA-1.5, second stage with LoRA: adapters in all linear layers of the language model, from the first stage's folder.
#
#   MODEL=output/llava-projector DATA=data/llava_v1_5_mix665k bash recipes/llava15_lora.sh
#
# Rank 128, alpha 256, rate 2e-4, of the projector 2e-5, batch 128, one epoch: scripts/v1_5/finetune_lora.sh of
# github.com/haotian-liu/LLaVA.
# LLaVA-1.5 pads images in this stage: build the first stage's model with --image_aspect_ratio pad. A model that crops
# is refused here; --image_aspect_ratio as_built at the end of the line takes it.
TRAIN_TYPE=use_lora bash "$(dirname "$0")/../run_zero2.sh" \
    --lora_r 128 \
    --lora_alpha 256 \
    --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj \
    --image_aspect_ratio pad \
    --learning_rate 2e-4 \
    --projector_learning_rate 2e-5 \
    --global_batch_size 128 \
    --num_train_epochs 1 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.03 \
    --weight_decay 0 \
    --model_max_length 2048 \
    --gradient_checkpointing true \
    --train_sampling_strategy group_by_length \
    "$@"
