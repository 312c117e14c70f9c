#!/usr/bin/env bash
# Sets up what the tests need, checks the style, runs every test:
#
#   bash run_tests.sh [pytest's arguments]
#   bash run_tests.sh --oldest [...]       with the lowest versions that requirements.txt allows, in .venv-oldest
#   bash run_tests.sh --newest [...]       with the highest, in .venv-newest
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/scripts/environment.sh"
case ${1:-} in
    --oldest | --newest)
        VENV=.venv-${1#--} CONSTRAINTS=$HERE/.venv-${1#--}.txt
        [ "$1" = --newest ] || PINS='s/^([a-z0-9-]+)>=([0-9.]+).*/\1==\2/p'
        sed -nE "${PINS:-}" "$HERE/requirements.txt" >"$CONSTRAINTS"
        shift
        ;;
esac
find_python "$HERE/requirements.txt" "$HERE/tests/requirements.txt"
cd "$HERE"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
