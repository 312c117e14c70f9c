# Sourced by run_zero2.sh and run_tests.sh: leaves in PYTHON an interpreter that has the requirements.
#
# That is, in this order:
# 1. the active environment's, or the one that PYTHON names, if it has them;
# 2. that of .venv in this repository, if it was made before;
# 3. that of a new .venv: on top of the first one where it has a torch in range, as containers and conda do. That torch
#    stays, and what is missing is added. Otherwise with everything, in the versions of constraints.txt.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LIGER="liger-kernel>=0.8.5,<1"  # fused kernels for GPUs; needs Triton, which comes with PyTorch for them

find_python() { # find_python REQUIREMENTS_FILE...
    local base venv
    ready_python "$@" && return
    [ -w "$ROOT" ] || fail "$ROOT cannot be written to, and $base lacks: $(lacking "$base" "$@" | head -3 | paste -sd ' ' -)." \
        "Copy the repository to a place of your own, or activate an environment that has requirements.txt"
    if [ "${base%/bin/*}" -ef "$venv" ]; then  # it is active itself, and lacks something: not to be made on top of itself
        base=$(cat "$venv/.base" 2>/dev/null || "$base" -c 'import sys; print(sys.base_prefix + "/bin/python3")')
    fi
    exec 8<"$ROOT"
    if command -v flock >/dev/null && ! flock -n 8; then
        echo "Another run is installing the packages; waiting for it ..."
        flock 8
        ready_python "$@" && { exec 8<&-; return; }
    fi
    install "$@"
    exec 8<&-
    PYTHON=$venv/bin/python
}

ready_python() { # sets PYTHON where an environment is ready; makes none. Leaves base and venv for what follows
    venv=$ROOT/${VENV:-.venv}
    base=$(base_python) || exit 2
    if [ -z "${VENV:-}" ] && lacking "$base" "$@" >/dev/null; then
        PYTHON=$base
    elif [ -f "$venv/.complete" ] && { [ -z "${PYTHON:-}" ] || [ "$(cat "$venv/.base" 2>/dev/null)" = "$base" ]; } &&
        lacking "$venv/bin/python" "$@" >/dev/null; then
        PYTHON=$venv/bin/python
    else
        return 1
    fi
}

base_python() { # prints the interpreter to begin with
    local name
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python python3 python3.13 python3.12 python3.11 python3.10; fi
    for name in "$@"; do
        "$name" -c 'import sys; sys.version_info < (3, 10) and sys.exit(1); print(sys.executable)' 2>/dev/null && return
    done
    fail "no Python 3.10 or newer found${PYTHON:+ at $PYTHON}; install one, or name it: PYTHON=/path/to/python bash ..."
}

lacking() { "$1" "$ROOT/scripts/requirements.py" "${@:2}" 2>/dev/null; } # lacking PYTHON [--torch] REQUIREMENTS_FILE...

fail() {
    echo "error: $*" >&2
    exit 2
}

install() { # install REQUIREMENTS_FILE... ; a file written at the very end marks the install as whole
    local torch name=${venv#"$ROOT"/} missing=() fused=() line
    local minutes="This happens once and takes some minutes; $name/install.log tells more."
    rm -f "$venv/.complete"
    if [ -z "${VENV:-}" ] && torch=$(lacking "$base" --torch "$@"); then
        echo "Making $name on top of $base, which keeps its torch $torch; adding what it lacks. $minutes"
        make_venv --system-site-packages
        while read -r line _; do missing+=("$line"); done < <(lacking "$venv/bin/python" "$@")
        echo "torch==$torch" >"$venv/keep.txt"
        pip_install -c "$venv/keep.txt" "${missing[@]}"
        fused=(-c "$venv/keep.txt")
    else
        case ${torch:-} in "" | *"is not there"*) ;; *) echo "Not used, of $base: $torch" ;; esac
        echo "Installing the packages into $name. $minutes"
        set -- "${@/#/-r}" -c "${CONSTRAINTS:-$ROOT/constraints.txt}"
        make_venv
        uv_install "$@" || { say_size; pip_install "$@"; }
    fi
    if nvidia_here; then  # without them a training is slower, and says so
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${fused[@]+"${fused[@]}"} "$LIGER" 2>/dev/null ||
            echo "liger-kernel could not be installed"
    fi
    touch "$venv/.complete"
}

nvidia_here() { compgen -G "/dev/nvidia[0-9]*" >/dev/null || [ -e /dev/dxg ]; } # /dev/dxg: a GPU under Windows

make_venv() { # make_venv [--system-site-packages] ; one that an interrupted install has left is used again
    local said below
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
        [ "$(cat "$venv/.base" 2>/dev/null || echo "$base")" != "$base" ]; then
        said=$("$base" -m venv --clear "$@" "$venv" 2>&1) ||
            uv venv -q --clear --seed --python "$base" "$@" "$venv" 2>/dev/null ||
            fail "could not make $venv: $(tail -1 <<<"$said") (on Debian and Ubuntu: apt install python3-venv)"
    fi
    echo "$base" >"$venv/.base"
    # what lies below a virtual environment is the system's Python; its own packages are to be found, too
    [ $# -gt 0 ] || return 0
    below=$("$base" -c 'import site, sys; print("\n".join(site.getsitepackages() * (sys.prefix != sys.base_prefix)))')
    [ -z "$below" ] || echo "$below" >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/below.pth"
}

uv_install() { # uv is fast, and takes PyTorch's build for this machine; it does not see packages below an environment
    command -v uv >/dev/null || return 1
    local backend=()
    [ -n "${UV_TORCH_BACKEND:-}" ] || backend=(--torch-backend auto)
    uv pip install --quiet --python "$venv/bin/python" ${backend[@]+"${backend[@]}"} "$@" 2>"$venv/uv.log" || {
        echo "uv could not ($(tail -1 "$venv/uv.log")); trying pip ..."
        return 1
    }
}

pip_install() {
    local said home=${HOME:-}
    [ -w "$home" ] || home=$venv  # some packages write there while they are built
    said=$(HOME=$home "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --log "$venv/install.log" "$@" 2>&1) ||
        fail "the install did not finish: $({ grep -i '^error' <<<"$said" || cat <<<"$said"; } | tail -1)." \
            "The same command again goes on from there"
}

say_size() { # on Linux, pip takes PyTorch with CUDA
    [ "$(uname -sm)" = "Linux x86_64" ] && [ -z "${PIP_EXTRA_INDEX_URL:-}" ] || return 0
    "$venv/bin/python" -c 'import importlib.util as i, sys; sys.exit(i.find_spec("torch") is None)' && return
    echo "pip takes PyTorch with CUDA: a download of about 3 GB."
    nvidia_here || {
        echo "No NVIDIA GPU is seen here. PyTorch for the CPU is 0.2 GB: to take that, press Ctrl-C and put this in front of"
        echo "the command: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
    }
}
