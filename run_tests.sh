#!/usr/bin/env bash
# Sets up what the tests need, checks the style, runs every test:   bash run_tests.sh [pytest's arguments]
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/scripts/environment.sh"
find_python "$HERE/requirements.txt" "$HERE/tests/requirements.txt"
cd "$HERE"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
