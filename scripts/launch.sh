# Sourced by run_zero2.sh: starts DeepSpeed's launcher on this machine, or on each of several, and passes signals on.

show_help() { # the lines at the top of run_zero2.sh, and the flags if the packages are there already
    sed -n '2,/^# -*$/{/^set \|^\[ /d;p}' "$HERE/run_zero2.sh"
    ready_python "$HERE/requirements.txt" && exec "$PYTHON" -m train_llava.train --help
    echo "The flags are in docs/flags.md. When the packages are installed, they are shown here, too."
    exit
}

check_machines() { # of several, each needs a number, the address of the first, and the model and data at the same place
    [ "$NNODES" -eq 1 ] || { [ -n "$NODE_RANK" ] && [ -n "$MASTER_ADDR" ] && [ -n "$MODEL" ]; } ||
        fail "NNODES=$NNODES needs NODE_RANK (0 to $((NNODES - 1))), MASTER_ADDR, MODEL and DATA"
}

find_accelerator() { # sets ACCELERATOR, GPUS, RANKS and INCLUDE, and says in a line what was found
    local found visible
    found=$("$PYTHON" "$HERE/scripts/accelerator.py") || exit
    read -r ACCELERATOR GPUS <<<"$found"
    RANKS=${NUM_PROCESSES:-$(( GPUS > 0 ? GPUS : 2 ))}
    [ "$GPUS" -gt 0 ] || export DS_ACCELERATOR=cpu
    [ "$GPUS" -eq 0 ] || [ "$NNODES" -gt 1 ] || [ -n "$HOSTFILE" ] || [ "$RANKS" -le "$GPUS" ] ||
        fail "NUM_PROCESSES=$NUM_PROCESSES, and there are $GPUS GPUs"
    # DeepSpeed's launcher wants the numbers of GPUs, and overlooks this variable when it is given how many to take
    visible=${CUDA_VISIBLE_DEVICES:-}
    if [ "$ACCELERATOR" = cuda ] && [ -n "$visible" ] && [ -z "$INCLUDE$HOSTFILE" ] && [ "$NNODES" -eq 1 ]; then
        case $visible in *[!0-9,]*) fail "CUDA_VISIBLE_DEVICES=$visible: write the numbers that nvidia-smi shows" ;; esac
        INCLUDE=localhost:$(cut -d, -f"1-$RANKS" <<<"$visible")
        unset CUDA_VISIBLE_DEVICES
    fi
    found=${found#*$'\n'}
    [ "$GPUS" -gt 0 ] && echo "$found" || echo "$found: $RANKS ranks on the CPU"
}

# The learning rate is right for so many samples in a step, however many GPUs share them. Who gives an accumulation has
# decided on that number already.
batch_flags() { # batch_flags FLAGS... ; fills BATCH
    case " $* " in
        *" --gradient"[_-]"accumulation"[_-]"steps"[" ="]* | *" --tokens"[_-]"per"[_-]"batch"[" ="]*)
            [ "$EACH" != auto ] || EACH=4
            SAMPLES=
            ;;
    esac
    SAMPLES=${GLOBAL_BATCH:-$SAMPLES}
    BATCH=(--per_device_train_batch_size "$EACH" ${SAMPLES:+--global_batch_size "$SAMPLES"})
}

fused_kernels() { # fused_kernels FLAGS... ; adds to FLAGS the kernels that a GPU trains with unless others are asked for
    case " $* " in *" --use"[_-]"liger"* | *" --torch"[_-]"compile"*) return ;; esac
    if "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("liger_kernel") is None)'; then
        FLAGS+=(--use_liger_kernel true)
    else
        echo "no fused kernels: \"$PYTHON -m pip install liger-kernel\" or --torch_compile true makes steps shorter"
    fi
}

launch_options() { # fills LAUNCH, the launcher's flags, and HOSTS, a file to delete at the end
    HOSTS=
    [ "$NNODES" -eq 1 ] || MASTER_PORT=${MASTER_PORT:-29500}
    [ -n "$MASTER_PORT" ] || MASTER_PORT=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    local level=critical  # nothing of each start and end of a process
    case " $*" in *" --log_level "[di]*) level=info ;; esac
    LAUNCH=(--master_port "$MASTER_PORT" --log_level "$level")
    if [ "$GPUS" -eq 0 ]; then
        [ "$NNODES" -gt 1 ] || LAUNCH+=(--num_accelerators "$RANKS")
    elif [ -n "$INCLUDE" ]; then
        LAUNCH+=(--include "$INCLUDE")
    elif [ -n "$NUM_PROCESSES" ] && [ "$NNODES" -eq 1 ]; then
        LAUNCH+=(--num_gpus "$NUM_PROCESSES")
    fi
    if [ -n "$HOSTFILE" ]; then
        LAUNCH+=(--hostfile "$HOSTFILE")
    elif [ "$NNODES" -gt 1 ]; then
        several_machines
    fi
}

