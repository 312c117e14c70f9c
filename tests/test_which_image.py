"""Each record is shown its own image, or none: wherever images lie, whatever is missing, whenever files change."""

import json
import os
import shutil
import tarfile
import zipfile
from collections import Counter

import layouts
import numpy as np
import pytest
from conftest import call
from transformers import AutoProcessor

from train_llava.check_data import main as check_data
from train_llava.cli import InputError
from train_llava.data import LlavaDataset
from train_llava.ingest.bad_images import BadImages
from train_llava.ingest.image_index import ImageIndex
from train_llava.model.generate import collator_of
from train_llava.processing.images import open_image


def records(folder, names):
    """chat.json, a record for each name."""
    turns = layouts.llava_turns(layouts.chat("<image>\nWhat?", "A thing."))
    layouts.write(folder / "chat.json", [{"id": name, "image": name, "conversations": turns} for name in names])


def same(image, seed):
    return np.array_equal(np.asarray(image), layouts.pixels(layouts.image(seed)))


@pytest.mark.parametrize("packed", ["loose", "zip", "tar", "several zips"])
def test_a_missing_image_changes_nothing_for_the_others(tmp_path, packed):
    """Another folder holds files of the same names; none of them is ever shown."""
    names, data = [f"{i:03}.png" for i in range(30)], tmp_path / "d"
    for i, name in enumerate(names):
        layouts.write(data / "images" / name, layouts.image(i))
        layouts.write(data / "masks" / name, layouts.image(500 + i))
    (data / "images" / "010.png").unlink()
    records(data, names)
    if packed != "loose":
        folders = [["images", "masks"]] if packed != "several zips" else [["images"], ["masks"]]
        for number, some in enumerate(folders):
            pack(data, some, data / f"{number}.{'tar' if packed == 'tar' else 'zip'}")
        shutil.rmtree(data / "images"), shutil.rmtree(data / "masks")
    with pytest.raises(InputError, match=r"1 of 30 records name images that are not there.*images/010\.png"):
        LlavaDataset(data)
    for _ in range(2):  # the second time from the cache
        for i, example in enumerate(LlavaDataset(data, bad_images=BadImages(tmp_path / "bad.jsonl", 1))):
            own = int(example["id"][:3])
            assert same(example["images"][0], own) and (own == i or i == 10)


def pack(data, folders, archive):
    files = sorted(file for folder in folders for file in (data / folder).iterdir())
    if archive.suffix == ".tar":
        with tarfile.open(archive, "w") as tar:
            for file in files:
                tar.add(file, file.relative_to(data))
    else:
        with zipfile.ZipFile(archive, "w") as zipped:
            for file in files:
                zipped.write(file, file.relative_to(data))


@pytest.mark.parametrize("packed", ["loose", "zip", "tar"])
def test_a_bare_name_in_two_places_is_refused(tmp_path, packed):
    for folder in ("train2017", "val2017"):
        layouts.write(tmp_path / folder / "1.jpg", layouts.image(1))
        layouts.write(tmp_path / folder / "deep" / "2.jpg", layouts.image(2))
    records(tmp_path, ["1.jpg"])
    if packed != "loose":
        (tmp_path / "files").mkdir()
        for folder in ("train2017", "val2017"):
            shutil.move(tmp_path / folder, tmp_path / "files")
        pack(tmp_path, ["files/train2017/deep", "files/val2017/deep"], tmp_path / f"deep.{packed}")
        shutil.rmtree(tmp_path / "files")
        records(tmp_path, ["2.jpg"])
    with pytest.raises(InputError, match=r"is in several places: .*train2017.*, .*val2017.*Name the folder"):
        LlavaDataset(tmp_path)
    records(tmp_path, ["val2017/deep/2.jpg", "deep/../val2017/deep/2.jpg"])
    for name in ("val2017/deep/2.jpg",):
        assert ImageIndex(str(tmp_path)).find(name) is not None


