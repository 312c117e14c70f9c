"""What run_zero2.sh hands to DeepSpeed's launcher on machines that the tests do not run on.

Stand-ins come first in PATH: an nvidia-smi with so many GPUs, an nproc with so many cores, and a python that prints its
arguments.
"""

from itertools import pairwise

import pytest
from conftest import ROOT, run

PYTHON = '[ "$1" = - ] || printf "%s\\n" "$@"\n'  # told `-`, it is asked for the requirements, and has them


def flags(tmp_path, gpus=0, cores=8, **variables):
    """Each word of the launcher's command line, and the one behind it: a flag and its value."""
    lines = {"python": PYTHON, "nproc": f"echo {cores}\n", "nvidia-smi": 'echo "GPU 0: NVIDIA H100"\n' * gpus}
    for name, text in lines.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    names = {"MODEL": "llava", "DATA": "data", "OUTPUT_DIR": str(tmp_path / "out"), "MASTER_PORT": "29500"}
    done = run("bash", ROOT / "run_zero2.sh", PATH=f"{tmp_path}:/usr/bin:/bin", **names, **variables)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:2] == ["-m", "deepspeed.launcher.runner"]
    return dict(pairwise(words))


@pytest.mark.parametrize(
    "train_type, rate",
    [("use_lora", "4e-4"), ("projector", "1e-3"), ("freeze_vision", "2e-5"), ("none", "2e-5"), (None, "4e-4")],
)
def test_each_strategy_has_its_learning_rate(tmp_path, train_type, rate):
    given = flags(tmp_path, **({"TRAIN_TYPE": train_type} if train_type else {}))
    assert (given["--learning_rate"], given["--train_type"]) == (rate, train_type or "use_lora")


def test_the_schedule_is_that_of_llava(tmp_path):
    given = flags(tmp_path)
    assert (given["--lr_scheduler_type"], given["--warmup_steps"]) == ("cosine", "0.03")


def test_all_gpus_are_used_in_bf16(tmp_path):
    given = flags(tmp_path, gpus=2)
    assert (given["--bf16"], given["--dataloader_pin_memory"]) == ("true", "true")
    assert not {"--use_cpu", "--include", "--num_gpus", "--num_accelerators"} & given.keys()


@pytest.mark.parametrize("ranks", ["", "3"])
def test_without_gpus_two_ranks_share_the_cpu(tmp_path, ranks):
    given = flags(tmp_path, NUM_PROCESSES=ranks)
    assert (given["--use_cpu"], given["--dataloader_pin_memory"]) == ("true", "false")
    assert given["--num_accelerators"] == (ranks or "2")
    assert not {"--bf16", "--include", "--num_gpus"} & given.keys()


def test_some_of_the_gpus(tmp_path):
    """The first ones, or those that are named."""
    given = flags(tmp_path, gpus=8, NUM_PROCESSES="2")
    assert given["--num_gpus"] == "2" and "--include" not in given
    given = flags(tmp_path, gpus=8, NUM_PROCESSES="2", INCLUDE="localhost:4,5")
    assert given["--include"] == "localhost:4,5" and "--num_gpus" not in given


@pytest.mark.parametrize("cores, ranks, workers", [(200, "", "10"), (40, "", "5"), (4, "", "1"), (16, "2", "8")])
def test_the_cores_are_shared_out_among_the_loaders(tmp_path, cores, ranks, workers):
    """Ten workers for each of eight ranks at most, and one at least."""
    given = flags(tmp_path, gpus=8, cores=cores, NUM_PROCESSES=ranks)
    assert (given["--dataloader_num_workers"], given["--dataloader_persistent_workers"]) == (workers, "true")
