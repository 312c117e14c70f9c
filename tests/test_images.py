"""Pictures of every kind against Pillow and the image processors of transformers, and broken ones."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from train_llava.command import InputError
from train_llava.images import Pixels, open_image

SIZES = [(50, 80), (333, 500), (224, 224), (57, 56), (400, 31), (336, 336), (30, 30)]


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng([seed, height, width]).integers(0, 256, shape, dtype=np.uint8)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 56, "width": 48}),
        CLIPImageProcessorPil(do_center_crop=False, size={"height": 90, "width": 70}, resample=2),
        CLIPImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}, do_center_crop=False, do_pad=True),
        CLIPImageProcessorPil(do_normalize=False, image_mean=[0.1, 0.2, 0.3]),
        SiglipImageProcessorPil(size={"height": 384, "width": 384}),
    ],
)
def test_pixels_equal_the_processor_bit_for_bit(processor):
    images = [Image.fromarray(noise(height, width)) for height, width in SIZES]
    if processor.do_pad or processor.size.longest_edge:
        images = images[2:3]  # keeps the shape, so others do not stack
    pixels = Pixels(processor)
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert pixels(images).dtype == torch.uint8
    assert torch.equal(pixels.normalise(pixels(images)), expected)


def test_torchvision_settings_give_pillow_pixels():
    """The processor that transformers makes where torchvision is installed is replaced by its Pillow twin."""
    assert type(Pixels(CLIPImageProcessorPil()).processor) is CLIPImageProcessorPil


def test_rgb_is_left_as_it_is():
    image = Image.fromarray(noise(20, 30))
    assert np.array_equal(open_image(saved(image)), np.asarray(image))
    assert np.array_equal(open_image(saved(image, "JPEG")), Image.open(io.BytesIO(saved(image, "JPEG")["bytes"])))


def test_grey_palette_and_16_bits():
    grey = noise(20, 30, 1)
    assert np.array_equal(np.asarray(open_image(saved(Image.fromarray(grey))))[..., 1], grey)
    palette = Image.fromarray(noise(20, 30)).quantize(16)
    assert np.array_equal(open_image(saved(palette)), palette.convert("RGB"))
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(open_image(saved(Image.fromarray(deep), kind)))[..., 0], deep >> 8)


def test_transparency_is_on_white():
    colours = noise(20, 30, 4)
    colours[0, 0], colours[0, 1] = (10, 20, 30, 0), (10, 20, 30, 255)
    pixels = np.asarray(open_image(saved(Image.fromarray(colours, "RGBA"))))
    assert tuple(pixels[0, 0]) == (255, 255, 255) and tuple(pixels[0, 1]) == (10, 20, 30)
    share = colours[..., 3:] / 255
    assert np.abs(pixels - (colours[..., :3] * share + 255 * (1 - share))).max() <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert open_image(saved(palette, "GIF", transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = open_image(saved(cmyk, "JPEG")).getpixel((0, 0))
    assert red[0] > 240 and max(red[1:]) < 15


def test_exif_turns_upright():
    picture = Image.fromarray(noise(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown rotated by 90 degrees
    upright = open_image(saved(picture, "PNG", exif=exif))
    assert np.array_equal(upright, np.rot90(np.asarray(picture), -1))


def test_animation_shows_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    moving = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(moving).getpixel((0, 0)) == (255, 0, 0)


def test_a_wrong_extension_does_not_matter(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert open_image(tmp_path / "a.jpg").size == (8, 8)


def png(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [10_000, 20_000])
def test_bombs_are_refused(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png(size, size))
    with pytest.raises(InputError, match=r"bomb\.png: more than 89,478,485 pixels"):
        open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("data", [b"", b"not a picture", saved(Image.new("RGB", (99, 99)), "JPEG")["bytes"][:-300]])
def test_broken_files_are_named(tmp_path, data):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.jpg: not a readable picture"):
        open_image(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"b\.jpg: no such picture file"):
        open_image(tmp_path / "b.jpg")


def test_a_thousand_mutated_files():
    """Whatever is done to the bytes of a picture: a picture comes out, or an InputError."""
    rng = np.random.default_rng(0)
    kinds = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA", "JPEG2000"]
    originals = [saved(Image.fromarray(noise(24, 32)), kind)["bytes"] for kind in kinds]
    read = 0
    for i in range(1000):
        data = bytearray(originals[i % len(originals)])
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data) if i % 3 else min(64, len(data)))] = rng.integers(256)
        if i % 5 == 0:
            del data[rng.integers(len(data)) :]
        try:
            image = open_image({"bytes": bytes(data), "path": None})
        except InputError:
            continue
        assert image.mode == "RGB" and min(image.size) > 0
        read += 1
    assert 100 < read < 900
