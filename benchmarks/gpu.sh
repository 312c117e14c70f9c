#!/usr/bin/env bash
# Measures training on one GPU in 9 minutes, without a network: what slows the machine down, then row by row what each
# change brings. Writes benchmarks/results/gpu.json after every figure; docs/gpu.md says how to read it.
#
#   bash benchmarks/gpu.sh [--json FILE]
#   bash benchmarks/gpu.sh --dry_run          the same on a CPU in two minutes, with the demo's model
#
# Nothing is installed. A folder `carried` in the repository may hold packages that this machine lacks; docs/gpu.md says
# how it is made.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$HERE:$HERE/carried${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore::FutureWarning
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}  # as run_zero2.sh does
export PYTORCH_NVML_BASED_CUDA_CHECK=1  # to ask whether there is a GPU must not spoil a process for forking
case " $* " in *" --dry_run "*) export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 ;; esac
source "$HERE/scripts/environment.sh"
if ! ready_python "$HERE/requirements.txt"; then
    for PYTHON in "$base" python3; do  # a container's torch may be with the second
        "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' && break
    done
    echo "$PYTHON lacks: $(lacking "$PYTHON" "$HERE/requirements.txt" | paste -sd, -); trying all the same"
fi
export PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"  # ninja, with which DeepSpeed compiles
cd "$HERE"
exec "$PYTHON" -m benchmarks.full_size.gpu "$@"
