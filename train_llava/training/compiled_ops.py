"""DeepSpeed's own ops, which it compiles when it needs them. A training needs none of them."""

import deepspeed


def compile_no_op() -> None:
    """To be called before DeepSpeed starts.

    At its first start on a CPU it would compile an op for inference (40 s), which no training calls and which does not
    link where a path has spaces. An empty table of ops prevents that. It is a private name, which
    deepspeed/comm/torch.py reads (0.19; tests/test_hooks.py).
    """
    deepspeed.ops.__compatible_ops__ = {}
