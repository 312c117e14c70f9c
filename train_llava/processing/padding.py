"""An image that is not square, padded to a square of one colour and resized, as LLaVA-1.5 does it.

(Liu et al., arXiv:2310.03744; `expand2square` in llava/mm_utils.py of github.com/haotian-liu/LLaVA.)
"""

from PIL import Image

STRIP = 1 << 22  # pixels that are padded at a time: 16 MB as Pillow holds RGB


def pad_and_resize(
    image: Image.Image, size: tuple[int, int], resample: int, background: tuple[int, int, int]
) -> Image.Image:
    """Puts an RGB image in the middle of a square as large as its long side, and resizes it to `size` (width, height).

    The pixels are those of the square resized as a whole. Pillow resizes the rows first, each by itself, and then the
    columns. So rows can go a strip at a time, and those of background alone, which stay as they are, need not go at
    all. The square of a panorama of 40,000 x 2,000 pixels would take 6.4 GB.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    rows, narrow = max(1, STRIP // side), Image.new("RGB", (size[0], side), background)
    for start in range(0, image.height, rows):
        end = min(start + rows, image.height)
        strip = Image.new("RGB", (side, end - start), background)
        strip.paste(image.crop((0, start, image.width, end)), (left, 0))
        narrow.paste(strip.resize((size[0], end - start), resample), (0, top + start))
    return narrow.resize(size, resample)
