"""A drawn sheet of images with the model's caption under each."""

from typing import Any

from PIL import Image, ImageDraw

from train_llava.pages.fonts import font_for, wrapped

TILE, CAPTION = 260, 140  # pixels: an image's side, and the height of the text under it
INK, RIGHT, WRONG = (90, 90, 90), (20, 110, 50), (190, 30, 30)


def draw_sheet(rows: list[dict[str, Any]]) -> Image.Image:
    """Images with the model's caption under each: where a row says whether it is `exact`, green if it is, else red
    with the right one below."""
    large, small = (
        font_for("".join(row["caption"] + row.get("reference", "") for row in rows), size) for size in (18, 14)
    )
    gap, columns = 20, min(4, len(rows))
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (TILE + gap) + gap, lines * (TILE + CAPTION) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        x, y = gap + i % columns * (TILE + gap), gap + i // columns * (TILE + CAPTION)
        image = row["image"] or Image.new("RGB", (TILE, TILE), "white")
        enlarge = Image.Resampling.NEAREST if max(image.size) < TILE else Image.Resampling.LANCZOS
        scale = TILE / max(image.size)
        sheet.paste(image.resize([max(1, round(side * scale)) for side in image.size], enlarge), (x, y))
        exact = row.get("exact")
        caption = wrapped(row["caption"], large, TILE, 3)
        draw.text((x, y + TILE + 6), "\n".join(caption), INK if exact is None else RIGHT if exact else WRONG, large)
        if exact is False:
            below = y + TILE + 12 + 22 * len(caption)
            reference = wrapped("should be: " + row["reference"], small, TILE, 3)
            draw.text((x, below), "\n".join(reference), INK, small)
    return sheet
