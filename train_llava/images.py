"""Where a picture lies -> RGB picture -> the numbers that the vision tower reads.

A picture is `{"path", "bytes"}`, as the `datasets` library stores one. `bytes` is set where it came inside a record;
otherwise `path` names a file, or what is read in place: a member of an archive by its position there,
`images.zip::a/b.jpg::<offset>:<size>:<zip's method>`, or a picture left in a parquet file,
`train.parquet::<column>::<row group>:<row in it>:<number in the row>`.
"""

import io
import os
import re
import warnings
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor

from train_llava.command import InputError
from train_llava.parquet_images import IN_PARQUET, image_bytes, open_parquet, open_row_group

MEMBER = re.compile(r"(?P<archive>.+?)::(?P<name>.+)::(?P<offset>\d+):(?P<size>\d+):(?P<method>\d+)$")
STORED, DEFLATED = 0, 8  # methods of the ZIP format (APPNOTE 4.4.5); a tar stores
UPRIGHT, ORIENTATION = 1, 0x0112  # EXIF
# Pillow keeps up to 64 freed blocks of 1 MB for its next pictures: fresh memory from the system would cost a third of
# the time of decoding and resizing a small picture, in page faults
Image.core.set_block_size(1 << 20)
Image.core.set_blocks_max(64)
Image.init()  # here, so that no forked worker has to import Pillow's plugins

Picture = dict[str, Any] | str | Path


def open_image(picture: Picture, kinds: Sequence[str] | None = None) -> Image.Image:
    """A picture as RGB: first frame, turned upright (EXIF), on white where it is transparent, 16 bits scaled to 8.

    `kinds` are names of Pillow's formats; None allows all, some of which call programs such as Ghostscript.

    Raises:
        InputError: missing, not a picture that Pillow can read to its end, or of more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (89 million), beyond which Pillow suspects a decompression bomb.
    """
    picture = picture if isinstance(picture, dict) else {"path": str(picture), "bytes": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about odd EXIF blocks and the like
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = picture["path"] if in_a_file(picture) else io.BytesIO(read_bytes(picture))
            with Image.open(source, formats=kinds) as image:
                return to_rgb(image)
    except FileNotFoundError as error:
        raise InputError(f"{name_of(picture)}: no such picture file.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{name_of(picture)}: more than {Image.MAX_IMAGE_PIXELS:,} pixels.") from error
    except Exception as error:  # decoders raise many kinds on broken bytes: OSError, SyntaxError, struct.error, ...
        reason = str(error).split(" <_io")[0].replace(picture["path"] or "", "it") or type(error).__name__
        raise InputError(f"{name_of(picture)}: not a readable picture ({reason}).") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow picture of any mode as RGB with 8 bits per channel."""
    if image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip all above 255 to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()  # before its file is closed
    return image if image.mode == "RGB" else image.convert("RGB")


def read_bytes(picture: dict[str, Any]) -> bytes:
    """The encoded picture, from the record, an archive or a file."""
    if picture["bytes"] is not None:
        return picture["bytes"]
    if row := IN_PARQUET.match(picture["path"]):
        return image_bytes(**row.groupdict())
    member = MEMBER.match(picture["path"])
    if member is None:
        return Path(picture["path"]).read_bytes()
    # pread moves no file position, so that forked workers may share the open file
    data = os.pread(open_archive(member["archive"]).fileno(), int(member["size"]), int(member["offset"]))
    return zlib.decompress(data, wbits=-zlib.MAX_WBITS) if int(member["method"]) == DEFLATED else data


@lru_cache(maxsize=64)
def open_archive(path: str) -> BinaryIO:
    """An archive, kept open until so many others were; then nobody holds it any more, and Python closes it."""
    return open(path, "rb", buffering=0)


def forget_files() -> None:
    """Before data is opened: files may have been made anew since others of the same names were read."""
    open_archive.cache_clear()
    open_row_group.cache_clear()
    open_parquet.cache_clear()


def in_a_file(picture: dict[str, Any]) -> bool:
    """Whether the picture is a file of its own."""
    return picture["bytes"] is None and not MEMBER.match(picture["path"])  # which fits a picture in parquet, too


def name_of(picture: dict[str, Any]) -> str:
    """What to call a picture in a message."""
    member = MEMBER.match(picture["path"] or "")
    return f"{member['archive']}, {member['name']}" if member else picture["path"] or "picture inside the record"


class Pixels:
    """Pictures -> what the vision tower reads, with the numbers of its own image processor (Pillow backend).

    Workers only decode, resize and crop; a picture travels as bytes, a quarter of the size of floats. `normalise`,
    on the device, looks each byte up in a table that the image processor itself made, so its result is equal to
    the processor's bit for bit, whatever mean, deviation or rescaling it asks for.
    """

    def __init__(self, image_processor: BaseImageProcessor) -> None:
        # torchvision's backend, which transformers prefers where it is installed, resizes to other pixels
        name = type(image_processor).__name__.removesuffix("Fast").removesuffix("Pil")
        self.processor = getattr(transformers, f"{name}Pil").from_dict(image_processor.to_dict())
        every_byte = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)  # a picture of 256 x 1
        kept = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        self.table = self.processor(Image.fromarray(every_byte), **kept)["pixel_values"][0, :, 0].float()  # (3, 256)
        self.direct = all(self._same_as_processor(size) for size in ((61, 90), (90, 61), (53, 53), (700, 333)))

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        """RGB pictures as (images, height, width, 3) uint8."""
        size = self._resized if self.direct else self._by_processor
        return torch.from_numpy(np.stack([np.asarray(size(image)) for image in images]))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(images, height, width, 3) uint8 -> (images, 3, height, width) float32, on the device of the input."""
        self.table = self.table.to(pixels.device)
        channels = pixels.movedim(-1, 1).int()
        return torch.stack([self.table[c][channels[:, c]] for c in range(3)], dim=1)

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

    def _same_as_processor(self, size: tuple[int, int]) -> bool:
        """Whether the short way leads to the processor's own pixels; where it does not, the processor is used."""
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        try:
            return np.array_equal(np.asarray(self._resized(noise)), self._by_processor(noise))
        except (AttributeError, TypeError, ValueError):  # settings of a kind that _resized does not know
            return False
