"""The two halves that a LLaVA is built of, loaded: vision tower and chat model, image processor and tokenizer."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import LlavaImageProcessorPil, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from train_llava.cli import InputError
from train_llava.ingest.conversation import IMAGE_TOKEN
from train_llava.model.config import logit_scale
from train_llava.model.load import pad_left
from train_llava.processing.images import FastImageProcessor, noise, with_pillow


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
    """The tower's image processor, tried on an image.

    Raises:
        InputError: there is none, or it makes images of another size than the tower's.
    """
    if not (folder / "preprocessor_config.json").is_file():
        raise InputError(f"{folder}: no preprocessor_config.json, so the size and colours it expects are unknown.")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        shape = processor(Image.new("RGB", (30, 20)), return_tensors="pt")["pixel_values"].shape
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: its preprocessor_config.json cannot be used ({error}).") from error
    if shape != (1, 3, size, size):
        raise InputError(
            f"{folder}: its preprocessor_config.json makes images of the shape {tuple(shape[1:])}, and the vision "
            f"tower reads (3, {size}, {size}). Take both files from one model."
        )
    return processor


def pad_to_square(published: BaseImageProcessor, folder: Path) -> BaseImageProcessor:
    """transformers' LLaVA processor with the settings of a published one, for images that are padded instead of cropped
    or squeezed. The background is the mean colour, which normalises to about zero.

    Raises:
        InputError: square images, which are not padded, would not get the published pixels; or the rim of an image
            would be cut off all the same.
    """
    settings = {name: value for name, value in published.to_dict().items() if name != "image_processor_type"}
    settings["do_center_crop"] = bool(settings.get("do_center_crop"))  # SigLIP's says nothing, which means no
    padding = LlavaImageProcessorPil(**settings | {"do_pad": True, "do_convert_rgb": True})
    ours, theirs = (
        each(noise(90, 90), return_tensors="pt")["pixel_values"] for each in (padding, with_pillow(published))
    )
    if not torch.equal(ours, theirs) or FastImageProcessor(padding).framing() != "pad":
        raise InputError(
            f"{folder}: --image_aspect_ratio pad does not go with its preprocessor_config.json, which does more than "
            f"resize and crop to one size ({type(published).__name__}, size {published.size}, crop_size "
            f"{getattr(published, 'crop_size', None)}). Leave it out, or make both sizes equal."
        )
    return padding


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
        # the chat template writes the first token; the tokenizer would add it once more in transformers' pipelines
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
