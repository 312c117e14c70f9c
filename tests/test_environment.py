"""scripts/environment.sh: which Python is taken, what is installed, and what is said where that cannot be done.

A stand-in for Python answers the script's questions, and writes down how it was called.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, run

PYTHON = """#!/bin/sh
echo "$0 $* HOME=$HOME" >>"$LOGS/calls"
case "$*" in
    *"version_info < (3, 10)"*) [ -z "$OLD" ] && echo "$0" ;;
    *"requirements.py --torch"*) printf '%s' "$TORCH"; case $TORCH in [0-9]*) ;; *) exit 1 ;; esac ;;
    *requirements.py*) [ -f "$0.ready" ] || { echo "peft<1,>=0.19 (is not there)"; exit 1; } ;;
    "-m venv"*)
        [ -z "$NO_VENV" ] || { echo "$NO_VENV"; exit 1; }
        for venv; do :; done
        mkdir -p "$venv/bin" && cp "$0" "$venv/bin/python" ;;
    "-m pip --version") ;;
    "-m pip install"*) sleep "${SLEEP:-0}"; [ -z "$NO_PIP" ] || { echo "$NO_PIP" >&2; exit 1; }; touch "$0.ready" ;;
    *base_prefix*getsitepackages* | *getsitepackages*base_prefix*) printf '%s' "$BELOW" ;;
    *getsitepackages*) echo "$LOGS" ;;
    *base_prefix*) echo "$LOGS/python" ;;
    *find_spec*) exit 1 ;;
esac
"""
SCRIPT = 'source "$0/scripts/environment.sh"; find_python requirements.txt; echo "PYTHON=$PYTHON"'
ON_GPU = SCRIPT.replace("; find", "; nvidia_here() { true; }; find")


@pytest.fixture
def home(tmp_path):
    """A copy of the script, and a python that has nothing."""
    (tmp_path / "repo/scripts").mkdir(parents=True)
    (tmp_path / "repo/scripts/environment.sh").write_text((ROOT / "scripts/environment.sh").read_text())
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def environment(home, **variables):
    return {"PATH": f"{home}:/usr/bin:/bin", "HOME": str(home), "LOGS": str(home), **variables}


def found(home, user=None, script=SCRIPT, **variables):
    command = ["bash", "-euo", "pipefail", "-c", script, str(home / "repo")]
    done = subprocess.run(command, env=environment(home, **variables), capture_output=True, text=True, user=user)
    calls = (home / "calls").read_text() if (home / "calls").exists() else ""
    (home / "calls").unlink(missing_ok=True)
    return done, [line for line in calls.splitlines() if "requirements.py" not in line]


def test_the_active_environment_if_it_has_everything(home):
    (home / "python.ready").touch()
    done, calls = found(home)
    assert done.stdout == f"PYTHON={home}/python\n" and not any("-m" in line for line in calls)


def test_a_new_environment_has_exact_versions_and_is_used_again(home):
    venv = home / "repo/.venv"
    done, calls = found(home)
    assert f"PYTHON={venv}/bin/python\n" in done.stdout and "takes some minutes" in done.stdout, done.stderr
    [install] = [line for line in calls if "pip install" in line]
    assert f"-rrequirements.txt -c {home}/repo/constraints.txt" in install
    assert not any("system-site" in line for line in calls)
    done, calls = found(home)
    assert done.stdout == f"PYTHON={venv}/bin/python\n" and not any("install" in line for line in calls)
    (venv / ".complete").unlink()  # an interrupted one
    done, calls = found(home)
    assert any("pip install" in line for line in calls) and not any("-m venv" in line for line in calls)


def test_a_torch_in_range_stays(home):
    """A container's, or that of an active virtual environment, whose packages are to be found as well."""
    done, calls = found(home, TORCH="2.11.0", BELOW="/opt/packages")
    assert "on top of" in done.stdout and "keeps its torch 2.11.0" in done.stdout
    assert any("venv --clear --system-site-packages" in line for line in calls)
    [install] = [line for line in calls if "pip install" in line]
    assert "peft<1,>=0.19" in install and "constraints.txt" not in install
    assert (home / "repo/.venv/keep.txt").read_text() == "torch==2.11.0\n"
    assert (home / "below.pth").read_text() == "/opt/packages\n"


@pytest.mark.parametrize("torch", ["", "2.11.0"])
def test_fused_kernels_are_installed_where_a_gpu_is_seen(home, torch):
    _, calls = found(home, script=ON_GPU, TORCH=torch)
    first, second = [line for line in calls if "pip install" in line]
    assert "liger" not in first and "liger-kernel>=" in second
    shutil.rmtree(home / "repo/.venv")
    _, calls = found(home, TORCH=torch)
    assert not any("liger" in line for line in calls)


@pytest.mark.parametrize("torch", ["torch>=2.11 (2.4.0 is there)", "torch>=2.11 (cannot be used (libcudart.so.12))"])
def test_a_torch_that_does_not_do_is_named(home, torch):
    done, calls = found(home, TORCH=torch)
    assert f"Not used, of {home}/python: {torch}\n" in done.stdout
    assert not any("system-site" in line for line in calls) and "on top of" not in done.stdout


