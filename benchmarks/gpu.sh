#!/usr/bin/env bash
# Measures the trainings of the full-size model on all GPUs of this machine, with random weights and made-up images:
#
#   bash benchmarks/gpu.sh [--name h100-x8] [--work_dir DIR]     half an hour, 25 GB of disk; nothing but packages is downloaded
#
# Writes benchmarks/results/gpu_<name>.json after every row. See benchmarks/full_size/gpu.py for what the rows are.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$HERE/scripts/environment.sh"
find_python "$HERE/requirements.txt"
"$PYTHON" -c 'import dashscope' 2>/dev/null || "$PYTHON" -m pip install --quiet dashscope  # Qwen's vocabulary
export PATH="$(dirname "$PYTHON"):$PATH"
cd "$HERE"
exec "$PYTHON" -m benchmarks.full_size.gpu "$@"