def test_the_three_places_come_first(tmp_path):
    for place, seed in (("", 1), ("images_dl", 2), ("images", 3), ("other", 4)):
        layouts.write(tmp_path / place / "a.jpg", layouts.image(seed))
    layouts.write(tmp_path / "other" / "b.jpg", layouts.image(5))
    finder = ImageIndex(str(tmp_path))
    for seed, place in ((3, "images"), (2, "images_dl"), (1, "")):
        for _ in range(2):
            assert same(open_image(finder.find("a.jpg")), seed)
            assert same(open_image(finder.find("b.jpg")), 5)
        settled = ImageIndex(str(tmp_path), ["a.jpg", "b.jpg"])
        assert same(open_image(settled.find("a.jpg")), seed) and settled.find("b.jpg") is None
        (tmp_path / place / "a.jpg").unlink()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_that_is_made_anew_is_read_anew(tmp_path, kind):
    """The order of its members turned round beside an unchanged chat.json."""
    names = [f"{i}.jpg" for i in range(20)]
    records(tmp_path / "d", names)
    for turn in (1, -1):
        for i, name in enumerate(names):
            layouts.write(tmp_path / "images" / name, layouts.image(i))
        archive = tmp_path / "d" / f"images.{kind}"
        archive.unlink(missing_ok=True)
        if kind == "zip":
            with zipfile.ZipFile(archive, "w") as zipped:
                for name in names[::turn]:
                    zipped.write(tmp_path / "images" / name, name)
        else:
            with tarfile.open(archive, "w") as tar:
                for name in names[::turn]:
                    tar.add(tmp_path / "images" / name, name)
        for i, example in enumerate(LlavaDataset(tmp_path / "d")):
            assert same(example["images"][0], i)


def test_a_true_copy_stays(tmp_path):
    """With two missing images, one of which is under a deeper folder; a copy is neither made anew nor taken away from
    those who read it."""
    names = [f"{i}.jpg" for i in range(5)]
    for i, name in enumerate(names[1:], 1):
        layouts.write(tmp_path / "d" / ("deep" if i == 4 else "images") / name, layouts.image(i))
    records(tmp_path / "d", names)
    bad = BadImages(tmp_path / "bad.jsonl", 2)
    first = LlavaDataset(tmp_path / "d", bad_images=bad)
    files = [file["filename"] for file in first.records.cache_files]
    made = [os.stat(file).st_ino for file in files]
    for _ in range(3):
        again = LlavaDataset(tmp_path / "d", bad_images=bad)
        assert [os.stat(file["filename"]).st_ino for file in again.records.cache_files] == made
    layouts.write(tmp_path / "d" / "images" / "0.jpg", layouts.image(0))  # they came
    layouts.write(tmp_path / "d" / "images" / "4.jpg", layouts.image(4))
    now = LlavaDataset(tmp_path / "d")
    assert all(same(now[i]["images"][0], i) for i in range(5))
    assert [os.stat(file).st_ino for file in files] == made and len(list(first.records)) == 5


def test_the_example_of_another_name_is_drawn_not_the_next(tmp_path):
    """Ten images in a row are missing: their records are replaced by others all over the data, the same in each epoch
    and in each process, and the report says by which."""
    names = [f"{i}.jpg" for i in range(100)]
    for i, name in enumerate(names):
        if not 20 <= i < 30:
            layouts.write(tmp_path / "d" / "images" / name, layouts.image(i))
    records(tmp_path / "d", names)
    seen = []
    for seed in (0, 0, 1):
        dataset = LlavaDataset(tmp_path / "d", bad_images=BadImages(tmp_path / f"{seed}.jsonl", 10), seed=seed)
        seen.append([example["id"] for example in dataset])
    assert seen[0] == seen[1] != seen[2]
    counts = Counter(seen[0])
    assert set(counts) == {name for i, name in enumerate(names) if not 20 <= i < 30} and max(counts.values()) <= 3
    lines = {line["id"]: line for line in map(json.loads, (tmp_path / "0.jsonl").read_text().splitlines())}
    assert sorted(lines) == sorted(names[20:30])
    for i in range(20, 30):
        assert seen[0][i] == lines[names[i]]["replaced_by"]


def test_a_substitute_is_of_the_same_source(tmp_path):
    for source in ("a", "b"):
        for i in (1, 2):
            layouts.write(tmp_path / source / "images" / f"{source}{i}.jpg", layouts.image(i))
        records(tmp_path / source, [f"{source}{i}.jpg" for i in range(3)])
    for seed in range(10):
        bad = BadImages(tmp_path / "bad.jsonl", 5)
        dataset = LlavaDataset([f"{tmp_path}/a:3", tmp_path / "b"], bad_images=bad, seed=seed)
        assert dataset[0]["id"] in ("a1.jpg", "a2.jpg") and dataset[3]["id"] in ("b1.jpg", "b2.jpg")


