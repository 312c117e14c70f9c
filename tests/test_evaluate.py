"""Scores against plain transformers, the metric library on its own, and values worked out by hand."""

import json
import math
import re
import shutil
import sys

import pytest
import torch
from conftest import call, run, user
from folders import make_adapter
from peft import PeftModel
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from transformers import LlavaForConditionalGeneration, pipeline

from train_llava import train
from train_llava.cli import InputError
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.evaluate import main, metrics_of, report_page
from train_llava.model.answer_losses import answer_losses
from train_llava.model.freeze import LoraSettings, apply_train_type
from train_llava.model.generate import caption_rows, first_question
from train_llava.model.load import load
from train_llava.pages.scores import captions
from train_llava.pages.scores.captions import caption_metrics, words
from train_llava.pages.scores.scoring import score_each


@pytest.fixture(scope="module")
def folder(llava, data, tmp_path_factory):
    """Eleven records: six answers are what a plain pipeline says, five are not; one has two rounds, one no image."""
    folder = tmp_path_factory.mktemp("held_out")
    (folder / "images").symlink_to(data / "images")
    records = json.loads((data / "chat.json").read_text())[:11]
    describe = pipeline("image-text-to-text", model=str(llava))
    for record in records[:6]:
        words = record["conversations"][0]["value"]
        content = [{"type": "image", "image": str(data / "images" / record["image"])}]
        content.insert(words.startswith("<image>"), {"type": "text", "text": words.replace("<image>", "").strip()})
        asked = {"text": [{"role": "user", "content": content}], "return_full_text": False, "max_new_tokens": 12}
        record["conversations"][1]["value"] = describe(**asked)[0]["generated_text"].strip()
    records[7]["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes, quite sure."}]
    del records[9]["image"]
    records[9]["conversations"] = [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Good morning."}]
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


def evaluate(model, folder, output, *flags):
    where = ("--model_name_or_path", model, "--data_path", folder, "--output_dir", output, "--max_new_tokens", 12)
    done = call(main, *where, *flags)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "metrics.json").read_text())


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def plain_loss(model, processor, examples):
    with torch.no_grad():
        return model(**LlavaCollator(processor)(examples)).loss.item()


def test_loss_and_exact_match(llava, folder, tmp_path):
    metrics = evaluate(llava, folder, tmp_path, "--batch_size", 3)
    plain, processor = LlavaForConditionalGeneration.from_pretrained(llava).eval(), load(llava)[1]
    examples = list(LlavaDataset(folder))
    expected = plain_loss(plain, processor, examples)  # one batch of all: a mean over tokens, not of means
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    labels = LlavaCollator(processor)(examples)["labels"]
    assert (metrics["records"], metrics["answer_tokens"]) == (11, int((labels != -100).sum()))
    rows = read_lines(tmp_path / "samples.jsonl")
    assert [row["exact"] for row in rows] == [True] * 6 + [False] * 5
    assert metrics["exact_match"] == pytest.approx(6 / 11)
    assert [row["id"] for row in rows] == [example["id"] for example in examples]
    for row, example in zip(rows, examples, strict=True):
        assert row["loss"] == pytest.approx(plain_loss(plain, processor, [example]), rel=1e-5)
        assert row["reference"] == example["messages"][1]["content"]


def test_an_adapter(llava, folder, tmp_path):
    make_adapter(LlavaForConditionalGeneration.from_pretrained(llava), tmp_path / "adapter")
    plain = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(llava), tmp_path / "adapter").eval()
    metrics = evaluate(llava, folder, tmp_path / "scores", "--adapter_name_or_path", tmp_path / "adapter")
    processor, examples = load(llava)[1], list(LlavaDataset(folder))
    assert metrics["loss"] == pytest.approx(plain_loss(plain, processor, examples), rel=1e-5)
    assert metrics["adapter"] == str(tmp_path / "adapter")
    with plain.disable_adapter():
        assert metrics["loss"] != pytest.approx(plain_loss(plain, processor, examples), rel=1e-3)


def test_losses_of_a_text_batch(llava, folder):
    """Beside a hidden image, of which nothing is counted."""
    model, processor = load(llava)
    text = LlavaDataset(folder)[9]
    assert text["images"] == []
    ((loss, tokens),) = answer_losses(model, processor, [text])
    inputs = processor.tokenizer(processor.apply_chat_template(text["messages"]), return_tensors="pt")
    answer = len(processor.tokenizer("Good morning.<|im_end|>")["input_ids"])
    assert tokens == answer
    with torch.no_grad():
        log_p = model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0]
    last = len(ids) - len(processor.tokenizer("\n")["input_ids"])  # what the template writes behind the end of turn
    expected = -sum(log_p[i - 1, ids[i]].item() for i in range(last - answer, last))
    assert loss == pytest.approx(expected, rel=1e-5)


