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
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || GPUS=0
[ "$GPUS" -gt 0 ] || export DS_ACCELERATOR=cpu
case " $* " in *" --help "* | *" -h "*) HELP=true ;; *) HELP=false ;; esac
[ "$HELP" = false ] || sed -n '2,/^# -*$/{/^set /d;p}' "${BASH_SOURCE[0]}"  # the lines at the top of this file
source "$HERE/scripts/environment.sh"
find_python "$HERE/requirements.txt"
[ "$HELP" = false ] || exec "$PYTHON" -m train_llava.train --help
if [ "$NNODES" -gt 1 ] && { [ -z "$NODE_RANK" ] || [ -z "$MASTER_ADDR" ] || [ -z "$MODEL" ]; }; then
    echo "error: NNODES=$NNODES needs NODE_RANK (0 to $((NNODES - 1))), MASTER_ADDR, MODEL and DATA" >&2
    exit 2
fi
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

[ "$NNODES" -eq 1 ] || MASTER_PORT=${MASTER_PORT:-29500}
[ -n "$MASTER_PORT" ] || MASTER_PORT=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
LAUNCH=(--master_port "$MASTER_PORT")
if [ "$GPUS" -gt 0 ]; then
    WORKERS=$(( $(nproc) / ${NUM_PROCESSES:-$GPUS} ))  # of each rank: 10, or fewer where there are not enough cores
    WORKERS=$(( WORKERS > 10 ? 10 : WORKERS < 1 ? 1 : WORKERS ))
    FLAGS+=(--bf16 true --dataloader_pin_memory true)
    FLAGS+=(--dataloader_num_workers "$WORKERS" --dataloader_persistent_workers true)
    if [ -n "$INCLUDE" ]; then
        LAUNCH+=(--include "$INCLUDE")
    elif [ -n "$NUM_PROCESSES" ] && [ "$NNODES" -eq 1 ]; then
        LAUNCH+=(--num_gpus "$NUM_PROCESSES")
    fi
else
    RANKS=${NUM_PROCESSES:-2}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) > RANKS ? $(nproc) / RANKS : 1 ))}
    [ "$NNODES" -gt 1 ] || LAUNCH+=(--num_accelerators "$RANKS")
    FLAGS+=(--use_cpu true --dataloader_pin_memory false)
fi
[ "$DEMO" = true ] && FLAGS+=("${DEMO_FLAGS[@]}")

HOSTS=
if [ -n "$HOSTFILE" ]; then
    LAUNCH+=(--hostfile "$HOSTFILE")
elif [ "$NNODES" -gt 1 ]; then
    SLOTS=${NUM_PROCESSES:-$(( GPUS > 0 ? GPUS : 2 ))}
    HOSTS=$(mktemp)
    for node in $(seq 0 $((NNODES - 1))); do echo "node$node slots=$SLOTS"; done >"$HOSTS"
    LAUNCH+=(--hostfile "$HOSTS" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
    # Gloo would pick the interface that this machine's name stands for, which is often the loopback.
    if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && command -v ip >/dev/null; then
        GLOO_SOCKET_IFNAME=$(ip -o addr show to "$MASTER_ADDR" 2>/dev/null | awk 'NR == 1 {print $2}')
        [ -n "$GLOO_SOCKET_IFNAME" ] ||
            GLOO_SOCKET_IFNAME=$(ip -o route get "$MASTER_ADDR" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p')
        [ -z "$GLOO_SOCKET_IFNAME" ] || export GLOO_SOCKET_IFNAME
    fi
fi

# The launcher gets a process group of its own, by which it and every rank can be found.
setsid "$PYTHON" -m deepspeed.launcher.runner "${LAUNCH[@]}" --module train_llava.train "${FLAGS[@]}" "$@" &
LAUNCHER=$!
ranks() { # and their loaders' workers
    local process
    for process in /proc/[0-9]*; do
        grep -qs -- --local_rank= "$process/cmdline" || continue
        [ "$(cut -d' ' -f5 "$process/stat" 2>/dev/null)" = "$LAUNCHER" ] && echo "${process#/proc/}"
    done
    true
}
# A signal goes to the ranks alone: they save a checkpoint and end, and then the launcher does. DeepSpeed's launcher, told
# itself, would kill them half a minute later. A second signal ends them at once.
tell_ranks() {
    local all
    all=$(ranks)
    kill -TERM -- ${all:-"-$LAUNCHER"} 2>/dev/null || true
}
# Where the launcher itself was killed, its ranks would train on with nobody to see: they are told the same.
tidy_up() {
    local waited=0
    if [ -n "$(ranks)" ]; then
        tell_ranks
        while [ -n "$(ranks)" ] && [ $((waited++)) -lt 120 ]; do sleep 0.5; done
        kill -KILL -- "-$LAUNCHER" 2>/dev/null || true
    fi
    rm -f ${HOSTS:+"$HOSTS"}
}
trap tell_ranks INT TERM HUP
trap tidy_up EXIT
STATUS=0
wait "$LAUNCHER" || STATUS=$?
while kill -0 "$LAUNCHER" 2>/dev/null; do STATUS=0; wait "$LAUNCHER" || STATUS=$?; done
if [ "$STATUS" -ne 0 ]; then
    # 2 is a refusal, which has said what to do
    if [ "$STATUS" -ne 2 ] && compgen -G "$OUTPUT_DIR/checkpoint-*/trainer_state.json" >/dev/null; then
        AGAIN=("TRAIN_TYPE=$TRAIN_TYPE" "OUTPUT_DIR=$OUTPUT_DIR")
        [ "$DEMO" = true ] || AGAIN+=("MODEL=$MODEL" "DATA=$DATA")
        [ "$NNODES" -eq 1 ] || AGAIN+=("NNODES=$NNODES" "NODE_RANK=$NODE_RANK" "MASTER_ADDR=$MASTER_ADDR")
        [ -z "$NUM_PROCESSES" ] || AGAIN+=("NUM_PROCESSES=$NUM_PROCESSES")
        echo "To go on from the last whole checkpoint:"
        printf ' cd %q &&' "$PWD"
        printf ' %q' env "${AGAIN[@]}" bash "$HERE/run_zero2.sh" "$@" --resume_from_checkpoint true
        echo
    fi
    exit "$STATUS"
fi

[ "$DEMO" = true ] && show_demo
echo
echo "The trained model is in $OUTPUT_DIR. Ask it something:"
[ "$DEMO" = true ] && ASK=(--image "$EXAMPLE_IMAGE" --prompt "What is in this picture?") || ASK=(--interactive)
printf ' %q' env "PYTHONPATH=$HERE" "$PYTHON" -m train_llava.infer --model_name_or_path "$(realpath "$OUTPUT_DIR")" "${ASK[@]}"
echo
