"""Captions the demo's held-out pictures with a trained model and counts the captions that are exactly right.

    python -m demo.show --model_name_or_path output/demo-use_lora --data_path output/demo/data/held_out

Prints the first pictures' captions and the rate; `captions.png` and `captions.jsonl` go into the model's folder.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from train_llava.command import command
from train_llava.data import LlavaDataset
from train_llava.infer import generate
from train_llava.load import load

SHOWN = 8  # pictures printed and drawn, the first ones: nobody chose them
TILE, CAPTION = 260, 124  # pixels: a picture's side, and the height of the text under it
INK, RIGHT, WRONG = (90, 90, 90), (20, 110, 50), (190, 30, 30)


def caption_all(model: Any, processor: Any, dataset: LlavaDataset, batch_size: int = 50) -> list[dict[str, Any]]:
    """One row per record: picture, reference, caption, exact."""
    rows = []
    for start in range(0, len(dataset), batch_size):
        examples = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        captions = generate(model, processor, [{**e, "messages": e["messages"][:1]} for e in examples])
        for i, (example, caption) in enumerate(zip(examples, captions, strict=True)):
            picture, reference = dataset.records[start + i]["images"][0]["path"], example["messages"][1]["content"]
            exact = caption == reference
            rows.append({"picture": picture, "reference": reference, "caption": caption, "exact": exact})
    return rows


def draw_sheet(rows: list[dict[str, Any]], columns: int = 4) -> Image.Image:
    """Pictures with the model's caption under each, green if exact, else red with the right one below."""
    large, small = ImageFont.load_default(18), ImageFont.load_default(14)
    gap, lines = 20, -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (TILE + gap) + gap, lines * (TILE + CAPTION) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        x, y = gap + i % columns * (TILE + gap), gap + i // columns * (TILE + CAPTION)
        with Image.open(row["picture"]) as picture:
            sheet.paste(picture.convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + TILE + 6), textwrap.fill(row["caption"], 30), RIGHT if row["exact"] else WRONG, large)
        if not row["exact"]:
            below = y + TILE + 12 + 22 * len(textwrap.wrap(row["caption"], 30))
            draw.text((x, below), textwrap.fill("should be: " + row["reference"], 38), INK, small)
    return sheet


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, type=Path)
    parser.add_argument("--data_path", required=True)
    args = parser.parse_args()

    model, processor = load(args.model_name_or_path)
    rows = caption_all(model, processor, LlavaDataset(args.data_path))
    sheet, answers = args.model_name_or_path / "captions.png", args.model_name_or_path / "captions.jsonl"
    draw_sheet(rows[:SHOWN]).save(sheet)
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))

    print("Pictures the model has never seen, and what it says:")
    for row in rows[:SHOWN]:
        note = "" if row["exact"] else f"   (should be: {row['reference']})"
        print(f"  {'right' if row['exact'] else 'WRONG'}  {Path(row['picture']).name}  {row['caption']}{note}")
    exact = sum(row["exact"] for row in rows)
    print(f"Exactly right: {exact} of {len(rows)} held-out pictures, {100 * exact / len(rows):.1f}%")
    print(f"The first {SHOWN} with their captions: {sheet}   all: {answers}")


if __name__ == "__main__":
    main()
