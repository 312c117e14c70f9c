"""The checks of a built or merged LLaVA: every weight is the right one, and transformers answers about an image."""

from pathlib import Path

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, PreTrainedModel, pipeline

from train_llava.cli import InputError
from train_llava.ingest.conversation import IMAGE_TOKEN
from train_llava.model.config import logit_scale, read_config
from train_llava.model.structure import LANGUAGE, PROJECTOR, VISION, component_of
from train_llava.model.weights import canonical, stored_tensors
from train_llava.processing.chat import ChatEncoder

QUESTION, GREY = "What is this?", Image.new("RGB", (64, 48), "grey")
TEXTS = ("What is 2 + 3?", "Name two colours. Then say why the sky is blue.")  # asked without an image
ROUNDING = 4  # units in the last place of the largest logit, by which 16-bit logits may differ


def check_weights(output_dir: Path, model: LlavaForConditionalGeneration, sources: tuple[Path, Path] | None) -> int:
    """Compares a built folder's files with the files of its two sources, tensor by tensor, bit for bit.

    `sources` are the vision and the language folder; None after a build with random weights, where the reference is
    `model`, from which the folder was saved. Returns how many tensors were compared.

    Raises:
        RuntimeError: names the first tensor that differs, is missing or has no source.
    """
    built = {canonical(name): value for name, value in model.state_dict().items()}
    published = {} if sources else built
    for component, folder in zip((VISION, LANGUAGE), sources or (), strict=False):
        published |= {canonical(name, component): value for name, value in stored_tensors(folder)}
    head = canonical("lm_head.weight")
    if sources and (scale := logit_scale(read_config(sources[1]))) != 1:
        published[head] = published.get(head, published[canonical("model.embed_tokens.weight", LANGUAGE)]) * scale
    saved = {head} if model.config.tie_word_embeddings else set()
    for name, value in ((canonical(name), value) for name, value in stored_tensors(output_dir)):
        saved.add(name)
        reference = (
            built[name] if component_of(name) == PROJECTOR else published.get(name)
        )  # the projector has no source
        if reference is None:
            raise RuntimeError(f"{output_dir}: {name} has no counterpart in the sources")
        # a table that was made larger has new rows, which no source knows
        if not torch.equal(value[: len(reference)] if value.ndim else value, reference.to(value.dtype)):
            raise RuntimeError(f"{output_dir}: {name} differs from its source")
    if lacking := sorted(set(built) - saved):
        raise RuntimeError(f"{output_dir}: {len(lacking)} tensors were not saved, such as {lacking[0]}")
    return len(saved)


@torch.inference_mode()
def text_logits(model: PreTrainedModel, encoder: ChatEncoder) -> list[torch.Tensor]:
    """The logits of each of TEXTS as a prompt of the chat template: (tokens, vocabulary)."""
    messages = [[{"role": "user", "content": text}] for text in TEXTS]
    prompts = [encoder.encode(each, add_generation_prompt=True)[0] for each in messages]
    return [model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in prompts]


def check_logits(
    model: LlavaForConditionalGeneration, encoder: ChatEncoder, published: list[torch.Tensor], language: Path
) -> None:
    """Compares the logits of a built LLaVA and its chat model on text alone: equal in fp32, within ROUNDING in 16 bits.

    Raises:
        InputError: they differ, as the chat model does something with its logits that a LLaVA does not do.
    """
    for ours, theirs in zip(text_logits(model, encoder), published, strict=True):
        off, exact = (ours.float() - theirs.float()).abs().max(), ours.dtype == torch.float32
        if off > (0 if exact else ROUNDING * torch.finfo(ours.dtype).eps * theirs.abs().max()) or ours.isnan().any():
            raise InputError(
                f"{language}: as a part of a LLaVA this {model.config.text_config.model_type!r} model gives other "
                f"logits than by itself, off by {off:.3g}. It works on its logits in a way that LLaVA's class does "
                "not know. Choose another chat model (docs/models.md)."
            )


def check_answers(output_dir: Path) -> str:
    """Loads a built folder with transformers' pipeline, asks it about a grey image, and returns the answer.

    Raises:
        RuntimeError: transformers' pipeline asks with other ids than the training teaches.
    """
    pipe = pipeline("image-text-to-text", model=str(output_dir))
    processor, model = pipe.processor, pipe.model
    content = [{"type": "image", "image": GREY}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    with torch.no_grad():
        pixels = processor.image_processor(GREY, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        features = len(model.get_image_features(pixels).pooler_output[0])
    encoder = ChatEncoder(processor.tokenizer, features, processor.chat_template)
    follow_up = [{"role": "assistant", "content": "A cloud."}, {"role": "user", "content": "Sure?"}]
    for more in ([], follow_up):
        messages = [{"role": "user", "content": f"{IMAGE_TOKEN}\n{QUESTION}"}, *more]
        ours, _ = encoder.encode(messages, add_generation_prompt=True)
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        theirs = processor.apply_chat_template([*chat, *more], **options).input_ids[0].tolist()
        if theirs != ours:
            at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), "the end")
            raise RuntimeError(
                f"{output_dir}: the processor's prompt is not the one of the training, from token {at} on"
            )
    return pipe(text=chat, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
