"""Whole images: padded to a square bit for bit as transformers' own LLaVA processor does it, from build to merge."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call
from folders import changed
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaProcessor,
    SiglipImageProcessorPil,
)

from benchmarks.learning.rim import draw_wide
from train_llava import build_model, merge_lora, train
from train_llava.cli import InputError
from train_llava.data import LlavaCollator
from train_llava.model.backbones import pad_to_square
from train_llava.model.load import load, load_processor
from train_llava.processing import padding
from train_llava.processing.images import FastImageProcessor, noise, open_image
from train_llava.processing.padding import pad_and_resize

CLIP = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
SIZES = [(30, 90), (90, 30), (56, 56), (77, 77), (1, 1), (1, 2), (3, 1), (31, 400), (400, 31), (333, 500), (2, 399)]
PUBLISHED = {
    "CLIP": CLIPImageProcessorPil(**CLIP),
    "SigLIP": SiglipImageProcessorPil(size={"height": 40, "width": 40}),
    "another background": CLIPImageProcessorPil(**CLIP, image_mean=[0.0, 0.999, 1.0], resample=2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_pixels_equal_the_plain_processor(name, tmp_path):
    """Read back from the files, by the fast path."""
    pad_to_square(PUBLISHED[name], tmp_path).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == (
        "LlavaImageProcessor"
    )
    plain = LlavaImageProcessorPil.from_pretrained(tmp_path)
    pixels = FastImageProcessor(plain)
    assert pixels.fast_path == pixels._resized
    for size in SIZES:
        expected = plain(noise(*size), return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels([noise(*size)]).normalise(), expected), size


def test_grey_and_transparent_images(tmp_path):
    """As their files are opened, on white; what is grey, plain transformers may be given as it is."""
    plain = pad_to_square(PUBLISHED["CLIP"], tmp_path)
    pixels = FastImageProcessor(plain)
    values = np.asarray(noise(30, 90))
    alpha = np.dstack([values, values[..., 0]])
    for i, array in enumerate((values[..., 0], alpha, np.dstack([values[..., 0], values[..., 1]]))):
        Image.fromarray(array).save(tmp_path / f"{i}.png")
        opened = open_image(tmp_path / f"{i}.png")
        expected = plain(opened, return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels([opened]).normalise(), expected)
    grey = Image.open(tmp_path / "0.png")
    assert grey.mode == "L"
    siglip = pad_to_square(SiglipImageProcessorPil(size={"height": 40, "width": 40}), tmp_path)
    expected = siglip(grey, return_tensors="pt")["pixel_values"]
    assert torch.equal(FastImageProcessor(siglip)([open_image(tmp_path / "0.png")]).normalise(), expected)


@pytest.mark.parametrize("strip", [1, 100, 1 << 22])
def test_strips_give_the_pixels_of_the_square(monkeypatch, strip):
    """Pillow's own resize of the whole square, for odd differences, larger and smaller sizes, and both filters."""
    monkeypatch.setattr(padding, "STRIP", strip)
    rng = np.random.default_rng(0)
    for size in [(1, 2), (2, 1), (9, 40), (40, 9), (61, 90), (90, 61)]:
        for target in ((8, 8), (56, 56), (33, 47)):
            image, colour = noise(*size), tuple(rng.integers(0, 256, 3).tolist())
            square = Image.new("RGB", (max(size), max(size)), colour)
            square.paste(image, ((max(size) - size[1]) // 2, (max(size) - size[0]) // 2))
            for resample in (Image.BICUBIC, Image.BILINEAR):
                made = pad_and_resize(image, target, resample, colour)
                assert np.array_equal(made, square.resize(target, resample)), (size, target, resample)


def test_every_background_stays_what_it_is():
    """Rows of background alone are not resized, since that would not change them."""
    for side in (57, 1000, 20_000):
        column = Image.fromarray(np.arange(256, dtype=np.uint8)[:, None].repeat(side, 1))
        for resample in (Image.BICUBIC, Image.BILINEAR, Image.LANCZOS):
            assert np.array_equal(column.resize((56, 256), resample), column.crop((0, 0, 56, 256)))


@pytest.mark.parametrize("size", [(12_000, 60), (60, 12_000)])
def test_a_long_image_takes_little_memory(monkeypatch, size):
    """Its square has 144 million pixels."""
    areas, plain = [], Image.new

    def new(mode, size, *args):
        areas.append(size[0] * size[1])
        return plain(mode, size, *args)

    monkeypatch.setattr(padding, "Image", SimpleNamespace(new=new))
    assert pad_and_resize(plain("RGB", size, "red"), (56, 56), Image.BICUBIC, (1, 2, 3)).size == (56, 56)
    assert max(areas) <= padding.STRIP


@pytest.mark.parametrize("pad", [False, True])
def test_torchvisions_form_is_nearly_equal(pad):
    """What plain transformers takes where torchvision is installed: docs/models.md says how far apart they are."""
    pytest.importorskip("torchvision", reason="pip install torchvision")
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    images = [photo.resize(size) for photo in photos for size in ((640, 427), (200, 427), (100, 75), (1600, 1000))]
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    theirs, ours = (form(**size, do_pad=pad) for form in (LlavaImageProcessor, LlavaImageProcessorPil))
    pixels = (form(images, return_tensors="pt").pixel_values for form in (theirs, ours))
    levels = (next(pixels) - next(pixels)).abs() * 255 * torch.tensor(ours.image_std)[:, None, None]
    assert levels.max() < 2.01 and levels.mean() < 0.005


def test_what_is_at_the_rim():
    """Cropped, one colour is left of a wide image with things at its ends; padded, the things are seen."""
    images = [draw_wide(np.random.default_rng(seed), "train")[0] for seed in range(30)]
    cropped, padded = PUBLISHED["CLIP"], pad_to_square(PUBLISHED["CLIP"], "x")
    for processor, rows, flat in ((cropped, slice(None), True), (padded, slice(14, 42), False)):  # padding above, below
        pixels = FastImageProcessor(processor)(images).normalise()[:, :, rows].flatten(2)
        assert set((pixels.amax(-1) == pixels.amin(-1)).all(-1).tolist()) == {flat}


def test_how_images_become_squares():
    assert [FastImageProcessor(each).framing() for each in PUBLISHED.values()] == ["crop", "squeeze", "crop"]
    assert {FastImageProcessor(pad_to_square(each, "x")).framing() for each in PUBLISHED.values()} == {"pad"}
    assert FastImageProcessor(LlavaImageProcessorPil(**CLIP, do_pad=False)).framing() == "crop"


@pytest.mark.parametrize(
    "published",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}),  # the rim of a square
        ConvNextImageProcessorPil(size={"shortest_edge": 56}),
    ],
    ids=["a larger size", "another kind"],
)
def test_what_cannot_be_padded_is_refused(published):
    with pytest.raises(
        InputError, match=r"clip: --image_aspect_ratio pad does not go with its preprocessor_config\.json"
    ):
        pad_to_square(published, "clip")


