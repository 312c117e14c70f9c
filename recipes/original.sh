#!/usr/bin/env bash
# The settings of the original tutorial, github.com/yuanzhoulvpi2017/zero_nlp, train_llava: those of its run_zero2.sh
# and run.py, and what transformers 4.41 and PEFT 0.11 took where they say nothing.
#
#   MODEL=models/llava DATA=data/LLaVA-CC3M-Pretrain-595K bash recipes/original.sh
#   TRAIN_TYPE=none bash recipes/original.sh                 without MODEL and DATA: on the demo
#
# Adapters of rank 32 and alpha 8 (PEFT's default, so that they are scaled by 0.25), found by the ends of layers' names,
# so that CLIP's q, k and v get some, too; 4e-4 for every TRAIN_TYPE, falling in a line without warm-up; batches of 4 x 8
# on each of 4 GPUs, ten epochs. docs/from_zero_nlp.md lists what still differs, and why.
TRAIN_TYPE=${TRAIN_TYPE:-use_lora}
ADAPTERS=()
[ "$TRAIN_TYPE" != use_lora ] ||
    ADAPTERS=(--lora_r 32 --lora_alpha 8 --lora_dropout 0.05 --lora_target_modules '.*\.[qkvo]_proj')
HERE=$(cd "$(dirname "$0")/.." && pwd)
[ -n "${MODEL:-}" ] || export OUTPUT_DIR=${OUTPUT_DIR:-$HERE/output/demo-original-$TRAIN_TYPE}  # not the demo's own
TRAIN_TYPE=$TRAIN_TYPE bash "$HERE/run_zero2.sh" \
    "${ADAPTERS[@]}" \
    --learning_rate 4e-4 \
    --lr_scheduler_type linear \
    --warmup_steps 0 \
    --adam_beta2 0.999 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 8 \
    --num_train_epochs 10 \
    --max_steps -1 \
    --save_strategy epoch \
    --save_total_limit 3 \
    --logging_steps 10 \
    "$@"
