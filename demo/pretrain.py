"""Trains the demo's two halves from nothing: a CLIP on images with captions, a Qwen2 chat model on text alone.

    python -m demo.pretrain

writes `demo/clip/` (a `CLIPModel` folder with its image processor), `demo/qwen/` (a Qwen2 chat folder with its own
byte-level BPE) and `demo/pretrain.json` (command, machine, time, figures). The committed weights come from this
command; --only trains one of the two. The CLIP sees training scans only; the language model sees no image at all,
but learns to turn notes in words ("one blue bottom right, top left red seven") into a caption, as a real chat model
can. With a projector that speaks its language, images then need no new skill.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_cosine_schedule_with_warmup,
)

from demo.scenes import (
    COLOURS,
    DIGITS,
    IMAGE_SIZE,
    INSTRUCTIONS,
    PLACES,
    Scene,
    caption,
    draw,
    load_scans,
    random_scene,
)
from demo.tokenizer import make_tokenizer

FOLDER = Path(__file__).parent
PATCH_SIZE = 28  # a quadrant: a token that holds a whole digit, as the patches of a large CLIP hold whole things
SPREAD = 2.5  # how much wilder the CLIP's images are drawn than the demo's, so that it knows more hands than 1,400
VOCAB_ROWS = 448  # like Qwen's, the table has more rows than tokens, so `<image>` finds a free one


def edit(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with one thing changed: the hard negative that makes CLIP look at details."""
    items = list(scene)
    i = int(rng.integers(len(items)))
    what = rng.integers(3)
    if what == 0:
        scan = int(rng.integers(len(load_scans("train")[1])))
        items[i] = replace(items[i], digit=int(load_scans("train")[1][scan]), scan=scan)
    elif what == 1:
        items[i] = replace(items[i], colour=str(rng.choice(list(COLOURS))))
    else:
        free = sorted(set(range(len(PLACES))) - {item.place for item in items})
        items[i] = replace(items[i], place=int(rng.choice(free)))
    return tuple(sorted(items, key=lambda item: item.place))


def contrastive_scenes(size: int, rng: np.random.Generator) -> list[Scene]:
    """`size` scenes with distinct captions (an equal caption would be a wrong negative), half of them edits."""
    scenes: dict[str, Scene] = {}
    while len(scenes) < size:
        scene = random_scene(rng, "train")
        for candidate in (scene, edit(scene, rng)):
            scenes.setdefault(caption(candidate), candidate)
    return list(scenes.values())[:size]


def clip_batch(
    scenes: list[Scene],
    rng: np.random.Generator,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    processor: CLIPImageProcessorPil,
    spread: float = 1.0,
) -> dict[str, torch.Tensor]:
    """pixel_values (scenes, 3, 56, 56), input_ids and attention_mask (scenes, longest caption)."""
    text = tokenizer([caption(s) + "<|endoftext|>" for s in scenes], padding=True, return_tensors="pt")
    pixels = processor([draw(s, rng, split, spread) for s in scenes], return_tensors="pt")
    return {**text, **pixels}


