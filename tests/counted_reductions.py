"""train_llava.train, whose first rank prints at the end of each step how often DeepSpeed has reduced gradients, and in
which dtype they were summed: `step 1: 2 reductions, sums in torch.float32`."""

import os
import time

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from transformers import TrainerCallback

from train_llava import train
from train_llava.planning import memory
from train_llava.training.trainer import LlavaTrainer

plain_flush = DeepSpeedEngine._flush_coalesced_reduction_zero12
plain_reduce, plain_train = DeepSpeedZeroOptimizer.reduce_ipg_grads, LlavaTrainer.train
count = 0


def reduce_ipg_grads(self, *args, **kwargs):
    global count
    count += any(bucket.elements for bucket in self.ipg_buckets.values())
    return plain_reduce(self, *args, **kwargs)


def flush(self, *args):
    print("gradients of a whole step", flush=True)
    return plain_flush(self, *args)


class Count(TrainerCallback):
    """Prints."""

    sums = None

    def on_substep_end(self, args, state, control, model, optimizer, **kwargs):
        parameter = next(p for p in model.parameters() if p.requires_grad)
        averaged = optimizer.optimizer.averaged_gradients.get(0) or optimizer.optimizer.all_grad_tensors.get(0)
        if os.environ.get("FAIL"):
            if args.process_index == 0:
                raise RuntimeError("as asked for")
            time.sleep(1000)
        self.sums = parameter.grad.dtype if parameter.grad is not None else averaged[0].dtype

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            print(f"step {state.global_step}: {count} reductions, sums in {self.sums}", flush=True)


def counted_train(self, *args, **kwargs):
    self.add_callback(Count())
    return plain_train(self, *args, **kwargs)


if __name__ == "__main__":
    if kind := os.environ.get("KIND"):
        train.this_gpu = lambda args: kind
    memory.SMALL = int(os.environ.get("SMALL", memory.SMALL))
    DeepSpeedEngine._flush_coalesced_reduction_zero12 = flush
    DeepSpeedZeroOptimizer.reduce_ipg_grads, LlavaTrainer.train = reduce_ipg_grads, counted_train
    train.main()
