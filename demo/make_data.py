"""Writes the demo's images in the layout of LLaVA-CC3M-Pretrain-595K.

    python -m demo.make_data --output_dir output/demo/data

makes `train/` and `held_out/`, each with `chat.json`, `metadata.json` and `images/`. The same seed gives the same
bytes. Held-out images show handwriting that is in no training image.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from demo.scenes import INSTRUCTIONS, caption, draw, random_scene

COUNTS = {"train": 6000, "held_out": 300}


def write_split(folder: Path, split: str, count: int, seed: int) -> None:
    """`count` images (nine in ten JPEG, the rest PNG) with their records; another seed gives other scenes."""
    rng = np.random.default_rng([seed, list(COUNTS).index(split)])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    chat, metadata = [], []
    for i in range(count):
        scene = random_scene(rng, split)
        identity, text = f"{split}_{i:06}", caption(scene)
        image = f"{identity}.{'png' if rng.random() < 0.1 else 'jpg'}"
        draw(scene, rng, split).save(folder / "images" / image, quality=95, subsampling=0)
        instruction = str(rng.choice(INSTRUCTIONS))
        question = f"<image>\n{instruction}" if rng.random() < 0.5 else f"{instruction}\n<image>"
        chat.append(
            {
                "id": identity,
                "image": image,
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": text}],
            }
        )
        metadata.append({"id": identity, "image": image, "caption": text})
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1))
    (folder / "chat.json").write_text(json.dumps(chat, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    for split, count in COUNTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help="how many images")
    args = parser.parse_args()
    for split in COUNTS:
        write_split(args.output_dir / split, split, getattr(args, split), args.seed)
        print(f"{getattr(args, split)} images in {args.output_dir / split}")


if __name__ == "__main__":
    main()
