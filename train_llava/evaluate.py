"""Scores a model on held-out data: loss and perplexity of all answers, and its own answer to each first question.

    python -m train_llava.evaluate --model_name_or_path output/first --data_path data/held_out
    torchrun --nproc_per_node 8 -m train_llava.evaluate --model_name_or_path output/first --data_path data/held_out

Writes metrics.json, samples.jsonl (a line for each record) and report.html (the worst and the best answers beside their
images) into --output_dir.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
from train_llava.model.generate import MAX_NEW_TOKENS, SORTED, caption_rows, collator_of, gather_rows
from train_llava.model.load import Model, accelerator, load
from train_llava.model.loss import record_losses
from train_llava.model.structure import llava_in
from train_llava.pages.thumbnails import thumbnail
from train_llava.processing.rows import rows_of_answers
from train_llava.scores.captions import caption_metrics

TEMPLATE = Path(__file__).parent / "pages" / "evaluate.html.jinja"
WRITTEN = ("metrics.json", "samples.jsonl", "report.html")
SHOWN = 12  # answers of either kind in the report


@torch.inference_mode()
def answer_losses(
    model: Model, processor: LlavaProcessor, examples: Sequence[dict[str, Any]]
) -> list[tuple[float, int]]:
    """For each example the sum of -log p over its answers' tokens (all turns, each given what precedes it), and the
    number of these tokens. Logits are computed only where a token is to be predicted."""
    batch = {name: value.to(model.device) for name, value in collator_of(processor)(examples).items()}
    labels = batch.pop("labels")
    rows, targets = rows_of_answers(labels)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    llava = llava_in(model)
    hidden = llava.model(**batch, use_cache=False).last_hidden_state.flatten(0, 1)[rows]  # (answer tokens, width)
    table = record_losses(llava.lm_head, hidden, targets, rows // labels.shape[1], len(labels))
    return [(loss, int(tokens)) for loss, tokens in table.tolist()]


def score(
    model: Model, processor: LlavaProcessor, dataset: LlavaDataset, indices: Sequence[int], batch_size: int, **options
) -> Iterator[dict[str, Any]]:
    """A row per record: index, id, prompt, reference, answer, and loss and tokens of `answer_losses`."""
    progress = tqdm(total=len(indices), unit="records", disable=None if PartialState().is_main_process else True)
    for start in range(0, len(indices), batch_size * SORTED):
        some = indices[start : start + batch_size * SORTED]
        examples = [dataset[i] for i in some]
        batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
        losses = [loss for batch in batches for loss in answer_losses(model, processor, batch)]
        rows = caption_rows(model, processor, examples, batch_size=batch_size, **options)
        for index, row, (loss, tokens) in zip(some, rows, losses, strict=True):
            shared = {"id": row["id"], "prompt": row["prompt"], "reference": row["reference"], "answer": row["caption"]}
            yield {"index": index, **shared, "loss": loss / tokens, "tokens": tokens}
        progress.update(len(some))
    progress.close()


def metrics_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics of all rows; adds to each row its own (see caption_metrics)."""
    metrics, each = caption_metrics([row["answer"] for row in rows], [row["reference"] for row in rows])
    for name, values in each.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    tokens = sum(row["tokens"] for row in rows)
    loss = sum(row["loss"] * row["tokens"] for row in rows) / tokens
    return {"records": len(rows), "answer_tokens": tokens, "loss": loss, "perplexity": math.exp(loss), **metrics}


def report_page(title: str, metrics: dict[str, float], rows: list[dict[str, Any]], dataset: LlavaDataset) -> str:
    """The worst and the best answers, by ROUGE-L (or exact match) and among equals by the loss, as a self-contained
    page."""
    ranked = sorted(rows, key=lambda row: (row.get("rouge_l", row["exact"]), -row["loss"]))
    half = min(SHOWN, (len(ranked) + 1) // 2)
    sections = {"Worst": ranked[:half], "Best": ranked[half:][-half:][::-1]}
    sections = {
        name: [{**row, "images": [thumbnail(image) for image in dataset[row["index"]]["images"]]} for row in part]
        for name, part in sections.items()
    }
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, metrics=as_text(metrics), sections=sections)


def as_text(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Names and values of metrics as text."""
    return [(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}") for name, value in metrics.items()]


@command
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="LLaVA or adapter: a folder or a hub id")
    parser.add_argument("--adapter_name_or_path", help="adapter to put on top of the model")
    parser.add_argument("--data_path", nargs="+", required=True, help="as for train_llava.train")
    parser.add_argument("--caption_fields", nargs="+", help="as for train_llava.train")
    parser.add_argument("--image_folder", help="as for train_llava.train")
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
    if state.is_main_process:
        print(dataset.summary(), flush=True)
    model, processor = load(args.model_name_or_path, args.adapter_name_or_path)
    indices = range(state.process_index, len(dataset), state.num_processes)
    options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    rows = gather_rows(score(model, processor, dataset, indices, **options))
    if state.is_main_process:
        metrics = metrics_of(rows)
        title = args.adapter_name_or_path or args.model_name_or_path
        page = report_page(f"{title} on {', '.join(args.data_path)}", metrics, rows, dataset)
        contents = (json.dumps(facts_of(args) | metrics, indent=2, ensure_ascii=False) + "\n", json_lines(rows), page)
        for name, text in zip(WRITTEN, contents, strict=True):
            write_whole(args.output_dir / name, text)
        print("\n".join(f"{name:<15}{value:>12}" for name, value in as_text(metrics)))
        if "cider" not in metrics:
            print(
                "BLEU, ROUGE-L and CIDEr need pycocoevalcap: pip install pycocoevalcap (the extra train_llava[score])"
            )
        print(f"every answer: {args.output_dir}/samples.jsonl   the worst and the best: {args.output_dir}/report.html")


if __name__ == "__main__":
    main()
