"""The demo's CLIP: trained to find the caption of an image among 128, on images of the training split alone."""

from dataclasses import replace

import numpy as np
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerBase

from demo.english import caption
from demo.scenes import (
    CELL,
    COLOURS,
    IMAGE_SIZE,
    PLACES,
    Scene,
    belongs,
    draw,
    random_item,
    random_scene,
)
from demo.steps import Batch, run_steps

BATCH_SIZE, LEARNING_RATE = 128, 1e-3
EDITS = 15  # of each scene: a linear probe then misreads 1.0% of validation digits; with 7, 3, 1 it was 1.3, 1.7, 2.2
SPREAD = 2.5  # how much wilder the CLIP's images are drawn than the demo's, so that it knows more hands than 1,400
END = "<|endoftext|>"


def edit(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with one thing changed: the hard negative that makes CLIP look at details.

    Half of the edits change the kind, which is the hardest to see.
    """
    while True:
        items = list(scene)
        i, what = int(rng.integers(len(items))), rng.integers(6)
        if what < 3:
            other = random_item(rng, "train", items[i].place)
            items[i] = replace(items[i], kind=other.kind, scan=other.scan)
        elif what == 3:
            items[i] = replace(items[i], colour=str(rng.choice(list(COLOURS))))
        elif what == 4:
            items[i] = replace(items[i], large=not items[i].large)
        elif free := sorted(set(range(len(PLACES))) - {item.place for item in items}):
            items[i] = replace(items[i], place=int(rng.choice(free)))
        changed = tuple(sorted(items, key=lambda item: item.place))
        if belongs(changed, "train"):
            return changed


def contrastive_scenes(size: int, rng: np.random.Generator) -> list[Scene]:
    """`size` scenes with distinct captions (an equal caption would be a wrong negative), most of them edits."""
    scenes: dict[str, Scene] = {}
    while len(scenes) < size:
        scene = random_scene(rng, "train")
        for candidate in (scene, *(edit(scene, rng) for _ in range(EDITS))):
            scenes.setdefault(caption(candidate), candidate)
    return list(scenes.values())[:size]


def clip_batch(
    scenes: list[Scene],
    rng: np.random.Generator,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    processor: CLIPImageProcessorPil,
    spread: float = 1.0,
) -> Batch:
    """pixel_values (scenes, 3, 112, 112), input_ids and attention_mask (scenes, longest caption)."""
    text = tokenizer([caption(s) + END for s in scenes], padding=True, return_tensors="pt")
    pixels = processor([draw(s, rng, split, spread) for s in scenes], return_tensors="pt")
    return {**text, **pixels}


def new_clip(rows: int, tokenizer: PreTrainedTokenizerBase) -> tuple[CLIPModel, CLIPImageProcessorPil]:
    """An untrained CLIP of 4 layers and 16 patches, for a vocabulary of so many rows."""
    size = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "hidden_act": "gelu"}
    text = {**size, "num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": rows}
    text |= {"max_position_embeddings": 64, "bos_token_id": None}
    text |= {"eos_token_id": tokenizer.convert_tokens_to_ids(END), "pad_token_id": tokenizer.pad_token_id}
    vision = {**size, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": CELL}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=128))
    # transformers' 0.02 is drowned by what a patch shows: the tower then never learns where a patch is
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.5)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return model, processor


def train_clip(
    steps: int, rows: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[CLIPModel, CLIPImageProcessorPil, dict[str, float]]:
    """Trains on random training scenes; returns the model, its processor and its figures."""
    model, processor = new_clip(rows, tokenizer)
    rng = np.random.default_rng(1)

    def batch(step: int) -> Batch:
        return clip_batch(contrastive_scenes(BATCH_SIZE, rng), rng, "train", tokenizer, processor, SPREAD)

    run_steps(model.train(), steps, LEARNING_RATE, batch, return_loss=True)
    model.eval()
    found = {split: retrieval(model, processor, tokenizer, split) for split in ("validation", "held_out")}
    return model, processor, {f"{split}_retrieval_at_1_of_256": share for split, share in found.items()}


@torch.no_grad()
def retrieval(
    model: CLIPModel, processor: CLIPImageProcessorPil, tokenizer: PreTrainedTokenizerBase, split: str
) -> float:
    """Share of 256 new images whose own caption scores highest among the 256 (distinct) captions."""
    rng = np.random.default_rng(2)
    scenes = list({caption(s): s for s in (random_scene(rng, split) for _ in range(600))}.values())[:256]
    logits = model(**clip_batch(scenes, rng, split, tokenizer, processor)).logits_per_image
    return round((logits.argmax(1) == torch.arange(len(scenes))).float().mean().item(), 3)
