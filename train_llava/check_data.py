"""Checks a whole dataset before a training reads it.

    python -m train_llava.check_data --data_path data/LLaVA-CC3M-Pretrain-595K --model_name_or_path models/llava

Reads every record and every image in parallel, prints what is there and what is wrong, and writes `report.json`,
`refused.jsonl` and `lengths.png` into --output_dir. The exit code is 2 if a training would fail. Ctrl-C prints what
was found so far.
"""

import argparse
import hashlib
import json
import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import concatenate_datasets, disable_progress_bars
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import LlavaConfig

from train_llava.cli import (
    InputError,
    check_same,
    command,
    command_parser,
    json_lines,
    not_negative,
    output_folder,
    positive,
    whole_file,
    write_whole,
)
from train_llava.ingest.bad_images import most_bad_images
from train_llava.ingest.data_files import paths_of
from train_llava.ingest.image_files import read_bytes
from train_llava.ingest.sources import LISTED, Source
from train_llava.model.config import max_positions
from train_llava.model.load import fetch, load_processor
from train_llava.pages.charts import COLOUR, chart
from train_llava.planning.arguments import MAX_BAD_IMAGES
from train_llava.processing.chat import ChatEncoder
from train_llava.processing.images import open_image, tokens_per_image
from train_llava.processing.token_lengths import too_long

BARS, WIDTH = 12, 50  # of the histogram in the terminal: rows, and columns of the longest
WRITTEN = ("report.json", "refused.jsonl", "lengths.png")
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


@dataclass
class Findings:
    """What was found so far."""

    records: int = 0
    counts: Counter = field(default_factory=Counter)  # "roles: user" and the like
    lengths: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    seen: Counter = field(default_factory=Counter)  # digests of images and of whole records

    def add(self, row: dict[str, Any]) -> None:
        """Adds what a worker has found out about one record."""
        self.records += 1
        self.refused += [{"id": row["id"], "kind": row["kind"], "reason": row["reason"]}] * bool(row["reason"])
        self.counts.update(row["counts"])
        self.sizes += row["sizes"]
        self.lengths += [row["length"]] * bool(row["length"])
        self.seen.update(row["digests"])

    def of_kind(self, kind: str) -> int:
        """The number of records refused for a reason of this kind, "record" or "image"."""
        return sum(line["kind"] == kind for line in self.refused)


class Checks(Dataset):
    """Each item holds everything about one record; a DataLoader's workers compute them."""

    def __init__(self, records: Any, encoder: ChatEncoder | None) -> None:
        self.records, self.encoder = records, encoder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        row = {"id": record["id"], "reason": record["problem"], "kind": "record", "sizes": [], "length": 0}
        row |= {"counts": {}, "digests": []}
        if row["reason"]:
            return row
        messages = record["messages"]
        row["counts"] = Counter(f"roles: {message['role']}" for message in messages)
        row["counts"][f"images in a record: {len(record['images']) or 'none, text only'}"] += 1
        row["counts"][f"answers in a record: {row['counts']['roles: assistant']}"] += 1
        try:
            if self.encoder:
                row["length"] = len(self.encoder.encode(messages)[0])
            row["kind"] = "image"
            for ref in record["images"]:
                row["sizes"].append(open_image(ref).size)
                row["digests"].append("image " + hashlib.sha1(read_bytes(ref)).hexdigest())
        except Exception as error:  # a chat template's own errors are of many kinds
            row["reason"] = str(error)
        words = json.dumps([messages, row["digests"]]).encode()
        row["digests"].append("record " + hashlib.sha1(words).hexdigest())
        return row


