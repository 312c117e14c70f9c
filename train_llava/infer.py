"""Asks a trained LLaVA about images: one question, one about each of many images, or a chat.

    python -m train_llava.infer --model_name_or_path output/first --image cat.jpg --prompt "What is this?"
    python -m train_llava.infer --model_name_or_path output/first --images images --output_file answers.jsonl
    python -m train_llava.infer --model_name_or_path output/first --interactive

The model may be a folder or a hub id, of a whole model or of an adapter that knows its base (--adapter_name_or_path
adds one explicitly). A second run with the same --output_file asks only the questions that this model, with these
options, has not answered in it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image
from tqdm import tqdm
from transformers import LlavaProcessor

from train_llava.cli import (
    InputError,
    check_apart,
    command,
    command_parser,
    json_lines,
    not_negative,
    number,
    open_locked,
    positive,
)
from train_llava.ingest.questions import Question, answered, questions
from train_llava.model.generate import Example, answers, ask, stream
from train_llava.model.load import Model, load, weights_digest
from train_llava.processing.images import open_image

temperature = number(float, 0, 100, "a number from 0 to 100")
share = number(float, 1e-9, 1, "a number above 0, at most 1")
CHAT_HELP = "/image FILE shows an image with the next question, /new starts over, /quit ends"


def print_answer(pieces: Iterator[str]) -> str:
    """Prints an answer as it comes, until it ends or Ctrl-C ends it; returns the answer."""
    answer = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            answer += piece
    except KeyboardInterrupt:
        pieces.close()
    print()
    return answer.strip()


def chat(model: Model, processor: LlavaProcessor, images: list[Image.Image], **options) -> None:
    """A conversation over stdin and stdout; the first question is about the images given."""
    print(CHAT_HELP, file=sys.stderr)
    history = {"messages": [], "images": []}
    for line in iter(lambda: input("> ").strip(), "/quit"):
        try:
            if line == "/new":
                history, images = {"messages": [], "images": []}, []
            elif line.startswith("/image "):
                images = [*images, open_image(line.removeprefix("/image ").strip())]
            elif line.startswith("/"):
                raise InputError(CHAT_HELP)
            elif line:
                question = ask(line, images)
                conversation = {name: history[name] + question[name] for name in history}
                answer = print_answer(stream(model, processor, conversation, **options))
                conversation["messages"].append({"role": "assistant", "content": answer})
                history, images = conversation, []
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def answer_all(
    model: Model, processor: LlavaProcessor, left: list[Question], folder: Path, file: BinaryIO, **options
) -> None:
    """Asks questions about images of a folder, and adds a JSON line for each answer to a file.

    Raises:
        InputError: at the end, when images could not be read.
    """
    given, bad = [], []

    def examples() -> Iterator[Example]:
        for question in left:
            names = question["image"] if isinstance(question["image"], list) else [question["image"]]
            try:
                example = ask(question["prompt"], [open_image(folder / name) for name in names])
            except InputError as error:
                bad.append(error)
                continue
            given.append(question)
            yield example

    with tqdm(total=len(left), unit="answers", disable=None) as progress:
        for index, answer in answers(model, processor, examples(), **options):
            line = json_lines([{**given[index], "answer": answer}])
            file.write(line.encode(errors="backslashreplace"))
            file.flush()
            progress.update()
    if bad:
        raise InputError(f"{len(bad)} of {len(left)} could not be asked, the first: {bad[0]} All others are answered.")


@command
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="LLaVA or adapter: a folder or a hub id")
    parser.add_argument("--adapter_name_or_path", help="adapter to put on top of the model")
    parser.add_argument("--image", nargs="+", action="extend", default=[], help="image files of one question, in order")
    parser.add_argument("--images", type=Path, help="folder of images, or list of them, each asked about")
    parser.add_argument("--output_file", type=Path, help="where the answers about --images go, as JSON lines")
    parser.add_argument("--batch_size", type=positive, default=16, help="how many of --images are asked about together")
    parser.add_argument("--interactive", action="store_true", help="chat; " + CHAT_HELP)
    parser.add_argument("--prompt", default="Describe this image in one sentence.")
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
        every_question = questions(args.images, args.prompt)
        read = (args.images, args.model_name_or_path, args.adapter_name_or_path)
        check_apart(args.output_file, *read, is_file=True)
        with open_locked(args.output_file) as file:
            done = answered(args.output_file)
            answer_images(args, every_question, done, file, options)
        return
    images = [open_image(path) for path in args.image]
    example = None if args.interactive else ask(args.prompt, images)
    if example and not images:
        print("no --image: asked about none", file=sys.stderr)
    model, processor = load(args.model_name_or_path, args.adapter_name_or_path)
    torch.manual_seed(args.seed)
    if example:
        print_answer(stream(model, processor, example, **options))
        return
    with suppress(EOFError, KeyboardInterrupt):
        chat(model, processor, images, **options)


def answer_images(
    args: argparse.Namespace, every_question: list[Question], done: set[str], file: BinaryIO, options: dict[str, Any]
) -> None:
    """Loads the model and asks the questions that it has not answered yet, about the same folder, with these options.

    Args:
        args: the command line.
        every_question: of the folder or list.
        done: those that the file has answers to, as JSON.
        file: to which answers are added.
        options: of `generate`.
    """
    model, processor = load(args.model_name_or_path, args.adapter_name_or_path)
    torch.manual_seed(args.seed)
    folder = args.images if args.images.is_dir() else args.images.parent
    names = {"model": args.model_name_or_path, "adapter": args.adapter_name_or_path, "weights": weights_digest(model)}
    about = {"folder": str(folder.resolve()), **names, "options": options | {"seed": args.seed}}
    left = [question | about for question in every_question if json.dumps(question | about) not in done]
    count = f"{len(every_question) - len(left)} of {len(every_question)}"
    print(f"{count} questions are answered in {args.output_file}", file=sys.stderr)
    answer_all(model, processor, left, folder, file, batch_size=args.batch_size, **options)


if __name__ == "__main__":
    main()
