"""What DeepSpeed holds in a training step, in a process that believes to be the first of several ranks.

    python -m tests.zero_step "[RANKS, [[STAGE, BYTES_PER_WEIGHT, FP32_SUMS], ...]]"

Prints a list: for each case the bytes per weight between steps, of gradients at most in the backward pass, and of all
when the optimizer begins. The model has many small weights, as a large one has layers.
"""

import json
import os
import sys

import deepspeed
import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.memory.simulate import LiveStorages
from train_llava.training.compiled_ops import compile_no_op

compile_no_op()
WIDTH, LAYERS = 64, 64


def config_of(stage, element, fp32_sums):
    zero = {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    buckets = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "stage3_prefetch_bucket_size": 0}
    types = {"bf16": {"enabled": element == 2}, "data_types": {"grad_accum_dtype": "fp32" if fp32_sums else None}}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {**zero, **buckets}, **types}


def measure(stage, element, fp32_sums):
    """The three numbers of a second step: Adam's moments are there from the first on."""
    dtype = torch.bfloat16 if element == 2 else torch.float32
    memory, in_step = LiveStorages(), []
    with memory:
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS)))
        for parameter in model.parameters():
            memory.add(parameter)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # as Trainer's
        optimizer.register_step_pre_hook(lambda *_: in_step.append(memory.live))
        config = config_of(stage, element, fp32_sums)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for _ in range(2):
            between = memory.live
            loss = engine(torch.ones(1, WIDTH, dtype=dtype)).sum()
            memory.peak = memory.live
            engine.backward(loss)
            gradients = memory.peak - between
            engine.step()
    return [size / (WIDTH * WIDTH * LAYERS) for size in (between, gradients, in_step[-1])]


if __name__ == "__main__":
    ranks, cases = json.loads(sys.argv[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    print(json.dumps([measure(*case) for case in cases]))
