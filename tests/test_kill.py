"""kill -9 at random moments, and two of each command at once: nothing old is lost, nothing half-made looks whole."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors import safe_open

from train_llava.check_data import WRITTEN as REPORT
from train_llava.evaluate import WRITTEN as EVALUATION
from train_llava.model.folder import CONFIGS, MODEL_FILES, recover_model

MOMENTS = 50  # of each command
COMMANDS = ["build_model", "merge_lora", "infer", "evaluate", "check_data", "show_batch", "train"]


@pytest.fixture(scope="module")
def jobs(llava, old_clip, old_qwen, data, files, runs, tmp_path_factory):
    """Of each command: its flags, what it writes, and what was there before."""
    home = tmp_path_factory.mktemp("kill")
    adapter = runs("use_lora")[0]
    for name in ("build_model", "merge_lora"):  # a model of other weights, which is to be replaced
        shutil.copytree(llava, home / "before" / name)
        with (home / "before" / name / "model.safetensors").open("r+b") as file:
            file.seek(-64, 2)
            file.write(bytes(64))
    (home / "before" / "infer").mkdir()
    (home / "images").mkdir()
    for file in files:
        shutil.copy(file, home / "images")
    model, out = ["--model_name_or_path", llava], home / "out"
    halves = ["--vision_model_name_or_path", old_clip, "--language_model_name_or_path", old_qwen]
    scored = ["--data_path", data, "--output_dir"]
    trained = [
        "--max_steps",
        6,
        "--save_steps",
        1,
        "--save_strategy",
        "steps",
        "--use_cpu",
        "true",
        "--report_to",
        "none",
    ]
    trained += ["--per_device_train_batch_size", 2, "--train_type", "none", "--sample_steps", 3]
    flags = {
        "build_model": [*halves, "--overwrite", "--output_dir", out / "build_model"],
        "merge_lora": ["--adapter_name_or_path", adapter, "--overwrite", "--output_dir", out / "merge_lora"],
        "infer": [*model, "--images", home / "images", "--batch_size", 2, "--output_file", out / "infer" / "a.jsonl"],
        "evaluate": [*model, "--max_new_tokens", 4, *scored, out / "evaluate"],
        "check_data": ["--workers", 0, *model, *scored, out / "check_data"],
        "show_batch": [*model, "--data_path", data, "--output", out / "show_batch" / "page.html"],
        "train": [*model, *trained, *scored, out / "train"],
    }
    return home, {name: list(map(str, words)) for name, words in flags.items()}


def worked(home, flags, name, moments, before=None):
    """The folder in which `killer.py` has left what it saw."""
    log = home / f"log-{name}-{len(moments)}"
    place = home / "out" / name
    job = {"module": f"train_llava.{name}", "flags": flags[name], "moments": moments, "watch": str(place)}
    job |= {"restore": {str(place): before and str(before)}, "log": str(log)}
    (home / "jobs.json").write_text(json.dumps([job]))
    command = [sys.executable, ROOT / "tests" / "killer.py", home / "jobs.json"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return log


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def contents(folder, patterns=("*",)):
    return {path.name: path.read_bytes() for each in patterns for path in folder.glob(each) if path.is_file()}


def loads(folder):
    return any((folder / name).is_file() for name in CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_kill_9_at_any_moment(jobs, name):
    home, flags = jobs
    moments = sorted(random.Random(COMMANDS.index(name)).random() for _ in range(MOMENTS))
    before = home / "before" / name
    if name in ("evaluate", "check_data", "show_batch"):  # its own results from before
        log = worked(home, flags, name, [0.0])
        shutil.copytree(log / "end" / "left", before)
    log = worked(home, flags, name, moments, before if before.exists() else None)
    assert (log / "end" / "code").read_text() == "0", (log / "end", *[p.read_text() for p in log.glob("said-*")][:1])
    kept = [log / str(number) for number in range(MOMENTS)]
    assert {(folder / "code").read_text() for folder in kept} == {"-9"}
    for folder in kept:
        CHECKS[name](folder / "left", log / "end" / "left", before)


def one_model(left, new, old):
    """The old one or the new one, at once or after the next command has mended the folder."""
    known = [contents(new, MODEL_FILES), contents(old, MODEL_FILES)]
    if loads(left):
        assert contents(left, MODEL_FILES) in known
    recover_model(left)
    assert contents(left, MODEL_FILES) in known


def whole_lines(left, new, old):
    """Answers as they are in the end, all whole but perhaps the last."""
    file, whole = left / "a.jsonl", (new / "a.jsonl").read_bytes().splitlines(keepends=True)
    if file.exists():
        lines = file.read_bytes().splitlines(keepends=True)
        assert lines == whole[: len(lines)]


def whole_files(names):
    """Each as it was, or as it will be."""

    def check(left, new, old):
        for name in names:
            known = [(folder / name).read_bytes() for folder in (new, old) if (folder / name).exists()]
            assert not (old / name).exists() or (left / name).read_bytes() in known or name.endswith(".png")

    return check


def whole_checkpoints(left, new, old):
    """Those that pass for whole can be read to their end; the final model is there with its config, or is not."""
    if not left.exists():
        return
    found = [path for path in left.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    for folder in found:
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] >= 1
    for folder in [*found, *([left] if loads(left) else [])]:
        with safe_open(folder / "model.safetensors", framework="np") as file:
            assert sum(file.get_tensor(name).size for name in file.keys()) > 1000  # noqa: SIM118
    if loads(left):
        assert contents(left, ("*.safetensors",)).keys() == contents(new, ("*.safetensors",)).keys()


CHECKS = {
    "build_model": one_model,
    "merge_lora": one_model,
    "infer": whole_lines,
    "evaluate": whole_files(EVALUATION),
    "check_data": whole_files(REPORT),
    "show_batch": whole_files(["page.html"]),
    "train": whole_checkpoints,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_two_at_once(jobs, name):
    """One works, the other says why not; what is left is what one alone leaves."""
    home, flags = jobs
    before = home / "before" / name
    log = worked(home, flags, name, [], before if name in ("build_model", "merge_lora") else None)
    said = "".join(path.read_text() for path in log.glob("said-*"))
    assert sorted(json.loads((log / "codes").read_text())) == [0, 2], said[-2000:]
    assert "another process is writing there. Wait for it, or give another place." in said
    left = log / "end" / "left"
    if name == "infer":
        images = [json.loads(line)["image"] for line in (left / "a.jsonl").read_text().splitlines()]
        assert sorted(images) == sorted(path.name for path in Path(home / "images").iterdir())
    elif name in ("build_model", "merge_lora"):
        assert contents(left, MODEL_FILES) != contents(before, MODEL_FILES) and loads(left)
    assert not [path for path in left.iterdir() if path.name.startswith(".unfinished")]
