"""Trains every strategy on the demo world under DeepSpeed ZeRO-2 on two ranks, three seeds each, and compares them.

    python -m benchmarks.learning.strategies [--output benchmarks/results/strategies]

As LLaVA is trained, and run_zero2.sh trains the demo: first the projector alone on captions, then each strategy on
conversations; beside it the conversations alone, in as many steps as both have together. A seed sets the projector's
random start, the LoRA adapters' and the order of the samples. About 80 minutes on two CPU cores. What is done is kept
below output/strategies, so that a run that was interrupted goes on. Writes .md, .json and a chart as .png.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.result import RESULTS, ROOT, head, parser, table, write
from benchmarks.script import environment, read_log
from demo import show
from train_llava.build_model import build_llava
from train_llava.model.folder import save_llava
from train_llava.pages.charts import COLOUR, chart

WORK = ROOT / "output" / "strategies"
HELD_OUT = WORK / "data" / "held_out"
SEEDS = (1, 2, 3)
LANGUAGES = ("English", "Chinese")
CAPTIONS, CAPTION_RATE = 400, 2e-3  # steps of 16 samples, and the rate: those of demo/prepare.sh, as the next two
CONVERSATIONS = 600
RATES = {"none": 5e-4, "use_lora": 1e-3, "freeze_vision": 5e-4, "projector": 2e-3}


@dataclass
class Strategy:
    """One row: its name, what the original's author found, and the flags of its last stage."""

    name: str
    train_type: str
    flags: tuple[str, ...] = ()
    two_stages: bool = True
    original: str = ""


ALONE = ", conversations alone"
STRATEGIES = [
    Strategy("use_lora, projector random and frozen", "use_lora", ("--train_projector", "false"), two_stages=False,
             original="very good (a bug, not recommended)"),
    Strategy("use_lora", "use_lora", original="very good"),
    Strategy("none", "none", original="very bad"),
    Strategy("freeze_vision", "freeze_vision", original="good, a little behind use_lora"),
    Strategy("projector", "projector"),
    Strategy("use_lora in 4 bits (QLoRA)", "use_lora", ("--load_in_4bit", "true")),
    *(Strategy(f"{train_type}{ALONE}", train_type, two_stages=False)
      for train_type in ("use_lora", "none", "freeze_vision", "projector")),
]  # fmt: skip


def train(
    model: Path, data: str, train_type: str, rate: float, steps: int, seed: int, output: Path, *flags: str, **words: Any
) -> dict[str, Any]:
    """One training of a row on a folder of the demo's data; what it took."""
    words |= {"max_steps": steps, "learning_rate": rate, "adam_beta2": 0.95, "eval_steps": steps}
    words |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "logging_steps": 30}
    words |= {"save_strategy": "steps", "save_steps": steps, "eval_strategy": "steps"}
    return run_script("run_zero2.sh", model, data, train_type, seed, output, *flags, **words)


def run_script(
    script: str, model: Path, data: str, train_type: str, seed: int, output: Path, *flags: str, **words: Any
) -> dict[str, Any]:
    """One training by a script of the repository, as a user types it; what it took."""
    shutil.rmtree(output, ignore_errors=True)
    words = {"seed": seed, "report_to": "none", "eval_data_path": HELD_OUT} | words
    command = ["bash", ROOT / script, *flags]
    command += [text for name, value in words.items() for text in (f"--{name}", value)]
    names = {"MODEL": model, "DATA": WORK / "data" / data, "TRAIN_TYPE": train_type, "OUTPUT_DIR": output}
    with (output.parent / f"{output.name}.log").open("w+") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment(**names), stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)  # of the largest process below the script: a rank
        log.seek(0)
        text = log.read()
    if status:
        raise RuntimeError(f"{output}: the training failed; see {output}.log")
    assert "DeepSpeedZeroOptimizer ZeRO-2 on 2 ranks" in text
    history = read_log(output)
    steps = history[-1]["step"]
    checkpoint = [path.stat().st_size for path in (output / f"checkpoint-{steps}").rglob("*") if path.is_file()]
    return {
        "trained_parameters": int(re.search(r"^total +[\d,]+ +([\d,]+)", text, re.M)[1].replace(",", "")),
        "held_out_loss": next(log["eval_loss"] for log in reversed(history) if "eval_loss" in log),
        "seconds": next(log["train_runtime"] for log in reversed(history) if "train_runtime" in log),
        "peak_memory_gb": usage.ru_maxrss * 1024 / 1e9,
        "checkpoint_mb": sum(checkpoint) / 1e6,
    }


