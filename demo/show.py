"""Asks a trained model the demo's held-out questions and counts the answers that are exactly right.

    python -m demo.show --model_name_or_path output/demo-use_lora --data_path output/demo/data/held_out

Prints the first question of each kind with its answer, and a table of the kinds; `answers.png`, a sheet of the first
eight, and `answers.jsonl` go into the model's folder. `--language zh` shows Chinese questions.
"""

from pathlib import Path
from typing import Any

from demo.questions import KINDS_OF_QUESTION
from train_llava.cli import command, command_parser, json_lines
from train_llava.data import LlavaDataset
from train_llava.ingest.conversation import IMAGE_TOKEN
from train_llava.model.generate import caption_rows
from train_llava.model.load import load
from train_llava.pages.caption_sheet import draw_sheet

ON_SHEET = 8
Row = dict[str, Any]


def exact_percent(rows: list[Row]) -> dict[str, float]:
    """How many answers are exactly right, in percent: of each kind of question, and of all."""
    kinds = {kind: [row["exact"] for row in rows if row["category"] == kind] for kind in KINDS_OF_QUESTION}
    kinds = {kind: exact for kind, exact in kinds.items() if exact} | {"all": [row["exact"] for row in rows]}
    return {kind: 100 * sum(exact) / len(exact) for kind, exact in kinds.items()}


def first_of_each_kind(rows: list[Row], language: str) -> list[Row]:
    """In the order of KINDS_OF_QUESTION; nobody chose them."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["reference"].isascii() == (language == "en"):
            found.setdefault(row["category"], row)
    return [found[kind] for kind in KINDS_OF_QUESTION if kind in found]


@command
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, type=Path)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--language", choices=["en", "zh"], default="en", help="of the questions that are shown")
    args = parser.parse_args()

    model, processor = load(args.model_name_or_path)
    rows = caption_rows(
        model, processor, LlavaDataset(args.data_path, held_out=True), batch_size=70, max_new_tokens=128
    )
    shown = first_of_each_kind(rows, args.language)
    sheet, answers = args.model_name_or_path / "answers.png", args.model_name_or_path / "answers.jsonl"
    draw_sheet(shown[:ON_SHEET]).save(sheet)

    print("Questions about images that the model has never seen, the first of each kind:")
    for row in shown:
        question = row["prompt"].replace(IMAGE_TOKEN, "").strip()
        note = "" if row["exact"] else f"   (should be: {row['reference']})"
        print(f"  {'right' if row['exact'] else 'WRONG'}  {question}  {row['caption']}{note}")
    print("Exactly right, in percent:")
    for kind, percent in exact_percent(rows).items():
        print(f"  {kind:<10} {percent:5.1f}")
    for row in rows:
        del row["image"]
    answers.write_text(json_lines(rows), encoding="utf-8")
    print(f"The first {ON_SHEET} with their images: {sheet}   all {len(rows)}: {answers}")


if __name__ == "__main__":
    main()
