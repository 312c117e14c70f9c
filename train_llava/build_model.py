"""CLIP folder + chat model folder -> LLaVA folder (model, processor, chat template), checked after saving.

    python -m train_llava.build_model --vision_model_name_or_path openai/clip-vit-large-patch14-336 \\
        --language_model_name_or_path Qwen/Qwen1.5-4B-Chat --output_dir models/llava

Weights keep the dtype they were published in unless --dtype says otherwise, and are never copied in memory: the two
loaded models become the parts of the LLaVA as they are. With --random_weights the two folders need hold no weights,
only their configs, image processor and tokenizer, which builds a model of any size without a download.

Images of another shape become squares as the vision model's own image processor says: CLIP's crops them, and what lies
at their ends is lost. With --image_aspect_ratio pad they are padded, as LLaVA-1.5 does it. The choice is saved with the
model, as a part of its image processor, where trainings, answers and servers read it.
"""

import argparse
from pathlib import Path

import torch
import transformers
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from train_llava.cli import command, command_parser, output_folder
from train_llava.ingest.conversation import IMAGE_TOKEN
from train_llava.model.backbones import load_image_processor, load_part, load_tokenizer, pad_to_square, scaled_head
from train_llava.model.config import SUPPORTED, compose_config, read_text_config, read_vision_config
from train_llava.model.folder import CARD, check_output_dir, new_folder, save_llava
from train_llava.model.load import fetch
from train_llava.model.structure import components_table, patches_per_image, processor_config
from train_llava.model.verify_build import check_answers, check_logits, check_weights, text_logits
from train_llava.processing.chat import ChatEncoder
from train_llava.processing.chat_template import CONTENT_PARTS
from train_llava.processing.images import FRAMINGS, FastImageProcessor
from train_llava.training.model_card import built_card

AS_PUBLISHED = {
    "crop": ", as published; --image_aspect_ratio pad keeps the whole",
    "squeeze": ", as published; --image_aspect_ratio pad keeps their shape",
}
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_llava(
    vision: str | Path,
    language: str | Path,
    dtype: torch.dtype | None = None,
    random_weights: bool = False,
    pad: bool = False,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Stitches a vision tower and a chat model together with a new, random projector between them.

    `vision` and `language` are folders or hub ids. `dtype` is that of all weights; None keeps each source's own (the
    projector takes the language model's). `random_weights` initialises from the configs instead of loading. `pad` has
    images padded to squares (see `backbones.pad_to_square`).

    Raises:
        InputError: a folder is missing, incomplete or not of a supported kind, which is found out before any weights
            are loaded; or the LLaVA would not say about text what the chat model says.
    """
    vision, language = fetch(vision), fetch(language)
    vision_config, text_config = read_vision_config(vision), read_text_config(language)
    image_processor = load_image_processor(vision, vision_config.image_size)
    image_processor = pad_to_square(image_processor, vision) if pad else image_processor
    tokenizer = load_tokenizer(language)
    template = CONTENT_PARTS.read_text() + tokenizer.chat_template
    encoder = ChatEncoder(tokenizer, patches_per_image(vision_config), template)

    tower = load_part(transformers.AutoModel, vision, vision_config, dtype, random_weights)
    chat_model = load_part(transformers.AutoModelForCausalLM, language, text_config, dtype, random_weights)
    if len(tokenizer) > chat_model.get_input_embeddings().num_embeddings:
        chat_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    published = text_logits(chat_model, encoder)
    ends = encoder.ends(chat_model.generation_config.eos_token_id)
    head = scaled_head(chat_model)
    config = compose_config(
        tower.config,
        chat_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("meta"):  # takes no memory: every component is put in below
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    # a new projector, with transformers' own initial weights (the private _init_weights, see tests/test_hooks.py)
    model.model.multi_modal_projector = LlavaMultiModalProjector(config).apply(model._init_weights).to(chat_model.dtype)
    model.model.language_model = chat_model.model
    model.lm_head = head
    check_logits(model.eval(), encoder, published, language)

    # Greedy, and stopping at every end the chat model knows: its sampling settings were tuned without images.
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        **processor_config(config),
        image_token=IMAGE_TOKEN,
        chat_template=encoder.chat_template,
    )
    return model, processor


@command
def main() -> None:
    parser = command_parser(__doc__, epilog=SUPPORTED)
    parser.add_argument("--vision_model_name_or_path", required=True, help="CLIP or SigLIP folder or hub id")
    parser.add_argument("--language_model_name_or_path", required=True, help="chat model folder or hub id")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto keeps each source's own")
    parser.add_argument(
        "--image_aspect_ratio",
        choices=("published", "pad"),
        default="published",
        help="how images become squares: as the vision model's image processor says, or padded, as in LLaVA-1.5",
    )
    parser.add_argument("--random_weights", action="store_true", help="use the configs alone, for tests of size")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --output_dir")
    args = parser.parse_args()

    check_output_dir(args.output_dir, args.overwrite)
    vision, language = fetch(args.vision_model_name_or_path), fetch(args.language_model_name_or_path)
    with output_folder(args.output_dir, vision, language):
        build(vision, language, args)


def build(vision: Path, language: Path, args: argparse.Namespace) -> None:
    """Builds, saves and checks."""
    torch.manual_seed(0)  # the same projector every time
    model, processor = build_llava(
        vision, language, DTYPES[args.dtype], args.random_weights, args.image_aspect_ratio == "pad"
    )
    print(components_table(model), flush=True)
    print(f"vision tower from {vision}, language model from {language}, projector new", flush=True)
    framing = FastImageProcessor(processor.image_processor).framing()
    print(f"images that are not square: {FRAMINGS[framing]}{AS_PUBLISHED.get(framing, '')}", flush=True)
    with new_folder(args.output_dir, args.overwrite) as folder:  # in its place only when all checks have passed
        save_llava(model, processor, folder)
        sources = (args.vision_model_name_or_path, args.language_model_name_or_path)
        (folder / CARD).write_text(built_card(args.output_dir.resolve().name, *sources), encoding="utf-8")
        print("saved, now reading it back", flush=True)
        compared = check_weights(folder, model, None if args.random_weights else (vision, language))
        print(f"{compared} tensors are equal to their sources bit for bit", flush=True)
        del model  # so that memory holds one copy at a time
        print(f"pipeline('image-text-to-text') answers about a grey image: {check_answers(folder)!r}")
    print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
