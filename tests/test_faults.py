"""What happens to runs: signals, killed ranks, full disks, losses that are no number. Nothing is lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT_PATH, call, run
from training import FLAGS, losses, shared_memory, weights, zero2

from train_llava.train import main

STEPS = 60
MORE = [*FLAGS, "--max_steps", STEPS, "--per_device_train_batch_size", 4, "--dataloader_num_workers", 1]
MORE += ["--lora_dropout", 0.05, "--save_steps", 20, "--save_total_limit", 2]


def environment(llava, data, output, train_type):
    names = {"MODEL": str(llava), "DATA": str(data), "TRAIN_TYPE": train_type, "OUTPUT_DIR": str(output)}
    return {**os.environ, **names, "PATH": SCRIPT_PATH}


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


def parent_of(process):
    return int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])


def without_workers(processes):
    """The ranks themselves; their loaders' workers have the same command line."""
    return [process for process in processes if parent_of(process) not in processes]


def start(llava, data, output, train_type, until, *flags):
    """The run script in the background, once its output has reached a step, and that output."""
    command = ["bash", str(ROOT / "run_zero2.sh"), *map(str, [*MORE, *flags])]
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
    """A run to its end, per train_type, made when first asked for."""
    made = {}

    def of(train_type):
        if train_type not in made:
            made[train_type] = tmp_path_factory.mktemp("whole") / train_type
            done = zero2(llava, data, made[train_type], train_type, *MORE)
            assert done.returncode == 0, done.stderr[-3000:]
        return made[train_type]

    return of


