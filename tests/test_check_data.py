"""check_data and show_batch on data with known faults, from their command lines."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import layouts
import numpy as np
import pytest
from conftest import ROOT, call
from PIL import Image
from transformers import AutoProcessor

from train_llava import check_data, show_batch
from train_llava.cli import InputError
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.ingest.formats import FORMATS
from train_llava.show_batch import batch_page


def faulty(folder, good=40):
    """Good records, a copy, two without an answer, one broken image."""
    layouts.cc3m(folder, good, unpacked=True)
    records = json.loads((folder / "chat.json").read_text())
    records += [{**records[0], "id": "copy"}]
    records += [{**records[1], "id": f"mute{i}", "conversations": records[1]["conversations"][:1]} for i in range(2)]
    layouts.write(folder / "images_dl" / "broken.jpg", layouts.image(1)[:200])
    records += [{**records[2], "id": "torn", "image": "broken.jpg"}]
    layouts.write(folder / "chat.json", records)
    return records


def test_check_data(llava, tmp_path):
    faulty(tmp_path / "d")
    flags = ["--data_path", tmp_path / "d", "--output_dir", tmp_path / "report", "--workers", 2]
    done = call(check_data.main, *flags, "--model_name_or_path", llava)
    assert done.returncode == 2 and "2 records cannot be trained on" in done.stderr, done.stderr
    for line in ("44 of 44 records read", "2 records to learn nothing from", "1 images that cannot be read"):
        assert line in done.stdout
    assert re.search(r"roles: user +42\n", done.stdout) and re.search(r"images in a record: 1 +42\n", done.stdout)
    assert "1 records that are copies of another" in done.stdout and "█" in done.stdout
    refused = [json.loads(line) for line in (tmp_path / "report" / "refused.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in refused) == ["mute0", "mute1", "torn"]
    assert Image.open(tmp_path / "report" / "lengths.png").size[0] > 500


def test_check_data_calls_good_data_good(tmp_path):
    layouts.messages_jsonl(tmp_path / "d")
    done = call(check_data.main, "--data_path", tmp_path / "d", "--output_dir", tmp_path / "report")
    assert done.returncode == 0 and "verdict: good to train on" in done.stdout, done.stderr
    assert re.search(r"images in a record: none, text only +3\n", done.stdout)


def test_ctrl_c_tells_what_was_found(tmp_path):
    """While it reads images that take a tenth of a second each, two minutes in all."""
    turns = layouts.llava_turns(layouts.chat("<image>\nWhat?", "A thing."))
    records = [{"id": str(i), "image": "large.png", "conversations": turns} for i in range(1000)]
    layouts.write(tmp_path / "d" / "chat.json", records)
    Image.new("RGB", (5000, 5000)).save(tmp_path / "d" / "large.png", compress_level=1)
    flags = ["--data_path", tmp_path / "d", "--output_dir", tmp_path / "report", "--workers", 1]
    # a process started in the background would ignore the signal, one that writes to a pipe say all at its end
    command = ["env", "--default-signal=INT", sys.executable, "-u", "-m", "train_llava.check_data", *map(str, flags)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while "chat.json" not in (line := process.stdout.readline()):
            assert line, process.communicate()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"^\d+ of 1,000 records read", out, re.M) and "interrupted; so far: " in out


def test_show_batch(llava, tmp_path):
    layouts.mix665k(tmp_path / "d")
    done = call(
        *(show_batch.main, "--model_name_or_path", llava, "--data_path", tmp_path / "d"),
        *("--output", tmp_path / "batch.html", "--samples", 8),
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "batch.html").read_text()
    assert page.count('class="sample"') == 8 and "http" not in page
    assert page.count("&lt;image&gt; x 4</span>") == page.count("data:image/png;base64,") > 3

    processor = AutoProcessor.from_pretrained(llava)
    examples = list(LlavaDataset(tmp_path / "d"))[:4]
    page = batch_page(processor, examples)
    labels = LlavaCollator(processor)(examples)["labels"]
    learned = re.findall(  # the first is the legend
        r'class="t learned *\w*"[^>]*>([^<]*)</span>', page
    )
    answers = [m["content"] for example in examples for m in example["messages"] if m["role"] == "assistant"]
    assert "".join(learned[1:]) == "".join(answer + "&lt;|im_end|&gt;" for answer in answers)
    assert f"{int((labels != -100).sum()):,}</td>" in page


def mutated(rng, record):
    """A record with one thing in it replaced by something absurd."""
    absurd = [
        None,
        7,
        -1.5,
        "",
        "x",
        "<image>",
        [],
        {},
        [None],
        {"from": 3},
        ["a", 1],
        "../../x",
        True,
        "\x00",
        "é" * 99,
    ]
    record = json.loads(json.dumps(record))
    here = record
    for _ in range(rng.integers(1, 5)):
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = keys[rng.integers(len(keys))]
        inner = here[key]
        if isinstance(inner, dict | list) and len(inner) and rng.random() < 0.7:
            here = inner
            continue
        here[key] = absurd[rng.integers(len(absurd))]
        break
    return record


@pytest.mark.parametrize("name", ["cc3m", "messages_jsonl", "sharegpt4o", "textocr"])
def test_two_thousand_fuzzed_records(tmp_path, name):
    """500 of each kind of file: whatever a record holds, it is read or refused by name; the good ones stay."""
    writer, format, _ = layouts.LAYOUTS[name]
    writer(tmp_path)
    file = next(path for path in sorted(tmp_path.rglob("*.json*")) if "metadata" not in path.name)
    text = file.read_text()
    records = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    rng = np.random.default_rng(0)
    fuzzed = [mutated(rng, random.Random(i).choice(records)) for i in range(500)]
    both = [record for i, bad in enumerate(fuzzed) for record in (bad, records[i % len(records)])]
    file.write_text(json.dumps(both) if file.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in both))
    with pytest.raises(InputError, match=r"of 1000 records cannot be trained on\. The first: .*record .*number"):
        LlavaDataset(f"{format}={tmp_path}")
    problems = LlavaDataset(f"{format}={tmp_path}", "skip", NoLimit(tmp_path))
    refused = 1000 - len(problems)
    assert 100 < refused <= 500
    for example in problems:
        assert example["messages"] and all(image.mode == "RGB" for image in example["images"])
    assert set(FORMATS) >= {format}


class NoLimit:
    """Images that mutated records name may be missing; that is another test's subject."""

    def __init__(self, _):
        self.found = []

    def limit(self, records):
        return records

    def add(self, *found):
        self.found.append(found)
