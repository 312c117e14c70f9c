#!/usr/bin/env bash
# LLaVA-1.5, second stage: projector and language model learn to follow instructions, from the first stage's folder.
#
#   MODEL=output/llava-projector DATA=data/llava_v1_5_mix665k bash recipes/llava15_finetune.sh
#
# Rate 2e-5, batch 128, one epoch, cosine, warm-up 0.03, no weight decay, at most 2,048 tokens: the hyperparameters in
# the README of github.com/haotian-liu/LLaVA.
# LLaVA-1.5 pads images in this stage: build the first stage's model with --image_aspect_ratio pad. A model that crops
# is refused here; --image_aspect_ratio as_built at the end of the line takes it.
TRAIN_TYPE=freeze_vision bash "$(dirname "$0")/../run_zero2.sh" \
    --image_aspect_ratio pad \
    --learning_rate 2e-5 \
    --global_batch_size 128 \
    --num_train_epochs 1 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.03 \
    --weight_decay 0 \
    --model_max_length 2048 \
    --gradient_checkpointing true \
    --train_sampling_strategy group_by_length \
    "$@"
