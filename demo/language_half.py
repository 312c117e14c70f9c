"""The demo's Qwen2: trained on text alone, it converses about scenes that it is told in words.

A scene is told as plain words, or squeezed: one position for each patch of an image, the sum of the vectors of the
words about it. A language model of billions reads such mixtures by itself, and that is what a projector relies on; one
of a million weights has to practise it. It sees no image and no CLIP.
"""

from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from demo import english
from demo.questions import KINDS_OF_QUESTION, LANGUAGES, pick, pick_language, question_of, rounds
from demo.scenes import CELL, IMAGE_SIZE, Scene, random_scene
from demo.steps import Batch, run_steps
from demo.tokenizer import MAX_LENGTH

BATCH_SIZE, LEARNING_RATE = 16, 2e-3
PATCHES = (IMAGE_SIZE // CELL) ** 2
HOLE = "<|endoftext|>"  # stands in a text for a squeezed note
CAPTION_QUESTIONS = {words.sentence(text) for words in LANGUAGES.values() for text in words.INSTRUCTIONS}
Chat = tuple[list[dict[str, str]], list[str]]  # messages, and the notes that are squeezed into them


def notes(scene: Scene, rng: np.random.Generator) -> dict[int, str]:
    """The English words about each patch that shows something, in any order."""
    return {item.patch: " ".join(rng.permutation(english.note(item))) for item in scene}


def tell(scene: Scene, squeezed: bool, rng: np.random.Generator) -> tuple[str, list[str]]:
    """A scene in place of its image: as text, and the notes that belong into its holes ("" for an empty patch)."""
    found = notes(scene, rng)
    if squeezed:
        return HOLE * PATCHES, [found.get(patch, "") for patch in range(PATCHES)]
    return ", ".join(found[patch] for patch in sorted(found)), []


def to_chat(scenes: list[Scene], pairs: list[tuple[str, str]], squeezed: bool, rng: np.random.Generator) -> Chat:
    """Questions and answers as messages; the scenes stand in the first question, before its words.

    Where it asks for a caption, they may stand behind them, as in LLaVA-CC3M.
    """
    told = [tell(scene, squeezed, rng) for scene in scenes]
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    parts = [text for text, _ in told]
    behind = pairs[0][0] in CAPTION_QUESTIONS and rng.random() < 0.5
    parts.insert(0 if behind else len(parts), messages[0]["content"])
    messages[0]["content"] = "\n".join(parts)
    if rng.random() < 0.2:
        words = LANGUAGES[pick_language(rng)]
        messages.insert(0, {"role": "system", "content": words.sentence(pick(rng, words.SYSTEM_PROMPTS))})
    return messages, [note for _, some in told for note in some]


def random_chat(rng: np.random.Generator) -> Chat:
    """One to ten questions about up to three scenes."""
    scenes = [random_scene(rng, "train") for _ in range(rng.choice(4, p=[0.05, 0.6, 0.2, 0.15]))]
    return to_chat(scenes, rounds(scenes, int(rng.integers(1, 11)), rng, mixed=0.2), rng.random() < 0.75, rng)


def random_facts(rng: np.random.Generator) -> Chat:
    """A squeezed scene of two things or more, and a sentence about each, in any order.

    Before it can answer questions, the model must learn to find a thing by its kind. Chats alone do not teach that:
    after 5,000 steps of them the model still guessed among the colours present; this takes 600 steps.
    """
    while True:
        scene = random_scene(rng, "train")
        kinds = [item.kind for item in scene]
        items = [item for item in scene if kinds.count(item.kind) == 1]
        if len(items) > 1:
            break
    facts = [
        f"The {english.kind(item.kind)} is {item.colour}, {english.size(item)} and at the {english.place(item.place)}."
        for item in items
    ]
    return to_chat([scene], [(pick(rng, english.DETAILED), " ".join(rng.permutation(facts)))], True, rng)


def squeeze(model: Qwen2ForCausalLM, inputs: Batch, bags: list[list[int]]) -> torch.Tensor:
    """Embeddings (batch, length, hidden), a note's words summed up at each hole that is no padding."""
    table = model.get_input_embeddings()
    embeddings = table(inputs["input_ids"])
    if not bags:
        return embeddings
    offsets = torch.tensor([0, *map(len, bags)]).cumsum(0)[:-1]
    words = torch.tensor(list(chain(*bags)), dtype=torch.long)
    sums = torch.nn.functional.embedding_bag(words, table.weight, offsets, mode="sum")
    where = (inputs["input_ids"] == model.config.pad_token_id) & (inputs["attention_mask"] == 1)
    return embeddings.masked_scatter(where[..., None], sums)


def answers_of(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Which of the ids (chats, length) belong to an answer or end it, as booleans of the same shape."""
    start, end = tokenizer("<|im_start|>assistant\n").input_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")
    begins = torch.zeros_like(ids)
    windows = ids.unfold(1, len(start), 1)  # (chats, length - 2, 3)
    begins[:, len(start) :] = (windows[:, :-1] == torch.tensor(start)).all(-1)
    ends = torch.zeros_like(ids)
    ends[:, 1:] = ids[:, :-1] == end
    # the last boundary before a position, of either kind, is the beginning of an answer
    last_begin, last_end = ((torch.arange(ids.shape[1]) * marks).cummax(1).values for marks in (begins, ends))
    return (last_begin >= last_end) & (last_begin > 0)


def chat_batch(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, chats: list[Chat]) -> Batch:
    """inputs_embeds (chats, longest, hidden), attention_mask and labels (chats, longest); labels are the answers."""
    text = [tokenizer.apply_chat_template(messages, tokenize=False) for messages, _ in chats]
    inputs = tokenizer(text, padding=True, padding_side="right", return_tensors="pt")
    bags = [tokenizer(f" {note}").input_ids if note else [] for _, some in chats for note in some]
    labels = inputs.input_ids.masked_fill(~answers_of(inputs.input_ids, tokenizer), -100)
    embeddings = squeeze(model, inputs, bags)
    return {"inputs_embeds": embeddings, "attention_mask": inputs.attention_mask, "labels": labels}


def new_language_model(rows: int, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """An untrained Qwen2 of 4 layers, for a vocabulary of so many rows."""
    end_of_turn, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", HOLE))
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=pad,
        eos_token_id=end_of_turn,
        pad_token_id=pad,
    )
    model = Qwen2ForCausalLM(config)
    # transformers' 0.02 is drowned by what attention adds: the same loss takes twice as many steps
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    model.generation_config = GenerationConfig(bos_token_id=pad, pad_token_id=pad, eos_token_id=[end_of_turn, pad])
    return model


def train_language_model(
    steps: int, rows: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Qwen2ForCausalLM, dict[str, Any]]:
    """Trains on plain facts for an eighth of the steps, then on chats; returns the model and its figures."""
    model = new_language_model(rows, tokenizer)
    rng, waiting = np.random.default_rng(3), []

    def batch(step: int) -> Batch:
        if not waiting:  # chats of about the same length go together
            make = random_facts if step <= steps // 8 else random_chat
            chats = sorted((make(rng) for _ in range(8 * BATCH_SIZE)), key=lambda chat: len(str(chat)))
            batches = [chats[i : i + BATCH_SIZE] for i in range(0, len(chats), BATCH_SIZE)]
            waiting.extend(batches[i] for i in rng.permutation(len(batches)))
        return chat_batch(model, tokenizer, waiting.pop())

    loss = run_steps(model.train(), steps, LEARNING_RATE, batch, bf16=True)
    model.eval()
    found: dict[str, Any] = {"loss_nats_per_token": round(loss, 3)}
    for split in ("validation", "held_out"):
        found[f"{split}_exact_percent"] = told_exact(model, tokenizer, split)
        found[f"{split}_conversation_exact_percent"] = talk_exact(model, tokenizer, split)
    return model, found


@torch.no_grad()
def told_exact(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, split: str, count: int = 100
) -> dict[str, float]:
    """Of each kind, how many of `count` answers about new scenes, told in squeezed notes, have no token but the most
    probable: in percent.
    """
    rng, found = np.random.default_rng(4), {}
    for kind in KINDS_OF_QUESTION:
        asked = [question_of(kind, rng, split) for _ in range(count)]
        batch = chat_batch(model, tokenizer, [to_chat(scenes, [qa], True, rng) for scenes, qa in asked])
        labels = batch.pop("labels")[:, 1:]
        right = (model(**batch).logits[:, :-1].argmax(-1) == labels) | (labels == -100)
        found[kind] = round(100 * right.all(1).float().mean().item(), 1)
    return found


def talk_exact(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, split: str, chats: int = 100) -> float:
    """Conversations of two to six turns, in both languages, each about a new scene that is told in plain words; the
    model's own answers stay in them, right or wrong. How many of its answers are right, in percent."""
    rng, right = np.random.default_rng(5), []
    for _ in range(chats):
        scenes = [random_scene(rng, split)]
        messages, _ = to_chat(scenes, rounds(scenes, int(rng.integers(2, 7)), rng, mixed=0.2), False, rng)
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            asked = tokenizer.apply_chat_template(messages[:at], **options)
            written = model.generate(**asked, max_new_tokens=80, do_sample=False)[0, asked.input_ids.shape[1] :]
            said = tokenizer.decode(written, skip_special_tokens=True).strip()
            right.append(said == message["content"])
            message["content"] = said
    return round(100 * float(np.mean(right)), 1)
