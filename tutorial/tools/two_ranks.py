"""Three steps of training under each stage of ZeRO on two ranks, and what each rank then keeps.

    DS_ACCELERATOR=cpu python -m torch.distributed.run --standalone --nproc_per_node 2 -m tutorial.tools.two_ranks

Rank 0 prints JSON: for each stage the losses, how many weights are trained, and what `kept` finds on each rank.
"""

import json
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from train_llava.training.fault_tolerance import close_process_group

STAGES = (0, 1, 2, 3)
STEPS = 3


def kept(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """How many weights, and how many of Adam's two moments, this process keeps between two steps."""
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    weights = [getattr(weight, "ds_tensor", weight) for weight in model.parameters()]  # ZeRO-3 leaves a part of each
    return {"weights": sum(each.numel() for each in weights), "moments": sum(each.numel() for each in moments)}


def train(model: nn.Module, stage: int) -> tuple[list[float], dict[str, int]]:
    """Trains a model on sentences of random words, others on each rank; returns the losses of all ranks, and `kept`."""
    import deepspeed  # here, as a notebook that starts the ranks has no use for it

    from train_llava.training.compiled_ops import compile_no_op

    compile_no_op()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # split even the smallest weights
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    words = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(0, 800, (4, 32), generator=words)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        losses.append(mean.item())
    return losses, kept(model, optimizer)


def run() -> dict:
    """Starts the command above and waits for what it found.

    Raises:
        RuntimeError: a rank failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", __name__]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    dist.init_process_group("gloo")
    found = {}
    for stage in STAGES:
        model = AutoModelForCausalLM.from_pretrained("demo/qwen", dtype=torch.float32)
        trained = sum(weight.numel() for weight in model.parameters())
        losses, mine = train(model, stage)
        dist.all_gather_object(ranks := [None] * dist.get_world_size(), mine)
        found[stage] = {"losses": losses, "trained": trained, "ranks": ranks}
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    close_process_group()


if __name__ == "__main__":
    main()
