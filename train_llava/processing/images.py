"""Where an image lies -> RGB image -> the numbers that the vision tower reads.

An image is `{"path", "bytes"}`, as the `datasets` library stores one. `bytes` is set where it came inside a record;
otherwise `path` names a file, or what is read in place: a member of an archive by its position there,
`images.zip::a/b.jpg::<offset>:<size>:<zip's method>`, or an image left in a parquet file,
`train.parquet::<column>::<row group>:<row in it>:<number in the row>`.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from train_llava.cli import InputError
from train_llava.ingest.image_files import ImageRef, beginning_of, check_file, image_name, in_a_file, read_bytes
from train_llava.ingest.image_kinds import KINDS, stranger
from train_llava.ingest.limits import MOST_PIXELS, THINNEST

ORIENTATION = 0x0112  # EXIF's tag, and what brings its values above 1 upright
TURNS = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE"), 2))
TURNS |= dict(enumerate(("ROTATE_270", "TRANSVERSE", "ROTATE_90"), 6))
# Pillow keeps up to 64 freed blocks of 1 MB for its next images: fresh memory from the system would cost a third of
# the time of decoding and resizing a small image, in page faults
Image.core.set_block_size(1 << 20)
Image.core.set_blocks_max(64)


def open_image(ref: ImageRef, kinds: Sequence[str] = KINDS, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """An image as RGB: first frame, turned upright (EXIF), on white where it is transparent, 8 bits per channel.

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
                what = stranger(beginning_of(ref), kinds)
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
    """An image of floats, or of integers beyond 8 bits, as grey. Its file does not say how much is white, so this is
    the least of 1 and 255, or of 8, 12 and 16 bits, that its values do not go beyond. (Pillow's own conversion clips
    at 255.)

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


class Pixels:
    """Images -> what the vision tower reads, with the numbers of its own image processor (Pillow backend).

    Workers only decode, resize and crop; an image travels as bytes, a quarter of the size of floats. `normalise`,
    on the device, looks each byte up in a table that the image processor itself made, so its result is equal to
    the processor's bit for bit, whatever mean, deviation or rescaling it asks for. That it is, is proven on PROBES;
    where it is not, the image processor does all the work.
    """

    PROBES = ((61, 90), (90, 61), (53, 53), (700, 333), (40, 600))  # height and width

    def __init__(self, image_processor: BaseImageProcessor) -> None:
        # torchvision's backend, which transformers prefers where it is installed, resizes to other pixels
        name = type(image_processor).__name__.removesuffix("Fast").removesuffix("Pil")
        self.processor = getattr(transformers, f"{name}Pil", type(image_processor)).from_dict(image_processor.to_dict())
        self.table = self._table()
        ways = (self._resized, self._by_processor) if self.table is not None else ()
        self.way = next((way for way in ways if self._is_proven(way)), None)

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        """RGB images as (images, height, width, 3) uint8, or if only the processor can make them, what it makes:
        (images, 3, height, width) float32."""
        if self.way is None:
            return torch.cat([self._whole(image) for image in images])
        return torch.from_numpy(np.stack([np.asarray(self.way(image)) for image in images]))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """What `__call__` has made -> (images, 3, height, width) float32, on the device of the input."""
        if pixels.dtype != torch.uint8:
            return pixels
        self.table = self.table.to(pixels.device)
        channels = pixels.movedim(-1, 1).int()
        return torch.stack([self.table[c][channels[:, c]] for c in range(3)], dim=1)

    def _whole(self, image: Image.Image) -> torch.Tensor:
        return self.processor([image], return_tensors="pt")["pixel_values"].float()

    def _table(self) -> torch.Tensor | None:
        """What the processor makes of each byte, (3, 256); None where it does not look at one byte alone."""
        every_byte = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)  # square: nothing to pad
        try:
            pixels = self.processor(
                [Image.fromarray(every_byte)], do_resize=False, do_center_crop=False, return_tensors="pt"
            )["pixel_values"]
        except (TypeError, ValueError):  # a kind of processor that knows no such settings
            return None
        return pixels.reshape(3, 256).float() if pixels.shape == (1, 3, 16, 16) else None

    def _resized(self, image: Image.Image) -> Image.Image:
        """Resize and centre crop as the processor does, without its conversions between Pillow and NumPy."""
        processor = self.processor
        if processor.do_resize:
            size = (processor.size.width, processor.size.height)
            if shortest := processor.size.shortest_edge:
                short, long = sorted(image.size)
                size = (shortest, int(shortest * long / short))
                size = size if image.width <= image.height else size[::-1]
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

    def _is_proven(self, way: Callable[[Image.Image], Any]) -> bool:
        """Whether bytes made in this way become the processor's own numbers."""
        for probe in self.PROBES:
            noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*probe, 3), dtype=np.uint8))
            try:
                numbers = self.normalise(torch.from_numpy(np.array(way(noise)))[None])
            except (AttributeError, TypeError, ValueError):  # settings of a kind that this way does not know
                return False
            if not torch.equal(numbers, self._whole(noise)):
                return False
        return True
