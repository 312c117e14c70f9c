# Sourced by run_zero2.sh and run_tests.sh: leaves in PYTHON an interpreter that has the requirements.
#
# The active environment is used where it has them. Otherwise .venv is made in the repository and they are installed
# there; a file written at the very end marks the install as whole, so that an interrupted one is done again.

find_python() { # find_python REQUIREMENTS_FILE...
    local here base version candidate
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    base=$(command -v python || command -v python3) || { echo "error: no python found; install Python 3.10 or newer" >&2; exit 2; }
    if has_requirements "$base" "$@"; then
        PYTHON=$base
        return
    fi
    PYTHON=$here/.venv/bin/python
    local mark=$here/.venv/.complete
    if [ -x "$PYTHON" ] && [ -f "$mark" ] && has_requirements "$PYTHON" "$@"; then
        return
    fi
    version=
    for candidate in "$base" python3 python3.13 python3.12 python3.11 python3.10; do
        version=$("$candidate" -c 'import sys; print(sys.version_info >= (3, 10))' 2>/dev/null || true)
        [ "$version" = True ] && { base=$candidate; break; }
    done
    [ "$version" = True ] || { echo "error: $("$base" --version) is too old; install Python 3.10 or newer" >&2; exit 2; }
    echo "Installing the requirements into .venv (once; a few minutes) ..."
    rm -f "$mark"
    [ -x "$PYTHON" ] && "$PYTHON" -m pip --version >/dev/null 2>&1 || "$base" -m venv --clear "$here/.venv" || {
        echo "error: could not make .venv; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    }
    "$PYTHON" -m pip install --disable-pip-version-check "${@/#/-r}" || {
        echo "error: the install did not finish; see pip's message above. Run the same command again to go on." >&2
        exit 1
    }
    touch "$mark"
}

has_requirements() { # has_requirements PYTHON REQUIREMENTS_FILE... ; looks up versions only, so it takes no time
    "$1" - "${@:2}" 2>/dev/null <<'END'
import sys
from importlib.metadata import version
from packaging.requirements import Requirement

for path in sys.argv[1:]:
    for line in open(path):
        if text := line.split("#")[0].strip():
            need = Requirement(text)
            # any torch will do that is there: which build is right depends on the machine's GPUs
            if not need.specifier.contains(version(need.name)) and need.name != "torch":
                sys.exit(1)
END
}
