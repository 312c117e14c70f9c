"""CLIP folder + chat model folder -> LLaVA folder (model, processor, chat template), checked after saving.

    python -m train_llava.build_model --vision_model_name_or_path openai/clip-vit-large-patch14-336 \\
        --language_model_name_or_path Qwen/Qwen1.5-4B-Chat --output_dir models/llava

Weights keep the dtype they were published in unless --dtype says otherwise, and are never copied in memory: the two
loaded models become the parts of the LLaVA as they are. With --random_weights the two folders need hold no weights,
only their configs, image processor and tokenizer, which builds a model of any size without a download.
"""

import argparse
import shutil
from pathlib import Path

import torch
import transformers
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from train_llava.chat import IMAGE_TOKEN, ChatEncoder
from train_llava.chat_template import CONTENT_PARTS
from train_llava.check_build import check_answers, check_weights
from train_llava.command import InputError, command
from train_llava.load import fetch
from train_llava.parts import parts_table

VISION_TYPES = {"clip_vision_model", "siglip_vision_model"}
SUPPORTED = "Supported are CLIP and SigLIP vision towers, and Qwen1.5/2/2.5 and Llama-type chat models."
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_llava(
    vision: str | Path, language: str | Path, dtype: torch.dtype | None = None, random_weights: bool = False
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Stitches a vision tower and a chat model together with a new, random projector between them.

    `vision` and `language` are folders or hub ids. `dtype` is that of all weights; None keeps each source's own (the
    projector takes the language model's). `random_weights` initialises from the configs instead of loading.

    Raises:
        InputError: a folder is missing, incomplete or not of a supported kind.
    """
    vision, language = fetch(vision), fetch(language)
    tower = load_part(transformers.AutoModel, vision, dtype, random_weights)
    if not (vision / "preprocessor_config.json").is_file():
        raise InputError(f"{vision}: no preprocessor_config.json, so the size and colours it expects are unknown.")
    chat_model = load_part(transformers.AutoModelForCausalLM, language, dtype, random_weights)
    if not (hasattr(chat_model, "model") and isinstance(getattr(chat_model, "lm_head", None), torch.nn.Linear)):
        raise InputError(f"{language}: a {chat_model.config.model_type!r} does not fit into a LLaVA. {SUPPORTED}")
    tokenizer = load_tokenizer(language)
    if len(tokenizer) > chat_model.get_input_embeddings().num_embeddings:
        chat_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)

    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    extra_tokens = tower.embeddings.position_embedding.num_embeddings - patches  # CLIP's CLS: 1, SigLIP: 0
    strategy = "default" if extra_tokens else "full"  # "default" drops CLS
    config = transformers.LlavaConfig(
        vision_config=tower.config,
        text_config=chat_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=patches,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=chat_model.config.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("meta"):  # a skeleton without memory: every part is put in below
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.multi_modal_projector = LlavaMultiModalProjector(config).apply(model._init_weights).to(chat_model.dtype)
    model.model.language_model = chat_model.model
    model.lm_head = chat_model.lm_head

    # Greedy, and stopping at every end the chat model knows: its sampling settings were tuned without pictures.
    ends = chat_model.generation_config.eos_token_id
    ends = [ChatEncoder(tokenizer, patches).end_of_turn_id, *(ends if isinstance(ends, list) else [ends])]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    processor = LlavaProcessor(
        image_processor=transformers.AutoImageProcessor.from_pretrained(vision),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra_tokens,
        image_token=IMAGE_TOKEN,
        chat_template=CONTENT_PARTS.read_text() + tokenizer.chat_template,
    )
    return model.eval(), processor


def load_part(auto_class: type, folder: Path, dtype: torch.dtype | None, random_weights: bool) -> PreTrainedModel:
    """One half with every weight from the folder; of a CLIP or SigLIP the vision tower alone."""
    kind = "vision" if auto_class is transformers.AutoModel else "language"
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        if kind == "vision":
            config = getattr(config, "vision_config", config)
            if config.model_type not in VISION_TYPES or not config.patch_size:
                raise ValueError(f"{config.model_type} with patch_size {getattr(config, 'patch_size', None)}")
        if random_weights:
            return auto_class.from_config(config, dtype=dtype or config.dtype or torch.float32)
        options = {"config": config, "dtype": dtype or "auto", "weights_only": True, "output_loading_info": True}
        model, info = auto_class.from_pretrained(folder, **options)
    except OSError as error:
        raise InputError(f"{folder}: config.json or weights are missing or unreadable. Fetch it again.") from error
    except ValueError as error:
        reason = str(error).splitlines()[0][:100]
        raise InputError(f"{folder}: not a {kind} model that fits here ({reason}). {SUPPORTED}") from error
    if lacking := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise InputError(f"{folder}: {len(lacking)} weights are missing, such as {lacking[0]}. Fetch it again.")
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The chat model's tokenizer, with `<image>` as one special token and something to pad with."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise InputError(f"{folder}: no chat template. Use the chat (instruct) version of the language model.")
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks come from lengths, never from comparing ids
    return tokenizer


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Refuses a folder that holds something, unless that is a model and may be replaced."""
    full = output_dir.exists() and any(output_dir.iterdir())
    if full and not (overwrite and (output_dir / "config.json").is_file()):
        hint = "It holds no model to overwrite" if overwrite else "Give --overwrite if it is a model to replace"
        raise InputError(f"{output_dir} is not empty. {hint}, or give another --output_dir.")


def save_llava(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, output_dir: str | Path, overwrite: bool = False
) -> None:
    """Writes one folder that plain transformers loads, in safetensors shards of 2 GB (the check maps one at a time).

    Raises:
        InputError: the folder is not empty, or the disk has no room for the weights.
    """
    output_dir = Path(output_dir)
    check_output_dir(output_dir, overwrite)
    output_dir.mkdir(parents=True, exist_ok=True)
    needed, free = sum(p.nbytes for p in model.parameters()), shutil.disk_usage(output_dir).free
    if needed > free:
        sizes = f"the model takes {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
        raise InputError(f"{output_dir}: {sizes}. Free some, or give an --output_dir on another disk.")
    shutil.rmtree(output_dir)  # only now, when nothing stands in the way of the new one
    model.save_pretrained(output_dir, max_shard_size="2GB")
    processor.save_pretrained(output_dir)
    # save_pretrained names the dtype of the first weight, the tower's; loading should follow the language model's
    model.config.dtype = model.lm_head.weight.dtype
    model.config.save_pretrained(output_dir)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision_model_name_or_path", required=True, help="CLIP or SigLIP folder or hub id")
    parser.add_argument("--language_model_name_or_path", required=True, help="chat model folder or hub id")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto keeps each source's own")
    parser.add_argument("--random_weights", action="store_true", help="use the configs alone, for tests of size")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --output_dir")
    args = parser.parse_args()

    check_output_dir(args.output_dir, args.overwrite)
    vision, language = fetch(args.vision_model_name_or_path), fetch(args.language_model_name_or_path)
    torch.manual_seed(0)  # the same projector every time
    model, processor = build_llava(vision, language, DTYPES[args.dtype], args.random_weights)
    print(parts_table(model), flush=True)
    print(f"vision tower from {vision}, language model from {language}, projector new", flush=True)
    save_llava(model, processor, args.output_dir, args.overwrite)
    print(f"saved to {args.output_dir}, now reading it back", flush=True)
    compared = check_weights(args.output_dir, model, None if args.random_weights else (vision, language))
    print(f"{compared} tensors are equal to their sources bit for bit", flush=True)
    del model  # so that memory holds one copy at a time
    print(f"pipeline('image-text-to-text') answers about a grey picture: {check_answers(args.output_dir)!r}")


if __name__ == "__main__":
    main()
