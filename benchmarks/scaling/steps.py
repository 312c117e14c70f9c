"""How long forward and backward pass take over tokens and over samples, beside what StepFlops says.

    python -m benchmarks.scaling.steps [--output benchmarks/results/scaling_steps]

The middle-sized model of benchmarks/inputs.py with random weights, freeze_vision, on one thread; medians of three
rounds of CPU time. A minute. Writes .json and .png.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.inputs import SIDE, middle_size
from benchmarks.result import RESULTS, head, parser, write
from train_llava.build_model import build_llava
from train_llava.model.freeze import apply_train_type
from train_llava.model.loss import patch_forward
from train_llava.pages.charts import COLOUR, chart
from train_llava.planning.flops import StepFlops
from train_llava.processing.chat import IGNORE_INDEX

ROUNDS = 3
LENGTHS, BATCHES = (128, 256, 512, 1024, 1536, 2048), (1, 2, 4, 8, 12)
LENGTH, ANSWER = 256, 20  # tokens of a sample while the batch grows; learned tokens of each sample


def measure(work: Path) -> list[dict[str, Any]]:
    """A row for each length of one sample, and for each number of samples: CPU seconds and FLOPs."""
    torch.set_num_threads(1)
    model, _ = build_llava(*middle_size(work), random_weights=True)
    model = apply_train_type(model, "freeze_vision").train()
    patch_forward(model)
    flops = StepFlops.count(model)
    rows = []
    for kind, batch, length in [*(("tokens", 1, n) for n in LENGTHS), *(("batch", n, LENGTH) for n in BATCHES)]:
        counted = flops.of(batch, batch * length, batch * length**2, batch * ANSWER)
        row = {"kind": kind, "batch": batch, "tokens": length, "seconds": seconds(one_step(model, batch, length))}
        rows.append(row | {"flops": counted, "linear_flops": counted - flops.per_token_pair * batch * length**2})
        print(rows[-1], flush=True)
    return rows


def seconds(step: Callable[[], None]) -> float:
    """CPU seconds of this process, the median of the rounds; of one thread, so others disturb it little."""
    step()
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        step()
        found.append(time.process_time() - start)
    return round(median(found), 4)


def one_step(model: LlavaForConditionalGeneration, batch: int, length: int) -> Callable[[], None]:
    """Forward and backward pass over samples of one image, words, and an answer at their end."""
    ids = torch.full((batch, length), 100)
    ids[:, : model.config.image_seq_length] = model.config.image_token_id
    labels = torch.where(torch.arange(length) < length - ANSWER, IGNORE_INDEX, ids)
    inputs = {"input_ids": ids, "labels": labels, "pixel_values": torch.rand(batch, 3, SIDE, SIDE)}

    def step() -> None:
        model.zero_grad()
        model(**inputs).loss.backward()

    return step


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds over tokens and over samples, with FLOPs at one speed for all points."""
    speed = median(row["flops"] / row["seconds"] for row in rows)
    names = {"tokens": "tokens of one sample", "batch": f"samples of {LENGTH} tokens"}
    with chart(path, 9.2, 3.8, columns=2) as axes:
        for panel, (kind, label) in zip(axes, names.items(), strict=True):
            some = [row for row in rows if row["kind"] == kind]
            x = [row[kind] for row in some]
            panel.plot(x, [row["seconds"] for row in some], "o", color=COLOUR, label="measured (median)")
            theory = "linear + quadratic attention" if kind == "tokens" else "linear"
            panel.plot(x, [row["flops"] / speed for row in some], "--", color="grey", label=f"theory: {theory}")
            if kind == "tokens":
                linear = [row["linear_flops"] / speed for row in some]
                panel.plot(x, linear, ":", color="grey", label="its linear part")
            panel.set(xlabel=label, ylabel="CPU seconds, forward and backward", ylim=(0, None), xlim=(0, None))
        axes[0].set_title(f"the line: StepFlops at {speed / 1e9:.0f} GFLOP/s", fontsize=10)


def main() -> None:
    output = parser(__doc__, "--output", RESULTS / "scaling_steps").parse_args().output
    result = head(__doc__) | {"rounds": ROUNDS}
    with tempfile.TemporaryDirectory() as work:
        result["rows"] = measure(Path(work))
    write(output, result)
    draw(result["rows"], output.with_suffix(".png"))


if __name__ == "__main__":
    main()
