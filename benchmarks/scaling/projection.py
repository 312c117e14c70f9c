"""Projects a training of the real model on 8, 64 and 512 GPUs from its FLOPs and from what ZeRO-2 sends.

    python -m benchmarks.scaling.projection [--json benchmarks/results/projection.json]

Nothing here is measured on more than one GPU: the table says what the formulas in this file give. CLIP-ViT-L/336 and
Qwen1.5-4B-Chat, micro batches of four samples of 620 tokens, H100s, eight to a machine. Takes a few seconds.
"""

import json
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.full_size.model import on_meta
from benchmarks.result import RESULTS, head, parser, table, write
from train_llava.model.structure import STRATEGIES
from train_llava.planning.flops import PEAKS, StepFlops
from train_llava.planning.memory import SMALL

GPUS = {8: 8, 64: 1, 512: 1}  # and batches accumulated: 256 samples a step as LLaVA-1.5's, 2,048 on 512
BATCH, TOKENS, ANSWER = 4, 620, 25  # per GPU and batch; tokens of a sample, and how many of them are learned
EPOCH = 595_375  # samples of LLaVA-CC3M-Pretrain-595K
PER_MACHINE = 8
NVLINK = 450e9  # bytes per second and direction of an H100 SXM (NVIDIA's data sheet: 900 GB/s both ways)
CARD = 400e9 / 8  # bytes per second and direction of a 400 Gb/s InfiniBand card (NDR)
HBM = 3.35e12  # bytes per second of an H100 SXM's memory (NVIDIA's data sheet)
MFU = 0.40
BACKWARD = 0.5  # the least share of a step that is backward, under which gradients can travel: forward : backward is
# 1 : 2 where all trains (Kaplan et al., arXiv:2001.08361, section 2.1), 1 : 1 where a gradient only passes through


@dataclass
class Share:
    """What one strategy costs: FLOPs of a sample, and how many parameters are trained."""

    flops: float
    trained: int

    def reductions(self, gpus: int) -> int:
        """Of gradients, in a step: once where they are few (train_llava/training/step.py)."""
        return 1 if self.trained <= SMALL else GPUS[gpus]


@dataclass
class Step:
    """One optimizer step of one GPU, in seconds; `reduce` can hide behind the backward pass, `gather` cannot."""

    compute: float
    reduce: float
    gather: float
    update: float

    @property
    def slowest(self) -> float:
        """Nothing is hidden."""
        return self.compute + self.reduce + self.gather + self.update

    @property
    def fastest(self) -> float:
        """All of the reduction is hidden that there is backward pass to hide it."""
        return self.slowest - min(self.reduce, BACKWARD * self.compute)


def shares() -> dict[str, Share]:
    """Of every strategy, counted on the real model without memory."""
    result = {}
    for name in STRATEGIES:
        model = on_meta(name)
        flops = StepFlops.count(model).of(images=1, tokens=TOKENS, token_pairs=TOKENS**2, answer_tokens=ANSWER)
        result[name] = Share(flops, sum(p.numel() for p in model.parameters() if p.requires_grad))
    return result


def sent(trained: int, gpus: int, accumulated: int, all_reduce: bool = True) -> tuple[float, float]:
    """Bytes in bf16 that each GPU sends in one optimizer step: to reduce gradients, and to gather parameters.

    In a ring of N, a reduce-scatter or an all-gather of n bytes makes each GPU send n (N - 1) / N, an all-reduce twice
    that (ZeRO, arXiv:1910.02054, section 7.1). ZeRO-2 is one reduce-scatter and one all-gather a step (section 7.2.1),
    but its gradients are shared out at once, so they are reduced after every accumulated batch; and DeepSpeed 0.19.8
    reduces each bucket with an all-reduce (`use_multi_rank_bucket_allreduce`, true by default in
    runtime/zero/config.py; `average_tensor` in runtime/zero/stage_1_and_2.py).
    """
    once = 2 * trained * (gpus - 1) / gpus
    return once * accumulated * (2 if all_reduce else 1), once


