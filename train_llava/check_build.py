"""What a build or a merge must prove before it is called done: the right weights, and an answer about a picture."""

from pathlib import Path

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, pipeline

from train_llava.load import read_json
from train_llava.weight_files import canonical, stored_tensors

QUESTION, GREY = "What is this?", Image.new("RGB", (64, 48), "grey")


def check_weights(output_dir: Path, model: LlavaForConditionalGeneration, sources: tuple[Path, Path] | None) -> int:
    """Compares a built folder's files with the files of its two sources, tensor by tensor, bit for bit.

    `sources` are the vision and the language folder; None after a build with random weights, where the reference is
    `model`, from which the folder was saved. Returns how many tensors were compared.

    Raises:
        RuntimeError: names the first tensor that differs, is missing or has no source.
    """
    built = {canonical(name): value for name, value in model.state_dict().items()}
    published = {} if sources else built
    for part, folder in zip(("vision", "language"), sources or (), strict=False):
        published |= {canonical(name, part): value for name, value in stored_tensors(folder)}
    saved = {"language: lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name, value in ((canonical(name), value) for name, value in stored_tensors(output_dir)):
        saved.add(name)
        reference = built[name] if "projector" in name else published.get(name)  # the projector has no source
        if reference is None:
            raise RuntimeError(f"{output_dir}: {name} has no counterpart in the sources")
        # a table that was made larger has new rows, which no source knows
        if not torch.equal(value[: len(reference)] if value.ndim else value, reference.to(value.dtype)):
            raise RuntimeError(f"{output_dir}: {name} differs from its source")
    if lacking := sorted(set(built) - saved):
        raise RuntimeError(f"{output_dir}: {len(lacking)} tensors were not saved, such as {lacking[0]}")
    return len(saved)


def check_merge(merged: LlavaForConditionalGeneration, base: Path, adapter: Path) -> int:
    """Compares a model with base + lora_alpha / r x B A (arXiv:2106.09685, section 4.1), in fp64 from the two folders.

    Weights with an adapter may differ by two roundings to their dtype, of the product and of the sum, and by those of
    the r fp32 sums in B A (Higham, Accuracy and Stability, section 3.5); all others are equal bit for bit to the
    adapter's (the projector) or the base's. Returns how many are adapted.

    Raises:
        RuntimeError: names a weight that differs, or a tensor of the adapter that no weight has taken in.
    """
    alpha, adapted = read_json(adapter, "adapter_config.json")["lora_alpha"], 0
    old = {canonical(name): value for name, value in stored_tensors(base)}
    new = {canonical(name.removeprefix("base_model.model.")): value for name, value in stored_tensors(adapter)}
    for name, value in merged.named_parameters():
        name = canonical(name)
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in new:
            a, b = (new.pop(f"{layer}.lora_{part}.weight").double() for part in "AB")  # (r, inputs), (outputs, r)
            scale, start = alpha / len(a), old[name].double()
            off = (start + scale * b @ a - value.double()).abs()
            rounding = torch.finfo(value.dtype).eps + len(a) * torch.finfo(torch.float32).eps
            same = (off <= rounding * (start.abs() + scale * b.abs() @ a.abs())).all()
            adapted += 1
        else:
            expected = new.pop(name) if name in new else old[name]
            same = torch.equal(expected.to(value.dtype), value)
        if not same:
            raise RuntimeError(f"{name} is not that of {base} with {adapter} added")
    if new:
        raise RuntimeError(f"{adapter}: {len(new)} tensors were not merged, such as {next(iter(new))}")
    return adapted


def check_answers(output_dir: Path) -> str:
    """Loads a built folder as any user of transformers would, and asks it about a grey picture.

    Raises:
        RuntimeError: the processor writes another number of image tokens than the model has features.
    """
    pipe = pipeline("image-text-to-text", model=str(output_dir))
    inputs = pipe.processor(images=GREY, text="<image>", return_tensors="pt").to(pipe.model.device, pipe.model.dtype)
    tokens = int((inputs.input_ids == pipe.model.config.image_token_id).sum())
    with torch.no_grad():
        features = len(pipe.model.get_image_features(inputs.pixel_values).pooler_output[0])
    if tokens != features:
        raise RuntimeError(
            f"{output_dir}: the processor writes {tokens} image tokens, the model has {features} features"
        )
    content = [{"type": "image", "image": GREY}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    return pipe(text=chat, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
