"""A drawn sheet of images with a question and the model's answer under each."""

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from train_llava.ingest.conversation import IMAGE_TOKEN
from train_llava.pages.fonts import font_for, wrapped

TILE, GAP = 260, 20  # pixels: an image's side, and from one image to the next
SMALL, LARGE = (14, 18), (18, 23)  # pixels: a letter's height, and from one line to the next
MOST = 8  # lines of a text
INK = (90, 90, 90)
VERDICT = {None: INK, True: (20, 110, 50), False: (190, 30, 30)}


def draw_sheet(rows: list[dict[str, Any]]) -> Image.Image:
    """Images with the `prompt`, if a row has one, and the model's answer (`caption`) under each.

    Where a row says whether the answer is `exact`, it is green if so, else red with the right one below.
    """
    words = "".join(row["caption"] + row.get("reference", "") + row.get("prompt", "") for row in rows)
    large, small = (font_for(words, size) for size, _ in (LARGE, SMALL))
    below = [texts(row, large, small) for row in rows]
    columns = min(4, len(rows))
    heights = [  # of each line of images, with what is below them
        TILE + 2 * GAP + max(sum(height for *_, height in lines) for lines in below[i : i + columns])
        for i in range(0, len(rows), columns)
    ]
    sheet = Image.new("RGB", (columns * (TILE + GAP) + GAP, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, lines) in enumerate(zip(rows, below, strict=True)):
        x, y = GAP + i % columns * (TILE + GAP), GAP + sum(heights[: i // columns])
        image = row["image"] or Image.new("RGB", (TILE, TILE), "white")
        enlarge = Image.Resampling.NEAREST if max(image.size) < TILE else Image.Resampling.LANCZOS
        scale = TILE / max(image.size)
        sheet.paste(image.resize([max(1, round(side * scale)) for side in image.size], enlarge), (x, y))
        y += TILE + 6
        for line, font, ink, height in lines:
            draw.text((x, y), line, ink, font)
            y += height
    return sheet


def texts(
    row: dict[str, Any], large: ImageFont.FreeTypeFont, small: ImageFont.FreeTypeFont
) -> list[tuple[str, ImageFont.FreeTypeFont, tuple[int, int, int], int]]:
    """The lines under an image: text, font, colour, and how far the next one is below."""
    right = f"should be: {row['reference']}" if row.get("exact") is False else ""
    parts = (
        (row.get("prompt", "").replace(IMAGE_TOKEN, ""), small, INK, SMALL[1]),
        (row["caption"], large, VERDICT[row.get("exact")], LARGE[1]),
        (right, small, INK, SMALL[1]),
    )
    return [(line, *rest) for text, *rest in parts for line in wrapped(text, rest[0], TILE, MOST) if line]
