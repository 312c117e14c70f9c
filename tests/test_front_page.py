"""Every command of the front pages, in their order, in a copy of the repository.

Small backbones and data lie where the pages put the downloads. What needs a network or makes an environment is not
typed: NOT_HERE says why. Runs of the script are cut short by flags at their end, as a user would; the Python commands
are called in this process, which saves the seconds that imports take.
"""

import shutil
import sys
from importlib import import_module

import pytest
from conftest import ROOT, SCRIPT_PATH, call, run
from page_client import served
from pages import commands, text_of

from demo.make_data import write_records

NOT_HERE = {
    "git": "the address is the reader's",
    "cd": "the copy is the folder",
    "hf": "a download",
    "source": "the tests' environment is active",
    "run_tests.sh": "it is what runs this",
}
FEW = ("--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none")
SCRIPTS = [words for words in commands(text_of("README.md")) if "run_zero2.sh" in words]
TRAINING = next(words for words in SCRIPTS if "MODEL=models/llava" in words)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The repository's files, and what its readers have downloaded or have of their own."""
    folder = tmp_path / "my train_llava"
    left = shutil.ignore_patterns(".*", "output", "models", "data", "tests", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=left)
    (folder / "models").mkdir()
    (folder / "models" / "clip").symlink_to(ROOT / "demo" / "clip")
    (folder / "models" / "qwen").symlink_to(ROOT / "demo" / "qwen")
    for seed, name in enumerate(("LLaVA-CC3M-Pretrain-595K", "mine", "held_out")):
        write_records(folder / "data" / name, "conversations", "held_out", 24, seed=seed)
    shutil.copy(next((folder / "data" / "mine" / "images").iterdir()), folder / "image.jpg")
    monkeypatch.chdir(folder)
    return folder


def type_script(folder, words, *more):
    """A line with run_zero2.sh, variables in front, as a shell takes it."""
    variables = dict(word.split("=", 1) for word in words[: words.index("bash")])
    return run(*words[words.index("bash") :], *more, cwd=folder, PATH=SCRIPT_PATH, **variables)


def type_module(folder, words):
    module, *flags = words[2:]
    if module == "train_llava.app":
        with served(sys.executable, "-m", module, "--model_name_or_path", folder / flags[1], *flags[2:]):
            return
    done = call(import_module(module).main, *flags)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_build_train_ask_and_look(copy):
    """All commands but the demo, the resumed and the mixed run."""
    typed = 0
    for words in commands(text_of("README.md")):
        if words[0] == "python":
            type_module(copy, words)
        elif words == TRAINING:
            done = type_script(copy, words, *FEW)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            assert words in SCRIPTS or words[0] in NOT_HERE or words[1] in NOT_HERE, words
            continue
        typed += 1
    assert typed == 9
    assert (copy / "models" / "mine" / "config.json").is_file() and (copy / "output" / "check_data" / "mine").is_dir()


@pytest.mark.slow
def test_every_run_of_the_script(copy):
    """The demo from nothing; the real run of one epoch, gone on with for a second; the mixture."""
    build = next(words for words in commands(text_of("README.md")) if "train_llava.build_model" in words)
    type_module(copy, build)
    for words in SCRIPTS:
        epochs = ("--num_train_epochs", "2" if "--resume_from_checkpoint" in words else "1", "--report_to", "none")
        more = ("--max_steps", "4") if words == ["bash", "run_zero2.sh"] else epochs
        done = type_script(copy, words, *more)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        assert "The trained model is in" in done.stdout
    assert (copy / "output" / "demo-use_lora" / "answers.png").is_file()


def test_the_scripts_help(copy):
    """The variables at its top and the flags of a training; nothing is made."""
    done = type_script(copy, ["bash", "run_zero2.sh", "--help"])
    assert done.returncode == 0 and "TRAIN_TYPE=${TRAIN_TYPE:-use_lora}" in done.stdout
    assert "--lora_target_modules" in done.stdout and not (copy / "output").exists()
