"""Trains every strategy on the demo world under DeepSpeed ZeRO-2 on two ranks, three seeds each, and compares them.

    python -m benchmarks.learning.strategies [--output benchmarks/results/strategies]

Every row sees the same number of samples, in two stages where it has two; a seed sets the projector's random start, the
LoRA adapters' and the order of the samples. About 75 minutes on two CPU cores. What is done is kept below
output/strategies, so that a run that was interrupted goes on. Writes a table as .md and .json, and a chart as .png.
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
from train_llava.build_model import build_llava
from train_llava.model.folder import save_llava
from train_llava.pages.charts import COLOUR, chart

WORK = ROOT / "output" / "strategies"
SEEDS = (1, 2, 3)
STEPS, FIRST_STAGE = 1200, 400  # of 16 samples each; a row of two stages spends 400 steps on its first


@dataclass
class Strategy:
    """One row: its name, what the original's author found, and the flags of its last stage."""

    name: str
    train_type: str
    rate: float  # the demo's, see demo/prepare.sh
    flags: tuple[str, ...] = ()
    after: str | None = None  # the train_type of a first stage
    original: str = ""


STRATEGIES = [
    Strategy("use_lora, projector random and frozen", "use_lora", 2e-3, ("--train_projector", "false"),
             original="very good (a bug, not recommended)"),
    Strategy("use_lora", "use_lora", 2e-3, original="very good"),
    Strategy("none", "none", 2e-4, original="very bad"),
    Strategy("freeze_vision", "freeze_vision", 1e-3, original="good, a little behind use_lora"),
    Strategy("projector", "projector", 1e-3),
    Strategy("projector, then use_lora", "use_lora", 2e-3, after="projector"),
    Strategy("projector, then freeze_vision", "freeze_vision", 1e-3, after="projector"),
    Strategy("use_lora in 4 bits (QLoRA)", "use_lora", 2e-3, ("--load_in_4bit", "true")),
]  # fmt: skip


def train(model: Path, train_type: str, rate: float, steps: int, seed: int, output: Path, *flags: str) -> dict:
    """One training of a row; what it took."""
    words = {"max_steps": steps, "learning_rate": rate, "adam_beta2": 0.95, "eval_steps": steps}
    words |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "logging_steps": 30}
    words |= {"save_strategy": "steps", "save_steps": steps, "eval_strategy": "steps"}
    return run_script("run_zero2.sh", model, train_type, seed, output, *flags, **words)


def run_script(script: str, model: Path, train_type: str, seed: int, output: Path, *flags: str, **words: Any) -> dict:
    """One training by a script of the repository, as a user types it; what it took."""
    shutil.rmtree(output, ignore_errors=True)
    words |= {"seed": seed, "report_to": "none", "eval_data_path": WORK / "data" / "held_out"}
    command = ["bash", ROOT / script, *flags]
    command += [text for name, value in words.items() for text in (f"--{name}", value)]
    names = {"MODEL": model, "DATA": WORK / "data" / "train", "TRAIN_TYPE": train_type, "OUTPUT_DIR": output}
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


def exact_percent(folder: Path) -> float:
    """How many of the held-out captions a trained model writes exactly, in percent."""
    shown = ["demo.show", "--model_name_or_path", folder, "--data_path", WORK / "data" / "held_out"]
    subprocess.run([sys.executable, "-m", *map(str, shown)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    answers = [json.loads(line)["exact"] for line in (folder / "captions.jsonl").read_text().splitlines()]
    return 100 * sum(answers) / len(answers)


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
        model, first, steps = built(seed), {"seconds": 0.0}, STEPS
        if strategy.after:
            stage = next(s for s in STRATEGIES if s.name == strategy.after)
            model, first = first_stage(stage, seed)
            steps -= FIRST_STAGE
        result = train(model, strategy.train_type, strategy.rate, steps, seed, folder, *strategy.flags)
        return result | {"seconds": result["seconds"] + first["seconds"], "exact_percent": exact_percent(folder)}

    return cached_run(f"{strategy.name.replace(', ', '-').replace(' ', '_')}-{seed}", make)


def make_data() -> None:
    """The demo's images, made once."""
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


def first_stage(stage: Strategy, seed: int) -> tuple[Path, dict[str, Any]]:
    """A first stage that several rows share, made once."""
    name = f"first_stage_{stage.name}-{seed}"
    settings = (stage.train_type, stage.rate, FIRST_STAGE, seed)
    return WORK / name, cached_run(name, lambda folder: train(built(seed), *settings, folder, *stage.flags))


def spread(values: list[float], form: str) -> str:
    """Mean and, in brackets, smallest and largest."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def comparison(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The table in Markdown."""
    heads = ["strategy", "trained", "exact match, %", "held-out loss", "seconds", "memory, GB", "checkpoint, MB"]
    lines = []
    for strategy in STRATEGIES:
        runs = rows[strategy.name]
        column = {name: [run[name] for run in runs] for name in runs[0]}
        cells = [f"`{strategy.name}`", f"{runs[0]['trained_parameters']:,}", spread(column["exact_percent"], ".1f")]
        cells += [spread(column["held_out_loss"], ".3f"), f"{statistics.mean(column['seconds']):.0f}"]
        cells += [f"{statistics.mean(column['peak_memory_gb']):.2f}", f"{runs[0]['checkpoint_mb']:.1f}"]
        lines.append([*cells, strategy.original or "-"])
    return table([*heads, "the original says"], lines)


def draw(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Exact match per strategy: bars of the means, a dot for each seed."""
    names = [strategy.name for strategy in reversed(STRATEGIES)]
    with chart(path, 9, 4) as axes:
        for y, name in enumerate(names):
            values = [run["exact_percent"] for run in rows[name]]
            axes.barh(y, statistics.mean(values), height=0.62, color=COLOUR, alpha=0.5)
            axes.plot(values, [y] * len(values), "o", color=COLOUR, markersize=5)
            axes.text(max(values) + 1.5, y, f"{statistics.mean(values):.1f}", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 108), xlabel=f"held-out captions exactly right, %: mean and {len(SEEDS)} seeds")


def main() -> None:
    output = parser(__doc__, "--output", RESULTS / "strategies").parse_args().output
    make_data()
    rows: dict[str, list[dict[str, Any]]] = {strategy.name: [] for strategy in STRATEGIES}
    for seed in SEEDS:
        for strategy in STRATEGIES:
            rows[strategy.name].append(measure(strategy, seed))
    result = head(__doc__) | {"steps": STEPS, "samples_per_step": 16, "seeds": SEEDS, "rows": rows}
    write(output, result, comparison(rows))
    draw(rows, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
