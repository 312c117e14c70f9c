"""Breaks one line of the product at a time, and asks whether a test notices.

    python tests/mutants.py [--only NUMBER ...] [--json FILE]

mutants.txt lists the faults: `@ file | tests that should notice`, lines with `-` are replaced by those with `+`. Each
is tried in a copy of the repository, with `pytest -x` on its tests, in a process forked from one that has imported the
libraries. It takes about an hour on two cores. Exit code 1 where a fault passes unnoticed that does not say `survives`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_name("mutants.txt")
SECONDS = 400  # after which a test hangs, which is noticing, too


@dataclass
class Mutant:
    """One fault. `survives` says why no test can notice it, if none can."""

    number: int
    file: str
    tests: list[str]
    old: str
    new: str
    survives: str

    def places(self):
        """How many places of the repository have what it changes; it should be one."""
        return (ROOT / self.file).read_text().count(self.old)

    def apply(self, folder):
        """Writes the fault into a copy."""
        if self.places() != 1:
            raise ValueError(f"{self.number}, {self.file}: {self.places()} places have {self.old!r}")
        path = folder / self.file
        path.write_text(path.read_text().replace(self.old, self.new))


def read_list():
    """All faults, in order."""
    mutants = []
    for block in LIST.read_text().split("\n@ ")[1:]:
        head, *lines = block.splitlines()
        file, tests, *why = (part.strip() for part in head.split("|"))
        old, new = ("\n".join(line[2:] for line in lines if line.startswith(sign)) for sign in "-+")
        survives = why[0].removeprefix("survives: ") if why else ""
        mutants.append(Mutant(len(mutants) + 1, file, tests.split(), old, new, survives))
    return mutants


def copied(folder):
    """The repository as it is now, without what git ignores."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def run_tests(folder, tests, log):
    """In a forked child: pytest on a copy; ends the process."""
    os.setsid()  # so that all that it starts can be ended
    os.chdir(folder)
    sys.path[0] = str(folder)
    os.environ |= {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    import pytest

    os._exit(int(pytest.main(["-x", "-p", "no:cacheprovider", "--tb=line", *tests])))


class Trial:
    """A fault in a copy of its own, and the process that tests it."""

    def __init__(self, mutant):
        self.mutant, self.began = mutant, time.monotonic()
        self.scratch = tempfile.TemporaryDirectory()
        folder = Path(self.scratch.name) / "copy"
        copied(folder)
        mutant.apply(folder)
        self.log = open(Path(self.scratch.name, "log"), "w+")  # noqa: SIM115 (closed in `end`)
        self.child = os.fork()
        if not self.child:
            run_tests(folder, mutant.tests, self.log)

    def result(self):
        """The row of this fault, None while its tests run."""
        pid, status = os.waitpid(self.child, os.WNOHANG)
        seconds = time.monotonic() - self.began
        if not pid and seconds < SECONDS:
            return None
        what, by = "hangs", ""
        if pid:
            self.log.seek(0)
            lines = [line for line in self.log.read().splitlines() if line.startswith(("FAILED", "ERROR", "/"))]
            code = os.waitstatus_to_exitcode(status)
            what, by = "unnoticed" if code == 0 else "noticed", (lines or [f"exit code {code}"])[-1]
        self.end(pid)
        return {**vars(self.mutant), "verdict": what, "by": by.split(" - ")[0], "seconds": round(seconds)}

    def end(self, ended):
        """Takes away whatever is left of it."""
        subprocess.run(["pkill", "-KILL", "-s", str(self.child)], check=False)
        if not ended:
            os.waitpid(self.child, 0)
        self.log.close()
        self.scratch.cleanup()


def tried(mutants, workers):
    """The rows of all faults as they come, so many at a time."""
    waiting, running = list(mutants), []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(Trial(waiting.pop(0)))
        for trial in [*running]:
            if row := trial.result():
                running.remove(trial)
                yield row
        time.sleep(0.2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=int, help="numbers of faults in the list; all if not given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import transformers.trainer  # noqa: F401 (so that forked children have these)

    chosen = [mutant for mutant in read_list() if not args.only or mutant.number in args.only]
    rows = []
    for row in tried(chosen, args.workers):
        rows.append(row)
        shown = f"{row['number']:>4} {row['verdict']:<10}{row['seconds']:>5} s  {row['file']}"
        print(f"{shown}: {row['new'] or '(deleted)'}   {row['by'][-90:]}", flush=True)
    lost = [row for row in rows if row["verdict"] == "unnoticed"]
    print(f"{len(rows) - len(lost)} of {len(rows)} faults are noticed")
    if args.json:
        args.json.write_text(json.dumps({"faults": len(rows), "unnoticed": len(lost), "rows": rows}, indent=2) + "\n")
    sys.exit(any(not row["survives"] for row in lost))


if __name__ == "__main__":
    main()
