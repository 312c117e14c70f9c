"""Asks a trained LLaVA about pictures: once, about each of many, or in a chat.

    python -m train_llava.infer --model_name_or_path output/first --image cat.jpg --prompt "What is this?"
    python -m train_llava.infer --model_name_or_path output/first --images pictures --output_file answers.jsonl
    python -m train_llava.infer --model_name_or_path output/first --interactive

The model may be a folder or a hub id, of a whole model or of an adapter that knows its base (--adapter_name_or_path
adds one explicitly). A second run with the same --output_file asks only about what this model, with these options, has
not answered in it about this folder's pictures.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from typing import Any, BinaryIO

import torch
from PIL import Image
from tqdm import tqdm
from transformers import LlavaProcessor, TextIteratorStreamer

from train_llava.chat import IMAGE_TOKEN
from train_llava.command import InputError, command, not_negative, number, positive
from train_llava.data import LlavaCollator
from train_llava.images import open_image
from train_llava.load import Model, load
from train_llava.outputs import check_apart, open_locked
from train_llava.questions import Question, answered, questions, weights_of

Example = dict[str, Any]  # {"messages": ending with a user's turn, "images": [RGB pictures]}
SORTED = 4  # so many batches are read ahead, to put prompts of like length together
temperature = number(float, 0, 100, "a number from 0 to 100")
share = number(float, 1e-9, 1, "a number above 0, at most 1")
HELP = "/image FILE shows a picture with the next question, /new starts over, /quit ends"


def ask(prompt: str, images: list[Any]) -> Example:
    """A one-turn example. `<image>` in the prompt says where each picture stands; without any, they come first.

    Raises:
        InputError: the prompt has some `<image>`, but not one per picture.
    """
    if IMAGE_TOKEN not in prompt:
        prompt = f"{IMAGE_TOKEN}\n" * len(images) + prompt
    example = {"messages": [{"role": "user", "content": prompt}], "images": images}
    check_placeholders(example)
    return example


def check_placeholders(example: Example) -> None:
    """Refuses an example that has not one `<image>` per picture."""
    count, images = sum(m["content"].count(IMAGE_TOKEN) for m in example["messages"]), len(example["images"])
    if count != images:
        raise InputError(f"the prompt has {count} {IMAGE_TOKEN}, but the number of pictures given is {images}.")


def generate(model: Model, processor: LlavaProcessor, examples: Sequence[Example], **options) -> list[str]:
    """The answers to one batch, greedy unless `options` (those of transformers' `generate`) say otherwise.

    Raises:
        InputError: not one `<image>` per picture, a prompt too long for the model's positions, memory too small.
    """
    for example in examples:
        check_placeholders(example)
    collator = collator_of(processor)
    batch = collator.prompts(examples)
    batch = {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in batch.items()}
    length, positions = batch["input_ids"].shape[1], model.config.get_text_config().max_position_embeddings
    if length >= positions:
        raise InputError(f"the prompt takes {length} of the model's {positions} positions. Shorten it, or show less.")
    ends = model.generation_config.eos_token_id or []
    ends = {collator.encoder.end_of_turn_id, *(ends if isinstance(ends, list) else [ends])}
    defaults = {"max_new_tokens": 256, "do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id}
    options = {**defaults, "eos_token_id": sorted(ends), **options}
    options["max_new_tokens"] = min(options["max_new_tokens"], positions - length)
    try:
        with torch.inference_mode():
            ids = model.generate(**batch, **options)[:, length:]
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise InputError(
                "out of memory. Lower --batch_size or --max_new_tokens, or show fewer pictures."
            ) from error
        raise
    return [answer.strip() for answer in processor.batch_decode(ids, skip_special_tokens=True)]


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

    def told(ids: torch.Tensor, *args) -> torch.Tensor:
        return torch.full(ids.shape[:1], stop.is_set(), device=ids.device)

    def work() -> None:
        try:
            generate(model, processor, [example], streamer=streamer, stopping_criteria=[told], **options)
        except Exception as error:
            failed.append(error)
            streamer.end()

    thread = Thread(target=work)
    thread.start()
    try:
        yield from filter(None, streamer)
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def show(pieces: Iterator[str]) -> str:
    """Prints an answer as it comes, until it ends or Ctrl-C ends it; returns it."""
    said = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            said += piece
    except KeyboardInterrupt:
        pieces.close()
    print()
    return said.strip()


def chat(model: Model, processor: LlavaProcessor, shown: list[Image.Image], **options) -> None:
    """A conversation over stdin and stdout; the first question is about the pictures given."""
    print(HELP, file=sys.stderr)
    history = {"messages": [], "images": []}
    for line in iter(lambda: input("> ").strip(), "/quit"):
        try:
            if line == "/new":
                history, shown = {"messages": [], "images": []}, []
            elif line.startswith("/image "):
                shown = [*shown, open_image(line.removeprefix("/image ").strip())]
            elif line.startswith("/"):
                raise InputError(HELP)
            elif line:
                question = ask(line, shown)
                asked = {name: history[name] + question[name] for name in history}
                answer = show(stream(model, processor, asked, **options))
                asked["messages"].append({"role": "assistant", "content": answer})
                history, shown = asked, []
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def answer_all(
    model: Model, processor: LlavaProcessor, left: list[Question], folder: Path, file: BinaryIO, **options
) -> None:
    """Asks about pictures of a folder, and adds a JSON line per answer to a file.

    Raises:
        InputError: at the end, when pictures could not be read.
    """
    asked, bad = [], []

    def examples() -> Iterator[Example]:
        for question in left:
            names = question["image"] if isinstance(question["image"], list) else [question["image"]]
            try:
                example = ask(question["prompt"], [open_image(folder / name) for name in names])
            except InputError as error:
                bad.append(error)
                continue
            asked.append(question)
            yield example

    with tqdm(total=len(left), unit="answers") as progress:
        for index, answer in answers(model, processor, examples(), **options):
            line = json.dumps({**asked[index], "answer": answer}, ensure_ascii=False) + "\n"
            file.write(line.encode(errors="backslashreplace"))
            file.flush()
            progress.update()
    if bad:
        raise InputError(f"{len(bad)} of {len(left)} could not be asked, the first: {bad[0]} All others are answered.")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="LLaVA or adapter: a folder or a hub id")
    parser.add_argument("--adapter_name_or_path", help="adapter to put on top of the model")
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], help="picture files of one question, in order"
    )
    parser.add_argument("--images", type=Path, help="folder of pictures, or list of them, each asked about")
    parser.add_argument("--output_file", type=Path, help="where the answers about --images go, as JSON lines")
    parser.add_argument("--batch_size", type=positive, default=16, help="how many of --images are asked about together")
    parser.add_argument("--interactive", action="store_true", help="chat; " + HELP)
    parser.add_argument("--prompt", default="Describe this picture in one sentence.")
    parser.add_argument("--max_new_tokens", type=positive, default=256)
    parser.add_argument("--temperature", type=temperature, default=0.0, help="above 0: sample; 0: the likeliest word")
    parser.add_argument("--top_p", type=share, default=1.0, help="sample from the likeliest words of this total")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the sampling")
    args = parser.parse_args()
    if bool(args.images) != bool(args.output_file) or (args.images and (args.image or args.interactive)):
        parser.error("--images goes with --output_file, and not with --image or --interactive")

    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:  # top_k: transformers would keep the likeliest 50 on its own account
        options |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    if args.images:
        asked = questions(args.images, args.prompt)
        read = (args.images, args.model_name_or_path, args.adapter_name_or_path)
        check_apart(args.output_file, *read, is_file=True)
        with open_locked(args.output_file) as file:
            done = answered(args.output_file)
            answer_images(args, asked, done, file, options)
        return
    images = [open_image(path) for path in args.image]
    example = None if args.interactive else ask(args.prompt, images)
    if example and not images:
        print("no --image: asked about none", file=sys.stderr)
    model, processor = load(args.model_name_or_path, args.adapter_name_or_path)
    torch.manual_seed(args.seed)
    if example:
        show(stream(model, processor, example, **options))
        return
    with suppress(EOFError, KeyboardInterrupt):
        chat(model, processor, images, **options)


def answer_images(
    args: argparse.Namespace, asked: list[Question], done: set[str], file: BinaryIO, options: dict[str, Any]
) -> None:
    """Loads the model, and asks about --images what is not answered yet: about the same folder, by this model, with
    these options."""
    model, processor = load(args.model_name_or_path, args.adapter_name_or_path)
    torch.manual_seed(args.seed)
    folder = args.images if args.images.is_dir() else args.images.parent
    names = {"model": args.model_name_or_path, "adapter": args.adapter_name_or_path, "weights": weights_of(model)}
    about = {"folder": str(folder.resolve()), **names, "options": options | {"seed": args.seed}}
    left = [question | about for question in asked if json.dumps(question | about) not in done]
    print(f"{len(asked) - len(left)} of {len(asked)} questions are answered in {args.output_file}", file=sys.stderr)
    answer_all(model, processor, left, folder, file, batch_size=args.batch_size, **options)


if __name__ == "__main__":
    main()
