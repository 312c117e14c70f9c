#!/usr/bin/env bash
# LoRA in the fewest hours: the script's own settings, one epoch in place of ten, and no dropout before the adapters.
#
#   MODEL=models/llava DATA=data/LLaVA-CC3M-Pretrain-595K bash recipes/lora_fast.sh
#
# Without dropout each adapted matrix takes two kernels less (docs/performance.md counts them), and one epoch is what
# LLaVA-1.5 takes in both of its stages. The batch is the largest that fits, and Liger's kernels are on, as always on a
# GPU.
TRAIN_TYPE=use_lora bash "$(dirname "$0")/../run_zero2.sh" \
    --lora_dropout 0 \
    --num_train_epochs 1 \
    "$@"
