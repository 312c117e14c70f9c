"""The demo world: deterministic, honest about what was held out, and its weights are what pretrain.json says."""

import json
import re

import numpy as np
from conftest import ROOT, run_module
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from demo.make_data import write_split
from demo.pretrain import retrieval
from demo.scenes import COLOURS, PLACES, SPLITS, Item, caption, draw, load_scans, random_scene


def test_no_scan_is_in_both_splits():
    train, validation, held_out = (load_scans(split)[0] for split in SPLITS)
    assert (len(train), len(validation), len(held_out)) == (1400, 100, 297)
    seen = {scan.tobytes() for scan in [*train, *validation]}
    assert len(seen) == 1500 and not any(scan.tobytes() in seen for scan in held_out)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_split(tmp_path / name, "train", 12, seed=3)
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("a", "b")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    write_split(tmp_path / "c", "train", 12, seed=4)
    assert (tmp_path / "c" / "chat.json").read_bytes() != (tmp_path / "a" / "chat.json").read_bytes()


def test_held_out_scenes_are_others(tmp_path):
    """Not the training's in their order, with other scans."""
    for split in ("train", "held_out"):
        write_split(tmp_path / split, split, 12, seed=3)

    def scenes(split):
        records = json.loads((tmp_path / split / "chat.json").read_text())
        texts = (record["conversations"][1]["value"] for record in records)
        return [re.findall(rf"{'|'.join([*COLOURS, *PLACES])}", text) for text in texts]

    assert len(scenes("train")) == 12 and scenes("train")[:3] != scenes("held_out")[:3]


def test_the_layout_is_that_of_cc3m(tmp_path):
    done = run_module("demo.make_data", "--output_dir", tmp_path, "--train", 40, "--held_out", 5)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "train" / "chat.json").read_text())
    assert len(records) == 40 and len(json.loads((tmp_path / "held_out" / "chat.json").read_text())) == 5
    questions = [record["conversations"][0]["value"] for record in records]
    assert {q.startswith("<image>\n") for q in questions} == {True, False}
    assert all(q.endswith("\n<image>") for q in questions if not q.startswith("<image>"))
    assert {record["image"][-3:] for record in records} == {"jpg", "png"}
    for record in records:
        assert list(record) == ["id", "image", "conversations"]
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"]
        assert (tmp_path / "train" / "images" / record["image"]).is_file()


def test_images_show_what_captions_say():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = random_scene(rng, "train")
        pixels = np.asarray(draw(scene, rng, "train"), dtype=float)
        for item in scene:
            top, left = item.place // 2 * 28, item.place % 2 * 28
            quadrant = pixels[top : top + 28, left : left + 28].reshape(-1, 3)
            brightest = quadrant[quadrant.sum(1).argmax()]
            nearest = min(COLOURS, key=lambda name: np.abs(brightest - COLOURS[name]).sum())
            assert nearest == item.colour
            assert load_scans("train")[1][item.scan] == item.digit
    scene = (Item(7, "red", 0, 0), Item(1, "blue", 3, 0))
    assert caption(scene) == "a red seven at the top left and a blue one at the bottom right"
    assert PLACES[3] == "bottom right"


def test_the_committed_clip_is_as_good_as_written():
    written = json.loads((ROOT / "demo" / "pretrain.json").read_text())
    model = CLIPModel.from_pretrained(ROOT / "demo" / "clip").eval()
    processor = CLIPImageProcessorPil.from_pretrained(ROOT / "demo" / "clip")
    found = retrieval(model, processor, AutoTokenizer.from_pretrained(ROOT / "demo" / "qwen"))
    assert abs(found - written["clip"]["held_out_retrieval_at_1_of_256"]) < 0.02
    assert sum(p.numel() for p in model.parameters()) == written["clip"]["parameters"]


def test_weights_are_small():
    files = [path for name in ("clip", "qwen") for path in (ROOT / "demo" / name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 8e6
