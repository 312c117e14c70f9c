"""Asking: batches, placeholders, ends and errors."""

import pytest
import torch
from conftest import run_module
from PIL import Image

from train_llava.command import InputError
from train_llava.data import LlavaDataset
from train_llava.images import open_image
from train_llava.infer import ask, generate
from train_llava.load import load


def test_a_batch_answers_as_one_at_a_time(llava, data):
    model, processor = load(llava)
    dataset = LlavaDataset(data)
    examples = [ask("What?" * (i + 1), dataset[i]["images"]) for i in range(5)]  # of different lengths
    together = generate(model, processor, examples, max_new_tokens=12)
    assert together == [generate(model, processor, [example], max_new_tokens=12)[0] for example in examples]


def test_generation_stops_at_the_end_of_turn(llava):
    model, processor = load(llava)
    head = torch.nn.Linear(48, 448)  # can say nothing but the end of turn
    torch.nn.init.zeros_(head.weight)
    head.bias.data = 100.0 * torch.eye(448)[420]
    model.lm_head = head
    prompt = processor(images=Image.new("RGB", (9, 9)), text="<image>", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=9)
    assert ids[0, prompt.input_ids.shape[1] :].tolist() == [420]
    assert generate(model, processor, [ask("What?", [Image.new("RGB", (9, 9))])]) == [""]


def test_placeholders():
    picture = Image.new("RGB", (9, 9))
    assert ask("What?", [picture, picture])["messages"][0]["content"] == "<image>\n<image>\nWhat?"
    assert ask("What is <image>?", [picture])["messages"][0]["content"] == "What is <image>?"
    with pytest.raises(InputError, match="has 2 <image>, but the number of pictures given is 1"):
        ask("<image> <image>", [picture])


def test_bad_folders_and_pictures(llava, old_qwen, tmp_path):
    with pytest.raises(InputError, match="not a LLaVA"):
        load(old_qwen)
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        load(llava, tmp_path)
    with pytest.raises(InputError, match="no such picture"):
        open_image(tmp_path / "none.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = run_module("train_llava.infer", "--model_name_or_path", llava, "--image", tmp_path / "bad.png")
    assert done.returncode == 2 and "bad.png: not a readable picture" in done.stderr


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    picture = Image.new(mode, (20, 10))
    picture.save(tmp_path / ("p.tif" if mode == "CMYK" else "p.png"))
    opened = open_image(next(tmp_path.glob("p.*")))
    assert (opened.mode, opened.size) == ("RGB", (20, 10))
