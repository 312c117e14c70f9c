"""Operations of one training step at full size, counted by torch, beside the smallest number there can be.

    python -m benchmarks.full_size.flops_limit [--json benchmarks/results/flops_limit.json]

CLIP-ViT-L/336 + Qwen1.5-4B on torch's meta device: every operation runs on shapes alone, without memory or weights.
Four samples of 636 tokens, 576 of them an image's, 20 the answer's.

The limit is worked out by train_llava/planning/flops.py from the layers' shapes: each matrix runs forward once over the
positions that reach it; a gradient goes through it where something before it is trained, and to it where it is trained
itself; the head, and what the language model's last layer does behind its attention, run at answers alone; of the tower
only the layers that LLaVA reads. A causal attention counts as a full square, as in torch's counter. The last layer's
queries of other positions, 0.2%, are in the limit, because attention kernels take as many queries as keys.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size.model import on_meta
from benchmarks.memory.simulate import token_inputs
from benchmarks.result import head, parser, write
from train_llava.model.loss import patch_forward
from train_llava.model.structure import STRATEGIES, llava_in
from train_llava.planning.activations import Batch
from train_llava.planning.flops import StepFlops

BATCH, LENGTH, ANSWER = 4, 636, 20


@contextmanager
def without_values() -> Iterator[None]:
    """Where plain transformers looks at values, which nothing on the meta device has: that as many image tokens as
    features are there, and that nothing is packed."""
    with (
        mock.patch.dict(os.environ, {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}),
        mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None),
    ):
        yield


def counted(model: nn.Module, inputs: dict[str, torch.Tensor], side: int) -> int:
    """FLOPs of one step's forward and backward pass, as torch counts them."""
    pixels = torch.zeros(BATCH, 3, side, side, dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        model(**inputs, pixel_values=pixels).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def compare(train_type: str) -> dict[str, float]:
    """TFLOP per sample: plain transformers, ours, the limit; and the two over the limit."""
    model = on_meta(train_type)
    with torch.device("meta"), without_values():
        llava = llava_in(model)
        limit = StepFlops.count(model).of(BATCH, BATCH * LENGTH, BATCH * LENGTH**2, BATCH * ANSWER)
        side = llava.config.vision_config.image_size
        inputs = token_inputs(Batch(BATCH, LENGTH, BATCH, BATCH * ANSWER), llava.config.image_seq_length)
        plain = counted(model, {name: inputs[name] for name in ("input_ids", "labels")}, side)
        patch_forward(llava)
        ours = counted(model, inputs, side)
    row = {"plain": plain, "ours": ours, "limit": limit}
    row = {name: round(flops / BATCH / 1e12, 3) for name, flops in row.items()}
    return row | {"plain_over_limit": round(plain / limit, 4), "ours_over_limit": round(ours / limit, 4)}


def main() -> None:
    args = parser(__doc__, "--json").parse_args()
    result = head(__doc__)
    print(f"{'TFLOP per sample':<16}{'plain':>9}{'ours':>9}{'limit':>9}{'plain / limit':>15}{'ours / limit':>14}")
    for train_type in STRATEGIES:
        row = result[train_type] = compare(train_type)
        *flops, over, ours_over = row.values()
        numbers = f"{''.join(f'{tera:>9.3f}' for tera in flops)}{over:>15.4f}{ours_over:>14.4f}"
        print(f"{train_type:<16}{numbers}", flush=True)
    write(args.json, result)


if __name__ == "__main__":
    main()
