"""The package as `pip install .` gives it: built, unpacked, and used from a folder that is not the repository."""

import shutil
import sys
from importlib.metadata import distributions

import pytest
from conftest import ROOT, call, run
from packaging.requirements import Requirement

import train_llava
from train_llava import COMMANDS, main

PACKAGE = ROOT / "train_llava"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel holds. Nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    left = shutil.ignore_patterns(".*", "output", "models", "data", "tests", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT, folder / "copy", ignore=left)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "copy", cwd=folder)
    assert built.returncode == 0, built.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    done = run(*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(folder / "copy")
    return folder / "site"


@pytest.fixture
def type_it(installed, tmp_path):
    """Types a command of the installed package in an empty folder."""

    def typed(*words):
        done = run(*words, cwd=tmp_path, PYTHONPATH=str(installed))
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return typed


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def lines_of(file):
    texts = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return {need.name: need for need in map(Requirement, filter(None, texts))}


def test_it_holds_every_file_of_the_package_and_nothing_else(installed):
    assert files_of(installed / "train_llava") == files_of(PACKAGE)
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"bin", "train_llava"}


def test_its_requirements_are_those_of_the_files(installed):
    """Extras have the bounds that the tests run with."""
    (metadata,) = distributions(path=[str(installed)])
    needs = [Requirement(text) for text in metadata.requires]
    own, tests = lines_of("requirements.txt"), lines_of("tests/requirements.txt")
    assert {str(need) for need in needs if need.marker is None} == set(map(str, own.values()))
    extras = [need for need in needs if need.marker is not None]
    assert {need.name for need in extras} == {
        "pycocoevalcap",
        "liger-kernel",
        "bitsandbytes",
        "aiohttp",
        "gguf",
        "wandb",
        "trackio",
        "swanlab",
    }
    for need in extras:
        tested = (own | tests).get(need.name)
        assert tested is None or need.specifier == tested.specifier, need
    assert metadata.version == train_llava.__version__


def test_its_command_runs(type_it, installed):
    assert type_it(installed / "bin" / "train-llava", "--version").strip() == train_llava.__version__
    assert type_it(installed / "bin" / "train-llava", "infer", "--help").startswith("usage: train-llava infer ")
    program = installed / "bin" / "train-llava"
    assert type_it(program) == type_it(program, "--help")


@pytest.mark.slow
def test_it_shows_a_batch(type_it, llava, data, tmp_path):
    """The page and the chat templates lie in the package."""
    type_it(sys.executable, "-m", "train_llava.show_batch", "--model_name_or_path", llava, "--data_path", data)
    assert "What the model sees" in next(tmp_path.rglob("*.html")).read_text()


@pytest.mark.slow
def test_it_estimates(type_it, llava):
    """Without the repository's DeepSpeed settings."""
    flags = ("--model_name_or_path", llava, "--train_type", "use_lora", "--num_gpus", 8, "--gpu", "h100-80g")
    assert "ZeRO-3" in type_it(sys.executable, "-m", "train_llava.estimate", *flags)


def test_the_list_names_each_command_and_imports_none():
    code = "import sys, train_llava as m; sys.argv[1:] = []; m.main(); print(sorted(sys.modules))"
    listed, modules = run(sys.executable, "-c", code).stdout.rsplit("\n[", 1)
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  ")] == list(COMMANDS)
    assert "torch" not in modules and "transformers" not in modules


@pytest.mark.parametrize("word", ["trian", "build-model", "--model_name_or_path", "data", ""])
def test_a_word_that_is_no_command(word):
    done = call(main, word)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and repr(word) in done.stderr
