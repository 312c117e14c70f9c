"""Trainings that write down every sample that reached the model: `python tests/ledger.py RUNS.json`.

RUNS.json holds lists of {"flags", "ranks", "ledger", "kill"}; the runs of a list follow each other, two lists work at
a time. Each run has as many processes as ranks, forked from this one, which has all libraries imported already; they
find each other as under torchrun. Each rank adds a JSON line per micro-batch to `<ledger>.<rank>`: step, ids, a digest
of each image's pixels and the text of all labels. `kill` is the step in whose middle the last rank dies by SIGKILL,
null for none. Exit codes are written to `<ledger>.codes`.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

from page_client import free_port

from train_llava.train import main
from train_llava.training.trainer import LlavaTrainer


def lines_of(trainer, batch):
    """What is written down of a micro-batch."""
    labels = batch["labels"]
    text = trainer.data_collator.tokenizer.decode(labels[labels != -100])
    images = [hashlib.sha1(image.cpu().numpy().tobytes()).hexdigest() for image in batch["pixel_values"].data]
    return {"step": trainer.state.global_step + 1, "ids": batch["ids"], "images": images, "labels": text}


def rank_of(run, rank, port):
    """One rank of a run, in a process of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run["ranks"])}
    os.environ |= {"LOCAL_WORLD_SIZE": str(run["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["train", *run["flags"]]
    plain = LlavaTrainer.training_step

    def training_step(trainer, model, inputs, *args, **kwargs):
        line = lines_of(trainer, inputs)
        with open(f"{run['ledger']}.{rank}", "a") as ledger:
            ledger.write(json.dumps(line) + "\n")
        if run["kill"] == line["step"] and rank == run["ranks"] - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(trainer, model, inputs, *args, **kwargs)

    LlavaTrainer.training_step = training_step
    main()


def start(run):
    port = free_port()
    children = []
    for rank in range(run["ranks"]):
        child = os.fork()
        if not child:
            code = 1
            try:
                rank_of(run, rank, port)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    codes = {}
    for _ in children:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:  # as torchrun does it
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL)
    Path(f"{run['ledger']}.codes").write_text(json.dumps([codes[child] for child in children]))


if __name__ == "__main__":
    working = 0
    for runs in json.loads(Path(sys.argv[1]).read_text()):
        working += 1
        if working > 2:
            os.wait()
        if not os.fork():
            for one in runs:
                start(one)
            os._exit(0)
    while working:
        try:
            os.wait()
        except ChildProcessError:
            working = 0