def check(records: Any, encoder: ChatEncoder | None, workers: int, findings: Findings) -> None:
    """Fills `findings`, which are valid whenever this is interrupted."""
    loader = DataLoader(
        Checks(records, encoder),
        batch_size=None,
        collate_fn=lambda row: row,
        num_workers=workers,
        prefetch_factor=64 if workers else None,
        worker_init_fn=lambda _: signal.signal(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is for the report
    )
    for row in tqdm(loader, unit=" records", smoothing=0.05, disable=None, leave=False):
        findings.add(row)


def bins(lengths: list[int], most: int) -> np.ndarray:
    """The edges of at most `most` bins, all of one whole width."""
    width = -(-(max(lengths) - min(lengths) + 1) // most)
    return np.arange(min(lengths), max(lengths) + width + 1, width)


def histogram(lengths: list[int]) -> str:
    """A histogram of lengths, as text."""
    counts, edges = np.histogram(lengths, bins=bins(lengths, BARS))
    rows = []
    for count, low, high in zip(counts, edges[:-1], edges[1:] - 1, strict=True):
        bar = "█" * round(WIDTH * count / counts.max()) or "▏" * bool(count)
        rows.append(f"  {low:>7,}{f' to {high:,}' if high > low else '':<12}{count:>9,} {bar}")
    return "\n".join(rows)


def draw(lengths: list[int], path: Path) -> None:
    """Draws the histogram."""
    with chart(path) as axes:
        axes.hist(lengths, bins=bins(lengths, 60), color=COLOUR)
        title = f"{len(lengths):,} records"
        axes.set(xlabel="tokens per record, image tokens included", ylabel="records", title=title)


def report(findings: Findings, total: int, positions: int | None = None) -> str:
    """The findings as text."""
    lines = [f"{findings.records:,} of {total:,} records read"]
    for name, count in sorted(findings.counts.items(), key=lambda pair: (pair[0].split(":")[0], -pair[1])):
        lines.append(f"  {name:<40}{count:>10,}")
    if findings.sizes:
        widths, heights = np.array(findings.sizes).T
        lines.append(f"{len(widths):,} images, width x height in pixels")
        for name, value in (("smallest", np.min), ("median", np.median), ("largest", np.max)):
            lines.append(f"  {name:<40}{f'{int(value(widths))} x {int(value(heights))}':>10}")
    for kind, what in (("image", "came before, as the same file or a copy"), ("record", "are copies of another")):
        copies = sum(n - 1 for name, n in findings.seen.items() if name.startswith(kind))
        lines.append(f"{copies:,} {kind}s that {what}")
    if findings.lengths:
        mean, most = np.mean(findings.lengths), max(findings.lengths)
        lines += [f"tokens per record: {mean:.0f} on average, at most {most:,}", histogram(findings.lengths)]
        lines += filter(None, [too_long(findings.lengths, positions).strip()])
    for kind, word in (("record", "records to learn nothing from"), ("image", "images that cannot be read")):
        lines.append(f"{findings.of_kind(kind):,} {word}")
        found = [line for line in findings.refused if line["kind"] == kind]
        lines += [f"  {line['reason']}" for line in found[:5]]
    return "\n".join(lines)


def verdict(findings: Findings, source_count: int) -> str | None:
    """The reason why a training would fail; None if it would not."""
    if count := findings.of_kind("record"):
        return f"{count:,} records cannot be trained on. Mend them, or train with --on_bad_record skip."
    most = most_bad_images(MAX_BAD_IMAGES, source_count)
    if (count := findings.of_kind("image")) > most:
        return f"{count:,} images cannot be read; --max_bad_images allows {most:,} unless it is raised."
    return "nothing to train on." if not findings.records else None


@command
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--data_path", nargs="+", required=True, help="as for train_llava.train")
    parser.add_argument("--caption_fields", nargs="+", help="as for train_llava.train")
    parser.add_argument("--image_folder", help="as for train_llava.train")
    parser.add_argument("--streaming", action="store_true", help="as for train_llava.train: copy no images")
    parser.add_argument("--model_name_or_path", help="count tokens as this LLaVA does")
    parser.add_argument("--sample", type=positive, help="look at this many records, drawn at random")
    parser.add_argument("--output_dir", type=Path, help="output/check_data/<name of the data> if not given")
    parser.add_argument("--workers", type=not_negative, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()

    paths = paths_of(args.data_path)
    if args.output_dir is None:
        args.output_dir = Path("output/check_data", "-".join(Path(path).absolute().name for path in paths))
    with output_folder(args.output_dir, args.model_name_or_path, args.image_folder, *paths):
        check_same({"data": args.data_path}, *(args.output_dir / name for name in WRITTEN))
        run_checks(args)


def run_checks(args: argparse.Namespace) -> None:
    """Checks, prints and writes the findings."""
    disable_progress_bars()
    encoder = positions = None
    if args.model_name_or_path:
        processor = load_processor(args.model_name_or_path)
        encoder = ChatEncoder(processor.tokenizer, tokens_per_image(processor), processor.chat_template)
        folder = fetch(args.model_name_or_path)
        if (folder / "config.json").is_file():  # not that of an adapter
            positions = max_positions(LlavaConfig.from_pretrained(folder))
    where = {"caption_fields": args.caption_fields, "streaming": args.streaming, "image_folder": args.image_folder}
    sources = [Source.find(path, **where) for path in args.data_path]
    opened = [source.open() for source in sources]
    records = concatenate_datasets(opened)
    for source, part in zip(sources, opened, strict=True):
        print(f"{source.path}: format {source.format}, {', '.join(Path(file).name for file in source.files[:LISTED])}")
        if files := source.files_read(part):
            print(files)
    if args.sample and args.sample < len(records):
        records = records.select(np.sort(np.random.default_rng(0).permutation(len(records))[: args.sample]))

    findings, interrupted = Findings(), False
    try:
        check(records, encoder, args.workers, findings)
    except KeyboardInterrupt:
        interrupted = True
    print(report(findings, len(records), positions))
    problem = verdict(findings, len(records))
    write(findings, problem, args)
    if interrupted:
        print(f"interrupted; so far: {problem or 'good'}", flush=True)
        raise SystemExit(INTERRUPTED)
    if problem:
        raise InputError(problem)
    print("verdict: good to train on")


def write(findings: Findings, problem: str | None, args: argparse.Namespace) -> None:
    """The files of the report."""
    facts = {"data": args.data_path, "records": findings.records, "problem": problem}
    report, refused, lengths = (args.output_dir / name for name in WRITTEN)
    write_whole(report, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write_whole(refused, json_lines(findings.refused))
    if findings.lengths:
        with whole_file(lengths) as new:
            draw(findings.lengths, new)
    print(f"written to {args.output_dir}: {report.name}, {refused.name}{f', {lengths.name}' * bool(findings.lengths)}")


if __name__ == "__main__":
    main()