def test_an_active_venv_that_lacks_something_is_added_to(home):
    """As for the tests, in a shell in which it was activated; it is not made on top of itself."""
    venv = home / "repo/.venv"
    for own in (True, False):  # made by the script, or by hand
        found(home)
        (venv / "mine").touch()
        (venv / "bin/python.ready").unlink()
        if not own:
            (venv / ".base").unlink()
        done, calls = found(home, PATH=f"{venv}/bin:{home}:/usr/bin:/bin", TORCH="2.11.0" if not own else "")
        assert done.stdout.endswith(f"PYTHON={venv}/bin/python\n"), done.stderr
        assert (venv / "mine").exists() and any("pip install" in line for line in calls)


def test_python_can_be_chosen(home):
    (home / "other").write_text(PYTHON)
    (home / "other").chmod(0o755)
    (home / "other.ready").touch()
    assert found(home, PYTHON=str(home / "other"))[0].stdout == f"PYTHON={home}/other\n"
    done, _ = found(home, PYTHON="/no/python")
    assert done.returncode == 2 and "no Python 3.10 or newer found at /no/python" in done.stderr


def test_no_python_is_new_enough(home):
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python3.10"):
        (home / name).write_text(PYTHON)
        (home / name).chmod(0o755)
    done, _ = found(home, OLD="yes")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "no Python 3.10 or newer" in done.stderr


FAILURES = {
    "no network": ({"NO_PIP": "WARNING: Retrying\nERROR: No matching distribution found for torch"}, "No matching"),
    "a full disk": ({"NO_PIP": "ERROR: [Errno 28] No space left on device"}, "No space left on device"),
    "no venv": ({"NO_VENV": "ensurepip is not available"}, "ensurepip is not available (on Debian"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_an_install_that_fails_says_why_in_a_line_and_the_next_try_is_clean(home, what):
    variables, reason = FAILURES[what]
    done, _ = found(home, **variables)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and reason in done.stderr, done.stderr
    assert "PYTHON=" not in done.stdout
    done, _ = found(home)
    assert done.returncode == 0 and "PYTHON=" in done.stdout, done.stderr


def test_a_home_that_cannot_be_written_to(home):
    """Some packages write there while they are built."""
    done, calls = found(home, HOME="/proc/none")
    [install] = [line for line in calls if "pip install" in line]
    assert install.endswith(f"HOME={home}/repo/.venv") and done.returncode == 0


def test_a_repository_that_cannot_be_written_to(home):
    """As nobody, for root may write everywhere."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        shutil.copytree(home, folder, dirs_exist_ok=True)
        os.chmod(folder, 0o755)
        os.chmod(f"{folder}/repo", 0o555)
        done, _ = found(Path(folder), user=65534 if os.geteuid() == 0 else None)
    assert done.returncode == 2 and "cannot be written to" in done.stderr and "peft<1,>=0.19" in done.stderr


def test_two_runs_install_once(home):
    command = ["bash", "-euo", "pipefail", "-c", SCRIPT, str(home / "repo")]
    options = {"env": environment(home, SLEEP="1"), "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, **options) for _ in range(2)]
    said = [process.communicate()[0] for process in runs]
    assert all(f"PYTHON={home}/repo/.venv/bin/python" in text for text in said), said
    assert (home / "calls").read_text().count("pip install") == 1
    assert sum("waiting for it" in text for text in said) == 1


UV = """#!/bin/sh
echo "$*" >>"$LOGS/uv"
[ -z "$NO_UV" ] || { echo "$NO_UV" >&2; exit 1; }
touch "$LOGS/repo/.venv/bin/python.ready"
"""


def test_uv_is_taken_where_it_is_there_and_pip_where_it_fails(home):
    (home / "bin").mkdir()
    (home / "bin/uv").write_text(UV)
    (home / "bin/uv").chmod(0o755)
    path = {"PATH": f"{home}:{home}/bin:/usr/bin:/bin"}
    done, calls = found(home, NO_UV="error: no route to download.pytorch.org", **path)
    assert "uv could not (error: no route to download.pytorch.org); trying pip" in done.stdout
    assert any("pip install" in line for line in calls) and done.returncode == 0
    (home / "repo/.venv/bin/python.ready").unlink()
    done, calls = found(home, **path)
    assert not any("pip install" in line for line in calls) and "PYTHON=" in done.stdout
    assert "--torch-backend auto -rrequirements.txt" in (home / "uv").read_text()


def lacking(tmp_path, packages, *flags):
    """What scripts/requirements.py says where these packages come first."""
    for name, version in packages.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "list.txt").write_text("torch>=2.11  # words\n\nnothing>=1 ; python_version < '3'\n")
    command = (sys.executable, ROOT / "scripts/requirements.py", *flags, tmp_path / "list.txt")
    return run(*command, PYTHONPATH=str(tmp_path))


def test_what_an_environment_lacks(tmp_path):
    done = lacking(tmp_path, {"torch": "2.4.1"})
    assert (done.returncode, done.stdout) == (1, "torch>=2.11 (2.4.1 is there)\n")


def test_a_container_own_build_counts_as_its_release(tmp_path):
    assert lacking(tmp_path, {"torch": "2.11.0a0+5228986.nv26.01"}).returncode == 0


def test_a_torch_that_cannot_be_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('first\\nlibcudart.so.12: cannot open shared object file')")
    done = lacking(tmp_path, {"torch": "2.12.0"}, "--torch")
    assert done.returncode == 1 and "cannot be used (libcudart.so.12: cannot open" in done.stdout
