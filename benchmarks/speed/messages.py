"""Records as chat messages with parts, which other programs train on."""

import json
from pathlib import Path
from typing import Any

import datasets


def messages_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Question and answer as chat messages whose content is a list of parts."""
    question, answer = (turn["value"] for turn in record["conversations"])
    text = question.removeprefix("<image>\n").removesuffix("\n<image>")
    parts = [{"type": "text", "text": text}, {"type": "image"}]
    parts = parts[::-1] if question.startswith("<image>") else parts
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def prompts_and_completions(folder: Path) -> datasets.Dataset:
    """The form of data for which TRL's SFTTrainer supervises answers alone."""
    rows = []
    for record in json.loads((folder / "chat.json").read_text()):
        prompt, completion = messages_of(record)
        images = [str(folder / "images" / record["image"])]
        rows.append({"prompt": [prompt], "completion": [completion], "images": images})
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
