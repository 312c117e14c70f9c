"""Scores a model on held-out data: its answer to each first question, the loss of all answers, and what the image does.

    python -m train_llava.evaluate --model_name_or_path output/first --data_path data/held_out
    torchrun --nproc_per_node 8 -m train_llava.evaluate --model_name_or_path output/first --data_path data/held_out

Writes metrics.json, samples.jsonl (a line for each record) and report.html (the worst and the best answers beside their
images) into --output_dir. docs/evaluation.md says by which metric a record is scored, and which benchmarks are read.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from jinja2 import Environment
from tqdm import tqdm
from transformers import LlavaProcessor

from train_llava.cli import (
    check_same,
    command,
    command_parser,
    json_lines,
    positive,
    shared_output_folder,
    write_whole,
)
from train_llava.data import LlavaDataset
from train_llava.ingest.data_files import paths_of
from train_llava.model.answer_losses import answer_losses
from train_llava.model.generate import MAX_NEW_TOKENS, SORTED, caption_rows
from train_llava.model.image_use import image_use, verdict
from train_llava.model.load import Model, accelerator, load
from train_llava.model.ranks import gather
from train_llava.pages.scores.scorable import check_metrics
from train_llava.pages.scores.scoring import CAPTION, NAMES, by_category, score_each
from train_llava.pages.thumbnails import thumbnail

TEMPLATE = Path(__file__).parent / "pages" / "evaluate.html.jinja"
WRITTEN = ("metrics.json", "samples.jsonl", "report.html")
SHOWN = 12  # answers of either kind in the report


def answer_rows(
    model: Model, processor: LlavaProcessor, dataset: LlavaDataset, indices: Sequence[int], batch_size: int, **options
) -> Iterator[dict[str, Any]]:
    """A row per record: its index, that of `caption_rows` without the image, and loss and tokens of `answer_losses`."""
    progress = tqdm(total=len(indices), unit="records", disable=None if PartialState().is_main_process else True)
    for start in range(0, len(indices), batch_size * SORTED):
        some = indices[start : start + batch_size * SORTED]
        examples = [dataset[i] for i in some]
        batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
        losses = [loss for batch in batches for loss in answer_losses(model, processor, batch)]
        rows = caption_rows(model, processor, examples, batch_size=batch_size, **options)
        for index, row, (loss, tokens) in zip(some, rows, losses, strict=True):
            del row["image"]
            yield {"index": index, **row, "loss": loss / tokens, "tokens": tokens}
        progress.update(len(some))
    progress.close()


def metrics_of(rows: list[dict[str, Any]], metric: str = CAPTION) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of all rows, and what `score_each` says of each row."""
    scores, each = score_each(rows, metric)
    tokens = sum(row["tokens"] for row in rows)
    loss = sum(row["loss"] * row["tokens"] for row in rows) / tokens
    return {"records": len(rows), "answer_tokens": tokens, "loss": loss, "perplexity": math.exp(loss), **scores}, each


def categories_of(rows: list[dict[str, Any]], metric: str = CAPTION) -> dict[str, dict[str, float]]:
    """The metrics of each category, as `by_category`."""
    return {name: metrics_of(part, metric)[0] for name, part in by_category(rows).items()}


