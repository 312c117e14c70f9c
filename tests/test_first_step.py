"""The first steps of a run: the memory and hours that they foretell, and a new start where memory runs out."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import call
from training import ANY_BATCH, losses, zero2
from transformers import Trainer, TrainerControl, TrainerState

from train_llava import train
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.planning.micro_batch import LIMIT_FILE
from train_llava.training import callbacks, first_step
from train_llava.training.callbacks import ProgressLine
from train_llava.training.first_step import FirstStepCallback

AUTO = ["--global_batch_size", 8, "--per_device_train_batch_size", "auto"]


def test_a_gpu_compares_the_first_step_with_the_estimate(tmp_path, monkeypatch, capsys):
    args = SimpleNamespace(use_cpu=False)
    monkeypatch.setattr(first_step, "gpu", lambda: torch.device("cuda"))
    monkeypatch.setattr(first_step, "peak_memory_gb", lambda: 31.2)
    callback = FirstStepCallback()
    callback.expected = 30.1e9
    for _ in range(2):
        callback.on_step_end(args, TrainerState(is_world_process_zero=True), TrainerControl())
    assert capsys.readouterr().out == "memory: 31.2 GB used in the first step, 30.1 expected\n"


def hours_line(monkeypatch, capsys, seconds, steps, start=0, foretold=False, **flags):
    """What is printed when the first step took 100 seconds and each that follows `seconds`."""
    now = iter([0.0, 100.0, 100.0 + 5 * seconds])
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(now))
    args = LlavaTrainingArguments(output_dir="x", use_cpu=True, **flags)
    line, state = ProgressLine(foretold), TrainerState(max_steps=steps, global_step=start, is_world_process_zero=True)
    line.on_train_begin(args, state, TrainerControl(), optimizer=None)
    for state.global_step in range(start + 1, start + 20):
        line.on_step_end(args, state, TrainerControl())
    return capsys.readouterr().out.splitlines()[1:]


def test_the_hours_of_a_long_run_are_said_once(monkeypatch, capsys):
    """LLaVA-CC3M in steps of 32: 18,606 an epoch."""
    ten = hours_line(monkeypatch, capsys, 1.0, 186_060, num_train_epochs=10)
    assert ten == ["about 51:41 hours in all at this speed; --num_train_epochs 1, LLaVA's, takes 5:10"]
    assert hours_line(monkeypatch, capsys, 1.0, 186_060, start=90_000, num_train_epochs=10) == ten  # resumed
    alone = ["about 51:41 hours in all at this speed"]
    assert hours_line(monkeypatch, capsys, 1.0, 186_060, num_train_epochs=1) == alone
    assert hours_line(monkeypatch, capsys, 1.0, 186_060, num_train_epochs=10, foretold=True) == alone
    assert hours_line(monkeypatch, capsys, 1.0, 186_060, max_steps=186_060) == alone  # epochs decide nothing
    assert hours_line(monkeypatch, capsys, 0.1, 186_060, num_train_epochs=10) == [
        "about 5:10 hours in all at this speed"
    ]
    assert hours_line(monkeypatch, capsys, 1.0, 3_600, num_train_epochs=10) == []


@pytest.fixture
def little_memory(monkeypatch):
    """Holds `most` samples at a time, from a step on."""
    plain = Trainer.training_step
    limits = SimpleNamespace(most=2, step=0)

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > limits.most and self.state.global_step >= limits.step:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    monkeypatch.setattr(os, "_exit", sys.exit)
    return limits


def start(llava, data, output, *flags):
    base = ["--model_name_or_path", llava, "--data_path", data, "--use_cpu", "true", "--output_dir", output]
    return call(train.main, *ANY_BATCH, *base, *flags)


@pytest.mark.slow
def test_it_starts_again_in_the_same_folder_until_it_fits(llava, data, tmp_path, little_memory, monkeypatch):
    """Although TensorBoard has written there; an old run is kept meanwhile. The losses are those of a run that fits."""
    flags = (*AUTO, "--report_to", "tensorboard", "--max_steps", 3, "--save_strategy", "no")
    flags += ("--overwrite_output_dir", "true")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_state.json").write_text("of an old run")
    (tmp_path / "limit").touch()
    monkeypatch.setenv(LIMIT_FILE, str(tmp_path / "limit"))
    for size, half in ((8, 4), (4, 2)):
        done = start(llava, data, tmp_path / "out", *flags)
        assert done.returncode == os.EX_TEMPFAIL, done.stderr
        assert f"auto is {size}\n" in done.stdout
        assert done.stderr.startswith(
            f"rank 0: out of memory with a micro-batch of {size}. Starting again with half.\n"
        )
        assert [path.read_text() for path in tmp_path.glob("out/_old-run-*/*")] == ["of an old run"]
        assert (tmp_path / "limit").read_text() == str(half)
    done = start(llava, data, tmp_path / "out", *flags)
    assert done.returncode == 0 and "8 samples a step (2 x 4 x 1)" in done.stdout, done.stderr
    assert len([*tmp_path.glob("out/runs/*/events*")]) == 1 and not [*tmp_path.glob("out/_old-run-*")]
    little_memory.most = 8
    start(llava, data, tmp_path / "plain", "--per_device_train_batch_size", 8, *flags[4:])
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_who_was_not_started_by_the_script_is_told_the_flag(llava, data, tmp_path, little_memory):
    done = start(llava, data, tmp_path / "out", *AUTO)
    assert done.returncode == os.EX_TEMPFAIL
    assert "Start again with --per_device_train_batch_size 4; a step has as many samples as before." in done.stderr


@pytest.mark.parametrize("most, step, flags", [(0, 0, ["1"]), (2, 0, ["4"]), (2, 1, ["auto"])])
def test_otherwise_it_is_an_error(llava, data, tmp_path, little_memory, most, step, flags):
    """Not even one sample fits; a number was given; it is not the first step."""
    little_memory.most, little_memory.step = most, step
    done = start(llava, data, tmp_path / "out", "--global_batch_size", 8, "--per_device_train_batch_size", *flags)
    assert done.returncode == 1 and "give --gradient_checkpointing true" in done.stderr
    assert ("lower --per_device_train_batch_size" in done.stderr) == (most > 0)


@pytest.mark.slow
def test_two_ranks_start_again_together(llava, data, tmp_path):
    """One runs out of memory, the other is in the middle of a collective."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'train_llava.train' in ' '.join(sys.orig_argv) and os.environ.get('RANK') == '1':\n"
        "    import torch, transformers\n"
        "    plain = transformers.Trainer.training_step\n"
        "    def training_step(self, model, inputs, *args, **kwargs):\n"
        "        if len(inputs['input_ids']) > 2:\n"
        "            raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "        return plain(self, model, inputs, *args, **kwargs)\n"
        "    transformers.Trainer.training_step = training_step\n"
    )
    done = zero2(llava, data, tmp_path / "out", "use_lora", *AUTO, base=ANY_BATCH, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    taken = [line.rsplit(" ")[-1] for line in done.stdout.splitlines() if "auto is" in line]
    assert taken == ["4", "2"] and done.stderr.count("Starting again with half") == 1
    start(llava, data, tmp_path / "plain", "--per_device_train_batch_size", 8, "--warmup_steps", 0.03)
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
