"""How much of what is computed and reserved is padding or waiting: batches of 16, grouped, and packs of a budget.

    python -m benchmarks.speed.packing [--json benchmarks/results/packing.json]

Nothing is trained: lengths are drawn for as many records as CC3M-595K and LLaVA-1.5's mix665k have, and shared out by
the samplers of the training. Half a minute. What is known of the lengths and what is assumed, in tokens of Qwen:

- CC3M-595K: 595,375 records of an image, 576 tokens, and a caption of 10.3 words on average with a standard deviation
  of 4.5 (Sharma et al., 2018, doi:10.18653/v1/P18-1238, table 1); assumed are 1.2 tokens a word.
- mix665k: how many records come from where is published (arXiv:2310.03744, table 7, and LLaVA's issue 657), and how
  many questions an image has in VQAv2 (443,757 on 82,783 images), GQA (943,000 on 72,140) and OCR-VQA (1,002,146 on
  207,572). Assumed are the rounds of the others and the tokens of a round, so that all texts together have some 550 MB:
  the file has 1.03 GB, nearly half of it the quotes and keys of seven million turns. ShareGPT is cut at 2,048.
"""

import time
from typing import Any

import numpy as np

from benchmarks.result import head, parser, table, write
from train_llava.training.sampler import LlavaSampler, PackSampler

IMAGE, FRAME, ROUND = 576, 14, 10  # tokens of an image, of the system message, and of the marks around a round's turns
BATCH, RANKS = 16, 8
BUDGETS = (2048, 4096, 8192)
# records, rounds, tokens of a round beside its marks
MIX665K = {
    "LLaVA, conversations": (58_000, 4.5, 75),
    "LLaVA, reasoning": (77_000, 1, 190),
    "LLaVA, descriptions": (23_000, 1, 150),
    "VQAv2": (83_000, 5.4, 11),
    "OK-VQA": (9_000, 1, 20),
    "A-OKVQA": (66_000, 1, 50),
    "RefCOCO": (48_000, 8, 30),
    "GQA": (72_140, 13.1, 12),
    "OCR-VQA": (80_000, 4.8, 15),
    "TextCaps": (21_953, 1, 40),
    "Visual Genome": (86_417, 10, 30),
}
SHAREGPT, CUT = 40_688, 2048


def cc3m(rng: np.random.Generator) -> np.ndarray:
    """(595,375,): a fixed question and a caption."""
    mean, deviation = 10.3, 4.5
    words = rng.gamma((mean / deviation) ** 2, deviation**2 / mean, 595_375)
    return (IMAGE + FRAME + ROUND + 9 + 1.2 * words).astype(np.int64)


def mix665k(rng: np.random.Generator) -> np.ndarray:
    """(about 665,000,): each source's rounds are 1 and a Poisson number, their lengths together a gamma's; ShareGPT's
    are log-normal around 800 tokens."""
    lengths = [np.clip(rng.lognormal(np.log(800), 0.9, SHAREGPT), 40, CUT)]
    for records, rounds, tokens in MIX665K.values():
        number = 1 + rng.poisson(rounds - 1, records)
        lengths.append(IMAGE + FRAME + ROUND * number + rng.gamma(4 * number, tokens / 4))
    return np.clip(np.concatenate(lengths), 1, CUT).astype(np.int64)


def batches(way: str, lengths: np.ndarray) -> list[list[int]]:
    """The micro-batches of an epoch, all ranks in turn."""
    records = np.arange(len(lengths))
    if way.startswith("packs"):
        order = PackSampler(records, lengths, int(way.split()[-1].replace(",", "")), RANKS, 0)
        order.set_epoch(1)  # which does not begin with the longest
        return list(order)
    samples = LlavaSampler([len(lengths)], [1], lengths, BATCH * RANKS, way == "group_by_length", 0)
    samples.set_epoch(1)
    indices = list(samples)
    return [indices[start : start + BATCH] for start in range(0, len(indices) - BATCH + 1, BATCH)]


def row(way: str, lengths: np.ndarray) -> dict[str, Any]:
    """What becomes of an epoch's tokens. All ranks wait at the end of each micro-batch for the one with most tokens."""
    began = time.perf_counter()
    shared = batches(way, lengths)
    seconds = time.perf_counter() - began
    real = np.array([lengths[batch].sum() for batch in shared])
    joined = way.startswith("pack")
    computed = real if joined else np.array([lengths[batch].max() * len(batch) for batch in shared])
    together = computed[: len(computed) // RANKS * RANKS].reshape(-1, RANKS)
    padding, waiting = 1 - real.sum() / computed.sum(), 1 - together.mean() / together.max(axis=1).mean()
    return {
        "way": way,
        "samples": round(len(lengths) / len(shared), 1),
        "tokens": round(real.mean()),
        "largest": int(computed.max()),
        "padding": round(padding, 4),
        "waiting": round(waiting, 4),
        "useful": round((1 - padding) * (1 - waiting), 4),
        "full": round(real.mean() / computed.max(), 4),
        "seconds_to_share_out": round(seconds, 1),
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables of docs/performance.md."""
    heads = ["samples", "tokens", "largest, tokens", "padding", "waiting", "useful", "memory in use"]
    made = []
    for name, data in result["data"].items():
        rows = [
            [one["way"], one["samples"], *(f"{one[key]:,}" for key in ("tokens", "largest"))]
            + [f"{one[key]:.1%}" for key in ("padding", "waiting", "useful", "full")]
            for one in data["rows"]
        ]
        made.append(table([name, *heads], rows))
    return "\n".join(made)


def main() -> None:
    args = parser(__doc__, "--json").parse_args()
    ways = [f"{BATCH} at random", "group_by_length", f"packing of {BATCH}", *(f"packs of {n:,}" for n in BUDGETS)]
    result: dict[str, Any] = head(__doc__) | {"what": "simulated lengths, not measured", "ranks": RANKS, "data": {}}
    for name, draw in {"CC3M-595K": cc3m, "mix665k": mix665k}.items():
        lengths = draw(np.random.default_rng(0))
        facts = {"records": len(lengths), "mean": round(lengths.mean()), "deviation": round(lengths.std())}
        facts["percentiles_1_50_99"] = np.percentile(lengths, (1, 50, 99)).astype(int).tolist()
        print(name, facts)
        result["data"][name] = facts | {"rows": [row(way, lengths) for way in ways]}
    print(markdown(result))
    write(args.json, result)


if __name__ == "__main__":
    main()
