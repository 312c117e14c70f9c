"""Sample captions while a model trains: image, prompt, answer and reference, printed, drawn, and in trackers."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import LlavaProcessor, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from train_llava.model.generate import caption_rows
from train_llava.pages.caption_sheet import draw_sheet
from train_llava.training.trackers import TRACKERS

COUNT, PROBED = 4, 200  # the first records that have an image, as nobody chose them, among so many


class LogGenerationsCallback(TrainerCallback):
    """Answers the same few records every `steps` steps, greedily, so that the run's random state stays as it is.

    `pause` is entered meanwhile: this time is not training.
    """

    def __init__(
        self,
        dataset: Iterable[dict[str, Any]],
        processor: LlavaProcessor,
        steps: int,
        pause: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.processor, self.steps, self.pause = processor, steps, pause
        first: list[dict[str, Any]] = []
        for example in islice(dataset, PROBED):
            first.append(example)
            if sum(bool(one["images"]) for one in first) == COUNT:
                break
        first.sort(key=lambda example: not example["images"])  # text where there are no images
        self.examples = first[:COUNT]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        without = sorted(set(args.report_to) - TRACKERS.keys())
        if without and state.is_world_process_zero:
            shown = f"{', '.join(TRACKERS)} and {Path(args.output_dir) / 'samples'} show them"
            print(f"--sample_steps: {', '.join(without)} gets numbers alone, no sample images; {shown}", flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # under ZeRO-3 every rank holds a part of the weights and must take part
        if state.global_step % self.steps or not (state.is_world_process_zero or is_deepspeed_zero3_enabled()):
            return
        with self.pause():
            rows = caption_rows(kwargs["model"], self.processor, self.examples)
            if state.is_world_process_zero:
                self._show(rows, state.global_step, Path(args.output_dir), args.report_to)

    def _show(self, rows: list[dict[str, Any]], step: int, folder: Path, report_to: list[str]) -> None:
        for row in rows:
            reference = "" if row["exact"] else f"   (reference: {row['reference']})"
            print(f"  {row['id']}: {row['caption']}{reference}", flush=True)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        draw_sheet(rows).save(folder / "samples" / f"step_{step:06}.png")
        # a card each: on a sheet trackers would show them too small to read
        cards = {f"samples/{row['id']}": (draw_sheet([row]), texts_of(row)) for row in rows}
        for name in TRACKERS.keys() & report_to:
            TRACKERS[name](cards, step, folder)


def texts_of(row: dict[str, Any]) -> str:
    """Prompt, answer and reference in Markdown."""
    return f"{row['prompt']}\n\n**{row['caption']}**\n\n{row['reference']}"