def report_page(
    title: str,
    metrics: dict[str, float],
    rows: list[dict[str, Any]],
    dataset: LlavaDataset,
    categories: dict[str, dict[str, float]],
    image_use: str = "",
) -> str:
    """The metrics, and the worst and the best answers, by their score and among equals by the loss, as a self-contained
    page."""
    ranked = sorted(rows, key=lambda row: (row["score"], -row["loss"]))
    half = min(SHOWN, (len(ranked) + 1) // 2)
    sections = {"Worst": ranked[:half], "Best": ranked[half:][-half:][::-1]}
    sections = {
        name: [{**row, "images": [thumbnail(image) for image in dataset[row["index"]]["images"]]} for row in part]
        for name, part in sections.items()
    }
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    table = category_table(categories)
    return template.render(title=title, metrics=as_text(metrics), sections=sections, table=table, image_use=image_use)


def as_text(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Names and values of metrics as text."""
    return [(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}") for name, value in metrics.items()]


def category_table(categories: dict[str, dict[str, float]]) -> list[list[str]]:
    """A line of names, and one of values for each category; empty where it has not that metric."""
    names = [*dict.fromkeys(name for metrics in categories.values() for name in metrics)]
    lines = [dict(as_text(metrics)) for metrics in categories.values()]
    body = [[name, *(line.get(each, "") for each in names)] for name, line in zip(categories, lines, strict=True)]
    return [["category", *names], *body] if body else []


def in_columns(table: list[list[str]]) -> str:
    """A table for the terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    first, *others = widths
    lines = [[name.ljust(first), *map(str.rjust, rest, others)] for name, *rest in table]
    return "\n".join(map("  ".join, lines))


@command
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="LLaVA or adapter: a folder or a hub id")
    parser.add_argument("--adapter_name_or_path", help="adapter to put on top of the model")
    parser.add_argument("--data_path", nargs="+", required=True, help="as for train_llava.train, or a benchmark")
    parser.add_argument("--caption_fields", nargs="+", help="as for train_llava.train")
    parser.add_argument("--image_folder", help="as for train_llava.train")
    parser.add_argument("--metric", choices=NAMES, default=CAPTION, help="for records that do not name their own")
    parser.add_argument("--batch_size", type=positive, default=16)
    parser.add_argument("--max_new_tokens", type=positive, default=MAX_NEW_TOKENS)
    parser.add_argument("--output_dir", type=Path, help="output/evaluation/<name of the model> if not given")
    args = parser.parse_args()
    if args.output_dir is None:
        model = Path(args.adapter_name_or_path or args.model_name_or_path)
        args.output_dir = Path("output/evaluation", model.absolute().name)

    # the ranks wait for each other at the end alone; the slowest may need more than the default of half an hour
    state = PartialState(cpu=accelerator() is None, timeout=timedelta(days=1))
    paths = paths_of(args.data_path)
    read = (args.model_name_or_path, args.adapter_name_or_path, args.image_folder, *paths)
    check = partial(check_same, facts_of(args), *(args.output_dir / name for name in WRITTEN))
    with shared_output_folder(args.output_dir, check, *read):
        evaluate(args, state)
    state.destroy_process_group()


def facts_of(args: argparse.Namespace) -> dict[str, Any]:
    """The model and the data that are scored."""
    return {"model": args.model_name_or_path, "adapter": args.adapter_name_or_path, "data": args.data_path}


def evaluate(args: argparse.Namespace, state: PartialState) -> None:
    """Scores on all ranks; the first writes."""
    with state.main_process_first():  # the others then find its Arrow copy
        where = {"caption_fields": args.caption_fields, "image_folder": args.image_folder}
        dataset = LlavaDataset(args.data_path, held_out=True, **where)
    check_metrics(dataset, args.metric)
    if state.is_main_process:
        print(dataset.summary(), flush=True)
    model, processor = load(args.model_name_or_path, args.adapter_name_or_path)
    share = slice(state.process_index, None, state.num_processes)
    options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    rows = gather(answer_rows(model, processor, dataset, range(len(dataset))[share], **options))
    shown = image_use(model, processor, dataset, args.batch_size, share)
    if state.is_main_process:
        write_results(args, dataset, sorted(rows, key=lambda row: row["index"]), shown)


def write_results(
    args: argparse.Namespace, dataset: LlavaDataset, rows: list[dict[str, Any]], shown: dict[str, float]
) -> None:
    """Writes what `evaluate` has found into --output_dir, and shows it in short."""
    metrics, each = metrics_of(rows, args.metric)
    categories = categories_of(rows, args.metric)
    use = verdict(shown) if shown else "No two images that look different: nothing to say about their use."
    metrics |= shown
    rows = [{"answer" if name == "caption" else name: value for name, value in row.items()} for row in rows]
    rows = [row | values for row, values in zip(rows, each, strict=True)]
    title = f"{args.adapter_name_or_path or args.model_name_or_path} on {', '.join(args.data_path)}"
    page = report_page(title, metrics, rows, dataset, categories, use)
    whole = facts_of(args) | metrics | {"image_use": use, "categories": categories}
    contents = (json.dumps(whole, indent=2, ensure_ascii=False) + "\n", json_lines(rows), page)
    for name, text in zip(WRITTEN, contents, strict=True):
        write_whole(args.output_dir / name, text)
    print("\n".join(f"{name:<18}{value:>12}" for name, value in as_text(metrics)))
    if categories:
        print(f"\n{in_columns(category_table(categories))}\n")
    print(use)
    if "cider" not in metrics and any(row["metric"] == CAPTION for row in rows):
        print("BLEU, ROUGE-L and CIDEr need pycocoevalcap: pip install pycocoevalcap (the extra train_llava[score])")
    print(f"every answer: {args.output_dir}/samples.jsonl   the worst and the best: {args.output_dir}/report.html")


if __name__ == "__main__":
    main()
