"""Eight records about two photos, of which five have a fault: what `check_data` is for.

The photos are those that scikit-learn ships.
"""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_images

RECORDS = [
    ("temple.jpg", ["<image>\nWhat is this?", "A temple by the water."]),
    ("flower.jpg", ["<image>\nWhat is this?", "A flower."]),
    ("flowr.jpg", ["<image>\nWhich colour has it?", "Orange."]),  # no such image
    ("temple.jpg", ["<image>\nIs it day?", "Yes.", "Do you see water?", "Yes, in front."]),
    ("temple.jpg", ["<image>\n<image>\nWhat is this?", "A temple."]),  # two places, one image
    ("flower.jpg", ["<image>\nIs it red?", "It is orange."]),  # see below
    ("cut.jpg", ["<image>\nWhat is in the middle?", "A flower."]),  # half of a file
    ("flower.jpg", ["<image>\nHow many flowers?", ""]),  # nothing to learn
]


def write(folder: Path) -> str:
    """Writes `chat.json` and `images/`, as LLaVA's data has them; returns the records in a line each, to be read."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, photo in zip(("temple.jpg", "flower.jpg"), load_sample_images().images, strict=True):
        Image.fromarray(photo).resize((320, 213)).save(images / name)
    whole = (images / "flower.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])  # as after a broken download
    records = []
    for i, (image, values) in enumerate(RECORDS):
        turns = [{"from": ("human", "gpt")[j % 2], "value": value} for j, value in enumerate(values)]
        records.append({"id": f"mine_{i}", "image": image, "conversations": turns})
    records[5]["conversations"][1]["from"] = "robot"  # a role that nobody knows
    (folder / "chat.json").write_text(json.dumps(records, indent=1))
    return "\n".join(map(line, records))


def line(record: dict[str, Any]) -> str:
    turns = " | ".join(f"{turn['from']}: {turn['value']!r}" for turn in record["conversations"])
    return f"{record['id']}  {record['image']}  {turns}"
