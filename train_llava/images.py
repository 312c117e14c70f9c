"""Picture files -> RGB pictures."""

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from train_llava.command import InputError


def open_image(path: str | Path) -> Image.Image:
    """A picture file as RGB, turned upright where the camera said so (EXIF).

    Raises:
        InputError: the file is missing, or is not a picture that Pillow can read to its end.
    """
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such picture file.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable picture ({error}).") from error
