"""Adapter + base -> one plain LLaVA folder (model, projector, processor, chat template), checked after saving.

    python -m train_llava.merge_lora --adapter_name_or_path output/first --output_dir models/first

The folder keeps the base's dtype; an adapter trained with --load_in_4bit is merged into the base in full precision. The
weights are in memory once, and one layer in fp64 beside them; files are mapped, and go when memory is needed.
"""

import resource
from pathlib import Path

from huggingface_hub import HfApi

from train_llava.cli import InputError, command, command_parser, output_folder
from train_llava.model.folder import CARD, check_output_dir, new_folder, upload
from train_llava.model.load import base_of, fetch
from train_llava.model.merge import merge
from train_llava.model.verify_merge import check_mergeable
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
        with new_folder(args.output_dir, args.overwrite) as folder:  # in its place only when all checks have passed
            components = merge(adapter, base, folder)
            name = page.repo_id if page else args.output_dir.resolve().name
            card = merged_card(components, name, args.adapter_name_or_path, base)
            (folder / CARD).write_text(card, encoding="utf-8")
        print(f"saved to {args.output_dir}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
        print(f"at most {peak:.1f} GB of memory were used")
    if page:
        upload(args.output_dir, args.push_to_hub)
        print(f"uploaded to {page}")


if __name__ == "__main__":
    main()
