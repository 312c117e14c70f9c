"""Every published layout is read as it is: messages, images, order; from the cache and as a stream."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import layouts
import numpy as np
import pytest
from conftest import ROOT
from datasets import Dataset, Features, Value

from train_llava.cli import InputError
from train_llava.data import LlavaDataset
from train_llava.ingest import data_files, formats
from train_llava.ingest.formats import parse, recognise
from train_llava.ingest.parquet_images import WINDOW
from train_llava.ingest.sources import GROUPS, ROW_BITS, Source, blocks_of, caption_mapping
from train_llava.processing.chat import ChatEncoder
from train_llava.train import main


@pytest.fixture(scope="module")
def encoder(llava):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(llava)
    return ChatEncoder(processor.tokenizer, 4, processor.chat_template)


def same(example, messages, images):
    assert [(m["role"], m["content"]) for m in example["messages"]] == [(m["role"], m["content"]) for m in messages]
    assert len(example["images"]) == len(images)
    for image, data in zip(example["images"], images, strict=True):
        assert np.array_equal(np.asarray(image), layouts.pixels(data))


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_layout(tmp_path, name, encoder):
    writer, format, fields = layouts.LAYOUTS[name]
    expected = writer(tmp_path / "d")
    dataset = LlavaDataset(tmp_path / "d", caption_fields=fields)
    assert dataset.sources[0].format == format
    assert len(dataset) == len(expected)
    for example, (messages, images) in zip(dataset, expected, strict=True):
        same(example, messages, images)
    assert dataset.filter_by_length(encoder).lengths.tolist() == [
        len(encoder.encode(messages)[0]) for messages, _ in expected
    ]

    in_place = LlavaDataset(tmp_path / "d", caption_fields=fields, streaming=True)
    assert len(in_place) == len(expected)
    for example, (messages, images) in zip(in_place, expected, strict=True):
        same(example, messages, images)
    copied = [image["bytes"] for record in in_place.records for image in record["images"]]
    assert not any(copied)


def test_unpacked_and_packed_images_are_the_same(tmp_path):
    layouts.cc3m(tmp_path / "zip")
    layouts.cc3m(tmp_path / "folder", unpacked=True)
    for a, b in zip(LlavaDataset(tmp_path / "zip"), LlavaDataset(tmp_path / "folder"), strict=True):
        assert a["messages"] == b["messages"] and a["images"][0].tobytes() == b["images"][0].tobytes()


def test_images_that_come_later_are_found(tmp_path):
    """The Arrow copy of a folder is made anew when images were unpacked, moved or taken away."""
    expected = layouts.cc3m(tmp_path, unpacked=True)
    away = tmp_path.with_name("away")
    shutil.move(tmp_path / "images_dl", away)
    with pytest.raises(InputError, match=f"{len(expected)} of {len(expected)} records name images that are not"):
        LlavaDataset(tmp_path)
    shutil.move(away, tmp_path / "images")
    assert len(LlavaDataset(tmp_path)[3]["images"]) == 1
    os.rename(tmp_path / "images", tmp_path / "photos")
    assert len(LlavaDataset(tmp_path)[3]["images"]) == 1


def test_a_kill_in_the_middle_leaves_nothing_half_made(tmp_path):
    """A process is killed while it makes the Arrow copy; the next one makes it whole."""
    turns = layouts.llava_turns(layouts.chat("What?", "Nothing much, really."))
    layouts.write(tmp_path / "d" / "chat.json", [{"id": str(i), "conversations": turns} for i in range(40_000)])
    code = f"from train_llava.data import LlavaDataset; print('now', flush=True); LlavaDataset({str(tmp_path / 'd')!r})"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        while not list((tmp_path / "cache").rglob("*.incomplete*/*.arrow")):
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert not list((tmp_path / "cache").rglob("dataset_info.json"))
    code = f"from train_llava.data import LlavaDataset; print(len(LlavaDataset({str(tmp_path / 'd')!r})))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1] == "40000", done.stderr[-2000:]


def test_a_dataset_of_the_hub_is_read_there(tmp_path, monkeypatch):
    """The hub cannot be reached from tests; fsspec's memory stands in for it, with the addresses of the hub's files."""
    expected = layouts.cauldron(tmp_path / "d")
    memory = fsspec.filesystem("memory")
    where = "memory:///hub/someone/cauldron/vqav2"
    memory.pipe(f"{where}/train-0.parquet", next((tmp_path / "d").rglob("*.parquet")).read_bytes())
    memory.pipe(f"{where}/test-0.parquet", b"not read")
    monkeypatch.setattr(data_files, "HUB", "memory://hub/")
    dataset = LlavaDataset("texts=someone/cauldron:2.0", streaming=True)
    assert dataset.sources[0].files == [f"{where}/train-0.parquet"] and dataset.sources[0].weight == 2
    assert dataset.sources[0].passed_over == {f"{where}/test-0.parquet": "held out"}
    for row, (messages, images) in zip(dataset, expected, strict=True):
        same(row, messages, images)
    memory.rm("/hub", recursive=True)
    with pytest.raises(InputError, match="no parquet files"):
        LlavaDataset("someone/cauldron", streaming=True)


def test_row_groups_of_many_files_are_told_apart():
    """As many shards as the largest datasets of the hub have, and more."""
    place = ((1_000_000 * GROUPS + 99) << ROW_BITS) + 40
    records = Dataset.from_dict({"place": [place, None, 0]}, features=Features({"place": Value("int64")}))
    blocks, windows = blocks_of(records, source=2)
    assert blocks.tolist() == [2 * 10**12 + 1_000_000 * GROUPS + 99, -1, 2 * 10**12]
    assert windows[0] == 40 // WINDOW and windows[2] == 0


def test_weights_and_names(tmp_path):
    layouts.cc3m(tmp_path / "a:b")
    cases = [
        (f"{tmp_path}/a:b", 1, "llava", "chat.json"),
        (f"caption={tmp_path}/a:b:0.5", 0.5, "caption", "metadata.json"),
    ]
    for text, weight, format, file in cases:
        source = Source.find(text)
        assert (source.weight, source.format, [Path(file).name for file in source.files]) == (weight, format, [file])
    with pytest.raises(InputError, match="no format 'lava'"):
        Source.find(f"lava={tmp_path}/a:b")
    with pytest.raises(InputError, match="no such file or folder"):
        Source.find(tmp_path / "nowhere")
    with pytest.raises(InputError, match="--caption_fields reply"):
        caption_mapping(["reply=text"])


@pytest.mark.parametrize("path", ["/etc/passwd.jpg", "../other/a.jpg", "http://host/a.jpg", "a/../../b.jpg"])
def test_an_image_outside_its_folder_is_refused(tmp_path, path):
    turns = layouts.llava_turns(layouts.chat("<image>\nWhat?", "A."))
    layouts.write(tmp_path / "chat.json", [{"id": "1", "image": path, "conversations": turns}])
    with pytest.raises(InputError, match="must be a file inside the data folder"):
        LlavaDataset(tmp_path)


def test_a_neighbour_of_the_folder_is_outside(tmp_path):
    turns = layouts.llava_turns(layouts.chat("<image>\nWhat?", "A."))
    layouts.write(tmp_path / "data-private" / "a.jpg", layouts.image(1))
    layouts.write(tmp_path / "data" / "chat.json", [{"image": "../data-private/a.jpg", "conversations": turns}])
    with pytest.raises(InputError, match="must be a file inside the data folder"):
        LlavaDataset(tmp_path / "data")


def test_other_caption_fields_are_another_copy(tmp_path):
    layouts.write(tmp_path / "a.jpg", layouts.image(1))
    layouts.write(tmp_path / "d.jsonl", layouts.lines([{"image": "a.jpg", "short": "A cat.", "long": "A grey cat."}]))
    for field, text in (("short", "A cat."), ("long", "A grey cat."), ("short", "A cat.")):
        assert LlavaDataset(tmp_path, caption_fields=[f"answer={field}"])[0]["messages"][1]["content"] == text


def test_bad_records_are_skipped_on_request(tmp_path):
    expected = layouts.messages_jsonl(tmp_path)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "No answer?"}], "images": []}\n{"messages": [\n[]\n')
    with pytest.raises(
        InputError, match=r"3 of 15 records cannot be trained on\. The first: .*data\.jsonl, record '12'"
    ):
        LlavaDataset(tmp_path)
    assert len(LlavaDataset(tmp_path, on_bad_record="skip")) == len(expected) == 12


def test_roles_of_the_wild():
    fields = caption_mapping(None)
    for human, gpt in (("human", "gpt"), ("user", "assistant"), ("human", "chatgpt"), ("user", "bing")):
        turns = [{"from": "system", "value": "S"}, {"from": human, "value": "Q"}, {"from": gpt, "value": "A"}]
        messages, _ = parse({"conversations": turns}, "llava", fields)
        assert messages == layouts.chat("Q", "A", system="S")
    assert recognise([{"x": 1}, {"messages": []}], fields) == "messages"


def test_the_example_of_an_own_format_in_the_docs(tmp_path, monkeypatch):
    """docs/data.md says: one function and one line."""
    code = re.search(r"```python\n(def quiz.*?)\n\n\nFORMATS", (ROOT / "docs" / "data.md").read_text(), re.S)[1]
    names = dict(vars(formats))
    exec(code, names)
    monkeypatch.setitem(formats.FORMATS, "quiz", ("photo", names["quiz"]))
    layouts.write(tmp_path / "a.jpg", layouts.image(1))
    layouts.write(tmp_path / "quiz.jsonl", layouts.lines([{"photo": "a.jpg", "q": "What is it?", "a": "A cat."}]))
    same(LlavaDataset(tmp_path)[0], layouts.chat("<image>\nWhat is it?", "A cat."), [layouts.image(1)])


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_layout_trains(llava, tmp_path, name, monkeypatch, capsys):
    """With the command's own flags; under DeepSpeed four of them are mixed in test_train.py."""
    _, flags = layouts.make(name, tmp_path / "d")
    flags += ["--model_name_or_path", llava, "--output_dir", tmp_path / "out", "--max_steps", 2, "--use_cpu", "true"]
    flags += ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--save_strategy", "no", "--report_to", "none"]
    monkeypatch.setattr("sys.argv", ["train", *map(str, flags)])
    main()
    assert "step 2/2" in capsys.readouterr().out and (tmp_path / "out" / "adapter_model.safetensors").is_file()
