"""Wide images whose things are all at the two ends: two LLaVAs of the demo's halves, one crops and one pads.

    python -m benchmarks.learning.rim [--output benchmarks/results/rim] [--steps 600] [--images 4000]

An image is twice as wide as high: the two middle rows of a demo scene, with a thing in the first column and one in the
last. CLIP's own image processor keeps the middle square, which is empty; padded (`build_model --image_aspect_ratio
pad`), all of it is seen. Both are trained alike (`freeze_vision`) and asked about images held out as the demo holds
them out. Exact captions: 0 to 1, `exact`. What is done is kept below output/rim-2x1, and not done again.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.result import RESULTS, ROOT, head, parser, table, write
from benchmarks.script import environment, read_log
from demo.english import caption
from demo.scenes import CELL, IMAGE_SIZE, Scene, belongs, draw, random_item
from train_llava.build_model import build_llava
from train_llava.model.folder import save_llava

WORK = ROOT / "output" / "rim-2x1"  # another name for other images
HELD_OUT = 300
ENDS = [[(0, 2), (2, 0)], [(1, 3), (3, 1)]]  # place and cell in the two middle rows: of the first column, of the last
QUESTION = "<image>\nWhat is at the two ends of this image?"


def wide_scene(rng: np.random.Generator, split: str) -> Scene:
    """A thing in the first column and one in the last, both in the two middle rows; in reading order."""
    while True:
        spots = sorted(end[rng.integers(2)] for end in ENDS)
        scene = tuple(replace(random_item(rng, split, place), cell=cell) for place, cell in spots)
        if belongs(scene, split):
            return scene


def draw_wide(rng: np.random.Generator, split: str) -> tuple[Image.Image, str]:
    """The two middle rows of such a scene, 112 x 56, and its caption."""
    scene = wide_scene(rng, split)
    return draw(scene, rng, split).crop((0, CELL, IMAGE_SIZE, IMAGE_SIZE - CELL)), caption(scene)


def write_data(folder: Path, split: str, count: int) -> None:
    """So many images with their records, in the layout of LLaVA-CC3M-Pretrain-595K."""
    if (folder / "chat.json").is_file():
        return
    rng, records = np.random.default_rng([7, len(split)]), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image, text = draw_wide(rng, split)
        image.save(folder / "images" / f"{i:06}.png")
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": text}]
        records.append({"id": f"{split}_{i:06}", "image": f"{i:06}.png", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))


def built(name: str) -> Path:
    """The demo's halves with the same projector in both."""
    folder = WORK / f"model-{name}"
    if not (folder / "config.json").is_file():
        torch.manual_seed(1)
        save_llava(*build_llava(ROOT / "demo" / "clip", ROOT / "demo" / "qwen", pad=name == "pad"), folder)
    return folder


def train(name: str, data: Path, steps: int) -> dict[str, Any]:
    """One training by run_zero2.sh, and how many held-out captions the model writes exactly."""
    output = WORK / f"trained-{name}-{data.name}-{steps}"
    if not (output / "scores" / "metrics.json").is_file():
        flags = {"max_steps": steps, "learning_rate": 1e-3, "adam_beta2": 0.95, "logging_steps": max(1, steps // 10)}
        flags |= {"global_batch_size": 32, "per_device_train_batch_size": 16, "save_strategy": "no", "seed": 1}
        flags |= {"report_to": "none", "overwrite_output_dir": "true"}
        words = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
        where = {"MODEL": built(name), "DATA": data, "OUTPUT_DIR": output, "TRAIN_TYPE": "freeze_vision"}
        subprocess.run(["bash", ROOT / "run_zero2.sh", *words], env=environment(**where), check=True)
        asked = ["--model_name_or_path", output, "--data_path", WORK / "held_out", "--output_dir", output / "scores"]
        command = [sys.executable, "-m", "train_llava.evaluate", *map(str, asked), "--max_new_tokens", "64"]
        subprocess.run(command, cwd=ROOT, check=True)
    metrics = json.loads((output / "scores" / "metrics.json").read_text())
    losses = [log["loss"] for log in read_log(output) if "loss" in log]
    return {"exact": metrics["exact_match"], "held_out_loss": metrics["loss"], "loss": losses[-1]}


def main() -> None:
    flags = parser(__doc__, "--output", RESULTS / "rim")
    flags.add_argument("--steps", type=int, default=600, help="of 32 samples each")
    flags.add_argument("--images", type=int, default=4000, help="to train on")
    args = flags.parse_args()
    data = WORK / f"train-{args.images}"
    write_data(data, "train", args.images)
    write_data(WORK / "held_out", "held_out", HELD_OUT)
    rows = {name: train(name, data, args.steps) for name in ("crop", "pad")}
    lines = [[name, f"{100 * row['exact']:.1f}", f"{row['held_out_loss']:.3f}"] for name, row in rows.items()]
    result = head(__doc__) | {"steps": args.steps, "images": args.images, "rows": rows}
    write(args.output, result, table(["images", "exact match, %", "held-out loss"], lines))


if __name__ == "__main__":
    main()
