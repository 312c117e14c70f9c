"""How long `bash run_zero2.sh` takes to its first step, and where that time goes.

    python -m benchmarks.speed.startup [--against COMMIT] [--rounds 3] [--json benchmarks/results/startup.json]

Runs the real script on the demo until the first batch goes through the model: once with nothing made before (no demo
data, no compiled op, no Arrow copy), then `rounds` times with all of it there, and shows medians. With a commit to
compare with, the two take turns. A module that Python imports at its start notes when each process begins, and in rank
0 looks every few milliseconds at what the main thread is doing; nothing in the product takes part. "CPU" is what rank 0
itself worked, which other programs on the machine disturb less than the clock.
"""

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.result import ROOT, head, parser, write
from benchmarks.script import environment

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
# Phases of rank 0 after its imports: the outermost function on the stack that has one of these names. Those of
# earlier versions (claim_output_dir, check_memory) are here, too, so that `--against` can compare with them.
FUNCTIONS = {
    "parse_args_into_dataclasses": "flags",
    "prepare_output_dir": "flags",
    "claim_output_dir": "flags",
    "load": "model",
    "apply_train_type": "model",
    "check_memory_budget": "model",
    "check_memory": "model",
    "open_data": "data",
    "_prepare_for_training": "DeepSpeed",  # Trainer's name for accelerator.prepare and what goes with it
    "_run_epoch": "first batch",
    "_find_and_load": "imports",
}
PHASES = ["script", "launcher", "imports", "flags", "data", "model", "DeepSpeed", "first batch", "other"]


def phase(stack: str) -> str:
    """Of a stack, its function names from the outermost on."""
    return next((FUNCTIONS[name] for name in stack.split() if name in FUNCTIONS), "other")


def run(root: Path, scratch: Path) -> dict[str, Any]:
    """One start, stopped when it logs a step: seconds of each phase up to the first, and of rank 0 CPU seconds."""
    notes = scratch / "notes"
    notes.write_text("")
    variables = {"PYTHONPATH": scratch, "STARTUP_NOTES": notes, "TORCH_EXTENSIONS_DIR": scratch / "ops"}
    variables |= {"HF_DATASETS_CACHE": scratch / "datasets", "OUTPUT_DIR": scratch / "out"}
    command = ["bash", str(root / "run_zero2.sh"), "--logging_steps", "1", "--sample_steps", "0"]
    begun, trains = time.time(), False
    printed, pipes = [], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # from its own folder, which `python -m` looks into before PYTHONPATH
    with subprocess.Popen(command, cwd=root, env=environment(**variables), **pipes) as script:
        for line in script.stdout:
            if not trains and re.match(r"step +\d+/", line):  # of the first stage where there are two
                trains = True
                script.terminate()
            printed.append(line)
    if not trains:
        raise RuntimeError("the script failed:\n" + "".join(printed[-30:]))
    return split([line.split("\t") for line in notes.read_text().splitlines()], begun)


def split(notes: list[list[str]], begun: float) -> dict[str, Any]:
    """Seconds and CPU seconds by phase, up to the first step, out of what the processes noted."""
    ended = next(float(now) for kind, now, _, stack in notes if kind == "look" and "training_step" in stack.split())
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


def check_out(commit: str, folder: Path) -> None:
    """The repository at this commit in a folder of its own, where nothing is made yet, and the module that notes."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCH)
    subprocess.run(["git", "clone", "-q", ROOT, f"{folder}/repository"], check=True)
    subprocess.run(["git", "-C", f"{folder}/repository", "checkout", "-q", commit], check=True)


def measure(commits: dict[str, str], rounds: int) -> dict[str, Any]:
    """The first start of each commit, then medians of `rounds` later ones, in turns."""
    result: dict[str, Any] = {}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commits}
    with tempfile.TemporaryDirectory() as work:
        folders = {name: Path(work, name) for name in commits}
        for name, commit in commits.items():
            check_out(commit, folders[name])
            result[f"{name}, the first time"] = medians([run(folders[name] / "repository", folders[name])])
        result["load_average_at_the_start"] = os.getloadavg()[0]
        for _ in range(rounds):
            for name, folder in folders.items():
                runs[name].append(run(folder / "repository", folder))
        result |= {name: medians(found) for name, found in runs.items()}
        result["load_average_at_the_end"] = os.getloadavg()[0]
    return result


def show(result: dict[str, Any]) -> None:
    """Prints phases by rows and kinds of start by columns."""
    columns = [name for name in result if isinstance(result[name], dict)]
    print(f"{'seconds (CPU of rank 0)':<24}" + "".join(f"{name:>24}" for name in columns))
    for row in [*PHASES, "all"]:
        cells = []
        for name in columns:
            cpu = result[name]["cpu_of_rank_0"].get(row)
            cells.append(f"{result[name]['seconds'][row]:.2f}{'' if cpu is None else f' ({cpu:.2f})':<8}")
        print(f"{row:<24}" + "".join(f"{cell:>24}" for cell in cells))


def main() -> None:
    flags = parser(__doc__, "--json")
    flags.add_argument("--against", help="a commit to take turns with")
    flags.add_argument("--rounds", type=int, default=3)
    args = flags.parse_args()
    words = ["--against", args.against] if args.against else []
    commits = {"before": args.against, "now": "HEAD"} if args.against else {"now": "HEAD"}
    result = head(__doc__, *words) | {"rounds": args.rounds} | measure(commits, args.rounds)
    show(result)
    write(args.json, result)


if __name__ == "__main__":
    main()
