#!/usr/bin/env bash
# Trains a LLaVA with DeepSpeed ZeRO-2, on all GPUs of this machine or, without any, on its CPU.
#
#   bash run_zero2.sh                                     the demo: from nothing to answers, in minutes, on a CPU
#   MODEL=models/llava DATA=data/LLaVA-CC3M-Pretrain-595K bash run_zero2.sh            the real thing
#   TRAIN_TYPE=freeze_vision bash run_zero2.sh --learning_rate 1e-5        any flag of training goes at the end
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started with sh
set -euo pipefail

# ---------------------------------------------------------------- edit these, or set them in the environment
MODEL=${MODEL:-}                    # a LLaVA folder from train_llava.build_model; empty: the demo's
DATA=${DATA:-}                      # one or more folders or files, see docs/data.md; empty: the demo's
TRAIN_TYPE=${TRAIN_TYPE:-use_lora}  # use_lora, freeze_vision, none or projector
OUTPUT_DIR=${OUTPUT_DIR:-}          # where the trained model goes; empty: output/<demo or llava>-$TRAIN_TYPE
GLOBAL_BATCH=${GLOBAL_BATCH:-}      # samples in a step of all GPUs together; empty: 32, the original tutorial's on one
NUM_PROCESSES=${NUM_PROCESSES:-}    # how many GPUs, or CPU ranks; empty: all GPUs, or 2 ranks
INCLUDE=${INCLUDE:-}                # which GPUs, as in INCLUDE=localhost:0,1; empty: the first NUM_PROCESSES
# On several machines, run the same line on each, with a number of its own as NODE_RANK (see docs/machines.md):
NNODES=${NNODES:-1}                 # how many machines
NODE_RANK=${NODE_RANK:-}            # which of them this is: 0, 1, ...
MASTER_ADDR=${MASTER_ADDR:-}        # address of machine 0
MASTER_PORT=${MASTER_PORT:-}        # a free port there; empty: 29500, or any free one on a single machine
HOSTFILE=${HOSTFILE:-}              # or: a DeepSpeed hostfile, when this machine can reach the others by ssh
# ----------------------------------------------------------------

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}  # of libraries, about their own next versions
source "$HERE/scripts/environment.sh"
source "$HERE/scripts/launch.sh"
case " $* " in *" --help "* | *" -h "*) show_help ;; esac

case $TRAIN_TYPE in  # the original's learning rate for LoRA, LLaVA-1.5's for the rest
    use_lora) LEARNING_RATE=4e-4 ;;
    projector) LEARNING_RATE=1e-3 ;;
    freeze_vision | none) LEARNING_RATE=2e-5 ;;
    *) fail "TRAIN_TYPE=$TRAIN_TYPE: there are use_lora, freeze_vision, none and projector" ;;
esac
[ -n "$MODEL" ] && [ -n "$DATA" ] || [ -z "$MODEL$DATA" ] || fail "set both MODEL and DATA, or neither for the demo"
check_machines
find_python "$HERE/requirements.txt"
"$PYTHON" "$HERE/scripts/check_flags.py" "$@" || exit
find_accelerator
DEMO=false NAME=llava SAMPLES=32 EACH=4  # in a step, and at a time on each rank
[ $((RANKS * NNODES)) -le 8 ] || EACH=1  # of 32 samples for more than 8 CPU ranks
[ "$GPUS" -eq 0 ] || [ "$ACCELERATOR" = mps ] || EACH=auto
if [ -z "$MODEL" ]; then
    DEMO=true NAME=demo
    source "$HERE/demo/prepare.sh"
fi
OUTPUT_DIR=${OUTPUT_DIR:-$HERE/output/$NAME-$TRAIN_TYPE}
if [ -e "$DATA" ]; then SOURCES=("$DATA"); else read -ra SOURCES <<<"$DATA"; fi  # one may have spaces in its name
batch_flags "$@"

FLAGS=(
    --model_name_or_path "$MODEL"
    --data_path "${SOURCES[@]}"
    --train_type "$TRAIN_TYPE"
    --output_dir "$OUTPUT_DIR"
    --num_train_epochs 10
    "${BATCH[@]}"
    --learning_rate "$LEARNING_RATE"
    --lr_scheduler_type cosine
    --warmup_steps 0.03
    --save_strategy epoch
    --save_total_limit 3
    --logging_steps 10
    --report_to tensorboard
)

[ "$ACCELERATOR" = mps ] || FLAGS+=(--deepspeed "$HERE/ds_zero2.json")
if [ "$ACCELERATOR" = mps ]; then
    FLAGS+=(--dataloader_pin_memory false)
elif [ "$GPUS" -gt 0 ]; then
    WORKERS=$(( $(nproc) / RANKS ))  # of each rank: 10, or fewer where there are not enough cores
    WORKERS=$(( WORKERS > 10 ? 10 : WORKERS < 1 ? 1 : WORKERS ))
    FLAGS+=(--bf16 true --dataloader_pin_memory true)
    FLAGS+=(--dataloader_num_workers "$WORKERS" --dataloader_persistent_workers true)
    fused_kernels "$@"
else
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) > RANKS ? $(nproc) / RANKS : 1 ))}
    FLAGS+=(--use_cpu true --dataloader_pin_memory false)
fi
[ "$DEMO" = true ] && FLAGS+=("${DEMO_FLAGS[@]}")

launch_options "$@"
[ "$DEMO" = false ] || first_stage "${FLAGS[@]}"
launch_until_it_fits "${FLAGS[@]}" "$@"
if [ "$STATUS" -ne 0 ]; then
    [ "$STATUS" -eq 2 ] || say_how_to_resume "$@"  # 2 is a refusal, which has said what to do
    exit "$STATUS"
fi
[ "$DEMO" = true ] && show_demo
say_how_to_ask
