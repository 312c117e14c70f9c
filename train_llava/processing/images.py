"""Encoded image (see ingest/image_files.py) -> RGB image -> the numbers that the vision tower reads."""

import hashlib
import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaProcessor
from transformers.image_processing_utils import BaseImageProcessor

# transformers 5.17 hands the same class out at its top only where torchvision is installed
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from train_llava.cli import InputError
from train_llava.ingest.image_files import ImageRef, beginning_of, check_file, image_name, in_a_file, read_bytes
from train_llava.ingest.image_kinds import KINDS, describe_other_kind
from train_llava.ingest.limits import MOST_PIXELS, THINNEST
from train_llava.processing.padding import pad_and_resize

FRAMINGS = {  # what becomes of images that are not square
    "crop": "their middle square alone",
    "squeeze": "squeezed to a square",
    "pad": "whole, padded to a square",
}
ORIENTATION = 0x0112  # EXIF's tag, and what brings its values above 1 upright
TURNS = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE"), 2))
TURNS |= dict(enumerate(("ROTATE_270", "TRANSVERSE", "ROTATE_90"), 6))


def open_image(ref: ImageRef, kinds: Sequence[str] = KINDS, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Opens an image as RGB: first frame, turned upright (EXIF), on white where it is transparent, 8 bits per channel.

    Raises:
        InputError: missing, not an image of one of these kinds that Pillow can read to its end, or beyond a bound of
            limits.py in pixels, bytes or thinness.
    """
    ref = ref if isinstance(ref, dict) else {"path": str(ref), "bytes": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about odd EXIF blocks and the like
            source = ref["path"] if in_a_file(ref) else io.BytesIO(read_bytes(ref))
            if isinstance(source, str):
                check_file(source)
            try:
                image = Image.open(source, formats=kinds)
            except Image.UnidentifiedImageError as error:
                what = describe_other_kind(beginning_of(ref), kinds)
                raise InputError(f"not a readable image ({what})") from error
            with image:
                check_image_size(image, most_pixels)
                return to_rgb(image)
    except FileNotFoundError as error:
        raise InputError(f"{image_name(ref)}: no such image file.") from error
    except InputError as error:
        raise InputError(f"{image_name(ref)}: {error}.") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{image_name(ref)}: more than {most_pixels:,} pixels.") from error
    except Exception as error:  # decoders raise many kinds on broken bytes: OSError, SyntaxError, struct.error, ...
        reason = str(error).split(" <_io")[0] or type(error).__name__
        reason = reason.replace(ref["path"], "it") if ref["path"] else reason
        raise InputError(f"{image_name(ref)}: not a readable image ({reason}).") from error


def check_image_size(image: Image.Image, most_pixels: int) -> None:
    """Refuses, before anything is decoded, what would take much more time and memory than an image should.

    Raises:
        InputError: see there.
    """
    short, long = sorted(image.size)
    if short * long > most_pixels:
        raise InputError(f"more than {most_pixels:,} pixels")
    if long > THINNEST * short:
        raise InputError(f"{image.width} x {image.height}, more than {THINNEST} times as long as wide")


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode as RGB with 8 bits per channel."""
    image.load()
    turn = None
    with suppress(Exception):  # a broken EXIF or XMP block says nothing, and the image is there all the same
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    if turn:
        image = image.transpose(Image.Transpose[turn])
    if image.mode == "F" or image.mode.startswith("I"):
        image = to_bytes(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_bytes(image: Image.Image) -> Image.Image:
    """An image of floats, or of integers beyond 8 bits, as grey.

    Its file does not say which value is white; so white is the least of 1 and 255, or of 8, 12 and 16 bits, that no
    value exceeds. (Pillow's own conversion clips at 255.)

    Raises:
        InputError: values of another range, or that are no numbers.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if low >= 0 and high <= 255:
            return Image.fromarray((values * (255 if high <= 1 else 1)).round().astype(np.uint8))
        expected = "0 to 1, or to 255"
    else:
        if low >= 0 and high < 1 << 16:
            bits = next(bits for bits in (8, 12, 16) if high < 1 << bits)
            return Image.fromarray((values >> (bits - 8)).astype(np.uint8))
        expected = "0 to 65,535"
    raise InputError(f"values from {low:,} to {high:,}, where {expected} are expected")


@dataclass
class PixelBytes:
    """Images on their way from the loader's workers to the device: bytes, a quarter of the size of floats.

    Args:
        data: (images, height, width, 3) uint8.
        table: (3, 256) float32, what each byte of each colour becomes.
    """

    data: torch.Tensor
    table: torch.Tensor

    def normalise(self) -> torch.Tensor:
        """(images, 3, height, width) float32, on the device of `data`."""
        channels = self.data.movedim(-1, 1).int()
        return torch.stack([self.table[c][channels[:, c]] for c in range(3)], dim=1)

    def to(self, *args, **kwargs) -> "PixelBytes":
        """On another device; accelerate's loader calls this."""
        return PixelBytes(self.data.to(*args, **kwargs), self.table.to(*args, **kwargs))

    def pin_memory(self) -> "PixelBytes":
        """In memory that a GPU can copy from; torch's loader calls this."""
        return PixelBytes(self.data.pin_memory(), self.table.pin_memory())


class FastImageProcessor:
    """Images -> what the vision tower reads, with the numbers of its own image processor (Pillow backend).

    Workers only decode, pad, resize and crop. What a byte becomes stands in a table that the image processor itself has
    made; so the result equals the processor's bit for bit, whatever mean, deviation or rescaling it asks for. That it
    does is proven on PROBES; where it does not, the image processor does all the work.
    """

    PROBES = ((61, 90), (90, 61), (53, 53), (700, 333), (40, 600))  # height and width

    def __init__(self, image_processor: BaseImageProcessor) -> None:
        self.processor = with_pillow(image_processor)
        self.table = self._table()
        fast_paths = (self._resized, self._by_processor) if self.table is not None else ()
        self.fast_path = next((fast_path for fast_path in fast_paths if self._is_proven(fast_path)), None)

    def __call__(self, images: list[Image.Image]) -> PixelBytes | torch.Tensor:
        """RGB images as PixelBytes, or where only the processor can make them, what it makes: (images, 3, height,
        width) float32."""
        if self.fast_path is None:
            return torch.cat([self._whole(image) for image in images])
        return self._bytes(images, self.fast_path)

    def fingerprint(self) -> str:
        """A digest that changes with what the processor makes of images; its files may say the same in other words."""
        digest = hashlib.sha256()
        for probe in self.PROBES:
            digest.update(self._whole(noise(*probe)).numpy().tobytes())
        return digest.hexdigest()

    def framing(self) -> str:
        """How an image that is not square becomes one, a key of FRAMINGS, found out on white images three times as wide
        as high: "crop" where black ends do not show, "squeeze" where all of the square is white, else "pad"."""
        plain = Image.new("RGB", (300, 100), "white")
        black_ends = plain.copy()
        for left in (0, 297):
            black_ends.paste("black", (left, 0, left + 3, 100))
        shown, with_ends, square = map(self._whole, (plain, black_ends, Image.new("RGB", (100, 100), "white")))
        if torch.equal(shown, with_ends):
            return "crop"
        return "squeeze" if torch.equal(shown, square) else "pad"

    def _bytes(self, images: list[Image.Image], fast_path: Callable[[Image.Image], Any]) -> PixelBytes:
        return PixelBytes(torch.from_numpy(np.stack([np.asarray(fast_path(image)) for image in images])), self.table)

    def _whole(self, image: Image.Image) -> torch.Tensor:
        return self.processor([image], return_tensors="pt")["pixel_values"].float()

    def _table(self) -> torch.Tensor | None:
        """(3, 256): what the processor makes of each byte; None where its result depends on more than that byte."""
        every_byte = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)  # square: nothing to pad
        try:
            pixels = self.processor(
                [Image.fromarray(every_byte)], do_resize=False, do_center_crop=False, return_tensors="pt"
            )["pixel_values"]
        except (TypeError, ValueError):  # a kind of processor that knows no such settings
            return None
        return pixels.reshape(3, 256).float() if pixels.shape == (1, 3, 16, 16) else None

    def _resized(self, image: Image.Image) -> Image.Image:
        """Pads, resizes and crops as the processor does, without its conversions between Pillow and NumPy. (Padding
        is that of LLaVA's, before resizing; another kind's fails the proof.)"""
        processor = self.processor
        pad = getattr(processor, "do_pad", False) and image.width != image.height
        if processor.do_resize:
            size = (processor.size.width, processor.size.height)
            if shortest := processor.size.shortest_edge:
                short, long = (1, 1) if pad else sorted(image.size)
                size = (shortest, int(shortest * long / short))
                size = size if image.width <= image.height else size[::-1]
            if pad:
                background = tuple(int(255 * mean) for mean in processor.image_mean)  # as LLaVA rounds it
                image = pad_and_resize(image, size, processor.resample, background)
            else:
                image = image.resize(size, processor.resample)
        if processor.do_center_crop:
            width, height = processor.crop_size.width, processor.crop_size.height
            left, top = (image.width - width) // 2, (image.height - height) // 2
            if image.size != (width, height):
                image = image.crop((left, top, left + width, top + height))
        return image

    def _by_processor(self, image: Image.Image) -> np.ndarray:
        pixels = self.processor([image], do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        return pixels.transpose(1, 2, 0).astype(np.uint8)

    def _is_proven(self, fast_path: Callable[[Image.Image], Any]) -> bool:
        """Whether the bytes of a fast path become the processor's own numbers, on all PROBES."""
        for probe in self.PROBES:
            image = noise(*probe)
            try:
                numbers = self._bytes([image], fast_path).normalise()
            except (AttributeError, TypeError, ValueError):  # settings of a kind that this path does not know
                return False
            if not torch.equal(numbers, self._whole(image)):
                return False
        return True


def noise(height: int, width: int) -> Image.Image:
    """An RGB image, always the same, in which no pixel is like its neighbours."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_pillow(image_processor: BaseImageProcessor) -> BaseImageProcessor:
    """The same image processor with the Pillow backend. torchvision's, which transformers prefers where it is
    installed, resizes to other pixels. The backend is chosen where a processor is loaded, so it is saved first.

    A class of somebody else's, which transformers does not know, stays as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        image_processor.save_pretrained(folder)
        try:
            return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        except (OSError, ValueError):
            return image_processor


def tokens_per_image(processor: LlavaProcessor) -> int:
    """The number of `<image>` ids that stand for one image; fixed, since every image is brought to one size."""
    pixels = processor.image_processor(Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
    patches = (pixels.shape[-2] // processor.patch_size) * (pixels.shape[-1] // processor.patch_size)
    return patches + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
