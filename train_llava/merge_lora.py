"""Adapter + base -> one plain LLaVA folder (model, projector, processor, chat template), checked after saving.

    python -m train_llava.merge_lora --adapter_name_or_path output/first --output_dir models/first

The folder keeps the base's dtype; an adapter trained with --load_in_4bit is merged into the base in full precision. The
weights are in memory once, and one layer in fp64 beside them; files are mapped, and go when memory is needed.
"""

import argparse
import resource
from pathlib import Path

import torch
from huggingface_hub import HfApi

from train_llava.cli import InputError, command, command_parser, output_folder
from train_llava.model.folder import CARD, check_output_dir, new_folder, save_llava, upload
from train_llava.model.generate import ask, collator_of, generate
from train_llava.model.load import base_of, fetch, load
from train_llava.model.verify_build import GREY, QUESTION, check_answers, check_weights
from train_llava.model.verify_merge import check_merge, check_mergeable
from train_llava.training.model_card import merged_card


@command
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--adapter_name_or_path", required=True, help="folder or hub id")
    parser.add_argument("--model_name_or_path", help="its base, where this is not where the adapter says")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --output_dir")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="upload the folder; log in with hf auth login")
    args = parser.parse_args()

    check_output_dir(args.output_dir, args.overwrite)
    adapter = fetch(args.adapter_name_or_path)
    base = args.model_name_or_path or base_of(adapter)
    check_mergeable(adapter, fetch(base))
    try:  # before the work, as this is where a missing login shows
        page = args.push_to_hub and HfApi().create_repo(args.push_to_hub, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--push_to_hub {args.push_to_hub}: {error}") from error
    with output_folder(args.output_dir, adapter, fetch(base)):
        merge(adapter, base, args)
    if page:
        upload(args.output_dir, args.push_to_hub)
        print(f"uploaded to {page}")


def merge(adapter: Path, base: str, args: argparse.Namespace) -> None:
    """Merges, saves and checks."""
    model, processor = load(base, adapter)
    before = generate(model, processor, [ask(QUESTION, [GREY])], max_new_tokens=8)[0]
    try:
        merged = model.merge_and_unload(safe_merge=True).cpu()  # beside the files it is compared with
    except (ValueError, RuntimeError) as error:  # such as a sum beyond fp16
        raise InputError(f"{adapter}: cannot be merged ({error}).") from error
    if merged.generation_config.eos_token_id is None:  # of a base saved by transformers 4: it would not stop
        merged.generation_config.eos_token_id = collator_of(processor).encoder.end_of_turn_id
    with new_folder(args.output_dir, args.overwrite) as folder:  # in its place only when all checks have passed
        save_llava(merged, processor, folder)
        card = merged_card(merged, args.output_dir, args.adapter_name_or_path, base)
        (folder / CARD).write_text(card, encoding="utf-8")
        print("saved, now reading it back", flush=True)
        adapted, dtype = check_merge(merged, fetch(base), adapter), merged.lm_head.weight.dtype
        print(f"{adapted} weights equal base + lora_alpha / r x B A within {dtype}, the others are equal bit for bit")
        print(f"{check_weights(folder, merged, None)} tensors in the folder are those compared", flush=True)
        del model, merged  # so that memory holds one copy at a time
        after = check_answers(folder).strip()
        if before != after and dtype == torch.float32:  # 16 bits may round one answer into another
            raise RuntimeError(f"{folder} answers {after!r} about a grey image, and {before!r} before")
    print(f"pipeline('image-text-to-text') answers about a grey image: {after!r}, and before the merge: {before!r}")
    print(f"saved to {args.output_dir}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
    print(f"at most {peak:.1f} GB of memory were used")


if __name__ == "__main__":
    main()
