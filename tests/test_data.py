"""Records of the CC3M-595K layout, what is refused, and batches."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from train_llava.cli import InputError
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model.load import load_processor
from train_llava.processing.images import tokens_per_image


@pytest.fixture(scope="module")
def processor(llava):
    return AutoProcessor.from_pretrained(llava)


def test_records_are_read_whole(data):
    records = json.loads((data / "chat.json").read_text())
    dataset = LlavaDataset(data)
    assert len(dataset) == len(records) == 64
    for record, example in zip(records, dataset, strict=True):
        assert example["id"] == record["id"]
        assert [m["content"] for m in example["messages"]] == [turn["value"] for turn in record["conversations"]]
        assert [m["role"] for m in example["messages"]] == ["user", "assistant"]
        assert example["images"][0].size == (56, 56) and example["images"][0].mode == "RGB"


@pytest.mark.parametrize("name", ["images_dl", "."])
def test_other_places_for_images(data, tmp_path, name):
    shutil.copy(data / "chat.json", tmp_path)
    shutil.copytree(data / "images", tmp_path / name, dirs_exist_ok=True)
    assert len(LlavaDataset(tmp_path)) == len(LlavaDataset(tmp_path / "chat.json")) == 64


def refused(tmp_path, *records):
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    (tmp_path / "chat.json").write_text(json.dumps(records))
    with pytest.raises(InputError) as error:
        LlavaDataset(tmp_path)
    return str(error.value)


def turns(question="<image>\nWhat?", answer="A cat."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_a_missing_image_is_named(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    records = json.loads((data / "chat.json").read_text())
    lost = tmp_path / "data" / "images" / records[40]["image"]
    lost.unlink()
    with pytest.raises(InputError) as error:
        LlavaDataset(tmp_path / "data")
    assert records[40]["id"] in str(error.value) and str(lost) in str(error.value)


def test_bad_records_are_refused_by_name(tmp_path):
    good = {"id": "good", "image": "a.jpg", "conversations": turns()}
    cases = {
        "1 <image> in the text, 0 images": {"conversations": turns()},
        "2 <image> in the text, 1 images": {"image": "a.jpg", "conversations": turns("<image><image>")},
        "no answer to learn from": {"image": "a.jpg", "conversations": turns(answer="  ")},
        "a turn from 'robot'": {"image": "a.jpg", "conversations": [{"from": "robot", "value": "<image>"}]},
        "not a record of the format": {"image": "a.jpg"},
        "must be a file inside": {"image": "../a.jpg", "conversations": turns()},
    }
    for reason, record in cases.items():
        message = refused(tmp_path, good, {"id": "bad", **record})
        assert reason in message and "'bad' (number 1)" in message and str(tmp_path / "chat.json") in message


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="no file with records"):
        LlavaDataset(tmp_path)
    (tmp_path / "chat.json").write_text("[{")
    with pytest.raises(InputError, match="not valid JSON"):
        LlavaDataset(tmp_path)


def test_an_unreadable_image_is_named_when_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "7", "image": "a.jpg", "conversations": turns()}]))
    with pytest.raises(InputError, match=r"record '7': .*a\.jpg: not a readable image"):
        LlavaDataset(tmp_path)[0]


def test_a_changed_file_is_read_anew(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    assert len(LlavaDataset(tmp_path / "data")) == 64
    file = tmp_path / "data" / "chat.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:10]))
    assert len(LlavaDataset(tmp_path / "data")) == 10
    file.write_text(file.read_text().replace("at the top", "at the end"))  # as many bytes as before
    assert "at the end" in str(LlavaDataset(tmp_path / "data").records["messages"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches(data, processor, side):
    """FastImageProcessor and ids equal the processor's own; masks come from lengths."""
    processor.tokenizer.padding_side = side
    examples = [LlavaDataset(data)[i] for i in range(8)]
    batch = LlavaCollator(processor)(examples)
    text = [processor.apply_chat_template(example["messages"]) for example in examples]
    images = [example["images"] for example in examples]
    reference = processor(images=images, text=text, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[name], reference[name]), name
    assert batch["labels"].shape == batch["input_ids"].shape
    for example, ids, labels in zip(examples, batch["input_ids"], batch["labels"], strict=True):
        answer = processor.tokenizer.decode(ids[labels != -100])
        assert answer == example["messages"][1]["content"] + "<|im_end|>"
        assert torch.equal(ids[labels != -100], labels[labels != -100])


def test_pad_equal_to_end_of_turn(data, processor):
    examples = [LlavaDataset(data)[i] for i in range(8)]
    expected = LlavaCollator(processor)(examples)
    processor.tokenizer.pad_token, before = "<|im_end|>", processor.tokenizer.pad_token
    batch = LlavaCollator(processor)(examples)
    processor.tokenizer.pad_token = before
    assert torch.equal(batch["labels"], expected["labels"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])


def test_image_tokens(processor):
    assert tokens_per_image(processor) == 4  # (28 / 14)^2; CLS is counted by the processor and dropped by the model


def test_an_image_of_what_is_cut_away_is_left_out(data, processor):
    """One in the first question, one in the second; the length ends behind the first answer."""
    first, second = (LlavaDataset(data)[i] for i in range(2))
    both = {name: first[name] + second[name] for name in ("messages", "images")}
    length = len(LlavaCollator(processor).encoder.encode(first["messages"])[0])
    cut, alone = LlavaCollator(processor, max_length=length)([both]), LlavaCollator(processor)([first])
    assert cut["pixel_values"].shape[0] == 1 and torch.equal(cut["pixel_values"], alone["pixel_values"])
    assert LlavaCollator(processor)([both])["pixel_values"].shape[0] == 2


def test_what_is_too_long_is_left_out_of_another_dataset(llava, data):
    """The first dataset stays whole; the summary of the second says how many are gone."""
    dataset, processor = LlavaDataset(data), load_processor(llava)
    lengths = dataset.filter_by_length(LlavaCollator(processor).encoder).lengths
    limit = int(np.median(lengths))
    encoder = LlavaCollator(processor, max_length=limit).encoder
    filtered = dataset.filter_by_length(encoder)
    fits = [bool(encoder.encode(dataset[i]["messages"])[0]) for i in range(len(dataset))]
    assert 0 < sum(fits) < len(dataset) == 64 and not dataset.lengths.any() and dataset.sizes == [64]
    assert [each["id"] for each in filtered] == [dataset[i]["id"] for i, fit in enumerate(fits) if fit]
    assert len(filtered) == sum(filtered.sizes) == len(filtered.lengths) and filtered.lengths.min() > 0
    assert f"{64 - sum(fits)} too long and left out" in filtered.summary()
    assert "left out" not in dataset.summary()
