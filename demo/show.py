"""Captions the demo's held-out images with a trained model and counts the captions that are exactly right.

    python -m demo.show --model_name_or_path output/demo-use_lora --data_path output/demo/data/held_out

Prints the first images' captions and the rate; `captions.png` and `captions.jsonl` go into the model's folder.
"""

from pathlib import Path

from train_llava.cli import command, command_parser, json_lines
from train_llava.data import LlavaDataset
from train_llava.model.generate import caption_rows
from train_llava.model.load import load
from train_llava.pages.caption_sheet import draw_sheet

SHOWN = 8  # images printed and drawn, the first ones: nobody chose them


@command
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, type=Path)
    parser.add_argument("--data_path", required=True)
    args = parser.parse_args()

    model, processor = load(args.model_name_or_path)
    rows = caption_rows(model, processor, LlavaDataset(args.data_path), batch_size=50)
    sheet, answers = args.model_name_or_path / "captions.png", args.model_name_or_path / "captions.jsonl"
    draw_sheet(rows[:SHOWN]).save(sheet)
    for row in rows:
        del row["image"]
    answers.write_text(json_lines(rows), encoding="utf-8")

    print("Images the model has never seen, and what it says:")
    for row in rows[:SHOWN]:
        note = "" if row["exact"] else f"   (should be: {row['reference']})"
        print(f"  {'right' if row['exact'] else 'WRONG'}  {row['id']}  {row['caption']}{note}")
    exact = sum(row["exact"] for row in rows)
    print(f"Exactly right: {exact} of {len(rows)} held-out images, {100 * exact / len(rows):.1f}%")
    print(f"The first {SHOWN} with their captions: {sheet}   all: {answers}")


if __name__ == "__main__":
    main()
