"""Names and links as people have them lead to their images, and to nobody else's."""

import json
import os
import unicodedata
import zipfile

import layouts
import numpy as np
import pytest
from own_data import ids, images, record, refusal, shard, text, two_records

from train_llava.data import LlavaDataset
from train_llava.ingest.bad_images import BadImages
from train_llava.ingest.sources import Source


def test_a_colon_in_a_name(tmp_path):
    for name in ("2024:12", "llava=x", "a:b:3"):
        folder = tmp_path / name
        images(folder, 1)
        (folder / "chat.json").write_text(json.dumps([record(0)]))
        assert Source.find(folder).weight == 1 and Source.find(f"{folder}:2.5").weight == 2.5
        assert Source.find(f"llava={folder}:2").folder == str(folder)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("packed", [False, True])
def test_accents_in_one_character_or_two(tmp_path, form, packed):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    there, named = (unicodedata.normalize(each, "café/ü.jpg") for each in (form, other))
    if packed:
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as zipped:
            zipped.writestr(there, layouts.image(3))
    else:
        layouts.write(tmp_path / "images" / there, layouts.image(3))
    (tmp_path / "chat.json").write_text(json.dumps([record(0, image=named)]))
    assert len(LlavaDataset(tmp_path)) == 1


def test_names_of_windows(tmp_path):
    """Backslashes; and a zip whose names are in GBK, as Explorer in Chinese writes them, without a word about it."""
    images(tmp_path, 1)
    info = zipfile.ZipInfo("x.jpg")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as zipped:
        zipped.writestr(info, layouts.image(5))
    raw = (tmp_path / "images.zip").read_bytes().replace(b"x.jpg", "图".encode("gbk") + b"jpg"[:0] + b".jp"[:3])
    (tmp_path / "images.zip").write_bytes(raw)
    (tmp_path / "chat.json").write_text(json.dumps([record(0, image="images\\0.jpg"), record(1, image="图.jp")]))
    assert len(LlavaDataset(tmp_path)) == 2


def test_links_are_not_followed(tmp_path):
    """A file of the hub's cache, which is a link to a blob; a folder that is linked; a file linked from elsewhere."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    images(snapshot, 1)
    text(blobs / "0123abcd", json.dumps([record(0)]))
    os.symlink(blobs / "0123abcd", snapshot / "chat.json")
    os.symlink(snapshot, tmp_path / "linked")
    for path in (snapshot, snapshot / "chat.json", tmp_path / "linked", tmp_path / "linked" / "chat.json"):
        assert ids(path) == ["0"]
    for name in (snapshot / "images" / "0.jpg", tmp_path / "linked" / "images" / "0.jpg"):
        text(blobs / "0123abcd", json.dumps([record(0, image=str(name))]))
        for path in (snapshot, tmp_path / "linked"):  # absolute names, through either
            assert ids(path) == ["0"]


def test_addresses_of_files(tmp_path):
    """As ms-swift's data have them."""
    layouts.write(tmp_path / "images" / "a b.jpg", layouts.image(1))
    names = (f"file://{tmp_path}/images/a%20b.jpg", "file:///etc/a.jpg", "http://host/a.jpg")
    (tmp_path / "chat.json").write_text(json.dumps([record(i, image=name) for i, name in enumerate(names)]))
    assert ids(tmp_path, on_bad_record="skip") == ["0"]


def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(two_records(tmp_path)))
    os.symlink(tmp_path / "gone.json", tmp_path / "b.json")
    os.symlink(tmp_path / "c.json", tmp_path / "c.json")
    assert "b.json" in refusal(tmp_path)
    dataset = LlavaDataset(tmp_path, on_bad_record="skip")
    assert len(dataset) == 2 and "2 records cannot be trained on" in dataset.summary()


def test_a_copy_with_missing_absolute_names_stays_true(tmp_path):
    images(tmp_path, 1)
    names = ("0.jpg", str(tmp_path / "photos" / "gone.jpg"), "photos/../gone.jpg", "./gone.jpg")
    (tmp_path / "chat.json").write_text(json.dumps([record(i, image=name) for i, name in enumerate(names)]))
    opened = [LlavaDataset(tmp_path, bad_images=BadImages(tmp_path / "bad.jsonl", 3)) for _ in range(3)]
    assert len({dataset.records.cache_files[0]["filename"] for dataset in opened}) == 1
    layouts.write(tmp_path / "photos" / "gone.jpg", layouts.image(1))
    dataset = LlavaDataset(tmp_path, bad_images=BadImages(tmp_path / "bad.jsonl", 3))
    assert np.array_equal(dataset[1]["images"][0], layouts.pixels(layouts.image(1)))


def test_images_elsewhere(tmp_path, monkeypatch):
    """--image_folder, with names relative to it and absolute ones; a name beside it is refused."""
    images(tmp_path / "coco", 2, "train2017")
    data = tmp_path / "texts" / "chat.json"
    for name in ("train2017/1.jpg", str(tmp_path / "coco" / "train2017" / "1.jpg")):
        text(data, json.dumps([record(0, image=name)]))
        assert "--image_folder" in refusal(tmp_path / "texts")
        dataset = LlavaDataset(tmp_path / "texts", image_folder=tmp_path / "coco")
        assert np.array_equal(dataset[0]["images"][0], layouts.pixels(layouts.image(1)))
        monkeypatch.chdir(tmp_path)
        assert len(LlavaDataset("texts", image_folder="coco")) == 1
    text(data, json.dumps([record(0, image="../other/1.jpg")]))
    assert "must be a file inside" in refusal(data, image_folder=tmp_path / "coco")
    assert "--image_folder" in refusal(data, image_folder=tmp_path / "nowhere")


def test_a_shard_keeps_its_own_images_beside_an_image_folder(tmp_path):
    shard(tmp_path / "d" / "s.tar") if (tmp_path / "d").mkdir() is None else None
    (tmp_path / "other").mkdir()
    assert len(LlavaDataset(tmp_path / "d", image_folder=tmp_path / "other")) == 4
