"""Writes the demo's data in LLaVA's own forms.

    python -m demo.make_data --output_dir output/demo/data

makes three folders, each with `chat.json` and `images/`:

- `captions/`: an image and its caption, as in LLaVA-CC3M-Pretrain-595K (with its `metadata.json`), for the first stage;
- `conversations/`: two to six questions about an image, about several or about none, as in LLaVA-Instruct, for the
  second stage;
- `held_out/`: one question a record, equally many of each kind, with the kind as its `category`;
- `validation/`, with `--validation 1400`: the same of a third part, by which settings are chosen.

The same seed gives the same bytes. What held-out images show that no other does is said in `demo/scenes.py`.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from demo.english import INSTRUCTIONS, caption
from demo.questions import KINDS_OF_QUESTION, LANGUAGES, pick, question_of, rounds, several_scenes
from demo.scenes import SPLITS, Scene, draw, random_scene

COUNTS = {"captions": 6000, "conversations": 8000, "held_out": 1400, "validation": 0}
Rng = np.random.Generator


def save_images(scenes: list[Scene], rng: Rng, split: str, folder: Path, identity: str) -> str | list[str] | None:
    """Draws scenes into `folder`, nine in ten as JPEG; what LLaVA's records have under `image`, None for no scene."""
    names = []
    for i, scene in enumerate(scenes):
        names.append(f"{identity}{f'_{i + 1}' if i else ''}.{'png' if rng.random() < 0.1 else 'jpg'}")
        draw(scene, rng, split).save(folder / "images" / names[-1], quality=95, subsampling=0)
    return names if len(names) > 1 else names[0] if names else None


def record(
    identity: str, image: str | list[str] | None, pairs: list[tuple[str, str]], behind: bool = False
) -> dict[str, Any]:
    """A LLaVA record; its images stand before the words of the first question, as LLaVA-1.5 puts them, or behind."""
    (question, answer), *others = pairs
    if image:
        places = "\n".join(["<image>"] * (1 if isinstance(image, str) else len(image)))
        question = f"{question}\n{places}" if behind else f"{places}\n{question}"
    turns = [
        {"from": role, "value": text}
        for pair in [(question, answer), *others]
        for role, text in zip(("human", "gpt"), pair, strict=True)
    ]
    return {"id": identity, **({"image": image} if image else {}), "conversations": turns}


def caption_record(rng: Rng, split: str, folder: Path, identity: str) -> dict[str, Any]:
    """An image with its English caption; the image stands before or behind the question, as in LLaVA-CC3M."""
    scene = random_scene(rng, split)
    image = save_images([scene], rng, split, folder, identity)
    return record(identity, image, [(pick(rng, INSTRUCTIONS), caption(scene))], bool(rng.random() < 0.5))


def conversation_record(rng: Rng, split: str, folder: Path, identity: str) -> dict[str, Any]:
    """Two to six questions, one record in ten with a system prompt."""
    kind = rng.random()
    scenes = [] if kind < 0.05 else several_scenes(rng, split) if kind < 0.25 else [random_scene(rng, split)]
    pairs = rounds(scenes, int(rng.integers(2, 7)), rng, mixed=0.2)
    made = record(identity, save_images(scenes, rng, split, folder, identity), pairs)
    if rng.random() < 0.1:
        words = LANGUAGES["en" if pairs[0][0].isascii() else "zh"]
        made["conversations"].insert(0, {"from": "system", "value": words.sentence(pick(rng, words.SYSTEM_PROMPTS))})
    return made


def question_record(rng: Rng, split: str, folder: Path, identity: str) -> dict[str, Any]:
    """One question; the kinds come in turn."""
    kind = KINDS_OF_QUESTION[int(identity.rpartition("_")[2]) % len(KINDS_OF_QUESTION)]
    scenes, pair = question_of(kind, rng, split)
    return record(identity, save_images(scenes, rng, split, folder, identity), [pair]) | {"category": kind}


FORMS: dict[str, Callable[[Rng, str, Path, str], dict[str, Any]]] = {
    "captions": caption_record,
    "conversations": conversation_record,
    "held_out": question_record,
    "validation": question_record,
}


def write_records(folder: Path, form: str, split: str, count: int, seed: int) -> None:
    """`count` records of a form of FORMS about scenes of a split; another seed gives other scenes."""
    rng = np.random.default_rng([seed, list(FORMS).index(form)])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = [FORMS[form](rng, split, folder, f"{form}_{i:06}") for i in range(count)]
    (folder / "chat.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    if form == "captions":
        metadata = [{"id": r["id"], "image": r["image"], "caption": r["conversations"][1]["value"]} for r in records]
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    for form, count in COUNTS.items():
        parser.add_argument(f"--{form}", type=int, default=count, help="how many records")
    args = parser.parse_args()
    counts = {form: getattr(args, form) for form in FORMS if getattr(args, form)}
    with ProcessPoolExecutor(max_workers=len(counts)) as pool:
        written = {}
        for form, count in counts.items():
            split = form if form in SPLITS else "train"
            written[form] = pool.submit(write_records, args.output_dir / form, form, split, count, args.seed)
    for form, done in written.items():
        done.result()
        print(f"{counts[form]} records in {args.output_dir / form}")


if __name__ == "__main__":
    main()
