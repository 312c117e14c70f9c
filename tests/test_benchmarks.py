"""Benchmarks in their published forms are read, scored by their own metric, and asked."""

import json

import layouts
import pytest
from benchmarks_published import PUBLISHED, pope, vqav2
from conftest import ROOT, call

from train_llava import evaluate, infer
from train_llava.cli import InputError
from train_llava.data import LlavaDataset
from train_llava.ingest.formats import FORMATS
from train_llava.ingest.readers import records_in
from train_llava.pages.scores.scoring import NAMES, score

METRICS = {"vqav2": "vqa", "textvqa": "vqa", "gqa": "exact", "docvqa": "anls", "chartqa": "relaxed", "pope": "yes_no"}
SHORT = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(tmp_path, name):
    expected = PUBLISHED[name](tmp_path)
    dataset = LlavaDataset(tmp_path, held_out=True)
    assert dataset.sources[0].format == name and METRICS[name] in NAMES
    found = [(e["messages"], e["answers"], e["metric"], e["category"], len(e["images"])) for e in dataset]
    assert found == [
        (layouts.chat(f"<image>\n{question}{SHORT}", answer), answers, METRICS[name], category, 1)
        for question, answer, answers, category in expected
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_has_one_answer_or_refuses(tmp_path, name):
    expected = PUBLISHED[name](tmp_path)
    if name == "pope":
        with pytest.raises(InputError, match="pope is a test, not to be trained on"):
            LlavaDataset(tmp_path)
        return
    dataset = LlavaDataset(tmp_path)
    assert [example["messages"][1]["content"] for example in dataset] == [answer for _, answer, *_ in expected]
    assert dataset[0].keys() == {"id", "messages", "images"}  # nothing that a training does not read


def test_answers_that_come_later_are_found(tmp_path):
    """And questions without any are refused by name, not scored as wrong."""
    expected = vqav2(tmp_path)
    answers = tmp_path / "v2_mscoco_val2014_annotations.json"
    answers.rename(tmp_path / "kept")
    with pytest.raises(InputError, match="no answer to learn from: a test whose answers are kept secret"):
        LlavaDataset(tmp_path, held_out=True)
    (tmp_path / "kept").rename(answers)
    assert [example["answers"] for example in LlavaDataset(tmp_path, held_out=True)] == [one[2] for one in expected]


def test_splits_of_coco_are_held_out(tmp_path):
    vqav2(tmp_path)
    for path in [*tmp_path.glob("*.json")]:
        path.with_name(path.name.replace("val2014", "train2014")).write_text(path.read_text())
    sources = {held_out: LlavaDataset(tmp_path, held_out=held_out).sources[0] for held_out in (True, False)}
    for held_out, split in ((True, "val2014"), (False, "train2014")):
        assert sources[held_out].files == [f"{tmp_path}/v2_OpenEnded_mscoco_{split}_questions.json"]
        answers = f"{tmp_path}/v2_mscoco_{split}_annotations.json"
        assert sources[held_out].passed_over[answers] == "answers, which are read with their questions"


def test_other_objects_are_read_as_before(tmp_path):
    """Records with a field of such a name: in lines, and as one object that is a record itself."""
    turns = layouts.llava_turns(layouts.chat("What?", "A thing."))
    records = [{"id": str(i), "imageId": "x", "conversations": turns} for i in range(3)]
    layouts.write(tmp_path / "lines.json", layouts.lines(records))
    layouts.write(tmp_path / "one.json", records[0])
    assert list(records_in(str(tmp_path / "lines.json"), {})) == records
    assert list(records_in(str(tmp_path / "one.json"), {})) == records[:1]


def test_every_format_of_a_benchmark_is_in_the_docs():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert all(f"`{name}`" in page for name in METRICS) and METRICS.keys() == FORMATS.keys() - {
        "llava", "messages", "texts", "caption"
    }  # fmt: skip


def test_evaluate_scores_each_kind(llava, tmp_path):
    pope(tmp_path / "pope")
    vqav2(tmp_path / "vqa")
    flags = ("--model_name_or_path", llava, "--max_new_tokens", 2, "--output_dir", tmp_path / "out")
    done = call(evaluate.main, *flags, "--data_path", tmp_path / "pope", tmp_path / "vqa")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    kinds = metrics["categories"]
    assert [(name, kinds[name]["records"]) for name in kinds] == [
        ("adversarial", 2), ("random", 2), ("number", 1), ("other", 1), ("yes/no", 1)
    ]  # fmt: skip
    assert {"yes_no_accuracy", "yes_share"} <= kinds["random"].keys() and "vqa_accuracy" not in kinds["random"]
    assert "vqa_accuracy" in metrics and "cider" not in metrics and "adversarial" in done.stdout
    assert "<td>adversarial</td>" in (tmp_path / "out" / "report.html").read_text()


def test_science_qa_as_llava_writes_it(llava, tmp_path):
    """llava_test_CQM-A.json of its scripts/convert_sqa_to_llava.py: an image behind the question, in a folder of the
    problem's number, or none; the answer in a sentence, of which the letter counts.
    """
    options = "Options: (A) Texas (B) Utah"
    asked = [f"Context: {context}\nQuestion: Which is farther east?\n{options}" for context in ("N/A", "See the map.")]
    records = [{"id": "7", "image": "7/image.png"}, {"id": "21"}]
    for record, question, letter in zip(records, asked, "AB", strict=True):
        image = "\n<image>" if "image" in record else ""
        turns = layouts.chat(question + image, f"The answer is {letter}.")
        record["conversations"] = layouts.llava_turns(turns)
    layouts.write(tmp_path / "llava_test_CQM-A.json", records)
    layouts.write(tmp_path / "images" / "test" / "7" / "image.png", layouts.image(7))
    rows = [{"caption": said, "reference": e["messages"][1]["content"]} for e, said in
            zip(LlavaDataset(tmp_path, held_out=True), ("A", "(A) Texas"), strict=True)]  # fmt: skip
    assert score(rows, "choice")["choice_accuracy"] == 0.5
    flags = ("--model_name_or_path", llava, "--max_new_tokens", 2, "--output_dir", tmp_path / "out")
    done = call(evaluate.main, *flags, "--data_path", tmp_path, "--metric", "choice")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["records"] == 2 and 0 <= metrics["choice_accuracy"] <= 1


def test_infer_asks_a_benchmark(llava, tmp_path):
    """Each question in its own words, with its id, wherever the images lie; here a test, as there are no answers."""
    expected = vqav2(tmp_path / "d")
    (tmp_path / "d" / "v2_mscoco_val2014_annotations.json").unlink()
    asked = tmp_path / "d" / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    old = tmp_path / "d" / "v2_OpenEnded_mscoco_val2014_questions.json"
    asked.write_text(old.read_text().replace('"val2014"', '"test-dev2015"'))
    old.unlink()
    for path in [*(tmp_path / "d" / "val2014").iterdir()]:
        path.rename(path.with_name(path.name.replace("val2014", "test2015")))
    flags = ("--model_name_or_path", llava, "--max_new_tokens", 2, "--images", asked)
    done = call(infer.main, *flags, "--output_file", tmp_path / "answers.jsonl")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted((line["question_id"], line["prompt"]) for line in lines) == [
        (262148000 + i, f"<image>\n{question}{SHORT}") for i, (question, *_) in enumerate(expected)
    ]