OTHERS = {
    "padded": {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
    "of transformers 4": {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True},
    "not padded": {"image_processor_type": "LlavaImageProcessor", "do_pad": False},
    "padded behind the crop": {"image_processor_type": "CLIPImageProcessor", "do_pad": True},  # so not at all
}


@pytest.mark.parametrize("kind", OTHERS)
def test_folders_of_others(llava, tmp_path, kind):
    """An image processor that somebody else has set, in both forms of a folder, against plain transformers."""
    shutil.copytree(llava, tmp_path / "new")
    content = json.loads((llava / "processor_config.json").read_text())
    settings = content.pop("image_processor") | OTHERS[kind]
    changed(tmp_path / "new" / "processor_config.json", image_processor=settings)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    (tmp_path / "old" / "processor_config.json").write_text(json.dumps(content))
    (tmp_path / "old" / "preprocessor_config.json").write_text(json.dumps(settings))
    for folder in (tmp_path / "new", tmp_path / "old"):
        plain = LlavaProcessor.from_pretrained(folder).image_processor
        ours = FastImageProcessor(load_processor(folder).image_processor)
        assert ours.framing() == ("pad" if "Llava" in str(settings) and settings["do_pad"] else "crop")
        for size in SIZES:
            expected = plain(noise(*size), return_tensors="pt")["pixel_values"]
            assert torch.equal(ours([noise(*size)]).normalise(), expected), size


@pytest.fixture(scope="module")
def padded(old_clip, old_qwen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("padded") / "llava"
    where = ("--vision_model_name_or_path", old_clip, "--language_model_name_or_path", old_qwen)
    options = ("--output_dir", folder, "--dtype", "float32", "--image_aspect_ratio", "pad")
    done = call(build_model.main, *where, *options)
    assert done.returncode == 0, done.stderr
    assert "\nimages that are not square: whole, padded to a square\n" in done.stdout
    return folder


def seen(folder):
    """A wide image as plain transformers shows it to the model in a folder."""
    return AutoProcessor.from_pretrained(folder).image_processor(noise(30, 90), return_tensors="pt")["pixel_values"]


def test_a_training_and_a_merge_keep_it(llava, padded, data, tmp_path):
    """In the checkpoint, the adapter and the merged folder, for plain transformers and for ours."""
    flags = (
        "--train_type",
        "use_lora",
        "--max_steps",
        1,
        "--use_cpu",
        "true",
        "--report_to",
        "none",
        "--save_steps",
        1,
    )
    where = ("--data_path", data, "--output_dir", tmp_path / "run", "--image_aspect_ratio", "pad")
    done = call(train.main, "--model_name_or_path", llava, *where, *flags)
    assert done.returncode == 2 and f"{llava} sees their middle square alone. Build it with" in done.stderr
    assert not (tmp_path / "run" / "checkpoint-1").exists()
    done = call(train.main, "--model_name_or_path", padded, *where, *flags)
    assert done.returncode == 0, done.stderr
    assert "\nimages that are not square: whole, padded to a square\n" in done.stdout
    done = call(merge_lora.main, "--adapter_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    expected = seen(padded)
    assert not torch.equal(seen(llava), expected)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1", tmp_path / "merged"):
        assert torch.equal(seen(folder), expected)
        ours = LlavaCollator(load(folder)[1]).pixels([noise(30, 90)]).normalise()
        assert torch.equal(ours, expected)


def test_a_run_is_not_resumed_with_other_pixels(padded, data, tmp_path):
    """Its base, of the same name and weights, built anew without padding."""
    base = shutil.copytree(padded, tmp_path / "base")
    where = ("--model_name_or_path", base, "--data_path", data, "--output_dir", tmp_path / "run", "--use_cpu", "true")
    flags = ("--train_type", "projector", "--save_strategy", "steps", "--save_steps", 1, "--report_to", "none")
    done = call(train.main, *where, *flags, "--max_steps", 1)
    assert done.returncode == 0, done.stderr
    image_processor = json.loads((base / "processor_config.json").read_text())["image_processor"]
    changed(base / "processor_config.json", image_processor=image_processor | {"do_pad": False})
    again = ("--max_steps", 2, "--resume_from_checkpoint", "true")
    done = call(train.main, *where, *flags, *again)
    assert done.returncode == 2 and "was trained with another image processor" in done.stderr
    run = json.loads((tmp_path / "run" / "checkpoint-1" / "run.json").read_text())
    del run["data"]["images"]  # as an earlier version wrote it
    (tmp_path / "run" / "checkpoint-1" / "run.json").write_text(json.dumps(run))
    assert call(train.main, *where, *flags, *again).returncode == 0
