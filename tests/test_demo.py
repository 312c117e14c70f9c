"""The demo world: deterministic, honest about what was held out, and its weights are what pretrain.json says."""

import json
import re
from collections import Counter
from statistics import mean

import numpy as np
import pytest
import torch
from conftest import ROOT, run_module
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, Qwen2ForCausalLM

from demo import chinese, english
from demo.language_half import random_chat, random_facts, talk_exact, told_exact
from demo.make_data import FORMS, write_records
from demo.questions import KINDS_OF_QUESTION, LANGUAGES, ask, neighbour, rounds
from demo.scenes import CELL, COLOURS, KINDS, SHAPES, SPLITS, Item, draw, home, load_scans, random_scene
from demo.tokenizer import chinese_words, make_tokenizer
from demo.vision_half import contrastive_scenes, retrieval
from train_llava.data import LlavaDataset
from train_llava.model.generate import caption_rows
from tutorial.tools.trained import trained_llava


def test_no_scan_is_in_both_splits():
    train, validation, held_out = (load_scans(split)[0] for split in SPLITS)
    assert (len(train), len(validation), len(held_out)) == (1400, 100, 297)
    seen = {scan.tobytes() for scan in [*train, *validation]}
    assert len(seen) == 1500 and not any(scan.tobytes() in seen for scan in held_out)


def pairs(scenes):
    return {(item.kind, item.colour) for scene in scenes for item in scene}


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_has_pairs_of_its_own(split):
    """Held out is a colour of each shape, another is for validation; each scene has a pair of its split."""
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, split) for _ in range(1500)]
    homes = Counter(home(*pair) for pair in pairs(scenes))
    assert homes == {"train": 116, **({} if split == "train" else {split: 6})}
    assert all(any(home(item.kind, item.colour) == split for item in scene) for scene in scenes)
    held_out = [(kind, colour) for kind in range(len(KINDS)) for colour in COLOURS if home(kind, colour) != "train"]
    assert Counter(KINDS[kind] for kind, _ in held_out) == dict.fromkeys(SHAPES, 2)
    assert len({colour for _, colour in held_out}) == 7


def said_of(kind, colour):
    """Patterns of how texts say that something of this kind has this colour."""
    yield rf"{colour} {KINDS[kind]}\b"
    yield rf"The {KINDS[kind]} (at the \w+ \w+ )?is (\w+ and )?{colour}\b"
    hue, name = chinese.colour(colour), chinese.kind(kind)
    yield rf"{hue}的?{name}(?!角)"  # a triangle begins with a three
    yield f"{name}是(.的\uff0c)?{hue}"


def told_in(texts):
    """Pairs of kind and colour of which a text or a note says that there is such a thing, or that there is none."""
    texts = [text.replace(" ", "") if re.search(r"[\u4e00-\u9fff]", text) else text for text in texts]
    everything, notes = "\n".join(texts), {frozenset(text.split()) for text in texts if len(text.split()) <= 5}
    for kind in range(len(KINDS)):
        for colour in COLOURS:
            said = any(re.search(pattern, everything) for pattern in said_of(kind, colour))
            if said or any({KINDS[kind], colour} <= note for note in notes):
                yield kind, colour


def test_pretraining_sees_no_held_out_pair():
    """Neither in images with captions nor in texts: there, not even in a question whose answer is no."""
    rng = np.random.default_rng(0)
    assert {home(*pair) for pair in pairs(contrastive_scenes(1000, rng))} == {"train"}
    chats = [make(rng) for make in (random_chat, random_facts) for _ in range(700)]
    notes = [note for _, some in chats for note in some]
    answers = [message["content"] for messages, _ in chats for message in messages]
    for texts in (notes, answers):
        assert {home(*pair) for pair in told_in(texts)} == {"train"}
        assert len(set(told_in(texts))) == 116  # all others are there, so the patterns find them


def test_a_new_pair_is_there_or_not():
    """Who says yes to every pair that is new is wrong at times."""
    rng, said = np.random.default_rng(0), Counter()
    for _ in range(2000):
        scene = random_scene(rng, "held_out")
        question, answer = ask("presence", [scene], "en", rng)
        if any(home(*pair) == "held_out" for pair in told_in([question])):
            said[answer.split()[0].strip(".,")] += 1
    assert min(said["Yes"], said["No"]) > 30, said


