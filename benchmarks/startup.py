"""How long `bash run_zero2.sh` takes to its first step, and where that time goes.

    python -m benchmarks.startup [--against COMMIT] [--rounds 3] [--json benchmarks/results/startup.json]

Runs the real script on the demo: once with nothing made before (no demo data, no compiled op, no Arrow copy), then
`rounds` times with all of it there, and shows medians. With a commit to compare with, the two take turns. A module that
Python imports at its start notes when each process begins, and in rank 0 looks every few milliseconds at what the main
thread is doing; nothing in the product takes part. "CPU" is what rank 0 itself worked, which other programs on the
machine disturb less than the clock.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import machine

ROOT = Path(__file__).parent.parent
TICK = 0.005  # seconds between two looks
WATCH = f"""
import os, sys, threading, time

def note(*what):
    with open(os.environ["STARTUP_NOTES"], "a") as file:
        file.write("\\t".join(map(str, what)) + "\\n")

def watch(main):
    while True:
        time.sleep({TICK})
        frame, names = sys._current_frames().get(main), []
        while frame:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        note("look", time.time(), time.process_time(), " ".join(reversed(names)))

words = " ".join(sys.orig_argv)
note("start", time.time(), time.process_time(), words)
if "train_llava.train" in words and "--local_rank=0" in words:
    threading.Thread(target=watch, args=[threading.get_ident()], daemon=True).start()
"""
# Phases of rank 0 after its imports: the outermost function on the stack that has one of these names
FUNCTIONS = {
    "parse_args_into_dataclasses": "flags",
    "claim_output_dir": "flags",
    "load": "model",
    "apply_train_type": "model",
    "memory_verdict": "model",
    "open_data": "data",
    "_prepare_for_training": "DeepSpeed",  # Trainer's name for accelerator.prepare and what goes with it
    "_run_epoch": "first step",
    "_find_and_load": "imports",
}
PHASES = ["script", "launcher", "imports", "flags", "data", "model", "DeepSpeed", "first step", "other"]


def phase(stack: str) -> str:
    """Of a stack, its function names from the outermost on."""
    return next((FUNCTIONS[name] for name in stack.split() if name in FUNCTIONS), "other")


def run(root: Path, scratch: Path) -> dict[str, Any]:
    """One start, stopped after its first step: seconds of each phase, and of rank 0 CPU seconds."""
    notes = scratch / "notes"
    notes.write_text("")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(scratch),
        "STARTUP_NOTES": str(notes),
        "TORCH_EXTENSIONS_DIR": str(scratch / "ops"),
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
        "OUTPUT_DIR": str(scratch / "out"),
    }
    command = ["bash", str(root / "run_zero2.sh"), "--logging_steps", "1", "--sample_steps", "0"]
    begun, ended = time.time(), None
    printed, pipes = [], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # from its own folder, which `python -m` looks into before PYTHONPATH
    with subprocess.Popen(command, cwd=root, env=environment, **pipes) as script:
        for line in script.stdout:
            if ended is None and re.match(r"step +1/", line):
                ended = time.time()
                script.terminate()
            printed.append(line)
    if ended is None:
        raise RuntimeError("the script failed:\n" + "".join(printed[-30:]))
    return split([line.split("\t") for line in notes.read_text().splitlines()], begun, ended)


def split(notes: list[list[str]], begun: float, ended: float) -> dict[str, Any]:
    """Seconds and CPU seconds by phase out of what the processes noted."""
    starts = [(float(at), words) for kind, at, _, words in notes if kind == "start"]
    launcher = next(at for at, words in starts if "launcher.runner" in words)
    at, worked, _ = next((float(at), float(cpu), words) for kind, at, cpu, words in notes
                         if kind == "start" and "--local_rank=0" in words)  # fmt: skip
    seconds = dict.fromkeys(PHASES, 0.0) | {"script": launcher - begun, "launcher": at - launcher}
    cpu = dict.fromkeys(PHASES[2:], 0.0)
    for kind, now, work, stack in notes:
        if kind == "look" and float(now) <= ended:
            seconds[phase(stack)] += float(now) - at
            cpu[phase(stack)] += float(work) - worked
            at, worked = float(now), float(work)
    return {"seconds": seconds | {"all": ended - begun}, "cpu_of_rank_0": cpu | {"all": sum(cpu.values())}}


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each number over the runs."""
    return {
        kind: {name: round(median(one[kind][name] for one in runs), 2) for name in runs[0][kind]} for kind in runs[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="a commit to take turns with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    command = f"python -m benchmarks.startup{f' --against {args.against}' if args.against else ''}"
    result = {"command": command, **machine(), "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as folder:
        commits = {"before": args.against, "now": "HEAD"} if args.against else {"now": "HEAD"}
        runs: dict[str, list[dict[str, Any]]] = {}
        for name, commit in commits.items():  # each in a checkout of its own, where nothing is made yet
            (Path(folder, name)).mkdir()
            (Path(folder, name, "sitecustomize.py")).write_text(WATCH)
            subprocess.run(["git", "clone", "-q", ROOT, f"{folder}/{name}/repository"], check=True)
            subprocess.run(["git", "-C", f"{folder}/{name}/repository", "checkout", "-q", commit], check=True)
            result[f"{name}, the first time"] = medians([run(Path(folder, name, "repository"), Path(folder, name))])
            runs[name] = []
        result["load_average_at_the_start"] = os.getloadavg()[0]
        for _ in range(args.rounds):
            for name in commits:
                runs[name].append(run(Path(folder, name, "repository"), Path(folder, name)))
        result |= {name: medians(found) for name, found in runs.items()}
        result["load_average_at_the_end"] = os.getloadavg()[0]
    columns = [name for name in result if isinstance(result[name], dict)]
    print(f"{'seconds (CPU of rank 0)':<24}" + "".join(f"{name:>24}" for name in columns))
    for row in [*PHASES, "all"]:
        cells = []
        for name in columns:
            cpu = result[name]["cpu_of_rank_0"].get(row)
            cells.append(f"{result[name]['seconds'][row]:.2f}{'' if cpu is None else f' ({cpu:.2f})':<8}")
        print(f"{row:<24}" + "".join(f"{cell:>24}" for cell in cells))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
