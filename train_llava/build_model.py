"""CLIP folder + chat model folder -> LLaVA folder (model, processor, chat template), checked after saving.

    python -m train_llava.build_model --vision_model_name_or_path openai/clip-vit-large-patch14-336 \\
        --language_model_name_or_path Qwen/Qwen1.5-4B-Chat --output_dir models/llava

Weights keep the dtype they were published in unless --dtype says otherwise, and are never copied in memory: the two
loaded models become the parts of the LLaVA as they are. With --random_weights the two folders need hold no weights,
only their configs, image processor and tokenizer, which builds a model of any size without a download.
"""

import argparse
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from train_llava.backbones import CLIP, SUPPORTED, join, logit_scale, text_config, tower_config
from train_llava.chat import IMAGE_TOKEN, ChatEncoder
from train_llava.chat_template import CONTENT_PARTS
from train_llava.check_build import check_answers, check_logits, check_weights, text_logits
from train_llava.command import InputError, command
from train_llava.load import fetch, pad_left
from train_llava.new_folder import check_output_dir, new_folder
from train_llava.outputs import output_folder
from train_llava.parts import parts_table

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_llava(
    vision: str | Path, language: str | Path, dtype: torch.dtype | None = None, random_weights: bool = False
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Stitches a vision tower and a chat model together with a new, random projector between them.

    `vision` and `language` are folders or hub ids. `dtype` is that of all weights; None keeps each source's own (the
    projector takes the language model's). `random_weights` initialises from the configs instead of loading.

    Raises:
        InputError: a folder is missing, incomplete or not of a supported kind, which is found out before any weights
            are loaded; or the LLaVA would not say about text what the chat model says.
    """
    vision, language = fetch(vision), fetch(language)
    tower_kind, text_kind = tower_config(vision), text_config(language)
    image_processor = load_image_processor(vision, tower_kind.image_size)
    tokenizer = load_tokenizer(language)
    patches = (tower_kind.image_size // tower_kind.patch_size) ** 2
    encoder = ChatEncoder(tokenizer, patches, CONTENT_PARTS.read_text() + tokenizer.chat_template)

    tower = load_part(transformers.AutoModel, vision, tower_kind, dtype, random_weights)
    chat_model = load_part(transformers.AutoModelForCausalLM, language, text_kind, dtype, random_weights)
    if len(tokenizer) > chat_model.get_input_embeddings().num_embeddings:
        chat_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    published = text_logits(chat_model, encoder)
    ends = chat_model.generation_config.eos_token_id
    head = scaled_head(chat_model)
    config = join(
        tower.config,
        chat_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("meta"):  # a skeleton without memory: every part is put in below
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.multi_modal_projector = LlavaMultiModalProjector(config).apply(model._init_weights).to(chat_model.dtype)
    model.model.language_model = chat_model.model
    model.lm_head = head
    check_logits(model.eval(), encoder, published, language)

    # Greedy, and stopping at every end the chat model knows: its sampling settings were tuned without pictures.
    ends = [encoder.end_of_turn_id, *(ends if isinstance(ends, list) else [ends])]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(tower.config.model_type == CLIP),  # its CLS
        image_token=IMAGE_TOKEN,
        chat_template=encoder.chat_template,
    )
    return model, processor


def load_part(
    auto_class: type, folder: Path, config: PreTrainedConfig, dtype: torch.dtype | None, random_weights: bool
) -> PreTrainedModel:
    """One half with every weight from the folder; of a CLIP or SigLIP the vision tower alone."""
    if random_weights:
        return auto_class.from_config(config, dtype=dtype or config.dtype or torch.float32, trust_remote_code=False)
    options: dict[str, Any] = {"config": config, "dtype": dtype or "auto", "trust_remote_code": False}
    try:
        model, info = auto_class.from_pretrained(folder, **options, weights_only=True, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise InputError(f"{folder}: config.json or weights are missing or unreadable. Fetch it again.") from error
    if lacking := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise InputError(f"{folder}: {len(lacking)} weights are missing, such as {lacking[0]}. Fetch it again.")
    return model


def load_image_processor(folder: Path, size: int) -> BaseImageProcessor:
    """The tower's image processor, tried on a picture.

    Raises:
        InputError: there is none, or it makes pictures of another size than the tower's.
    """
    if not (folder / "preprocessor_config.json").is_file():
        raise InputError(f"{folder}: no preprocessor_config.json, so the size and colours it expects are unknown.")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        shape = processor(Image.new("RGB", (30, 20)), return_tensors="pt")["pixel_values"].shape
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: its preprocessor_config.json cannot be used ({error}).") from error
    if shape != (1, 3, size, size):
        raise InputError(
            f"{folder}: its preprocessor_config.json makes pictures of the shape {tuple(shape[1:])}, and the vision "
            f"tower reads (3, {size}, {size}). Take both files from one model."
        )
    return processor


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The chat model's tokenizer, with `<image>` as one special token and something to pad with.

    Raises:
        InputError: there is none, or none with a chat template.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions on files it cannot read
        reason = str(error).strip().splitlines()[0][:100]
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({reason}). Fetch it again.") from error
    if isinstance(tokenizer.chat_template, dict):  # several by name, as Command R has for tools
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        raise InputError(f"{folder}: no chat template. Use the chat (instruct) version of the language model.")
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    pad_left(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks come from lengths, never from comparing ids
    if tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids:
        # the template alone says what stands in front; transformers' pipelines would add this tokenizer's own to it
        tokenizer.add_bos_token = tokenizer.add_eos_token = False
    return tokenizer


def scaled_head(chat_model: PreTrainedModel) -> nn.Linear:
    """The chat model's head; where it scales its logits, as Granite and Cohere do, a copy that does so by itself."""
    head, scale = chat_model.lm_head, logit_scale(chat_model.config)
    if scale == 1:
        return head
    scaled = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    scaled.weight = nn.Parameter(head.weight.detach() * scale)
    return scaled


def save_llava(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, output_dir: str | Path, overwrite: bool = False
) -> None:
    """Writes one folder that plain transformers loads, in safetensors shards of 2 GB (the check maps one at a time).

    Raises:
        InputError: the folder is not empty, or the disk has no room for the weights.
    """
    with new_folder(Path(output_dir), overwrite, sum(p.nbytes for p in model.parameters())) as folder:
        model.save_pretrained(folder, max_shard_size="2GB")
        processor.save_pretrained(folder)
        # save_pretrained names the dtype of the first weight, the tower's; loading should follow the language model's
        model.config.dtype = model.lm_head.weight.dtype
        model.config.save_pretrained(folder)


@command
def main() -> None:
    options = {"epilog": SUPPORTED, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **options)
    parser.add_argument("--vision_model_name_or_path", required=True, help="CLIP or SigLIP folder or hub id")
    parser.add_argument("--language_model_name_or_path", required=True, help="chat model folder or hub id")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto keeps each source's own")
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
    model, processor = build_llava(vision, language, DTYPES[args.dtype], args.random_weights)
    print(parts_table(model), flush=True)
    print(f"vision tower from {vision}, language model from {language}, projector new", flush=True)
    with new_folder(args.output_dir, args.overwrite) as folder:  # in its place only when all checks have passed
        save_llava(model, processor, folder)
        print("saved, now reading it back", flush=True)
        compared = check_weights(folder, model, None if args.random_weights else (vision, language))
        print(f"{compared} tensors are equal to their sources bit for bit", flush=True)
        del model  # so that memory holds one copy at a time
        print(f"pipeline('image-text-to-text') answers about a grey picture: {check_answers(folder)!r}")
    print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
