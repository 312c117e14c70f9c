"""Two hosts, as two network namespaces joined by a cable (a veth pair), one rank in each."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run
from training import FLAGS, losses, zero2

STEPS = 30
MORE = [*FLAGS, "--max_steps", STEPS, "--save_steps", 10, "--per_device_train_batch_size", 4]
NAMES = ("train_llava_0", "train_llava_1")


@pytest.fixture
def hosts():
    """Addresses 10.77.0.1 and 10.77.0.2."""

    def ip(*words):
        return run("ip", *words).returncode == 0

    made = all(ip("netns", "add", name) for name in NAMES) and ip(
        *("link", "add", "train_llava_a", "netns", NAMES[0], "type", "veth"),
        *("peer", "name", "train_llava_b", "netns", NAMES[1]),
    )
    if made:
        for number, (name, link) in enumerate(zip(NAMES, ("train_llava_a", "train_llava_b"), strict=True)):
            made &= ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", link)
            made &= ip("-n", name, "link", "set", link, "up") and ip("-n", name, "link", "set", "lo", "up")
    if made:
        yield
    for name in NAMES:
        ip("netns", "del", name)
    if not made:
        pytest.skip("network namespaces are not allowed here (they need root and iproute2)")


def start(llava, data, output, rank, *flags):
    """The run script on one host, one rank."""
    names = {"MODEL": str(llava), "DATA": str(data), "TRAIN_TYPE": "use_lora", "OUTPUT_DIR": str(output)}
    names |= {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "10.77.0.1", "NUM_PROCESSES": "1"}
    names["PATH"] = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin:/bin"
    command = ["ip", "netns", "exec", NAMES[rank], "bash", str(ROOT / "run_zero2.sh"), *map(str, [*MORE, *flags])]
    log = (output.parent / f"log{rank}").open("a+")
    return subprocess.Popen(command, env={**os.environ, **names}, stdout=log, stderr=subprocess.STDOUT)


def text(output, rank):
    return (output.parent / f"log{rank}").read_text()


def wait_for_step_12(process, output):
    deadline = time.monotonic() + 180
    while not re.search(r"\nstep 1[2-9]/", text(output, 0)):
        assert time.monotonic() < deadline and process.poll() is None, text(output, 0)[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
def test_two_hosts_train_lose_one_and_go_on(llava, data, tmp_path, hosts):
    done = zero2(llava, data, tmp_path / "one", "use_lora", *MORE)
    assert done.returncode == 0, done.stderr[-2000:]
    output = tmp_path / "two"
    both = [start(llava, data, output, rank) for rank in (0, 1)]
    wait_for_step_12(both[0], output)
    for process in run("ip", "netns", "pids", NAMES[1]).stdout.split():  # all that runs on host 1 is gone at once
        os.kill(int(process), signal.SIGKILL)
    cut = time.monotonic()
    for process in both:
        assert process.wait(timeout=120) != 0
    assert time.monotonic() - cut < 60
    assert "The last whole checkpoint is" in text(output, 0)

    both = [start(llava, data, output, rank, "--resume_from_checkpoint", "true") for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in both] == [0, 0], text(output, 0)[-3000:]
    assert "DeepSpeedZeroOptimizer ZeRO-2 on 2 ranks" in text(output, 0)
    assert losses(output) == losses(tmp_path / "one")  # from the first step to the last


@pytest.mark.slow
def test_a_cable_that_is_pulled_ends_both_hosts(llava, data, tmp_path, hosts):
    """No connection is closed, nothing arrives any more."""
    output = tmp_path / "two"
    both = [start(llava, data, output, rank, "--ddp_timeout", 10) for rank in (0, 1)]
    wait_for_step_12(both[0], output)
    assert run("ip", "-n", NAMES[1], "link", "set", "train_llava_b", "down").returncode == 0
    pulled = time.monotonic()
    for process in both:
        assert process.wait(timeout=120) != 0
    assert time.monotonic() - pulled < 60
    for rank in (0, 1):
        assert re.search(r"nothing has moved since step \d+, for 10 seconds", text(output, rank))
