"""What happens to runs: signals, killed ranks, full disks, losses that are no number. Nothing is lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, run
from test_train import FLAGS, losses, shared_memory, weights, zero2

from train_llava.train import main

STEPS = 60
MORE = [*FLAGS, "--max_steps", STEPS, "--per_device_train_batch_size", 4, "--dataloader_num_workers", 1]
MORE += ["--lora_dropout", 0.05, "--save_steps", 20, "--save_total_limit", 2]


def environment(llava, data, output, train_type):
    names = {"MODEL": str(llava), "DATA": str(data), "TRAIN_TYPE": train_type, "OUTPUT_DIR": str(output)}
    return {**os.environ, **names, "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"}


def ranks(output):
    """Process ids of the ranks of a run that are alive, by what deepspeed starts them with."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            mine = b"--local_rank=" in command and str(output).encode() in command
            if mine and "State:\tZ" not in (folder / "status").read_text():
                found.append(int(folder.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def start(llava, data, output, train_type, until):
    """The run script in the background, once its output has reached a step, and that output."""
    command = ["bash", str(ROOT / "run_zero2.sh"), *map(str, MORE)]
    process = subprocess.Popen(
        command,
        env=environment(llava, data, output, train_type),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    text = ""
    for line in process.stdout:
        text += line
        if re.match(rf"step +{until}/", line):
            return process, text
    raise AssertionError(text[-3000:])


@pytest.fixture(scope="module")
def uninterrupted(llava, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "use_lora"
    done = zero2(llava, data, output, "use_lora", *MORE)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def resumes_exactly(llava, data, output, uninterrupted):
    done = zero2(llava, data, output, "use_lora", *MORE, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(output) == losses(uninterrupted)
    expected = weights(uninterrupted)
    for name, value in weights(output).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_a_checkpoint_and_resume_is_exact(llava, data, tmp_path, uninterrupted, number):
    process, log = start(llava, data, tmp_path / "out", "use_lora", until=25)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "SIGTERM: saving a checkpoint of step" in out, out[-2000:]
    step = int(re.search(r"checkpoint of step (\d+)", out)[1])
    assert 25 <= step < STEPS
    assert (
        json.loads((tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())["global_step"] == step
    )
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()  # that would look like a finished run
    assert not ranks(tmp_path) and not shared_memory(log + out)
    if number == signal.SIGTERM:
        resumes_exactly(llava, data, tmp_path / "out", uninterrupted)


def test_a_killed_rank_ends_the_others_and_resume_is_exact(llava, data, tmp_path, uninterrupted):
    process, _ = start(llava, data, tmp_path / "out", "use_lora", until=45)
    os.kill(ranks(tmp_path)[0], signal.SIGKILL)
    killed = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 40
    assert not ranks(tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-40"]
    resumes_exactly(llava, data, tmp_path / "out", uninterrupted)


def train(llava, data, output, *flags):
    base = [*FLAGS, "--model_name_or_path", llava, "--data_path", data, "--use_cpu", "true", "--output_dir", output]
    return call(main, *base, *flags)


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_records(llava, data, tmp_path):
    flags = ["--train_type", "none", "--learning_rate", 1e30, "--save_steps", 1, "--per_device_train_batch_size", 4]
    done = train(llava, data, tmp_path / "out", *flags, "--lr_scheduler_type", "constant", "--warmup_steps", 0)
    assert done.returncode == 1
    message = re.search(r"the loss is (?:nan|inf) at step (\d+), records ((?:train_\d+(?:, )?){4})\.", done.stderr)
    assert message, done.stderr[-2000:]
    assert "The last whole checkpoint is" in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """40 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if run("mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    run("umount", folder)


def test_a_disk_too_small_is_refused_or_leaves_the_last_good_checkpoint(llava, data, small_disk, tmp_path):
    """The checkpoints of this small model take 4 MB; a file fills the rest of the disk."""
    flags = ["--train_type", "none", "--save_steps", 1, "--save_total_limit", 3, "--per_device_train_batch_size", 4]
    whole = train(llava, data, tmp_path / "roomy", *flags, "--max_steps", 1)
    assert whole.returncode == 0, whole.stderr[-2000:]
    checkpoint = sum(p.stat().st_size for p in (tmp_path / "roomy" / "checkpoint-1").rglob("*") if p.is_file())
    (small_disk / "other").write_bytes(bytes(int(shutil.disk_usage(small_disk).free - 2.5 * checkpoint)))

    done = train(llava, data, small_disk / "out", *flags)
    assert done.returncode == 2 and "will be there at once, and the disk has" in done.stderr, done.stderr[-2000:]
    done = train(llava, data, small_disk / "out", *flags, "--check_resources", "false")
    assert done.returncode == 1, done.stdout[-2000:]
    last = re.search(r"The last whole checkpoint is (\S+); continue with", done.stderr)[1]
    assert last.endswith("checkpoint-2")
    (small_disk / "other").unlink()
    done = train(llava, data, small_disk / "out", *flags, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("train_type", ["use_lora", "none"])
def test_the_estimate_of_a_checkpoint_is_what_it_takes(llava, data, tmp_path, train_type):
    """Weights and optimizer; the tokenizer and other small files are not counted."""
    from test_loss import trainer_of

    from train_llava.resources import checkpoint_bytes
    from train_llava.trainer import LlavaTrainer

    flags = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, train_type, **flags)
    trainer.train()
    files = [path for path in (tmp_path / "checkpoint-1").iterdir() if path.suffix in (".safetensors", ".pt")]
    assert sum(path.stat().st_size for path in files) == pytest.approx(
        checkpoint_bytes(trainer.model, trainer.args), rel=0.15, abs=60_000
    )
