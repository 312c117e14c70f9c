"""Shows what the model really gets, as one HTML page: images as the tower gets them, tokens, labels, padding.

    python -m train_llava.show_batch --model_name_or_path models/llava --data_path data/mine --output batch.html

In a notebook: `IPython.display.HTML(batch_page(processor, [dataset[0], dataset[1]]))`.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from transformers import LlavaProcessor

from train_llava.cli import InputError, check_apart, command, command_parser, positive, whole_file
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.ingest.data_files import paths_of
from train_llava.model.load import load_processor
from train_llava.pages.thumbnails import png
from train_llava.processing.chat import IGNORE_INDEX
from train_llava.processing.images import PixelBytes

TEMPLATE = Path(__file__).parent / "pages" / "show_batch.html.jinja"
MARK = b"<title>What the model sees</title>"  # in it


def batch_page(processor: LlavaProcessor, examples: list[dict[str, Any]], max_length: int | None = None) -> str:
    """The batch that the collator makes of some examples, as a self-contained page."""
    collator = LlavaCollator(processor, max_length, for_trainer=True)
    batch = collator(examples)
    images = iter(visible(batch["pixel_values"]))
    image_id, per_image = collator.encoder.image_ids[0], len(collator.encoder.image_ids)
    rows, totals = [], dict.fromkeys(("learned", "image", "read", "padding"), 0)
    for i, example in enumerate(examples):
        ids, labels = (batch[name][i].tolist() for name in ("input_ids", "labels"))
        own = len(collator.encoder.encode(example["messages"])[0])  # what follows is padding
        kinds = [kind_of(*token, k < own, image_id) for k, token in enumerate(zip(ids, labels, strict=True))]
        for kind in kinds:
            totals[kind] += 1
        own_images = [png(next(images)) for _ in range(kinds.count("image") // per_image)]
        spans = [span for kind, part in groupby(zip(ids, kinds, strict=True), key=lambda pair: pair[1])
                 for span in spans_of(kind, [token for token, _ in part], collator)]  # fmt: skip
        learned = kinds.count("learned")
        row = {"id": example.get("id", i), "images": own_images, "spans": spans, "learned": learned, "tokens": own}
        rows.append(row)
    names = {"learned": "learned", "image": "image tokens", "read": "other text, read only", "padding": "padding"}
    summary = [(names[kind], count) for kind, count in totals.items()]
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(rows=rows, summary=summary, total=sum(totals.values()), length=len(ids))


def visible(pixels: PixelBytes | torch.Tensor) -> list[np.ndarray]:
    """Images as people can see them, (height, width, 3) bytes each; numbers that only the image processor can make are
    stretched from black to white."""
    if isinstance(pixels, PixelBytes):
        return [*pixels.data.numpy()]
    lows, highs = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
    stretched = (pixels - lows) / (highs - lows).clamp(min=1e-9) * 255
    return [*stretched.round().byte().permute(0, 2, 3, 1).numpy()]


def kind_of(token: int, label: int, seen: bool, image_id: int) -> str:
    """The kind of a position: padding behind the conversation, part of an image, learned, or only read."""
    if not seen:
        return "padding"
    return "image" if token == image_id else "learned" if label != IGNORE_INDEX else "read"


def spans_of(kind: str, ids: list[int], collator: LlavaCollator) -> list[dict[str, Any]]:
    """Neighbouring tokens of one kind as pieces of text: one for an image, one for padding, else one per token."""
    if kind == "padding":
        return [{"kind": kind, "text": f"padding x {len(ids)}", "ids": ""}]
    if kind == "image":
        per_image = len(collator.encoder.image_ids)
        return [{"kind": kind, "text": f"<image> x {per_image}", "ids": ids[0]}] * (len(ids) // per_image)
    special = set(collator.encoder.special_ids.values())
    spans, held = [], []
    for token in ids:
        held.append(token)
        text = collator.tokenizer.decode(held)
        if text.endswith("\ufffd") and len(held) < 4:
            continue  # a character may be several tokens of bytes
        names = " ".join([kind if kind == "learned" else "", "special" if token in special else ""])
        spans.append({"kind": names, "text": text.replace("\n", "⏎\n"), "ids": held})
        held = []
    return spans


@command
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="a LLaVA folder; only its processor is read")
    parser.add_argument("--data_path", nargs="+", required=True, help="as for train_llava.train")
    parser.add_argument("--caption_fields", nargs="+", help="as for train_llava.train")
    parser.add_argument("--image_folder", help="as for train_llava.train")
    parser.add_argument("--streaming", action="store_true", help="as for train_llava.train: copy no images")
    parser.add_argument("--held_out", action="store_true", help="of the held-out files, as --eval_data_path takes them")
    parser.add_argument("--model_max_length", type=positive, help="as for train_llava.train")
    parser.add_argument("--samples", type=positive, default=6, help="how many, drawn at random")
    parser.add_argument("--output", type=Path, default=Path("output/batch.html"))
    args = parser.parse_args()

    paths = paths_of(args.data_path)
    check_apart(args.output, args.model_name_or_path, args.image_folder, *paths, is_file=True)
    if args.output.exists() and not (args.output.is_file() and MARK in args.output.read_bytes()[:1000]):
        raise InputError(f"{args.output} is no page of this command. Give another --output.")
    with whole_file(args.output) as new:
        processor = load_processor(args.model_name_or_path)
        options = {"caption_fields": args.caption_fields, "streaming": args.streaming, "held_out": args.held_out}
        options["image_folder"] = args.image_folder
        dataset = LlavaDataset(args.data_path, on_bad_record="skip", **options)
        print(dataset.summary())
        indices = np.random.default_rng(0).permutation(len(dataset))[: args.samples]
        examples = [dataset[int(index)] for index in indices]
        new.write_text(batch_page(processor, examples, args.model_max_length), encoding="utf-8")
    print(f"{len(examples)} samples in {args.output}; open it in a browser")


if __name__ == "__main__":
    main()