def test_two_ranks_equal_one_process(llava, folder, tmp_path):
    one = evaluate(llava, folder, tmp_path / "one")
    where = ("--model_name_or_path", llava, "--data_path", folder, "--output_dir", tmp_path / "two")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "train_llava.evaluate")
    done = run(sys.executable, *launch, *where, "--max_new_tokens", 12)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two.keys() == one.keys()
    assert all(
        two[name] == pytest.approx(one[name], rel=1e-6, abs=1e-6) for name in one if isinstance(one[name], int | float)
    )
    rows = [read_lines(tmp_path / name / "samples.jsonl") for name in ("one", "two")]
    assert [row["answer"] for row in rows[0]] == [row["answer"] for row in rows[1]]
    assert [row["index"] for row in rows[1]] == list(range(11))
    assert done.stdout.count("perplexity") == 1  # said once


SAID = ["a red seven at the top left", "a blue one", "Two cats, asleep on a mat.", "nothing"]
RIGHT = ["a red seven at the top left", "a blue one at the top", "two cats sleep on the mat", "a green four"]


def test_metrics_by_hand_and_by_the_library():
    metrics, each = caption_metrics(SAID, [[text] for text in RIGHT])
    # 7 + 3 + 4 + 0 of 17 words are right (two, cats, on, mat), and 17 words are fewer than the references' 22
    assert metrics["bleu_1"] == pytest.approx(14 / 17 * math.exp(1 - 22 / 17), rel=1e-6)
    # Lin's F with beta 1.2: of "a blue one" all 3 words of its 3, and 3 of the reference's 6
    assert each["rouge_l"][1] == pytest.approx((1 + 1.44) * 1 * 0.5 / (0.5 + 1.44 * 1))
    assert each["cider"][0] == pytest.approx(10) and each["cider"][3] == 0
    said, right = (
        {i: [re.sub(r"[^a-z ]", "", text.lower())] for i, text in enumerate(texts)} for texts in (SAID, RIGHT)
    )
    assert metrics["bleu_4"] == pytest.approx(Bleu(4).compute_score(right, said, verbose=0)[0][3])
    assert metrics["rouge_l"] == pytest.approx(Rouge().compute_score(right, said)[0])
    assert metrics["cider"] == pytest.approx(Cider().compute_score(right, said)[0])


def test_blanks_at_the_ends_do_not_matter():
    rows = [{"caption": " a cat\n", "reference": "a cat"}, {"caption": "a cat", "reference": "a  cat"}]
    metrics, each = score_each(rows)
    assert [row["exact"] for row in each] == [True, False] and metrics["exact_match"] == 1 / 2


def test_the_first_question_has_the_images_of_its_own_words():
    turns = [*user("<image>\nWhat?"), {"role": "assistant", "content": " A cat. "}, *user("<image>\nAnd this?")]
    example = {"id": "7", "messages": [*turns, {"role": "assistant", "content": "A dog."}], "images": ["cat", "dog"]}
    question, row = first_question(example)
    assert question == {"messages": turns[:1], "images": ["cat"]}
    assert row == {"id": "7", "image": "cat", "prompt": "<image>\nWhat?", "reference": "A cat."}


def test_captions_of_a_model_in_training_are_without_dropout(llava, folder):
    """And it is in training afterwards."""
    model, processor = load(llava)
    model = apply_train_type(model, "use_lora", LoraSettings(lora_dropout=0.5))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    examples = [LlavaDataset(folder)[i] for i in range(3)]
    expected = [row["caption"] for row in caption_rows(model.eval(), processor, examples, max_new_tokens=8)]
    rows = caption_rows(model.train(), processor, examples, max_new_tokens=8)
    assert model.training and [row["caption"] for row in rows] == expected and len(set(expected)) > 1


def test_words():
    assert words(" A red, red_dog's 2nd\nball! ") == "a red red dog s 2nd ball"
    assert words("一只红色的猫 cat") == "一 只 红 色 的 猫 cat"
    assert words("Größe...") == "größe"
    assert words("यह एक हिंदी वाक्य है।") == "यह एक हिंदी वाक्य है"  # vowel signs are marks, no letters
    assert words("ไม่มีแมว ที่นี่") == "ไม่มีแมว ที่นี่" and words("দুটি বিড়াল,") == "দুটি বিড়াল"
    assert words("cafe\u0301 Cafe\u0301!") == "café café" == words("Café café")
    assert words("猫がいる") == "猫 が い る" and words("שָׁלוֹם") == "שָׁלוֹם"


