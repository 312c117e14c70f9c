#!/usr/bin/env bash
# Builds the site from the lessons, the pages in docs/ and the docstrings, in English and in Chinese:
#
#   bash site/build.sh [OUTPUT]      OUTPUT is output/site unless you say otherwise, and is made anew
#
# REPOSITORY=https://host/owner/name links to files that are no pages of the site; without it they are plain text.
# Nothing is executed: the notebooks are shown with the outputs that are in them. No page asks another host for anything.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/../scripts/environment.sh"
OUTPUT=$(realpath -m "${1:-$ROOT/output/site}")
[ ! -e "$OUTPUT" ] || [ -f "$OUTPUT/.site" ] || fail "$OUTPUT is there, and no site was built in it. Give another place"
find_python "$ROOT/requirements.txt" "$HERE/requirements.txt"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
for LANGUAGE in en zh; do
    "$PYTHON" "$HERE/stage.py" "$LANGUAGE" "$WORK/$LANGUAGE"
    SITE_LANGUAGE=$LANGUAGE PYTHONPATH=$ROOT HF_HUB_OFFLINE=1 "$PYTHON" -m sphinx -b html -W --keep-going -q \
        -c "$HERE" -d "$WORK/doctrees-$LANGUAGE" "$WORK/$LANGUAGE" "$WORK/site/$LANGUAGE"
done
cp "$HERE/index.html" "$WORK/site/"
mkdir "$WORK/site/interactive"
cp "$ROOT"/tutorial/interactive/*.html "$WORK/site/interactive/"
touch "$WORK/site/.site" "$WORK/site/.nojekyll"  # GitHub would leave folders like _static out
rm -rf "$OUTPUT"
mkdir -p "$(dirname "$OUTPUT")"
mv "$WORK/site" "$OUTPUT"
echo "$OUTPUT/index.html"