def train_clip(
    steps: int, batch_size: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[CLIPModel, CLIPImageProcessorPil, float]:
    """Trains on random training scenes; returns the model, its processor and held-out retrieval@1 of 256."""
    size = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "hidden_act": "gelu"}
    config = CLIPConfig(
        vision_config={**size, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        text_config={
            **size,
            "num_hidden_layers": 2,
            "intermediate_size": 256,
            "vocab_size": VOCAB_ROWS,
            "max_position_embeddings": 64,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
        },
        projection_dim=128,
    )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    model = CLIPModel(config).train().to("cuda" if torch.cuda.is_available() else "cpu")
    rng = np.random.default_rng(1)
    run_steps(
        model,
        steps,
        1e-3,
        lambda: clip_batch(contrastive_scenes(batch_size, rng), rng, "train", tokenizer, processor, SPREAD),
        return_loss=True,
    )
    model = model.eval().cpu()
    return model, processor, retrieval(model, processor, tokenizer)


@torch.no_grad()
def retrieval(model: CLIPModel, processor: CLIPImageProcessorPil, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of 256 held-out images whose own caption scores highest among the 256 (distinct) captions."""
    rng = np.random.default_rng(2)
    scenes = list({caption(s): s for s in (random_scene(rng, "held_out") for _ in range(600))}.values())[:256]
    logits = model(**clip_batch(scenes, rng, "held_out", tokenizer, processor)).logits_per_image
    return (logits.argmax(1) == torch.arange(len(scenes))).float().mean().item()


def notes(scene: Scene, rng: np.random.Generator) -> list[str]:
    """A scene in loose words, items and words in any order: ["one blue bottom right", "top left red seven"]."""
    items = [rng.permutation([item.colour, DIGITS[item.digit], PLACES[item.place]]) for item in scene]
    return [" ".join(items[i]) for i in rng.permutation(len(items))]


def language_chat(rng: np.random.Generator) -> tuple[list[dict[str, str]], list[str]]:
    """A chat that ends in a caption, and the notes that it holds as one token each.

    A quarter of the captions must be guessed. The rest can be written from notes: as words, or with each note squeezed
    into one position (a pad token here, see `squeeze`). A language model of billions reads such mixtures by itself,
    and that is what a projector relies on; one of a million weights has to practise it.
    """
    scene = random_scene(rng, "train")
    parts, squeezed = [str(rng.choice(INSTRUCTIONS))], []
    if (kind := rng.random()) < 0.75:
        words = notes(scene, rng)
        squeezed = words if kind < 0.4 else []
        parts.insert(int(rng.integers(2)), "<|endoftext|>" * len(words) if squeezed else ", ".join(words))
    return [{"role": "user", "content": "\n".join(parts)}, {"role": "assistant", "content": caption(scene)}], squeezed


def squeeze(model: Qwen2ForCausalLM, inputs: dict[str, torch.Tensor], bags: list[list[int]]) -> torch.Tensor:
    """Embeddings (batch, length, hidden), a note's words summed up at each pad token that is no padding."""
    table = model.get_input_embeddings()
    embeddings = table(inputs["input_ids"])
    if not bags:
        return embeddings
    offsets = torch.tensor([0, *map(len, bags)]).cumsum(0)[:-1]
    sums = torch.nn.functional.embedding_bag(torch.tensor(list(chain(*bags))), table.weight, offsets, mode="sum")
    where = (inputs["input_ids"] == model.config.pad_token_id) & (inputs["attention_mask"] == 1)
    return embeddings.masked_scatter(where[..., None], sums)


def train_language_model(
    steps: int, batch_size: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Qwen2ForCausalLM, float]:
    """Trains on captions as chats, without images; returns the model and its last loss in nats per token."""
    end_of_turn, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    config = Qwen2Config(
        vocab_size=VOCAB_ROWS,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=pad,
        eos_token_id=end_of_turn,
        pad_token_id=pad,
    )
    model = Qwen2ForCausalLM(config).train()
    rng = np.random.default_rng(3)

    def batch() -> dict[str, torch.Tensor]:
        chats, squeezed = zip(*(language_chat(rng) for _ in range(batch_size)), strict=True)
        text = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        inputs = tokenizer(text, padding=True, padding_side="right", return_tensors="pt")
        bags = [tokenizer(" " + note).input_ids for group in squeezed for note in group]
        unknown = (inputs.attention_mask == 0) | (inputs.input_ids == pad)
        labels = inputs.input_ids.masked_fill(unknown, -100)
        embeddings = squeeze(model, inputs, bags)
        return {"inputs_embeds": embeddings, "attention_mask": inputs.attention_mask, "labels": labels}

    loss = run_steps(model, steps, 2e-3, batch)
    model.generation_config = GenerationConfig(bos_token_id=pad, pad_token_id=pad, eos_token_id=[end_of_turn, pad])
    return model.eval(), loss


def run_steps(
    model: torch.nn.Module,
    steps: int,
    learning_rate: float,
    next_batch: Callable[[], dict[str, torch.Tensor]],
    **kwargs,
) -> float:
    """AdamW with a cosine schedule and 5% warm-up; prints a line every 100 steps and returns the last mean loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    start, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        batch = {name: tensor.to(model.device) for name, tensor in next_batch().items()}
        loss = model(**batch, **kwargs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            print(
                f"  step {step}/{steps}  loss {np.mean(losses[-100:]):.3f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return float(np.mean(losses[-100:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="where clip/, qwen/ and pretrain.json go")
    parser.add_argument("--only", choices=["clip", "qwen"], help="train one half and leave the other as it is")
    parser.add_argument("--clip_steps", type=int, default=2000)
    parser.add_argument("--language_steps", type=int, default=3000)
    args = parser.parse_args()

    tokenizer = make_tokenizer()
    report_file = args.output_dir / "pretrain.json"
    report = json.loads(report_file.read_text()) if report_file.is_file() else {}

    if args.only != "clip":
        torch.manual_seed(0)
        started = time.perf_counter()
        print("Qwen2 on text alone")
        model, loss = train_language_model(args.language_steps, 32, tokenizer)
        model.to(torch.bfloat16).save_pretrained(args.output_dir / "qwen")  # bf16, as Qwen1.5 is published
        tokenizer.save_pretrained(args.output_dir / "qwen")
        report["qwen"] = figures(model, started, args.language_steps, loss_nats_per_token=round(loss, 3))

    if args.only != "qwen":
        torch.manual_seed(0)
        started = time.perf_counter()
        print("CLIP on images and captions")
        model, processor, top1 = train_clip(args.clip_steps, 256, tokenizer)
        model.save_pretrained(args.output_dir / "clip")
        processor.save_pretrained(args.output_dir / "clip")
        report["clip"] = figures(model, started, args.clip_steps, held_out_retrieval_at_1_of_256=round(top1, 3))

    report_file.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def figures(model: torch.nn.Module, started: float, steps: int, **measured: float) -> dict:
    """What is kept beside the weights of one half."""
    return {
        "command": "python -m demo.pretrain",
        "seed": 0,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        **measured,
        "seconds": round(time.perf_counter() - started),
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
