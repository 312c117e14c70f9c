"""Images of every kind against Pillow and the image processors of transformers, and broken ones."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from train_llava.cli import InputError
from train_llava.ingest.image_kinds import KINDS
from train_llava.processing.images import FastImageProcessor, PixelBytes, open_image
from train_llava.show_batch import visible

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
    pixels = FastImageProcessor(processor)
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert pixels(images).data.dtype == torch.uint8
    assert torch.equal(pixels(images).normalise(), expected)


IMAGE_PROCESSORS = [
    LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    LlavaImageProcessorPil(do_pad=False),
    transformers.ConvNextImageProcessorPil(),  # a size that depends on its crop
    transformers.MobileViTImageProcessorPil(),  # blue first
    transformers.JanusImageProcessorPil(),  # pads with its mean
    transformers.DonutImageProcessorPil(size={"height": 64, "width": 48}),  # turns and thins
    transformers.Owlv2ImageProcessorPil(size={"height": 32, "width": 32}),  # blurs before it resizes
    transformers.SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}),
]


@pytest.mark.parametrize("processor", IMAGE_PROCESSORS, ids=lambda each: type(each).__name__)
def test_any_processor_whose_images_have_one_size(processor):
    """By the table where it is proven to be equal, else by the processor itself."""
    images = [Image.fromarray(noise(height, width)) for height, width in [*SIZES, (300, 31)]]
    pixels = FastImageProcessor(processor)
    expected = torch.cat([processor([image], return_tensors="pt")["pixel_values"] for image in images]).float()
    made = pixels(images)
    assert torch.equal(made.normalise() if isinstance(made, PixelBytes) else made, expected)


def test_a_page_shows_images_that_only_the_processor_can_make():
    made = FastImageProcessor(transformers.Owlv2ImageProcessorPil(size={"height": 32, "width": 32}))(
        [Image.new("RGB", (40, 30))]
    )
    assert made.dtype == torch.float32
    (shown,) = visible(made)
    assert shown.dtype == np.uint8 and shown.shape == (32, 32, 3)


def test_torchvision_settings_give_pillow_pixels():
    """What transformers takes where torchvision is installed has the same settings under another class, and resizes to
    other pixels. This stand-in is as far off, and named as that class is."""

    class Torchvision(CLIPImageProcessorPil):
        def preprocess(self, *args, **kwargs):
            made = super().preprocess(*args, **kwargs)
            made["pixel_values"] = made["pixel_values"] + 0.01
            return made

    Torchvision.__name__ = Torchvision.__qualname__ = "CLIPImageProcessor"
    settings = {"size": {"shortest_edge": 40}, "crop_size": {"height": 56, "width": 48}}
    image, pillow = Image.fromarray(noise(50, 60)), CLIPImageProcessorPil(**settings)
    pixels = FastImageProcessor(Torchvision(**settings))([image]).normalise()
    assert torch.equal(pixels, pillow([image], return_tensors="pt")["pixel_values"])
    assert not torch.equal(pixels, Torchvision(**settings)([image], return_tensors="pt")["pixel_values"])


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
    photo = Image.fromarray(noise(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown rotated by 90 degrees
    upright = open_image(saved(photo, "PNG", exif=exif))
    assert np.array_equal(upright, np.rot90(np.asarray(photo), -1))


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


@pytest.mark.parametrize("data", [b"", b"not an image", saved(Image.new("RGB", (99, 99)), "JPEG")["bytes"][:-300]])
def test_broken_files_are_named(tmp_path, data):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.jpg: not a readable image"):
        open_image(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"b\.jpg: no such image file"):
        open_image(tmp_path / "b.jpg")


def test_a_thousand_mutated_files():
    """Whatever is done to the bytes of an image: an image comes out, or an InputError."""
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


PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) print quit\n%%EOF\n"
OTHER_KINDS = {
    "EPS": PROGRAM,
    "an empty file": b"",
    "a PDF": b"%PDF-1.7\n",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "a drawing in XML": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "none of": b"hello",
}


@pytest.mark.parametrize("what", OTHER_KINDS)
def test_what_is_no_image_is_named_and_runs_nothing(tmp_path, monkeypatch, what):
    """Ghostscript, which Pillow calls for an EPS, would be found first in this folder."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.jpg").write_bytes(OTHER_KINDS[what])
    with pytest.raises(InputError, match=rf"a\.jpg: not a readable image \({what}"):
        open_image(tmp_path / "a.jpg")
    assert not (tmp_path / "ran").exists()


