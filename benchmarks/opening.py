"""What it costs to open a dataset of the size of LLaVA-CC3M-Pretrain-595K, the first time and every later time.

    python -m benchmarks.opening [--records 595375] [--json benchmarks/results/opening.json]

Makes a chat.json of that many records with (empty) image files, loose in a folder and inside one zip, and opens each
in new processes. "own memory" is what a process holds for itself (anonymous pages), beyond what it held after its
imports; the records are mapped from one file, which all processes share.
"""

import argparse
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from benchmarks.machine import machine

ROOT = Path(__file__).parent.parent
WORDS = "a man in a red shirt holding the hand of his child on an old wooden bridge over a quiet river at night"


def write(folder: Path, records: int, packed: bool, images: int | None = None) -> None:
    """Records in the layout of CC3M-595K with captions of 5 to 20 words, written one by one; they share the images
    where there are to be fewer of these."""
    rng = random.Random(0)
    names = [f"GCC_train_{i:09}.jpg" for i in range(images or records)]
    with (folder / "chat.json").open("w") as file:
        for i in range(records):
            name = names[i % len(names)]
            answer = " ".join(rng.choices(WORDS.split(), k=rng.randint(5, 20)))
            question = {"from": "human", "value": "Provide a brief description of the given image.\n<image>"}
            turns = [question, {"from": "gpt", "value": answer}]
            file.write(("[" if i == 0 else ", ") + json.dumps({"id": name[:-4], "image": name, "conversations": turns}))
        file.write("]")
    if packed:
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for name in names:
                archive.writestr(name, b"")
    else:
        (folder / "images").mkdir()
        for name in names:
            (folder / "images" / name).touch()


def private_mb() -> float:
    """Memory of this process alone, mapped files not counted: their pages are in the cache of the system anyway."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1000


def opened(folder: str, reads: int = 10_000) -> dict[str, float]:
    """Opens a folder in this process and reads records at random."""
    import numpy as np

    from train_llava.data import LlavaDataset

    before, start = private_mb(), time.perf_counter()
    dataset = LlavaDataset(folder)
    seconds = time.perf_counter() - start
    indices = np.random.default_rng(0).integers(len(dataset), size=reads).tolist()
    start = time.perf_counter()
    for index in indices:
        dataset.records[index]
    each = (time.perf_counter() - start) / reads
    return {
        "seconds": round(seconds, 2),
        "microseconds_per_random_record": round(each * 1e6, 1),
        "own_memory_mb": round(private_mb() - before),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
    }


def written(folder: Path, *what: int | bool | None) -> None:
    """`write` in a process of its own: a child's peak memory starts at its parent's."""
    writer = multiprocessing.get_context("spawn").Process(target=write, args=(folder, *what))
    writer.start()
    writer.join()


def open_anew(folder: Path, cache: Path) -> dict[str, float]:
    """`opened` in a new process."""
    command = [sys.executable, "-m", "benchmarks.opening", "--open", str(folder)]
    environment = {"HF_DATASETS_CACHE": str(cache), "PATH": "/usr/bin:/bin", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=595_375)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--open", help=argparse.SUPPRESS)  # what the new processes do
    args = parser.parse_args()
    if args.open:
        print(json.dumps(opened(args.open)))
        return
    result = {"command": "python -m benchmarks.opening", **machine(), "records": args.records}
    for kind in ("folder", "zip"):
        with tempfile.TemporaryDirectory() as folder:
            data, cache = Path(folder, "data"), Path(folder, "cache")
            data.mkdir()
            written(data, args.records, kind == "zip")
            for opening in ("first", "second", "third"):
                result[f"{kind}, {opening} opening"] = open_anew(data, cache)
                print(f"{kind}, {opening} opening:", result[f"{kind}, {opening} opening"], flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
