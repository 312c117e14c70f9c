"""Commands that are killed, or started twice at once: `python tests/killer.py JOBS.json`.

JOBS.json is a list of {"module", "flags", "moments", "restore", "watch", "log"}. This process has all libraries
imported, so that a command, forked from it, takes a second or two. Each job first runs to its end, which gives the
time that it takes; then it is killed by SIGKILL at each of `moments`, given as shares of that time. Before each run the
folders in `restore`, {place: copy}, are put back as they were; after each, `watch` is copied to `<log>/<number>`, with
the exit code in `code`. Without `moments` two are started at once, and `codes` written.
"""

import importlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import train_llava.build_model
import train_llava.check_data
import train_llava.evaluate
import train_llava.infer
import train_llava.merge_lora
import train_llava.show_batch
import train_llava.train  # noqa: F401 (all are called by name)


def start(job):
    """The process id of the command, forked from here."""
    child = os.fork()
    if child:
        return child
    log = os.open(f"{job['log']}/said-{os.getpid()}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.argv, code = [job["module"], *job["flags"]], 1
    try:
        importlib.import_module(job["module"]).main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def put_back(job):
    for place, copy in job["restore"].items():
        for old in (Path(place), *Path(place).parent.glob(f".unfinished-{Path(place).name}")):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        if copy and Path(copy).is_dir():
            shutil.copytree(copy, place)
        elif copy:
            shutil.copy(copy, place)


def keep(job, number, code):
    """What the command has left, for the test to look at."""
    kept = Path(job["log"]) / str(number)
    kept.mkdir()
    watch = Path(job["watch"])
    if watch.is_dir():
        shutil.copytree(watch, kept / "left")
    elif watch.exists():
        shutil.copy(watch, kept / "left")
    (kept / "code").write_text(str(code))


def run(job):
    Path(job["log"]).mkdir(parents=True)
    if not job["moments"]:
        put_back(job)
        children = [start(job), start(job)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        (Path(job["log"]) / "codes").write_text(json.dumps(codes))
        keep(job, "end", 0)
        return
    for _ in range(2):  # the second time, all files are in the system's memory
        put_back(job)
        began = time.monotonic()
        code = os.waitstatus_to_exitcode(os.waitpid(start(job), 0)[1])
        seconds = time.monotonic() - began
    keep(job, "end", code)
    for number, moment in enumerate(job["moments"]):
        code = 0
        while code == 0:  # it was done before the moment: then it takes less time than was thought
            put_back(job)
            code, seconds = killed_after(start(job), moment * seconds, seconds)
        keep(job, number, code)


def killed_after(child, wait, seconds):
    """The exit code, and how long the command takes by what is known now."""
    began = time.monotonic()
    while time.monotonic() - began < wait:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), seconds


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        run(one)
