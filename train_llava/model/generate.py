"""Questions about images -> the model's answers: one batch, any number of them, or a stream of pieces."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from threading import Event, Thread
from typing import Any

import torch
from transformers import LlavaProcessor, TextIteratorStreamer

from train_llava.cli import InputError
from train_llava.data import LlavaCollator
from train_llava.ingest.conversation import IMAGE_TOKEN, first_answer
from train_llava.ingest.records import TAGS
from train_llava.model.load import Model

Example = dict[str, Any]  # {"messages": ending with a user's turn, "images": [RGB images]}
SORTED = 4  # so many batches are read ahead, to put prompts of like length together
MAX_NEW_TOKENS = 256  # of an answer


def ask(prompt: str, images: list[Any]) -> Example:
    """A one-turn example. `<image>` in the prompt says where each image stands; without any, they come first.

    Raises:
        InputError: the prompt has some `<image>`, but not one per image.
    """
    if IMAGE_TOKEN not in prompt:
        prompt = f"{IMAGE_TOKEN}\n" * len(images) + prompt
    example = {"messages": [{"role": "user", "content": prompt}], "images": images}
    check_placeholders(example)
    return example


def check_placeholders(example: Example) -> None:
    """Refuses an example that has not one `<image>` per image."""
    count, images = sum(m["content"].count(IMAGE_TOKEN) for m in example["messages"]), len(example["images"])
    if count != images:
        raise InputError(f"the prompt has {count} {IMAGE_TOKEN}, but the number of images given is {images}.")


def generate(model: Model, processor: LlavaProcessor, examples: Sequence[Example], **options) -> list[str]:
    """The answers to one batch, greedy unless `options` (those of transformers' `generate`) say otherwise.

    Raises:
        InputError: not one `<image>` per image, a prompt too long for the model's positions, memory too small.
    """
    for example in examples:
        check_placeholders(example)
    collator = collator_of(processor)
    batch = collator.prompts(examples)
    batch = {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in batch.items()}
    length, positions = batch["input_ids"].shape[1], model.config.get_text_config().max_position_embeddings
    if length >= positions:
        raise InputError(f"the prompt takes {length} of the model's {positions} positions. Shorten it, or show less.")
    ends = ends_of_answer(model, processor)
    defaults = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id}
    options = {**defaults, "eos_token_id": sorted(ends), **options}
    options["max_new_tokens"] = min(options["max_new_tokens"], positions - length)
    try:
        with torch.inference_mode():
            ids = model.generate(**batch, **options)[:, length:]
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            less = "Lower --batch_size (--per_device_eval_batch_size), --max_new_tokens, or the number of images"
            raise InputError(f"out of memory. {less}.") from error
        raise
    return [answer.strip() for answer in processor.batch_decode(ids, skip_special_tokens=True)]


def ends_of_answer(model: Model, processor: LlavaProcessor) -> list[int]:
    """The ids that end an answer, that of the chat template first."""
    return collator_of(processor).encoder.ends(model.generation_config.eos_token_id)


@lru_cache(maxsize=2)
def collator_of(processor: LlavaProcessor) -> LlavaCollator:
    """Made once: its self-tests take longer than a prompt."""
    return LlavaCollator(processor)


def answers(
    model: Model, processor: LlavaProcessor, examples: Iterable[Example], batch_size: int = 16, **options
) -> Iterator[tuple[int, str]]:
    """(index, answer) of any number of examples, a batch at a time; prompts of like length together, longest first."""
    encoder, rest = collator_of(processor).encoder, enumerate(examples)
    while window := list(islice(rest, batch_size * SORTED)):
        window.sort(key=lambda pair: -len(encoder.encode(pair[1]["messages"], add_generation_prompt=True)[0]))
        for start in range(0, len(window), batch_size):
            indices, batch = zip(*window[start : start + batch_size], strict=True)
            yield from zip(indices, generate(model, processor, batch, **options), strict=True)


def stream(
    model: Model, processor: LlavaProcessor, example: Example, stop: Event | None = None, **options
) -> Iterator[str]:
    """The answer to one example in pieces, as they come; setting `stop`, or closing the iterator, ends it early."""
    stop, failed = stop or Event(), []
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def stopped(ids: torch.Tensor, *args) -> torch.Tensor:
        return torch.full(ids.shape[:1], stop.is_set(), device=ids.device)

    def run() -> None:
        try:
            generate(model, processor, [example], streamer=streamer, stopping_criteria=[stopped], **options)
        except Exception as error:
            failed.append(error)
            streamer.end()

    thread = Thread(target=run)
    thread.start()
    try:
        yield from filter(None, streamer)
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def first_question(example: dict[str, Any]) -> tuple[Example, dict[str, Any]]:
    """The example up to its first answer to a question, and of a row: id, image (the first, or None), prompt,
    reference, and what the record says about how it is scored."""
    first = first_answer(example["messages"])
    prompt, reference = example["messages"][:first], example["messages"][first]["content"]
    shown = sum(message["content"].count(IMAGE_TOKEN) for message in prompt)
    row = {"id": example["id"], "image": next(iter(example["images"]), None), "prompt": prompt[-1]["content"]}
    tags = {name: example[name] for name in TAGS if example.get(name)}
    return {"messages": prompt, "images": example["images"][:shown]}, {**row, "reference": reference.strip(), **tags}


def caption_rows(
    model: Model, processor: LlavaProcessor, examples: Iterable[dict[str, Any]], **options
) -> list[dict[str, Any]]:
    """Asks each example's first question; one row per example: id, image, prompt, reference, caption, exact, and what
    the record says about how it is scored (answers, metric, category).

    `options` are those of `answers`.
    """
    rows = []

    def questions() -> Iterator[Example]:
        for example in examples:
            question, row = first_question(example)
            rows.append(row)
            yield question

    was_training = model.training
    model.eval()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):  # not of other ranks' GPUs
        for i, caption in answers(model, processor, questions(), **{"max_new_tokens": 64, **options}):
            row = rows[i]
            row |= {"caption": caption, "exact": caption in row.get("answers", [row["reference"]])}
    model.train(was_training)
    return rows
