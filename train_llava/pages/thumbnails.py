"""Small images inside a page."""

import base64
import io

import numpy as np
from PIL import Image, ImageOps

SIDE = 360  # the most pixels of a thumbnail's side


def png(pixels: np.ndarray) -> str:
    """(height, width, 3) bytes as a base64 PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def thumbnail(image: Image.Image) -> str:
    """An image of a size that fits the page, as a base64 PNG."""
    image = ImageOps.scale(image, max(1, SIDE // max(image.size)), Image.Resampling.NEAREST)  # a copy
    image.thumbnail((SIDE, SIDE))
    return png(np.asarray(image))
