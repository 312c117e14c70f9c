#!/usr/bin/env bash
# Trains a LLaVA with DeepSpeed ZeRO-2, on all GPUs of this machine or, without any, on its CPU.
#
#   bash run_zero2.sh                                     the demo: from nothing to captions, in minutes, on a CPU
#   MODEL=models/llava DATA=data/LLaVA-CC3M-Pretrain-595K bash run_zero2.sh            the real thing
#   TRAIN_TYPE=freeze_vision bash run_zero2.sh --learning_rate 1e-5        any flag of training goes at the end
set -euo pipefail

# ---------------------------------------------------------------- edit these, or set them in the environment
MODEL=${MODEL:-}                    # a LLaVA folder from train_llava.build_model; empty: the demo's
DATA=${DATA:-}                      # one or more folders or files, see docs/data.md; empty: the demo's
TRAIN_TYPE=${TRAIN_TYPE:-use_lora}  # use_lora, freeze_vision, none or projector
OUTPUT_DIR=${OUTPUT_DIR:-}          # where the trained model goes; empty: output/<demo or llava>-$TRAIN_TYPE
NUM_PROCESSES=${NUM_PROCESSES:-}    # how many GPUs, or CPU ranks; empty: all GPUs, or 2 ranks
INCLUDE=${INCLUDE:-}                # which GPUs, as in INCLUDE=localhost:0,1; empty: the first NUM_PROCESSES
# ----------------------------------------------------------------

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}  # of libraries, about their own next versions
source "$HERE/scripts/environment.sh"
find_python "$HERE/requirements.txt"

GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || GPUS=0
[ "$GPUS" -gt 0 ] || export DS_ACCELERATOR=cpu
DEMO=false
if [ -z "$MODEL" ] && [ -z "$DATA" ]; then
    DEMO=true
    source "$HERE/demo/prepare.sh"
elif [ -z "$MODEL" ] || [ -z "$DATA" ]; then
    echo "error: set both MODEL and DATA, or neither for the demo" >&2
    exit 2
fi
[ "$DEMO" = true ] && NAME=demo || NAME=llava
OUTPUT_DIR=${OUTPUT_DIR:-$HERE/output/$NAME-$TRAIN_TYPE}
if [ -e "$DATA" ]; then SOURCES=("$DATA"); else read -ra SOURCES <<<"$DATA"; fi  # one may have spaces in its name

case $TRAIN_TYPE in              # the original's rate for LoRA, LLaVA-1.5's for the rest
    use_lora) LEARNING_RATE=4e-4 ;;
    projector) LEARNING_RATE=1e-3 ;;
    *) LEARNING_RATE=2e-5 ;;
esac
FLAGS=(
    --deepspeed "$HERE/ds_zero2.json"
    --model_name_or_path "$MODEL"
    --data_path "${SOURCES[@]}"
    --train_type "$TRAIN_TYPE"
    --output_dir "$OUTPUT_DIR"
    --num_train_epochs 10
    --per_device_train_batch_size 4
    --gradient_accumulation_steps 8
    --learning_rate "$LEARNING_RATE"
    --lr_scheduler_type cosine
    --warmup_steps 0.03
    --save_strategy epoch
    --save_total_limit 3
    --logging_steps 10
    --report_to tensorboard
)

MASTER_PORT=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
LAUNCH=(--master_port "$MASTER_PORT")
if [ "$GPUS" -gt 0 ]; then
    FLAGS+=(--bf16 true --dataloader_pin_memory true --dataloader_num_workers 10 --dataloader_persistent_workers true)
    if [ -n "$INCLUDE" ]; then
        LAUNCH+=(--include "$INCLUDE")
    elif [ -n "$NUM_PROCESSES" ]; then
        LAUNCH+=(--num_gpus "$NUM_PROCESSES")
    fi
else
    RANKS=${NUM_PROCESSES:-2}
    command -v c++ >/dev/null || { echo "error: DeepSpeed compiles a small op on a CPU; install g++ first" >&2; exit 2; }
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) > RANKS ? $(nproc) / RANKS : 1 ))}
    LAUNCH+=(--num_accelerators "$RANKS")
    FLAGS+=(--use_cpu true --dataloader_pin_memory false)
fi
[ "$DEMO" = true ] && FLAGS+=("${DEMO_FLAGS[@]}")

# A signal goes to the ranks alone: they save a checkpoint and end, and then the launcher does. DeepSpeed's launcher, told
# itself, would kill them half a minute later. A second signal ends them at once.
tell_ranks() {
    local told=1 process
    for process in /proc/[0-9]*; do
        grep -qs -- --local_rank= "$process/cmdline" || continue
        [ "$(cut -d' ' -f5 "$process/stat" 2>/dev/null)" = "$LAUNCHER" ] && kill -TERM "${process#/proc/}" && told=0
    done
    return $told
}

# The launcher gets a process group of its own, so that it and every rank can be found by it.
setsid "$PYTHON" -m deepspeed.launcher.runner "${LAUNCH[@]}" --module train_llava.train "${FLAGS[@]}" "$@" &
LAUNCHER=$!
trap 'tell_ranks || kill -TERM -- "-$LAUNCHER" 2>/dev/null || true' INT TERM HUP
trap 'rm -f /dev/shm/deepspeed_allreduce_buffer_*_"${MASTER_PORT}"_*' EXIT
STATUS=0
wait "$LAUNCHER" || STATUS=$?
while kill -0 "$LAUNCHER" 2>/dev/null; do STATUS=0; wait "$LAUNCHER" || STATUS=$?; done
[ "$STATUS" -eq 0 ] || exit "$STATUS"

[ "$DEMO" = true ] && show_demo
echo
echo "The trained model is in $OUTPUT_DIR. Ask it something:"
echo "  $PYTHON -m train_llava.infer --model_name_or_path $OUTPUT_DIR --image ${EXAMPLE_IMAGE:-picture.jpg} --prompt 'What is in this picture?'"