several_machines() { # each starts its own ranks: no ssh
    local node
    HOSTS=$(mktemp)
    for node in $(seq 0 $((NNODES - 1))); do echo "node$node slots=$RANKS"; done >"$HOSTS"
    LAUNCH+=(--hostfile "$HOSTS" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
    # Gloo would pick the interface that this machine's name stands for, which is often the loopback.
    if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && command -v ip >/dev/null; then
        # of a name instead of an address ip knows nothing: Gloo picks one then
        GLOO_SOCKET_IFNAME=$(ip -o addr show to "$MASTER_ADDR" 2>/dev/null | awk 'NR == 1 {print $2}') || true
        [ -n "$GLOO_SOCKET_IFNAME" ] ||
            GLOO_SOCKET_IFNAME=$(ip -o route get "$MASTER_ADDR" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p') || true
        [ -z "$GLOO_SOCKET_IFNAME" ] || export GLOO_SOCKET_IFNAME
    fi
}

# A rank whose memory runs out in the first step leaves the number of samples to try next in a file. Its exit code would
# not do: others fail when it is gone, and the launcher passes on the code that it sees first.
launch_until_it_fits() { # launch_until_it_fits FLAGS...
    local limit=
    if [ "$NNODES" -gt 1 ] || [ -n "$HOSTFILE" ] || [ "$ACCELERATOR" = mps ]; then  # a machine cannot start alone
        launch "$@"
        return
    fi
    MICRO_BATCH_FILE=$(mktemp)
    export MICRO_BATCH_FILE
    launch "$@"
    while [ "$STATUS" -ne 0 ] && [ "$(cat "$MICRO_BATCH_FILE")" != "$limit" ]; do
        limit=$(cat "$MICRO_BATCH_FILE")
        launch "$@"
    done
}

launch() { # launch FLAGS... ; waits for the training and leaves its exit code in STATUS
    if [ "$ACCELERATOR" = mps ]; then
        STATUS=0
        "$PYTHON" -m train_llava.train "$@" || STATUS=$?
        return
    fi
    # The launcher gets a process group of its own, by which it and every rank can be found.
    setsid "$PYTHON" -m deepspeed.launcher.runner "${LAUNCH[@]}" --module train_llava.train "$@" &
    LAUNCHER=$!
    trap signal_ranks INT TERM HUP
    trap end_ranks EXIT
    STATUS=0
    wait "$LAUNCHER" || STATUS=$?
    while kill -0 "$LAUNCHER" 2>/dev/null; do STATUS=0; wait "$LAUNCHER" || STATUS=$?; done
}

ranks() { # process ids of the ranks and of their loaders' workers
    local process
    for process in /proc/[0-9]*; do
        grep -qs -- --local_rank= "$process/cmdline" || continue
        [ "$(cut -d' ' -f5 "$process/stat" 2>/dev/null)" = "$LAUNCHER" ] && echo "${process#/proc/}"
    done
    true
}

# A signal goes to the ranks alone: they save a checkpoint and end, and then the launcher ends. If the launcher received
# the signal itself, it would kill them half a minute later. A second signal ends the ranks at once.
signal_ranks() {
    local all
    all=$(ranks)
    kill -TERM -- ${all:-"-$LAUNCHER"} 2>/dev/null || true
}

# If the launcher itself was killed, its ranks would train on unseen: they receive the same signal.
end_ranks() {
    local waited=0
    if [ -n "$(ranks)" ]; then
        signal_ranks
        while [ -n "$(ranks)" ] && [ $((waited++)) -lt 120 ]; do sleep 0.5; done
        kill -KILL -- "-$LAUNCHER" 2>/dev/null || true
    fi
    rm -f ${HOSTS:+"$HOSTS"} ${MICRO_BATCH_FILE:+"$MICRO_BATCH_FILE"}
}

say_how_to_resume() { # say_how_to_resume FLAGS... ; where a whole checkpoint is left
    local again
    compgen -G "$OUTPUT_DIR/checkpoint-*/trainer_state.json" >/dev/null || return 0
    again=("TRAIN_TYPE=$TRAIN_TYPE" "OUTPUT_DIR=$OUTPUT_DIR")
    [ "$DEMO" = true ] || again+=("MODEL=$MODEL" "DATA=$DATA")
    [ "$NNODES" -eq 1 ] || again+=("NNODES=$NNODES" "NODE_RANK=$NODE_RANK" "MASTER_ADDR=$MASTER_ADDR")
    [ -z "$NUM_PROCESSES" ] || again+=("NUM_PROCESSES=$NUM_PROCESSES")
    [ -z "$GLOBAL_BATCH" ] || again+=("GLOBAL_BATCH=$GLOBAL_BATCH")
    echo "To go on from the last whole checkpoint:"
    printf ' cd %q &&' "$PWD"
    printf ' %q' env "${again[@]}" bash "$HERE/run_zero2.sh" "$@" --resume_from_checkpoint true
    echo
}

say_how_to_ask() {
    local ask=(--interactive)
    [ "$DEMO" = false ] || ask=(--image "$EXAMPLE_IMAGE" --prompt "What is in this image?")
    echo
    echo "The trained model is in $OUTPUT_DIR. Ask it something:"
    printf ' %q' env "PYTHONPATH=$HERE" "$PYTHON" -m train_llava.infer \
        --model_name_or_path "$(realpath "$OUTPUT_DIR")" "${ask[@]}"
    echo
}