def test_training_data_has_no_held_out_pair(tmp_path):
    for form, split in (("captions", "train"), ("conversations", "train"), ("held_out", "held_out")):
        write_records(tmp_path / form, form, split, 400, 0)
        records = json.loads((tmp_path / form / "chat.json").read_text())
        told = set(told_in(turn["value"] for record in records for turn in record["conversations"]))
        assert {home(*pair) for pair in told} == {"train", split}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_seed_gives_the_same_bytes(tmp_path, form):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_records(tmp_path / name, form, "train", 12, seed)
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("a", "b")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert (tmp_path / "c" / "chat.json").read_bytes() != (tmp_path / "a" / "chat.json").read_bytes()


def test_the_layouts_are_those_of_llava(tmp_path):
    counts = {"captions": 40, "conversations": 60, "held_out": 28, "validation": 28}
    flags = [word for form, count in counts.items() for word in (f"--{form}", count)]
    done = run_module("demo.make_data", "--output_dir", tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    records = {form: json.loads((tmp_path / form / "chat.json").read_text()) for form in FORMS}
    assert {form: len(some) for form, some in records.items()} == counts
    assert len(json.loads((tmp_path / "captions" / "metadata.json").read_text())) == 40
    for form in ("held_out", "validation"):
        assert Counter(r["category"] for r in records[form]) == dict.fromkeys(KINDS_OF_QUESTION, 2)
    assert {r["image"][-3:] for r in records["captions"]} == {"jpg", "png"}
    for form, some in records.items():
        for record in some:
            images = record.get("image", [])
            images = [images] if isinstance(images, str) else images
            turns = record["conversations"]
            first = turns[turns[0]["from"] == "system"]["value"]
            assert first.count("<image>") == len(images) == sum(t["value"].count("<image>") for t in turns)
            assert first.startswith("<image>\n") or not images or (form == "captions" and first.endswith("\n<image>"))
            asked = turns[turns[0]["from"] == "system" :]
            assert [turn["from"] for turn in asked] == ["human", "gpt"] * (len(asked) // 2)
            assert len(asked) in ([4, 6, 8, 10, 12] if form == "conversations" else [2])
            assert all((tmp_path / form / "images" / image).is_file() for image in images)
    seen = {1 if isinstance(r.get("image", []), str) else len(r.get("image", [])) for r in records["conversations"]}
    assert seen == {0, 1, 2, 3}
    assert {r["conversations"][0]["from"] for r in records["conversations"]} == {"system", "human"}


def test_images_show_what_captions_say():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = random_scene(rng, "train")
        pixels = np.asarray(draw(scene, rng, "train"), dtype=float)
        for item in scene:
            top, left = item.patch // 4 * CELL, item.patch % 4 * CELL
            assert (item.patch // 8 * 2 + item.patch % 4 // 2) == item.place
            cell = pixels[top : top + CELL, left : left + CELL].reshape(-1, 3)
            brightest = cell[cell.sum(1).argmax()]
            nearest = min(COLOURS, key=lambda name: np.abs(brightest - COLOURS[name]).sum())
            assert nearest == item.colour
            inked = (np.abs(cell - pixels[0, 0]).sum(1) > 100).reshape(CELL, CELL)
            assert max(inked.any(0).sum(), inked.any(1).sum()) <= (28 if item.large else 20)
            assert not item.is_digit or load_scans("train")[1][item.scan] == item.kind
    scene = (Item(7, "red", 0), Item(13, "blue", 3, large=True))
    assert english.caption(scene) == "a small red seven at the top left and a large blue star at the bottom right"
    assert chinese.sentence(chinese.caption(scene)) == "左上角有一个小的红色七\uff0c右下角有一个大的蓝色星星"


SCENE = (Item(7, "red", 0, True), Item(7, "blue", 1), Item(13, "green", 3))
ANSWERS = {
    "What colour is the star?": "The star is green.",
    "In which corner is the red seven?": "At the top left.",
    "What is below the blue seven?": "The green star is below the blue seven.",
    "Which thing is to the left of the blue seven?": "The red seven.",
    "What is to the left of the star?": "Nothing is to the left of the star.",
    "Which is larger, the star or the red seven?": "The red seven is larger.",
    "How many digits are in the image?": "There are two digits in the image.",
    "Count the shapes.": "One.",
    "Read the digits from left to right, the top row first.": "Seven and seven.",
    "Is there a green seven in the image?": "No, there is no green seven.",
    "Do you see a star?": "Yes.",
    "What is at the bottom left?": "Nothing is at the bottom left.",
    "星星是什么颜色\uff1f": "星星是绿色的。",
    "红色的七的右边是什么\uff1f": "红色的七的右边是蓝色的七。",
    "图里有几个数字\uff1f": "图里有两个数字。",
    "左下角有什么\uff1f": "没有东西。",
}


def test_answers_of_a_scene():
    """By hand, for one scene; and no question is asked whose answer would not be clear."""
    rng, found = np.random.default_rng(0), {}
    for language in LANGUAGES:
        for kind in KINDS_OF_QUESTION:
            found |= dict(filter(None, (ask(kind, [SCENE], language, rng) for _ in range(300))))
    assert {question: found.get(question) for question in ANSWERS} == ANSWERS
    assert "What colour is the seven?" not in found and "Where is the seven?" not in found


def test_a_question_has_one_answer():
    """The same words about the same scene are always answered alike."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        scenes, said = [random_scene(rng, "train") for _ in range(rng.integers(1, 4))], {}
        for _ in range(40):
            for question, answer in rounds(scenes, 3, rng, mixed=1):
                assert said.setdefault(question, answer) == answer, (scenes, question)


def test_what_is_beside_what():
    left, right = Item(1, "red", 2), Item(2, "blue", 3)
    assert neighbour((left, right), left, "right") == right and neighbour((left, right), right, "left") == left
    assert neighbour((left, right), left, "above") is None
    with pytest.raises(KeyError):
        neighbour((left, right), left, "below")


def test_every_word_is_one_token():
    """In both languages; no token reaches from one word into the next."""
    tokenizer = make_tokenizer()
    assert len(tokenizer) < 896
    words = [*chinese_words(), *(f" {word}" for word in [*KINDS, *COLOURS, "left", "nothing", "larger"])]
    assert [word for word in words if len(tokenizer(word).input_ids) != 1 and word != " nothing"] == []
    scene = chinese.caption(SCENE)
    apart = [tokenizer(word).input_ids[0] for word in scene.split()]
    assert tokenizer(chinese.sentence(scene)).input_ids == apart
    assert tokenizer.decode(apart) == chinese.sentence(scene)


def test_the_committed_halves_are_as_written():
    """What pretrain.json says of held-out scenes: how many images' captions the CLIP finds, and how many answers the
    Qwen has right when it is told in words, one by one and in conversations. Both have the tokenizer's vocabulary.
    """
    written = json.loads((ROOT / "demo" / "pretrain.json").read_text())
    model = CLIPModel.from_pretrained(ROOT / "demo" / "clip").eval()
    processor = CLIPImageProcessorPil.from_pretrained(ROOT / "demo" / "clip")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "qwen")
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    for split in ("validation", "held_out"):
        found = retrieval(model, processor, tokenizer, split)
        assert abs(found - written["clip"][f"{split}_retrieval_at_1_of_256"]) < 0.02
    assert sum(p.numel() for p in model.parameters()) == written["clip"]["parameters"]
    language_model = Qwen2ForCausalLM.from_pretrained(ROOT / "demo" / "qwen", dtype=torch.float32).eval()
    kept, told = written["qwen"]["held_out_exact_percent"], told_exact(language_model, tokenizer, "held_out", count=20)
    assert list(kept) == list(told) and abs(mean(kept.values()) - mean(told.values())) < 4
    talked = talk_exact(language_model, tokenizer, "held_out", chats=20)
    assert abs(talked - written["qwen"]["held_out_conversation_exact_percent"]) < 4


def test_the_trained_adapter_is_that_of_the_kept_run(tmp_path):
    """The first held-out questions, ten of each kind, and the table of that run: 95% of 1,400."""
    write_records(tmp_path, "held_out", "held_out", 140, seed=0)
    rows = caption_rows(*trained_llava(), LlavaDataset(tmp_path))
    kept = re.search(r"^  all +([\d.]+)$", (ROOT / "benchmarks" / "results" / "demo.txt").read_text(), re.M)
    assert abs(100 * mean(row["exact"] for row in rows) - float(kept[1])) < 4


def test_weights_are_small():
    files = [path for name in ("clip", "qwen", "trained") for path in (ROOT / "demo" / name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 12e6
