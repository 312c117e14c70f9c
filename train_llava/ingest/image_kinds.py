"""The kinds of image files that are read, and what a file is that is of none of them."""

import importlib
import re
from collections.abc import Sequence
from contextlib import suppress

from PIL import Image

Image.init()  # here, so that no forked worker has to import Pillow's plugins
with suppress(ImportError):
    importlib.import_module("pillow_heif").register_heif_opener()
# Pillow knows more kinds, of which some, such as EPS, call a program
KINDS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "HEIF", "ICO", "PPM", "TGA")
KINDS = tuple(kind for kind in KINDS if kind in Image.OPEN)
SHOWN = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # those of them that browsers show, too
# Files of other kinds that have an image's name: their first bytes, and what to do about them
OTHER_KINDS = {
    rb"$": "an empty file",
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC: pip install pillow-heif",
    rb"....ftypavi": "AVIF: pip install --upgrade pillow",
    rb"%!PS|\xc5\xd0\xd3\xc6": "EPS, a program that draws: convert it to PNG",
    rb"%PDF": "a PDF: convert it to PNG",
    rb"version https://git-lfs": "a pointer of Git LFS: git lfs pull",
    rb"\s*<\?xml|\s*<svg": "a drawing in XML: convert it to PNG",
    rb"(?i)\s*<(!doctype|html)": "a web page, as a failed download leaves it",
}


def suffixes_of(kinds: Sequence[str]) -> set[str]:
    """How names of images of these kinds end."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds}


SUFFIXES = suffixes_of(KINDS)


def describe_other_kind(head: bytes, kinds: Sequence[str]) -> str:
    """What a file is, by its first bytes, that is of none of these kinds."""
    known = (what for beginning, what in OTHER_KINDS.items() if re.match(beginning, head, re.DOTALL))
    return next(known, f"none of {', '.join(kinds)}")
