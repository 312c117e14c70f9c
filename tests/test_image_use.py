"""Does the model look at the image? A trained one does, an untrained one gives no sign of it, a blind one does not."""

import json
import statistics

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from transformers import LlavaForConditionalGeneration

from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.evaluate import main
from train_llava.model import image_use
from train_llava.model.image_use import Losses, figures, losses_by_image, sample, verdict
from train_llava.model.load import load
from train_llava.train import main as train

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
NAMES = ("loss_own_image", "loss_other_image", "loss_grey_image")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Sixteen records, two of a colour after the other, and one without an image before them."""
    folder, records = tmp_path_factory.mktemp("colours"), []
    turns = [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Good morning."}]
    records.append({"id": "text", "conversations": turns})
    for i in range(16):
        name = list(COLOURS)[i // 2 % 4]
        Image.new("RGB", (28, 28), COLOURS[name]).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": name}]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def trained(llava, colours):
    """It has learned the colours in some steps over all records."""
    model, processor = load(llava)
    batch = LlavaCollator(processor)(list(LlavaDataset(colours))[1:])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1, loss
    return model.eval(), processor


def losses(model, processor, dataset, batch_size=5):
    return [*losses_by_image(model, processor, dataset, sample(dataset), batch_size)]


def test_a_trained_model_looks(trained, colours):
    dataset = LlavaDataset(colours)
    found = losses(*trained, dataset)
    means = figures(found)
    assert means["image_records"] == 16 and means["loss_own_image"] < 0.1 < means["loss_other_image"]
    assert verdict(means).startswith("The model looks at the image: with its own, a token of the answer is ")
    model, processor = trained
    # the same by hand, with the plain model; the next record of another colour is one or two behind
    examples = list(dataset)[1:]
    shown = {"loss_own_image": [example["images"][0] for example in examples]}
    shown["loss_other_image"] = [examples[(i // 2 * 2 + 2) % 16]["images"][0] for i in range(16)]
    shown["loss_grey_image"] = [Image.new("RGB", (28, 28), (128, 128, 128))] * 16
    for name, images in shown.items():
        batch = [example | {"images": [image]} for example, image in zip(examples, images, strict=True)]
        with torch.no_grad():
            expected = model(**LlavaCollator(processor)(batch)).loss.item()
        assert means[name] == pytest.approx(expected, rel=1e-5), name


def test_an_untrained_model_shows_no_sign(llava, colours):
    found = losses(*load(llava), LlavaDataset(colours))
    assert not verdict(figures(found)).startswith("The model looks")


def test_a_blind_model_ignores_the_image(trained, colours, llava, tmp_path):
    """Its projector gives the same for every image; the command says so on the terminal and in its files."""
    model, processor = LlavaForConditionalGeneration.from_pretrained(llava).eval(), trained[1]
    model.load_state_dict(trained[0].state_dict())
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.zero_()
    means = figures(losses(model, processor, LlavaDataset(colours)))
    assert len({means[name] for name in NAMES}) == 1
    model.save_pretrained(tmp_path / "blind")
    processor.save_pretrained(tmp_path / "blind")
    flags = ("--model_name_or_path", tmp_path / "blind", "--data_path", colours, "--max_new_tokens", 2)
    done = call(main, *flags, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["image_records"] == 16 and len({written[name] for name in NAMES}) == 1
    said = "The model ignores the image: its loss is the same whatever it is shown."
    assert (
        said == written["image_use"] and said in done.stdout and said in (tmp_path / "out" / "report.html").read_text()
    )
    # a training leaves it blind: no weight of the projector has a gradient where all are zero, but the last bias
    flags = ("--model_name_or_path", tmp_path / "blind", "--data_path", colours, "--train_type", "projector")
    flags += ("--eval_data_path", colours, "--eval_generate", "true", "--max_steps", 1, "--use_cpu", "true")
    done = call(train, *flags, "--report_to", "none", "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert f"| does it look at the image? | {said} |" in (tmp_path / "run" / "README.md").read_text()


def test_the_sample_is_spread_and_bounded(colours, monkeypatch):
    dataset = LlavaDataset(colours)
    assert sample(dataset) == [*range(1, 17)]  # the first has no image
    monkeypatch.setattr(image_use, "MOST", 4)
    assert sample(dataset) == [1, 6, 11, 16]


def test_images_that_all_look_alike(colours, tmp_path, trained):
    """There is no other image to show: no figures, and no sentence about the model."""
    records = json.loads((colours / "chat.json").read_text())[1:3]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    for record in records:
        Image.new("RGB", (28, 28), "red").save(tmp_path / record["image"])
    assert losses(*trained, LlavaDataset(tmp_path)) == []


def test_verdicts():
    rng = np.random.default_rng(0)
    noise = [Losses(10, 10 + gain, 10 + gain, 10) for gain in rng.normal(0, 5, 200)]
    clear = [Losses(10, 20 + gain, 15, 10) for gain in rng.normal(0, 5, 200)]
    said = {name: verdict(figures(some)) for name, some in {"noise": noise, "clear": clear, "few": clear[:9]}.items()}
    assert said["noise"].startswith("No sign that") and "looks at the image: " in said["clear"]
    assert f" {np.exp(figures(clear)['loss_other_image'] - 1):.3g} times" in said["clear"]
    assert said["few"].startswith("9 records with another image are too few")
    gains = [each.other - 10 for each in clear]
    assert figures(clear)["image_gain"] == pytest.approx(statistics.mean(gains))
    assert figures(clear)["image_gain_error"] == pytest.approx(statistics.stdev(gains) / len(gains) ** 0.5)
    # 99.9% of the loss, as rounding in 16 bits may change it
    assert verdict(figures([Losses(10, 10.005, 9.995, 10)] * 20)).startswith("The model ignores the image")
    better = figures([Losses(10, 9, 9, 10)] * 20)  # another image serves better: it does not look
    assert verdict(better).startswith("No sign") and figures(clear[:1])["image_gain_error"] == 0
