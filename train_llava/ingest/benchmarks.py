"""Public benchmarks as they are published: questions with short answers about images.

Most are one JSON object around all questions, which `benchmark_records` takes apart; VQAv2 has its answers in a file of
their own. What a question is asked, and by what its answer is scored, is in BENCHMARKS; docs/evaluation.md lists where
each is from.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from train_llava.ingest.conversation import IMAGE_TOKEN, Message
from train_llava.ingest.limits import MOST_BENCHMARK_BYTES

Record = dict[str, Any]
# LLaVA-1.5's words for all of these, in training and in evaluation (arXiv:2310.03744, section 3.2)
SHORT = "Answer the question using a single word or phrase."
HEAD = 1 << 16  # bytes of a file that show whether it is a benchmark: GQA's first question may be long
KNOWN = re.compile(rb'\s*\{.*"(data_subtype|dataset_name|imageId)"\s*:', re.DOTALL)
# the fields that may say of what kind a record is; the first that it has does
CATEGORIES = ("category", "kind", "answer_type", "question_type")
LONGEST_CATEGORY = 100  # characters


class Benchmark(NamedTuple):
    """How the records of a benchmark are read.

    `metric`: one of METRICS in pages/scores/scoring.py; `question`: its field; `image`: of a record, the name of its
    file; `answer`: of a record, the one to train on, if it has one; `category`: of a record and its file's name.
    """

    metric: str
    question: str
    image: Callable[[Record], str]
    answer: Callable[[Record], str | None]
    category: Callable[[Record, str], str | None] = lambda record, file: category_in(record)
    test_only: bool = False


def most_frequent(record: Record) -> str | None:
    """The answer that most people gave, the first of several."""
    answers = answers_in(record)
    return Counter(answers).most_common(1)[0][0] if answers else None


def of_file(record: Record, file: str) -> str | None:
    """The part of a benchmark that a file holds, which is the end of its name: adversarial, human, ..."""
    return category_in(record) or Path(file).stem.rpartition("_")[2]


def coco_name(record: Record) -> str:
    """The file of an image of COCO; test-dev2015 has those of test2015."""
    split = "test2015" if record["data_subtype"].startswith("test") else record["data_subtype"]
    return f"COCO_{split}_{record['image_id']:012}.jpg"


BENCHMARKS = {
    "vqav2": Benchmark(
        "vqa",
        "question",
        coco_name,
        lambda record: record.get("multiple_choice_answer"),
    ),
    "textvqa": Benchmark("vqa", "question", lambda record: f"{record['image_id']}.jpg", most_frequent),
    "gqa": Benchmark(
        "exact",
        "question",
        lambda record: f"{record['imageId']}.jpg",
        lambda record: record.get("answer"),
        lambda record, file: (record.get("types") or {}).get("structural"),
    ),
    "docvqa": Benchmark(
        "anls",
        "question",
        lambda record: record["image"],
        lambda record: (answers_in(record) or [None])[0],
        lambda record, file: (record.get("question_types") or [None])[0],
    ),
    "chartqa": Benchmark(
        "relaxed", "query", lambda record: record["imgname"], lambda record: record.get("label"), of_file
    ),
    "pope": Benchmark(
        "yes_no", "text", lambda record: record["image"], lambda record: record.get("label"), of_file, test_only=True
    ),
}


def from_benchmark(name: str) -> Callable[[Record, dict[str, str]], tuple[list[Message], list[Any]]]:
    """The function for `formats.FORMATS`: question, and answer if there is one, and the image."""
    benchmark = BENCHMARKS[name]

    def messages_and_image(record: Record, fields: dict[str, str]) -> tuple[list[Message], list[Any]]:
        question, answer = f"{IMAGE_TOKEN}\n{record[benchmark.question]}\n{SHORT}", benchmark.answer(record)
        messages = [{"role": "user", "content": question}]
        if isinstance(answer, str):
            messages.append({"role": "assistant", "content": answer})
        return messages, [benchmark.image(record)]

    return messages_and_image


def tags_of(record: Record, name: str, file: str) -> dict[str, Any]:
    """What a record says about how it is scored: `answers` that count as right, `metric`, and `category`; each None
    where it says nothing."""
    benchmark = BENCHMARKS.get(name)
    metric = benchmark.metric if benchmark else record.get("metric")
    category = benchmark.category(record, file) if benchmark else category_in(record)
    metric, category = (value if isinstance(value, str) and value else None for value in (metric, category))
    return {"answers": answers_in(record), "metric": metric, "category": category}


def category_in(record: Record) -> str | None:
    """The first field of CATEGORIES that holds a name."""
    names = (record.get(field) for field in CATEGORIES)
    return next((name for name in names if isinstance(name, str) and 0 < len(name) <= LONGEST_CATEGORY), None)


def answers_in(record: Record) -> list[str] | None:
    """The texts in the field `answers`, if it is a list of nothing else."""
    answers = record.get("answers")
    fits = isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)
    return answers if fits else None


def benchmark_records(file: str, head: bytes) -> Iterable[Record] | None:
    """The records of a file that is one JSON object around them; None if it is anything else. An empty list for answers
    without questions, which are read with their questions.

    Args:
        file: its path.
        head: its first HEAD bytes.

    Raises:
        ValueError: VQAv2's file with the answers is not JSON.
    """
    if not KNOWN.match(head) or os.path.getsize(file) > MOST_BENCHMARK_BYTES:
        return None
    try:
        whole = load(file)
    except ValueError:  # JSON Lines, or broken: as every other file
        return None
    if isinstance(whole.get("data"), list) and "dataset_name" in whole:
        return ({"id": each.get("question_id", each.get("questionId"))} | each for each in whole["data"])
    if "data_subtype" in whole and isinstance(whole.get("questions"), list):
        return vqav2_records(whole, answers_file(file))
    if "data_subtype" in whole and isinstance(whole.get("annotations"), list):
        return []
    if all(isinstance(each, dict) and "imageId" in each for each in whole.values()):
        return ({"id": key} | each for key, each in whole.items())
    return None


def vqav2_records(whole: dict[str, Any], answers: str | None) -> Iterator[Record]:
    """The questions of VQAv2, each with its answers if there are any."""
    told = {each["question_id"]: each for each in load(answers)["annotations"]} if answers else {}
    for question in whole["questions"]:
        number = question["question_id"]
        yield {"id": number, "data_subtype": whole["data_subtype"]} | told.get(number, {}) | question


def answers_file(file: str) -> str | None:
    """The file with the answers to VQAv2's questions, which lies beside them, if it is there."""
    folder, name = os.path.split(file)
    answers = os.path.join(folder, name.replace("OpenEnded_", "").replace("_questions", "_annotations"))
    return answers if answers != file and os.path.isfile(answers) else None


def load(file: str) -> dict[str, Any]:
    """A file of JSON; of VQAv2's two million answers the words alone, each text once."""

    def smaller(value: dict[str, Any]) -> Any:
        return sys.intern(value["answer"]) if "answer_id" in value else value

    with open(file, encoding="utf-8-sig") as text:
        return json.load(text, object_hook=smaller)
