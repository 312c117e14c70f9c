"""Asks a trained LLaVA about pictures.

    python -m train_llava.infer --model_name_or_path output/first --image cat.jpg --prompt "What is this?"

The folder may be a whole model, or an adapter that knows its base (--adapter_name_or_path adds one explicitly).
"""

import argparse
from typing import Any

import torch
from transformers import LlavaProcessor, TextStreamer

from train_llava.chat import IMAGE_TOKEN
from train_llava.command import InputError, command
from train_llava.data import LlavaCollator
from train_llava.images import open_image
from train_llava.load import Model, load


def ask(prompt: str, images: list[Any]) -> dict[str, Any]:
    """A one-turn example for `generate`. `<image>` in the prompt says where each picture stands; without any, first.

    Raises:
        InputError: the prompt has some `<image>`, but not one per picture.
    """
    if IMAGE_TOKEN not in prompt:
        prompt = f"{IMAGE_TOKEN}\n" * len(images) + prompt
    if (count := prompt.count(IMAGE_TOKEN)) != len(images):
        raise InputError(f"the prompt has {count} {IMAGE_TOKEN}, but the number of pictures given is {len(images)}.")
    return {"messages": [{"role": "user", "content": prompt}], "images": images}


@torch.inference_mode()
def generate(model: Model, processor: LlavaProcessor, examples: list[dict[str, Any]], **kwargs) -> list[str]:
    """Answers to examples (`messages` ending with a user's turn, `images`), greedy unless kwargs say otherwise."""
    batch = LlavaCollator(processor).prompts(examples).items()
    batch = {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in batch}
    ids = model.generate(**batch, **{"max_new_tokens": 256, "do_sample": False, **kwargs})
    answers = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="LLaVA folder, or adapter folder")
    parser.add_argument("--adapter_name_or_path", help="adapter to put on top of the model")
    parser.add_argument("--image", nargs="+", action="extend", default=[], help="picture files, in order")
    parser.add_argument("--prompt", default="Describe this picture in one sentence.")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    args = parser.parse_args()

    example = ask(args.prompt, [open_image(path) for path in args.image])
    model, processor = load(args.model_name_or_path, args.adapter_name_or_path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)  # prints as words come
    generate(model, processor, [example], max_new_tokens=args.max_new_tokens, streamer=streamer)


if __name__ == "__main__":
    main()