def test_the_page_shows_the_worst_and_the_best(folder):
    dataset = LlavaDataset(folder)
    rows = [{"index": i, "id": f"r{i}", "prompt": "What?", "tokens": 2} for i in range(11)]
    for i, row in enumerate(rows):
        row |= {"reference": "one two three four", "loss": float(i)}
        row["caption"] = " ".join(["one", "two", "three", "four"][: i % 4 + 1]) + "<b>" * (i == 4)
    metrics, each = metrics_of(rows)
    rows = [row | values | {"answer": row["caption"]} for row, values in zip(rows, each, strict=True)]
    page = report_page("a < b", metrics, rows, dataset, {})
    shown = re.findall(r"(r\d+) · ROUGE-L", page)
    # one right word (and "b") first, the highest loss first among equals; at the end, the lowest loss first
    assert shown[:3] == ["r4", "r8", "r0"] and shown[6:9] == ["r3", "r7", "r2"] and len(shown) == 11
    assert page.count("data:image/png;base64,") == 10 and page.count("no image") == 1
    assert "a &lt; b" in page and "one&lt;b&gt;" in page and "http" not in page


def test_without_the_metrics_of_coco(llava, folder, tmp_path, monkeypatch):
    """Loss and exact match need no package; a line says what the others need."""
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    where = ("--data_path", folder, "--output_dir", tmp_path, "--max_new_tokens", 12)
    done = call(main, "--model_name_or_path", llava, *where)
    assert done.returncode == 0 and "pip install pycocoevalcap" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["exact_match"] == pytest.approx(6 / 11) and not {"cider", "rouge_l", "bleu_1"} & metrics.keys()
    page = (tmp_path / "report.html").read_text()
    worst, best = page.split("Best answers")
    assert worst.count('class="wrong"') == 5 and 'class="wrong"' not in best and "ROUGE" not in page


def test_wrong_usage(llava, folder, tmp_path):
    done = call(main, "--model_name_or_path", llava, "--data_path", tmp_path / "none")
    assert done.returncode == 2 and str(tmp_path / "none") in done.stderr
    shutil.copytree(folder, tmp_path / "bad")
    name = json.loads((folder / "chat.json").read_text())[5]["image"]
    (tmp_path / "bad" / "images" / name).write_bytes(b"no image")
    done = call(main, "--model_name_or_path", llava, "--data_path", tmp_path / "bad")
    assert done.returncode == 2 and "record 'train_000005'" in done.stderr


def test_a_conversation_that_the_assistant_begins(llava, data, tmp_path):
    """Greetings, as ShareGPT's have them: trained on and scored, and asked where somebody asks."""
    turns = [("gpt", "Welcome!"), ("human", "<image>\nWhat is it?"), ("gpt", "A digit.")]
    record = {"id": "greeting", "image": "x.jpg", "conversations": [{"from": a, "value": b} for a, b in turns]}
    (tmp_path / "d" / "images").mkdir(parents=True)
    shutil.copy(next((data / "images").iterdir()), tmp_path / "d" / "images" / "x.jpg")
    (tmp_path / "d" / "chat.json").write_text(json.dumps([record]))
    metrics = evaluate(llava, tmp_path / "d", tmp_path / "out")
    (row,) = read_lines(tmp_path / "out" / "samples.jsonl")
    assert row["prompt"] == "<image>\nWhat is it?" and row["reference"] == "A digit."
    (example,) = LlavaDataset(tmp_path / "d")
    model, processor = load(llava)
    assert metrics["loss"] == pytest.approx(plain_loss(model, processor, [example]), rel=1e-5)
    flags = ("--model_name_or_path", llava, "--data_path", tmp_path / "d", "--output_dir", tmp_path / "run")
    flags += ("--use_cpu", "true", "--report_to", "none", "--max_steps", 1, "--sample_steps", 1)
    done = call(train.main, *flags)
    assert done.returncode == 0 and "(reference: A digit.)" in done.stdout, done.stderr
    record["conversations"] = record["conversations"][:1]
    del record["image"]
    (tmp_path / "d" / "chat.json").write_text(json.dumps([record]))
    with pytest.raises(InputError, match="no answer to a question"):
        LlavaDataset(tmp_path / "d")
