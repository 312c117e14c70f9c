"""The sheet of images and answers that the commands draw, as a figure of a lesson."""

import io
from typing import Any

from IPython.display import Image

from train_llava.pages.caption_sheet import draw_sheet


def sheet(rows: list[dict[str, Any]], alt: str) -> Image:
    """Rows of `caption_rows`: under each image its question and answer, green if exactly right, red if not."""
    content = io.BytesIO()
    draw_sheet(rows).save(content, "jpeg", quality=90)
    return Image(content.getvalue(), format="jpeg", alt=alt)