def resumes_exactly(llava, data, output, uninterrupted, train_type="use_lora"):
    done = zero2(llava, data, output, train_type, *MORE, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(output) == losses(uninterrupted(train_type))
    expected = weights(uninterrupted(train_type))
    for name, value in weights(output).items():
        assert torch.equal(value, expected[name]), name


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


SIGNALS = [("script", signal.SIGTERM), slow("script", signal.SIGINT)]
SIGNALS += [slow("runner", signal.SIGTERM), slow("launcher", signal.SIGTERM), slow("rank", signal.SIGTERM)]


@pytest.mark.parametrize(("told", "number"), SIGNALS)
def test_a_signal_saves_a_checkpoint_and_resume_is_exact(llava, data, tmp_path, uninterrupted, told, number):
    process, _ = start(llava, data, tmp_path / "out", "use_lora", until=25)
    rank = without_workers(ranks(tmp_path))[-1]
    launcher, port = parent_of(rank), re.search(r"MASTER_PORT=(\d+)", Path(f"/proc/{rank}/environ").read_text())[1]
    os.kill({"script": process.pid, "runner": parent_of(launcher), "launcher": launcher, "rank": rank}[told], number)
    out, _ = process.communicate(timeout=90)
    assert process.returncode != 0 and "SIGTERM: saving a checkpoint of step" in out, out[-2000:]
    assert told != "script" or process.returncode == 143
    assert re.search(r"The checkpoint is \S+/checkpoint-\d+\. The same command with --resume_from_checkpoint true", out)
    assert re.search(r" env TRAIN_TYPE=use_lora OUTPUT_DIR=\S+ .*run_zero2\.sh .* --resume_from_checkpoint true\n", out)
    step = int(re.search(r"checkpoint of step (\d+)", out)[1])
    assert 25 <= step < STEPS
    state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["global_step"] == step
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()  # that would look like a finished run
    assert not ranks(tmp_path) and not shared_memory(port)
    if number == signal.SIGTERM and told in ("script", "launcher"):
        resumes_exactly(llava, data, tmp_path / "out", uninterrupted)


KILLED = [slow("use_lora", victim) for victim in ("rank", "all ranks", "launcher")]
KILLED += [slow(train_type, "rank") for train_type in ("freeze_vision", "none", "projector")]


@pytest.mark.parametrize(("train_type", "victim"), KILLED)
def test_kill_9_ends_all_and_resume_is_exact(llava, data, tmp_path, uninterrupted, train_type, victim):
    """With a worker, in the middle of an epoch, and with dropout where there are adapters."""
    process, _ = start(llava, data, tmp_path / "out", train_type, until=45)
    alive = without_workers(ranks(tmp_path))
    launchers = [parent_of(alive[0]), parent_of(parent_of(alive[0]))]
    for victim_id in {"rank": alive[:1], "all ranks": alive, "launcher": launchers}[victim]:
        os.kill(victim_id, signal.SIGKILL)
    killed = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 40
    assert not ranks(tmp_path)
    if victim != "launcher":  # without it, the ranks still save where they are
        left = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
        assert left == ["checkpoint-20", "checkpoint-40"]
    resumes_exactly(llava, data, tmp_path / "out", uninterrupted, train_type)


@pytest.mark.slow
def test_a_rank_that_falls_silent_ends_the_others(llava, data, tmp_path):
    """Stopped, not killed: its connections stay open, so only --ddp_timeout tells that it is gone."""
    process, _ = start(llava, data, tmp_path / "out", "use_lora", 25, "--ddp_timeout", 10)
    os.kill(without_workers(ranks(tmp_path))[1], signal.SIGSTOP)
    began = time.monotonic()
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert re.search(r"nothing has moved since step \d+, for 10 seconds", out), out[-2000:]
    assert not ranks(tmp_path)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(llava, data, tmp_path, uninterrupted):
    """The checkpoint of two ranks is converted, and one goes on as two would have, with as many samples in a step."""
    shutil.copytree(uninterrupted("use_lora") / "checkpoint-40", tmp_path / "out" / "checkpoint-40")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    flags = [*MORE, "--lora_dropout", 0, "--resume_from_checkpoint", "true"]
    done = zero2(llava, data, tmp_path / "out", "use_lora", *flags, NUM_PROCESSES="1")
    assert done.returncode == 2 and "8 samples in a step (4 x 1 x 2), this one has 4 (4 x 1 x 1)" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before

    advice = re.search(r"Give (--per_device_train_batch_size \d+ --gradient_accumulation_steps \d+)\.", done.stderr)[1]
    done = zero2(llava, data, tmp_path / "out", "use_lora", *flags, *advice.split(), NUM_PROCESSES="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is of 2 ranks, this run has 1: converting it" in done.stdout and "on 1 ranks" in done.stdout
    # adapters' dropout is drawn anew on each rank, so only nearly equal
    assert losses(tmp_path / "out") == pytest.approx(losses(uninterrupted("use_lora")), rel=0.05)


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
    from trainers import trainer_of

    from train_llava.planning.budget import checkpoint_bytes
    from train_llava.training.trainer import LlavaTrainer

    flags = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(LlavaTrainer, llava, data, tmp_path, train_type, **flags)
    trainer.train()
    files = [path for path in (tmp_path / "checkpoint-1").iterdir() if path.suffix in (".safetensors", ".pt")]
    assert sum(path.stat().st_size for path in files) == pytest.approx(
        checkpoint_bytes(trainer.model, deepspeed=False), rel=0.15, abs=60_000
    )


def test_what_does_not_fit_into_memory_is_refused_before_the_weights_are_loaded(tmp_path):
    """A trillion weights, which this test itself only talks about."""
    from train_llava.cli import InputError
    from train_llava.planning.activations import Batch, Stage
    from train_llava.planning.arguments import LlavaTrainingArguments
    from train_llava.planning.budget import memory_verdict
    from train_llava.planning.memory import MemoryModel, ZeroConfig

    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    batch, alone = Batch(1, 10, 1, 5), ZeroConfig(deepspeed=False)
    stages = [Stage("token", 1), Stage("answer", 1)]
    large = MemoryModel(4, 4e12, 10**12, 10**12, on_gpu=False, stages=stages)
    with pytest.raises(InputError, match=r"needs 1.6e\+04 GB for weights, gradients and optimizer, and .* are free"):
        memory_verdict(large, batch, alone, args)  # 4 bytes of weight, 4 of gradient and 8 of AdamW's moments for each
    args.check_resources = False
    assert "will not fit" in memory_verdict(large, batch, alone, args)
    args.check_resources = True
    small = MemoryModel(4, 400, 100, 100, on_gpu=False, stages=stages)
    assert "fits; the largest batch" in memory_verdict(small, batch, alone, args)


def test_flags_that_would_be_ignored_are_refused(llava, data, tmp_path):
    def refused(*flags):
        done = train(llava, data, tmp_path / "out", *flags)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "on a CPU accelerate trains with DDP instead" in refused("--fsdp", "full_shard")
    assert "--vision_lora true goes with" in refused("--vision_lora", "true", "--train_type", "none")
    assert "--load_in_4bit true goes with" in refused("--load_in_4bit", "true", "--train_type", "projector")
    assert "given for the vision tower" in refused("--vision_learning_rate", "1e-5", "--train_type", "freeze_vision")