# ---------------------------------------------------------------- which files


def mixed(folder):
    """Two formats on top, a parquet below."""
    turns = layouts.llava_turns(layouts.chat("What?", "A thing."))
    layouts.write(folder / "a.json", [{"id": str(i), "conversations": turns} for i in range(3)])
    lines = [{"messages": layouts.chat("What?", "A thing.")} for _ in range(50)]
    layouts.write(folder / "b.jsonl", layouts.lines(lines))
    layouts.write(folder / "notes.json", [{"nothing": 1}])
    layouts.cauldron(folder / "more", 4)


def test_what_is_read_and_passed_over_is_said(tmp_path, llava):
    mixed(tmp_path)
    said = LlavaDataset(tmp_path).summary()
    assert "3 records (llava) x 1" in said and "3 a.json" in said
    assert f"passed over: b.jsonl: messages records; add messages={tmp_path} to read them, too" in said
    assert "passed over: notes.json: no records of a known format" in said
    assert "passed over: more/vqav2/train-00000-of-00001.parquet: it lies below a folder that holds others" in said
    both = LlavaDataset([tmp_path, f"messages={tmp_path}", tmp_path / "more"])
    assert both.sizes == [3, 50, 4]
    done = call(check_data, "--data_path", tmp_path, "--output_dir", tmp_path / "report", "--workers", 0)
    assert "passed over: b.jsonl" in done.stdout and "3 a.json" in done.stdout


SPLITS = [("train.jsonl", "test.jsonl"), ("data.jsonl", "my-validation-00000.jsonl"), ("train/0.jsonl", "val/0.jsonl")]


@pytest.mark.parametrize("train, held", SPLITS)
def test_held_out_data_is_held_out(tmp_path, train, held):
    for name, count in ((train, 5), (held, 2)):
        layouts.write(tmp_path / name, layouts.lines([{"messages": layouts.chat("What?", name)}] * count))
    for held_out, name, count in ((False, train, 5), (True, held, 2)):
        dataset = LlavaDataset(tmp_path, held_out=held_out)
        assert [example["messages"][1]["content"] for example in dataset] == [name] * count
        other = held if name == train else train
        assert f"passed over: {other}: {'not held out' if held_out else 'held out'}" in dataset.summary()
    (tmp_path / held).unlink()
    assert len(LlavaDataset(tmp_path, held_out=True)) == 5  # all there is


def test_evaluate_scores_the_held_out_file(llava, tmp_path):
    from train_llava.evaluate import main

    for name, count in (("train.jsonl", 5), ("test.jsonl", 2)):
        layouts.write(tmp_path / name, layouts.lines([{"messages": layouts.chat("What?", name)}] * count))
    flags = ("--model_name_or_path", llava, "--data_path", tmp_path, "--max_new_tokens", 1)
    done = call(main, *flags, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["records"] == 2
    assert "2 test.jsonl" in done.stdout and "passed over: train.jsonl: not held out" in done.stdout


def test_many_archives_are_not_all_kept_open(tmp_path):
    """600 shards, with as many open files as a shell allows and a few less."""
    records(tmp_path, [])
    for i in range(600):
        with zipfile.ZipFile(tmp_path / f"{i:03}.zip", "w") as zipped:
            zipped.writestr(f"{i}.jpg", layouts.image(i % 7))
    records(tmp_path, [f"{i}.jpg" for i in range(600)])
    before = len(os.listdir("/proc/self/fd"))
    dataset = LlavaDataset(tmp_path)
    assert all(same(example["images"][0], i % 7) for i, example in enumerate(dataset))
    assert len(os.listdir("/proc/self/fd")) <= before + 70


def test_a_batch_of_no_examples(llava):
    """As a rank may get at the end of an epoch: one grey image, nothing to learn."""
    collator = collator_of(AutoProcessor.from_pretrained(llava))
    batch = collator([])
    assert batch["pixel_values"].shape[0] == 1 and (batch["labels"] == -100).all()
