"""The Dockerfile's steps, typed one by one in a folder: no engine is needed, and nothing is installed or downloaded."""

import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, SCRIPT_PATH


def lines_of(name):
    return [line for line in (ROOT / name).read_text().splitlines() if line.strip() and not line.startswith("#")]


def steps():
    """Pairs of an instruction and the rest of its line."""
    text = "\n".join(lines_of("Dockerfile")).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines()]


def is_ignored(path):
    """As Docker reads .dockerignore: patterns begin at the top, and a folder stands for what is in it."""
    for pattern in lines_of(".dockerignore"):
        regex = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{regex}(/.*)?", path):
            return True
    return False


@pytest.fixture(scope="module")
def files():
    """All files of the repository, also those that are not committed yet."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository's history")
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in found if (ROOT / name).is_file()]


def copy_step(context, folder, words):
    """COPY: a folder's content, or files, which must be there."""
    *sources, target = words.split()
    for source in sources:
        found = list(context.glob(source)) if source != "." else [context]
        assert found, f"COPY {source}"
        for path in found:
            if path.is_dir():
                shutil.copytree(path, folder / target, dirs_exist_ok=True)
            else:
                shutil.copy(path, folder / target)


def test_every_step_works(files, tmp_path):
    """apt-get and rm only write down what they are asked; pip goes all the way to what it would install."""
    context, folder, stubs = (tmp_path / name for name in ("context", "train_llava", "stubs"))
    for name in files:
        if not is_ignored(name):
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, context / name)
    stubs.mkdir()
    for name in ("apt-get", "rm"):
        (stubs / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/asked\n')
        (stubs / name).chmod(0o755)
    typed = {**os.environ, "PATH": f"{stubs}:{SCRIPT_PATH}", "PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1", "PYTHONPATH": ""}
    folder.mkdir()
    shell, done, printed = ["/bin/sh", "-c"], [], ""
    for step, words in steps():
        done.append(step)
        if step == "SHELL":
            shell = json.loads(words)
        elif step == "COPY":
            copy_step(context, folder, words)
        elif step in ("RUN", "CMD"):
            line = [*shell, words] if step == "RUN" else [*json.loads(words), "--help"]
            end = subprocess.run(line, cwd=folder, env=typed, capture_output=True, text=True)
            assert end.returncode == 0, f"{words}\n{end.stdout[-2000:]}\n{end.stderr[-2000:]}"
            printed += end.stdout
        else:
            assert step in ("ARG", "FROM", "WORKDIR", "ENV")
    assert done[:2] == ["ARG", "FROM"] and done[-1] == "CMD" and done.count("RUN") == 3
    assert "Would install train_llava" in printed and "--model_name_or_path" in printed
    asked = (tmp_path / "asked").read_text()
    assert "python3-venv" in asked and "rm -rf /var/lib/apt/lists" in asked


def test_an_image_gets_all_that_git_has_and_nothing_that_it_ignores(files):
    """Models and data would make the build send gigabytes."""
    assert [name for name in files if is_ignored(name)] == []
    ignored = {line.strip("/") for line in lines_of(".gitignore")}
    assert {".git", *ignored} == {line.removeprefix("**/") for line in lines_of(".dockerignore")}
    assert all(is_ignored(name) for name in (".git/HEAD", "models/qwen/model.safetensors", "demo/__pycache__/a.pyc"))