def exact_percent(folder: Path, data: Path = HELD_OUT) -> dict[str, float]:
    """How many held-out answers of a trained model are exactly right, in percent: of each kind and of all."""
    shown = ["demo.show", "--model_name_or_path", folder, "--data_path", data]
    subprocess.run([sys.executable, "-m", *map(str, shown)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return show.exact_percent([json.loads(line) for line in lines])


def captions_of_languages(folder: Path) -> dict[str, float]:
    """Of those answers, how many captions in each language are exactly right, in percent."""
    exact: dict[str, list[bool]] = {language: [] for language in LANGUAGES}
    for answer in map(json.loads, (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()):
        if answer["category"] == "caption":
            exact["English" if answer["reference"].isascii() else "Chinese"].append(answer["exact"])
    return {language: 100 * statistics.mean(of) for language, of in exact.items()}


def cached_run(name: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `make` has found about a run in this folder of WORK, from a file beside it where it was done before."""
    folder = WORK / name
    file = folder.with_name(f"{name}.json")
    if not file.is_file():
        file.write_text(json.dumps(make(folder)))
        print(f"{name}: {file.read_text()}", flush=True)
    return json.loads(file.read_text())


def measure(strategy: Strategy, seed: int) -> dict[str, Any]:
    """One row's run with one seed."""

    def make(folder: Path) -> dict[str, Any]:
        model, first, steps = built(seed), {"seconds": 0.0}, CAPTIONS + CONVERSATIONS
        if strategy.two_stages:
            (model, first), steps = first_stage(seed), CONVERSATIONS
        settings = ("conversations", strategy.train_type, RATES[strategy.train_type], steps, seed)
        result = train(model, *settings, folder, *strategy.flags)
        kinds = exact_percent(folder)
        result |= {"seconds": result["seconds"] + first["seconds"]}
        result |= {"exact_percent": kinds.pop("all"), "exact_percent_of_kinds": kinds}
        return result | {"exact_percent_of_languages": captions_of_languages(folder)}

    return cached_run(f"{strategy.name.replace(', ', '-').replace(' ', '_')}-{seed}", make)


def make_data() -> None:
    """The demo's data, made once."""
    if not (WORK / "data").exists():
        make = [sys.executable, "-m", "demo.make_data", "--output_dir", str(WORK / "data")]
        subprocess.run(make, check=True, cwd=ROOT)


def built(seed: int) -> Path:
    """The demo's halves with a projector of this seed."""
    folder = WORK / f"model-{seed}"
    if not (folder / "config.json").is_file():
        torch.manual_seed(seed)
        save_llava(*build_llava(ROOT / "demo" / "clip", ROOT / "demo" / "qwen"), folder)
    return folder


def first_stage(seed: int) -> tuple[Path, dict[str, Any]]:
    """The projector trained on captions, made once for all rows."""
    name, settings = f"first_stage-{seed}", ("captions", "projector", CAPTION_RATE, CAPTIONS, seed)
    return WORK / name, cached_run(name, lambda folder: train(built(seed), *settings, folder))


def spread(values: list[float], form: str) -> str:
    """Mean and, in brackets, smallest and largest."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def comparison(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The table in Markdown."""
    heads = ["strategy", "trained", "exact match, %", "held-out loss", "seconds", "memory, GB", "checkpoint, MB"]
    originals = {strategy.name: strategy.original for strategy in STRATEGIES}
    lines = []
    for name, runs in rows.items():
        column = {key: [run[key] for run in runs] for key in runs[0]}
        cells = [f"`{name}`", f"{runs[0]['trained_parameters']:,}", spread(column["exact_percent"], ".1f")]
        cells += [spread(column["held_out_loss"], ".3f"), f"{statistics.mean(column['seconds']):.0f}"]
        cells += [f"{statistics.mean(column['peak_memory_gb']):.2f}", f"{runs[0]['checkpoint_mb']:.1f}"]
        lines.append([*cells, originals.get(name) or "-"])
    return table([*heads, "the original says"], lines)


def kinds_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Exact match of each kind of question, mean of the seeds, in Markdown."""
    kinds = list(next(iter(rows.values()))[0]["exact_percent_of_kinds"])
    lines = []
    for name, runs in rows.items():
        means = [statistics.mean(run["exact_percent_of_kinds"][kind] for run in runs) for kind in kinds]
        lines.append([f"`{name}`", *(f"{mean:.0f}" for mean in means)])
    return table(["exact match, %", *kinds], lines)


def draw(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Exact match per strategy: bars of the means, a dot for each seed."""
    names = list(reversed(rows))
    with chart(path, 9, 4) as axes:
        for y, name in enumerate(names):
            values = [run["exact_percent"] for run in rows[name]]
            axes.barh(y, statistics.mean(values), height=0.62, color=COLOUR, alpha=0.5)
            axes.plot(values, [y] * len(values), "o", color=COLOUR, markersize=5)
            axes.text(max(values) + 1.5, y, f"{statistics.mean(values):.1f}", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 108), xlabel=f"held-out answers exactly right, %: mean and {len(SEEDS)} seeds")


def main() -> None:
    output = parser(__doc__, "--output", RESULTS / "strategies").parse_args().output
    make_data()
    rows: dict[str, list[dict[str, Any]]] = {strategy.name: [] for strategy in STRATEGIES}
    for seed in SEEDS:
        for strategy in STRATEGIES:
            rows[strategy.name].append(measure(strategy, seed))
    steps = {"captions": CAPTIONS, "conversations": CONVERSATIONS, "samples_per_step": 16}
    result = head(__doc__) | steps | {"seeds": SEEDS, "rows": rows}
    write(output, result, f"{comparison(rows)}\n\n{kinds_table(rows)}")
    draw(rows, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