def test_heic_names_the_package_and_is_read_with_it(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.fromarray(noise(64, 96))).save(tmp_path / "phone.heic")
    assert open_image(tmp_path / "phone.heic").size == (96, 64)
    without = [kind for kind in KINDS if kind != "HEIF"]
    with pytest.raises(InputError, match="pip install pillow-heif"):
        open_image(tmp_path / "phone.heic", without)


def test_values_beyond_a_byte_are_scaled_to_what_they_fill(tmp_path):
    grey = noise(20, 30, 1)
    grey[0, 0] = 255
    as_they_are = grey, grey.astype(np.int32), grey.astype(np.uint16), grey.astype(np.float32), grey / np.float32(255)
    deep = [(grey.astype(np.uint16) << 4) + 15, (grey.astype(np.uint16) << 8) + 255, (grey.astype(np.int32) << 8) + 255]
    for i, values in enumerate([*as_they_are, *deep]):
        Image.fromarray(values).save(tmp_path / f"{i}.tiff")
        assert np.array_equal(np.asarray(open_image(tmp_path / f"{i}.tiff"))[..., 0], grey), i
    Image.fromarray((grey.astype(np.uint16) << 4) + 15).save(tmp_path / "12_bits.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "12_bits.png"))[..., 0], grey)


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 300.0], [np.nan, 1.0], [np.inf, 0.0], [-5, 3], [0, 70_000]])
def test_values_of_another_range_are_refused(tmp_path, values):
    kind = np.int32 if all(isinstance(value, int) for value in values) else np.float32
    Image.fromarray(np.array([values] * 4, dtype=kind)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=r"a\.tiff: values from .* are expected"):
        open_image(tmp_path / "a.tiff")


def test_the_eight_orientations():
    """As Pillow's own transposition has them."""
    photo = Image.fromarray(noise(20, 30))
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "WEBP", "TIFF"):
            options = {"lossless": True} if kind == "WEBP" else {}
            written = saved(photo, kind, exif=exif, **options)
            expected = ImageOps.exif_transpose(Image.open(io.BytesIO(written["bytes"])))
            assert np.array_equal(open_image(written), expected), (orientation, kind)


BROKEN_BLOCKS = [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nothing", b"MM\0*\0\0\0\x08\xff\xff", b"\xff" * 9]


@pytest.mark.parametrize("block", BROKEN_BLOCKS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_broken_exif_block_costs_no_image(block, kind):
    photo = Image.fromarray(noise(20, 30))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert open_image(saved(photo, kind, exif=block, **options)).size == (30, 20)


def test_xmp_that_is_no_text_costs_no_image():
    photo = Image.fromarray(noise(20, 30))
    assert open_image(saved(photo, "WEBP", xmp=b"\xff\xfe\xfd tiff:Orientation", lossless=True)).size == (30, 20)


def test_the_reason_of_an_image_inside_a_record_is_whole():
    torn = {"bytes": saved(Image.fromarray(noise(99, 99)), "JPEG")["bytes"][:-3000], "path": ""}
    with pytest.raises(OSError) as plain:
        Image.open(io.BytesIO(torn["bytes"])).load()
    with pytest.raises(InputError) as error:
        open_image(torn)
    assert str(error.value) == f"image inside the record: not a readable image ({plain.value})."
    with pytest.raises(InputError) as long:
        open_image({"bytes": None, "path": "x" * 100_000})
    assert len(str(long.value)) < 1000
