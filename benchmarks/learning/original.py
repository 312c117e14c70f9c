"""The original tutorial's settings on the demo world, and the rate that it gives to every strategy.

    python -m benchmarks.learning.original [--output benchmarks/results/original]

Two questions about its table of strategies, which calls `none` very bad:

- the rows: what each of its four strategies reaches with its own settings, in one stage on captions alone
  (recipes/original.sh: ten epochs of the demo's captions, 64 a step on two ranks, 4e-4);
- the curves: `none` over the rate, in steps of 16 samples (the settings of benchmarks/learning/strategies.py) and in
  the original's of 64; beside it `none` with a rate of 2e-5 for the tower, and `freeze_vision`, which differs from
  `none` in the tower alone.

Held out are the questions for a caption, as captions are all that these trainings learn. These are English, as those of
LLaVA-CC3M-Pretrain-595K are; 26 of the 100 held-out ones are Chinese, which the language model could write before: they
show what it forgets. About 80 minutes on two CPU cores. What is done is kept below output/strategies, so that a run
that was interrupted goes on. Writes a table as .md, all figures as .json, and the curves as .png.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.strategies import (
    HELD_OUT,
    LANGUAGES,
    STRATEGIES,
    WORK,
    built,
    cached_run,
    captions_of_languages,
    exact_percent,
    make_data,
    run_script,
    train,
)
from benchmarks.result import RESULTS, head, parser, table, write
from train_llava.pages.charts import chart

ROWS = {strategy.name: strategy for strategy in STRATEGIES if strategy.original}  # the original's table
CAPTIONS = WORK / "data" / "held_out_captions"
RATE, STEPS = 4e-4, 1200  # the original's for every strategy; those of the curves, of 16 samples


@dataclass
class Curve:
    """A strategy at several rates; `flags` are of the training, `original` means the original's other settings."""

    train_type: str
    rates: tuple[float, ...]
    seeds: dict[float, tuple[int, ...]]  # of some rates; the others have seed 1
    flags: tuple[str, ...] = ()
    original: bool = False


CURVES = {
    "none, 16 samples a step": Curve(
        "none", (1e-4, 2e-4, 3e-4, 4e-4, 6e-4, 1e-3), dict.fromkeys((3e-4, 4e-4, 6e-4), (1, 2))
    ),
    "none, 64 a step (the original's)": Curve("none", (RATE, 1e-3), {}, original=True),
    "none, 16 a step, the tower at 2e-5": Curve("none", (RATE, 1e-3), {}, ("--vision_learning_rate", "2e-5")),
    "freeze_vision, 16 a step": Curve("freeze_vision", (RATE, 1e-3), {}),
}


def keep_captions() -> None:
    """The held-out questions for a caption, as a folder of their own."""
    CAPTIONS.mkdir(exist_ok=True)
    records = json.loads((HELD_OUT / "chat.json").read_text(encoding="utf-8"))
    kept = [record for record in records if record["category"] == "caption"]
    (CAPTIONS / "chat.json").write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
    if not (CAPTIONS / "images").exists():
        (CAPTIONS / "images").symlink_to(HELD_OUT / "images")


def run(train_type: str, flags: tuple[str, ...], rate: float, seed: int, original: bool) -> dict[str, Any]:
    """One training: by the original's recipe, or with the settings of benchmarks/learning/strategies.py."""

    def make(folder: Path) -> dict[str, Any]:
        model, words = built(seed), {"eval_data_path": CAPTIONS}
        if original:
            words |= {"learning_rate": rate}
            result = run_script("recipes/original.sh", model, "captions", train_type, seed, folder, *flags, **words)
        else:
            result = train(model, "captions", train_type, rate, STEPS, seed, folder, *flags, **words)
        result |= {"exact_percent": exact_percent(folder, CAPTIONS)["all"]}
        return result | {"exact_percent_of_languages": captions_of_languages(folder)}

    return cached_run("-".join(["original" if original else "rate", train_type, *flags, f"{rate:g}", str(seed)]), make)


def comparison(rows: dict[str, dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = []
    for name, run in rows.items():
        exact = (f"{run['exact_percent_of_languages'][language]:.1f}" for language in LANGUAGES)
        figures = (f"{run['trained_parameters']:,}", *exact, f"{run['held_out_loss']:.3f}")
        lines.append([f"`{name}`", *figures, ROWS[name].original])
    heads = ["strategy", "trained", *(f"{language}, exact, %" for language in LANGUAGES), "held-out loss"]
    return table([*heads, "the original says"], lines)


def draw(curves: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Exact captions against rate: a line of means in each language, a dot for each seed."""
    with chart(path, 8, 4.4) as axes:
        for i, (name, points) in enumerate(curves.items()):
            rates = [float(rate) for rate in points]
            for language, style in zip(LANGUAGES, ("--", "-"), strict=True):
                exact = [[run["exact_percent_of_languages"][language] for run in runs] for runs in points.values()]
                label = name if language == LANGUAGES[-1] else None
                axes.plot(rates, [statistics.mean(of) for of in exact], style, color=f"C{i}", label=label)
                for rate, of in zip(rates, exact, strict=True):
                    axes.plot([rate] * len(of), of, "o", color=f"C{i}", markersize=4)
        axes.axvline(RATE, color="grey", linestyle="--", linewidth=1)
        axes.text(RATE * 1.03, 95, "the original's rate\nfor every strategy", color="grey", fontsize=9, va="top")
        axes.text(1e-4, 93, "English (dashed): as in the training", fontsize=9, va="top")
        axes.text(1e-4, 60, "Chinese: not in it", fontsize=9)
        axes.set(xscale="log", ylim=(-4, 104), xlabel="learning rate", ylabel="held-out captions exactly right, %")


def all_curves() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By name and rate: the runs of its seeds."""
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in CURVES}
    for name, curve in CURVES.items():
        for rate in curve.rates:
            settings = (curve.train_type, curve.flags, rate)
            runs = [run(*settings, seed, curve.original) for seed in curve.seeds.get(rate, (1,))]
            curves[name][f"{rate:g}"] = runs
    return curves


def main() -> None:
    output = parser(__doc__, "--output", RESULTS / "original").parse_args().output
    make_data()
    keep_captions()
    rows = {name: run(row.train_type, row.flags, RATE, seed=1, original=True) for name, row in ROWS.items()}
    curves = all_curves()
    write(output, head(__doc__) | {"rows": rows, "curves": curves}, comparison(rows))
    draw(curves, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
