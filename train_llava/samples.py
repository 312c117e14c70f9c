"""Sample captions while a model trains: picture, prompt, answer and reference, printed, drawn, in TensorBoard."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.tensorboard import SummaryWriter
from transformers import LlavaProcessor, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from train_llava.chat import IMAGE_TOKEN
from train_llava.fonts import font_for, wrapped
from train_llava.formats import first_answer
from train_llava.infer import Example, answers
from train_llava.load import Model

COUNT, LOOKED_AT = 4, 200  # the first records that have a picture: nobody chose them; a stream has no end
TILE, CAPTION = 260, 140  # pixels: a picture's side, and the height of the text under it
INK, RIGHT, WRONG = (90, 90, 90), (20, 110, 50), (190, 30, 30)


class SampleCaptions(TrainerCallback):
    """Asks about the same few records every `steps` steps; greedily, so the run's random state is left alone.

    `pause` is entered meanwhile, as this is not training.
    """

    def __init__(
        self,
        dataset: Iterable[dict[str, Any]],
        processor: LlavaProcessor,
        steps: int,
        pause: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.processor, self.steps, self.pause = processor, steps, pause
        looked_at: list[dict[str, Any]] = []
        for example in islice(dataset, LOOKED_AT):
            looked_at.append(example)
            if sum(bool(one["images"]) for one in looked_at) == COUNT:
                break
        looked_at.sort(key=lambda example: not example["images"])  # text where there are no pictures
        self.examples = looked_at[:COUNT]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # under ZeRO-3 every rank holds a part of the weights and must take part
        if state.global_step % self.steps or not (state.is_world_process_zero or is_deepspeed_zero3_enabled()):
            return
        with self.pause():
            rows = caption_rows(kwargs["model"], self.processor, self.examples)
            if state.is_world_process_zero:
                self._show(rows, state.global_step, Path(args.output_dir), "tensorboard" in args.report_to)

    def _show(self, rows: list[dict[str, Any]], step: int, folder: Path, tensorboard: bool) -> None:
        for row in rows:
            reference = "" if row["exact"] else f"   (reference: {row['reference']})"
            print(f"  {row['id']}: {row['caption']}{reference}", flush=True)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        draw_sheet(rows).save(folder / "samples" / f"step_{step:06}.png")
        if tensorboard:
            with SummaryWriter(str(folder / "runs" / "samples")) as writer:
                for row in rows:  # a card each: on a sheet TensorBoard would show them too small to read
                    card = np.asarray(draw_sheet([row]))
                    writer.add_image(f"samples/{row['id']}", card, step, dataformats="HWC")
                text = "\n\n".join(f"{row['prompt']}\n\n**{row['caption']}**\n\n{row['reference']}" for row in rows)
                writer.add_text("samples", text, step)


def first_question(example: dict[str, Any]) -> tuple[Example, dict[str, Any]]:
    """The example up to its first answer to a question, and of a row: id, image (the first, or None), prompt,
    reference."""
    first = first_answer(example["messages"])
    prompt, reference = example["messages"][:first], example["messages"][first]["content"]
    shown = sum(message["content"].count(IMAGE_TOKEN) for message in prompt)
    row = {"id": example["id"], "image": next(iter(example["images"]), None), "prompt": prompt[-1]["content"]}
    return {"messages": prompt, "images": example["images"][:shown]}, {**row, "reference": reference.strip()}


def caption_rows(
    model: Model, processor: LlavaProcessor, examples: Iterable[dict[str, Any]], **options
) -> list[dict[str, Any]]:
    """Asks each example's first question; one row per example: id, image, prompt, reference, caption, exact.

    `options` are those of `infer.answers`.
    """
    rows = []

    def questions() -> Iterator[Example]:
        for example in examples:
            question, row = first_question(example)
            rows.append(row)
            yield question

    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        for i, caption in answers(model, processor, questions(), **{"max_new_tokens": 64, **options}):
            rows[i] |= {"caption": caption, "exact": caption == rows[i]["reference"]}
    model.train(was_training)
    return rows


def draw_sheet(rows: list[dict[str, Any]]) -> Image.Image:
    """Pictures with the model's caption under each: where a row says whether it is `exact`, green if it is, else red
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
