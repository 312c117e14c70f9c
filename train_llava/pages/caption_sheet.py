"""A drawn sheet of images with a question and the model's answer under each."""

from typing import Any

from PIL import Image, ImageDraw

from train_llava.ingest.conversation import IMAGE_TOKEN
from train_llava.pages.fonts import font_for, wrapped

TILE, TEXT = 260, 186  # pixels: an image's side, and the height of the text under it
SMALL_LINE, LARGE_LINE = 18, 23  # pixels from one line to the next
INK = (90, 90, 90)
VERDICT = {None: INK, True: (20, 110, 50), False: (190, 30, 30)}


def draw_sheet(rows: list[dict[str, Any]]) -> Image.Image:
    """Images with the `prompt`, if a row has one, and the model's answer (`caption`) under each.

    Where a row says whether the answer is `exact`, it is green if so, else red with the right one below.
    """
    words = "".join(row["caption"] + row.get("reference", "") + row.get("prompt", "") for row in rows)
    large, small = (font_for(words, size) for size in (18, 14))
    gap, columns = 20, min(4, len(rows))
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (TILE + gap) + gap, lines * (TILE + TEXT) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        x, y = gap + i % columns * (TILE + gap), gap + i // columns * (TILE + TEXT)
        image = row["image"] or Image.new("RGB", (TILE, TILE), "white")
        enlarge = Image.Resampling.NEAREST if max(image.size) < TILE else Image.Resampling.LANCZOS
        scale = TILE / max(image.size)
        sheet.paste(image.resize([max(1, round(side * scale)) for side in image.size], enlarge), (x, y))
        y += TILE + 6
        right = f"should be: {row['reference']}" if row.get("exact") is False else ""
        for text, font, height, ink, most in (
            (row.get("prompt", "").replace(IMAGE_TOKEN, ""), small, SMALL_LINE, INK, 3),
            (row["caption"], large, LARGE_LINE, VERDICT[row.get("exact")], 3 if right else 5),
            (right, small, SMALL_LINE, INK, 3),
        ):
            for line in filter(None, wrapped(text, font, TILE, most)):
                draw.text((x, y), line, ink, font)
                y += height
    return sheet