def bandwidth(gpus: int, cards: int) -> float:
    """Bytes per second that a GPU sends in a ring.

    NCCL runs as many rings as there are cards, each over its own card with its share of the bytes, so that machines
    are joined by all cards together, and inside them the slower of this and NVLink counts.
    """
    return NVLINK if gpus <= PER_MACHINE else min(NVLINK, cards * CARD)


def step(share: Share, gpus: int, cards: int, mfu: float = MFU) -> Step:
    """One optimizer step. AdamW reads and writes fp32 weight and two moments, reads a gradient, writes a bf16 weight:
    28 bytes for each parameter, of which a GPU has its share."""
    reduced, gathered = sent(share.trained, gpus, share.reductions(gpus))
    speed = bandwidth(gpus, cards)
    compute = GPUS[gpus] * BATCH * share.flops / (mfu * PEAKS["H100"])
    return Step(compute, reduced / speed, gathered / speed, 28 * share.trained / gpus / HBM)


def row(name: str, share: Share, gpus: int, cards: int, mfu: float = MFU) -> dict[str, float | int | str]:
    """One line of the table: without and with overlap, samples per second, efficiency and minutes of an epoch."""
    one, samples = step(share, gpus, cards, mfu), GPUS[gpus] * BATCH * gpus
    perfect = BATCH * GPUS[gpus] / one.compute * gpus
    speeds = [samples / one.slowest, samples / one.fastest]
    return {
        "strategy": name,
        "gpus": gpus,
        "cards_per_machine": cards if gpus > PER_MACHINE else 0,
        "samples_per_step": samples,
        "sent_gb": round(sum(sent(share.trained, gpus, share.reductions(gpus))) / 1e9, 2),
        "sent_gb_with_reduce_scatter": round(sum(sent(share.trained, gpus, GPUS[gpus], all_reduce=False)) / 1e9, 2),
        "compute_ms": round(one.compute * 1e3),
        "communication_ms": round((one.reduce + one.gather) * 1e3, 1),
        "samples_per_second": [round(speed) for speed in speeds],
        "efficiency": [round(speed / perfect, 3) for speed in speeds],
        "minutes_of_cc3m": [round(EPOCH / speed / 60, 1) for speed in speeds],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table that docs/scaling.md shows."""
    heads = ["strategy", "GPUs", "cards per machine", "sent, GB", "compute, ms", "communication, ms"]
    heads += ["samples/s", "efficiency", "minutes of CC3M-595K"]
    lines = []
    for one in rows:
        ranges = [one["samples_per_second"], [f"{share:.0%}" for share in one["efficiency"]], one["minutes_of_cc3m"]]
        cells = [f"`{one['strategy']}`", one["gpus"], one["cards_per_machine"] or "-", one["sent_gb"]]
        cells += [one["compute_ms"], one["communication_ms"]]
        lines.append([*cells, *(" to ".join(map(str, dict.fromkeys(found))) for found in ranges)])
    return table(heads, lines)


def main() -> None:
    args = parser(__doc__, "--json").parse_args()
    costs = shares()
    places = [(8, 0), (64, PER_MACHINE), (64, 1), (512, PER_MACHINE), (512, 1)]
    rows = [row(name, share, *place) for name, share in costs.items() for place in places]
    measured = json.loads((RESULTS / "gpu_h100.json").read_text())["use_lora"]
    speed = median(measured["samples_per_second_last_30_steps"])
    reached = speed * costs["use_lora"].flops / PEAKS["H100"]
    slow = [row("use_lora", costs["use_lora"], *place, reached) for place in places]
    for name, share in costs.items():
        print(f"{name}: {share.trained:,} trained, {share.flops / 1e12:.2f} TFLOP per sample")
    print(f"\nprojected, at an MFU of {MFU:.0%}\n{markdown(rows)}")
    print(f"projected, at what one H100 did with use_lora: {speed} samples/s, MFU {reached:.0%}\n{markdown(slow)}")
    result = head(__doc__) | {"what": "projected, not measured", "mfu": MFU}
    result |= {"mfu_measured_on_one_h100_use_lora": round(reached, 3)}
    result |= {"strategies": {name: vars(share) for name, share in costs.items()}}
    write(args.json, result | {"rows": rows, "rows_at_the_measured_mfu": slow})


if __name__ == "__main__":
    main()
