#!/usr/bin/env bash
# LLaVA-1.5, first stage: the projector alone learns to translate, on 558K (here: CC3M-595K) captions.
#
#   MODEL=models/llava DATA=data/LLaVA-CC3M-Pretrain-595K bash recipes/llava15_pretrain.sh
#
# Rate 1e-3, batch 256, one epoch, cosine, warm-up 0.03, no weight decay, at most 2,048 tokens: the hyperparameters in
# the README of github.com/haotian-liu/LLaVA.
# LLaVA-1.5 crops images here and pads them in its second stage. A folder of ours has one way for both, so build
# models/llava with --image_aspect_ratio pad. One that crops is refused; --image_aspect_ratio as_built takes it.
TRAIN_TYPE=projector bash "$(dirname "$0")/../run_zero2.sh" \
    --image_aspect_ratio pad \
    --learning_rate 1e-3 \
    --global_batch_size 256 \
    --num_train_epochs 1 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.03 \
    --weight_decay 0 \
    --model_max_length 2048 \
    --gradient_checkpointing true \
    "$@"
