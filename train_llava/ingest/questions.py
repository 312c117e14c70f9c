"""Lists of questions about images, and the JSON Lines files that hold the answers."""

import json
import os
from itertools import chain, islice
from pathlib import Path
from typing import Any

from train_llava.cli import InputError
from train_llava.ingest.benchmarks import BENCHMARKS
from train_llava.ingest.data_files import PROBED
from train_llava.ingest.formats import CAPTION_FIELDS, FORMATS, has_fields, recognise
from train_llava.ingest.image_index import ImageIndex
from train_llava.ingest.image_kinds import SUFFIXES
from train_llava.ingest.readers import reason_of, records_in

Question = dict[str, Any]  # {"image": file or list of files, "prompt": text}, then what else tells it from others


def questions(source: Path, prompt: str) -> list[Question]:
    """One question for each image file in a folder, for each one of a benchmark (benchmarks.py), which has its own
    prompts, or for each line of a list: a path, relative to the list, or a Question as JSON.

    Raises:
        InputError: no such folder or list, nothing in it, or a line of another kind.
    """
    if source.is_dir():
        names = sorted(path.name for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
        found = [{"image": name, "prompt": prompt} for name in names if not name.startswith(".")]
    elif source.is_file() and (published := benchmark_questions(source)):
        found = published
    elif source.is_file():
        try:
            lines = source.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source}: {reason_of(error, str(source))}.") from error
        found = [
            question(line.strip(), f"{source}, line {i}", prompt) for i, line in enumerate(lines, 1) if line.strip()
        ]
    else:
        raise InputError(f"{source}: no such folder or list of images.")
    if not found:
        raise InputError(f"{source}: no images here.")
    return found


def benchmark_questions(source: Path) -> list[Question]:
    """The questions of a benchmark, each with its id; none if the file is something else. An image that is not there
    keeps its name.

    Raises:
        InputError: one of them is of another form.
    """
    if source.suffix.lower() not in (".json", ".jsonl"):
        return []
    records = records_in(str(source), CAPTION_FIELDS)
    first = list(islice(records, PROBED))
    name = recognise(first, CAPTION_FIELDS, BENCHMARKS)
    if name is None:
        return []
    asked = []
    for record in chain(first, records):
        if not has_fields(record, name, CAPTION_FIELDS):
            raise InputError(f"{source}, question {len(asked) + 1}: not as {name} has them: {str(record)[:80]}.")
        messages, (image,) = FORMATS[name][1](record, CAPTION_FIELDS)
        number = record.get("id", record.get("question_id"))
        asked.append({"image": image, "prompt": messages[0]["content"], "question_id": number})
    index = ImageIndex(str(source.parent), [question["image"] for question in asked[:PROBED]])
    return [question | {"image": index.find(question["image"]) or question["image"]} for question in asked]


def question(line: str, place: str, prompt: str) -> Question:
    """Reads a line of a list.

    Raises:
        InputError: it is of another kind.
    """
    try:
        entry = json.loads(line) if line.startswith("{") else {"image": line}
        entry = {"image": entry["image"], "prompt": entry.get("prompt", prompt)}
    except (ValueError, KeyError, RecursionError) as error:
        raise InputError(f'{place}: a line is neither a path nor {{"image": ..., "prompt": ...}}.') from error
    names = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    if not all(isinstance(text, str) and text for text in (*names, entry["prompt"])):
        raise InputError(f"{place}: the names of its images and its prompt must be texts.")
    return entry


def answered(output_file: Path) -> set[str]:
    """The questions that a file has answers to: its lines without the answers. A last line that was cut off is removed
    from the file.

    Raises:
        InputError: the file holds something else than answers.
    """
    *lines, last = output_file.read_bytes().split(b"\n")
    try:
        done = [json.loads(line) for line in lines]
        if not all("answer" in line and "weights" in line for line in done) or (last and not done):
            raise ValueError
    except (ValueError, TypeError) as error:
        raise InputError(f"{output_file}: holds something else than answers. Give another --output_file.") from error
    if last:
        os.truncate(output_file, sum(len(line) + 1 for line in lines))
    return {json.dumps({key: value for key, value in line.items() if key != "answer"}) for line in done}
