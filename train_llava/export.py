"""A LLaVA -> the files that another program serves it from: llama.cpp, Ollama or vLLM.

    python -m train_llava.export --model_name_or_path models/mine --format gguf --output_dir models/mine-gguf

gguf    model.gguf (language model, tokenizer, chat template) and mmproj.gguf (tower and projector), for llama.cpp
ollama  the same two and a Modelfile, for `ollama create NAME -f Modelfile`
vllm    the folder again, with the names of weights that vLLM reads

An adapter is merged into its base on the way. Weights keep the values they are stored with. What differs there from
here, such as what becomes of an image that is not square: docs/serving.md.
"""

import argparse
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from transformers import LlavaConfig, LlavaProcessor

from train_llava.cli import InputError, command, command_parser, output_folder
from train_llava.model.config import load_llava_config
from train_llava.model.folder import check_output_dir, new_folder
from train_llava.model.generate import collator_of, ends_of_answer
from train_llava.model.load import base_and_adapter, fetch, load, processor_of
from train_llava.model.merge import merge
from train_llava.model.older_names import copy_with_older_names
from train_llava.model.structure import has_cls
from train_llava.model.verify_merge import check_mergeable
from train_llava.processing.images import FRAMINGS, FastImageProcessor
from train_llava.processing.modelfile import modelfile, openings

LANGUAGE_FILE, VISION_FILE, MODELFILE = "model.gguf", "mmproj.gguf", "Modelfile"
MERGED = "merged"  # a folder inside the output, until the end


@command
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="whole LLaVA or adapter: a folder or a hub id")
    parser.add_argument("--adapter_name_or_path", help="adapter to merge into the model")
    parser.add_argument("--format", required=True, choices=("gguf", "ollama", "vllm"))
    parser.add_argument("--output_dir", required=True, type=Path)
    args = parser.parse_args()

    check_output_dir(args.output_dir, overwrite=False)
    base, adapter = base_and_adapter(args.model_name_or_path, args.adapter_name_or_path)
    source = fetch(base)
    if adapter:
        check_mergeable(adapter, source)
    config, processor = load_llava_config(source), processor_of(source, adapter)
    if args.format != "vllm":
        check_gguf(config, processor, args)
    needed = sum(path.stat().st_size for path in source.iterdir() if path.is_file())
    with (
        output_folder(args.output_dir, source, adapter),
        new_folder(args.output_dir, needed=needed * (2 if adapter else 1)) as folder,
    ):
        if not adapter:
            write(source, folder, args.format)
        else:
            merge(adapter, base, folder / MERGED)
            write(folder / MERGED, folder, args.format)
            shutil.rmtree(folder / MERGED)
    print(f"saved to {args.output_dir}")


def check_gguf(config: LlavaConfig, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Refuses what llama.cpp would compute in another way, before any weight is loaded.

    Raises:
        InputError: names what it is, see also `openings`; or the package gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise InputError("--format gguf and ollama need gguf: pip install gguf (the extra train_llava[export])")
    from train_llava.model.gguf_language import unsupported_language_model
    from train_llava.model.gguf_vision import CLASS_TOKEN, unsupported_vision
    from train_llava.model.gguf_vocabulary import unsupported_tokenizer

    source = args.model_name_or_path
    reason = unsupported_language_model(config.text_config) or unsupported_vision(config, processor)
    if reason := reason or unsupported_tokenizer(processor.tokenizer):
        raise InputError(
            f"{source}: cannot be exported to llama.cpp: {reason}. Serve it in another way: docs/serving.md"
        )
    if has_cls(config.vision_config):
        if args.format == "ollama":  # which nobody builds anew
            raise InputError(f"{source}: {CLASS_TOKEN}. Ollama has the same code. Use llama.cpp, or a SigLIP tower.")
        print(f"warning: {CLASS_TOKEN}. A SigLIP tower has no such trouble.", file=sys.stderr)
    if args.format == "ollama":
        openings(collator_of(processor).encoder.template)
    framing = FRAMINGS[FastImageProcessor(processor.image_processor).framing()]
    print(
        f"warning: images that are not square: this model has learned to see {framing}; llama.cpp brings them to a "
        "square in its own way. What to do with them first: docs/serving.md",
        file=sys.stderr,
    )


def write(source: Path, folder: Path, form: str) -> None:
    """Writes a whole model as vLLM's folder, or as the two files of llama.cpp; for Ollama a third, which names them."""
    if form == "vllm":
        print(f"{copy_with_older_names(source, folder)} weights have the names of transformers 4 there")
        return
    from train_llava.model.gguf_language import write_language_model
    from train_llava.model.gguf_vision import write_vision

    model, processor = load(source)
    if form == "ollama":
        ends = processor.tokenizer.convert_ids_to_tokens(ends_of_answer(model, processor))
        text = modelfile(collator_of(processor).encoder.template, [LANGUAGE_FILE, VISION_FILE], ends)
        (folder / MODELFILE).write_text(text, encoding="utf-8")
    write_language_model(model, processor, folder / LANGUAGE_FILE)
    write_vision(model, processor, folder / VISION_FILE)


if __name__ == "__main__":
    main()
