"""Folders as people have them: each file is read, refused with a reason, or passed over by name."""

import gzip
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import layouts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import call
from own_data import ids, images, record, refusal, shard, text, two_records

from train_llava import check_data
from train_llava.cli import InputError
from train_llava.data import LlavaDataset
from train_llava.ingest import readers
from train_llava.ingest.bad_images import BadImages


def passed_over(dataset):
    return {Path(file).name: why for file, why in dataset.sources[0].passed_over.items()}


def test_files_that_hold_no_records_are_passed_over(tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps(two_records(tmp_path)))
    others = {
        "dataset_info.json": json.dumps({"features": {}, "splits": {}}, indent=1),
        "dataset_infos.json": json.dumps({"default": {"features": {}}}),
        "instances.json": json.dumps({"info": {}, "images": [{"file_name": "0.jpg"}], "annotations": [{"id": 1}]}),
        "words.json": json.dumps(["a", "b"]),
        "empty.json": "",
        "table.csv": "image,caption\n0.jpg,hello\n",
        "more.json.gz": gzip.compress(b"[]"),
        "._chat.json": b"\0\5\x16\7\0\2\0\0Mac OS X        ",
    }
    for name, content in others.items():
        text(tmp_path / name, content)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "images" / "0.jpg", "0.jpg")
    dataset = LlavaDataset(tmp_path)
    assert len(dataset) == 2
    assert set(passed_over(dataset)) == {"images.tar", *others} - {"._chat.json"}  # hidden ones are not even looked at
    assert passed_over(dataset)["table.csv"].startswith("a table: save it as JSON Lines")
    assert passed_over(dataset)["images.tar"].startswith("images without texts")
    assert "passed over: dataset_info.json: no records of a known format" in dataset.summary()


def test_data_below_a_folder_that_holds_none_itself(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    layouts.cauldron(tmp_path / "data", 4)
    assert len(LlavaDataset(tmp_path)) == 4


def test_each_file_is_named_with_its_count(tmp_path):
    images(tmp_path, 9)
    for name, some in (("all", range(9)), ("a", range(4)), ("b", range(4, 9))):
        (tmp_path / f"{name}.json").write_text(json.dumps([record(i) for i in some]))
    said = LlavaDataset(tmp_path).summary()
    assert re.search(r" 4 a\.json\n +9 all\.json\n +5 b\.json\n", said)


@pytest.mark.parametrize("name", ["a.json.gz", "a.csv", "a.xlsx", "a.txt", "data-00000-of-00001.arrow"])
def test_files_of_another_kind_say_what_to_do(tmp_path, name):
    layouts.write(tmp_path / name, b"x,y\n")
    assert re.search(r"unpack it|save it as JSON Lines|save it as parquet|not a \.json", refusal(tmp_path / name))


@pytest.mark.parametrize(
    "content", [b"PAR1xxxx", b"\x1f\x8b\x08xx", b"PK\x03\x04xx", b"<html>", b"version https://git-lfs"]
)
def test_another_kind_under_the_name_of_json(tmp_path, content):
    layouts.write(tmp_path / "chat.json", content)
    known = readers.OTHER_KINDS[next(start for start in readers.OTHER_KINDS if content.startswith(start))]
    assert f"chat.json: cannot be read any further: {known}" in refusal(tmp_path)


@pytest.mark.parametrize("broken", ["first", "second"])
def test_a_broken_file_beside_a_good_one(tmp_path, broken):
    layouts.cauldron(tmp_path, 4)
    good = next(tmp_path.rglob("*.parquet"))
    bad = good.with_name("train-99999.parquet" if broken == "second" else "train-00.parquet")
    bad.write_bytes(good.read_bytes()[:-200])
    assert f"{bad}, record '0'" in refusal(tmp_path)
    dataset = LlavaDataset(tmp_path, on_bad_record="skip")
    assert len(dataset) == 4 and str(bad) in dataset.summary()


@pytest.mark.parametrize("spoil", [b"{broken", b"[1]", b"\xb0\xa1", b"7", b"[" * 50_000])
def test_a_bad_member_of_a_shard_is_one_bad_record(tmp_path, spoil):
    shard(tmp_path / "s.tar", spoil)
    assert "1 of 4 records cannot be trained on" in refusal(tmp_path)
    assert ids(tmp_path, on_bad_record="skip") == ["0", "2", "3"]


def test_a_shard_that_is_cut_off(tmp_path):
    """Anywhere: inside a file, inside a header, between two files, before its end; or followed by another."""
    shard(tmp_path / "s.tar")
    whole = (tmp_path / "s.tar").read_bytes()
    with tarfile.open(tmp_path / "s.tar") as tar:
        starts = [member.offset for member in tar] + [tar.offset]
    for length in [*starts[1:], *(start + 100 for start in starts[1:]), *(start - 700 for start in starts[1:])]:
        (tmp_path / "s.tar").write_bytes(whole[:length])
        assert re.search(r"s\.tar.*(not a record|cannot be read any further)", refusal(tmp_path)), length
        if length > starts[3]:
            dataset = LlavaDataset(tmp_path, on_bad_record="skip")
            assert 1 <= len(dataset) <= 4 and "cannot be trained on" in dataset.summary(), length
    (tmp_path / "s.tar").write_bytes(whole * 2)
    assert "more follows its end" in refusal(tmp_path)
    (tmp_path / "s.tar").write_bytes(gzip.compress(whole))
    assert "packed: unpack it with gunzip" in refusal(tmp_path)


def test_a_broken_archive_is_named_and_opened_once(tmp_path, monkeypatch):
    (tmp_path / "chat.json").write_text(json.dumps([record(i) for i in range(20)]))
    layouts.write(tmp_path / "images.zip", b"PK\x03\x04 and no more")
    opened = []
    plain = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: opened.append(args) or plain(*args))
    assert "images.zip is broken" in refusal(tmp_path)
    assert len(opened) <= 4  # by the reading, the look whether its copy is true, the list of files and the message
    said = call(check_data.main, "--data_path", tmp_path, "--output_dir", f"{tmp_path}-report", "--workers", 0).stdout
    assert "broken: images.zip: File is not a zip file" in said
    images(tmp_path, 20)  # loose ones are there: nobody needs the archive
    assert len(LlavaDataset(tmp_path)) == 20


def test_an_archive_below_is_named(tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps([record(0)]))
    (tmp_path / "images").mkdir()
    with zipfile.ZipFile(tmp_path / "images" / "part1.zip", "w") as zipped:
        zipped.writestr("0.jpg", layouts.image(0))
    assert f"unpack {tmp_path}/images/part1.zip, or move it into {tmp_path}" in refusal(tmp_path)
    (tmp_path / "images" / "part1.zip").rename(tmp_path / "part1.ZIP")
    assert len(LlavaDataset(tmp_path)) == 1


def test_one_broken_image_does_not_end_a_small_run(tmp_path):
    """Five records and the default of --max_bad_images, in the training's data and in check_data's verdict."""
    images(tmp_path / "d", 5)
    (tmp_path / "d" / "images" / "2.jpg").write_bytes(b"broken")
    (tmp_path / "d" / "chat.json").write_text(json.dumps([record(i) for i in range(5)]))
    bad = BadImages(tmp_path / "bad.jsonl", 0.001)
    assert len(ids(tmp_path / "d", bad_images=bad)) == 5 and len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1
    done = call(check_data.main, "--data_path", tmp_path / "d", "--output_dir", tmp_path / "report", "--workers", 0)
    assert done.returncode == 0 and "verdict: good to train on" in done.stdout
    (tmp_path / "d" / "images" / "3.jpg").unlink()
    with pytest.raises(InputError, match=r"2 images cannot be read, more than --max_bad_images 0\.001 allows"):
        ids(tmp_path / "d", bad_images=BadImages(tmp_path / "more.jsonl", 0.001))
    with pytest.raises(InputError, match="more than 0"):
        ids(tmp_path / "d", bad_images=BadImages(tmp_path / "none.jsonl", 0))


def test_rows_of_large_images_are_written_in_parts(tmp_path, monkeypatch):
    from train_llava.ingest import sources

    monkeypatch.setattr(sources, "BYTES", 10_000)
    expected = layouts.cauldron(tmp_path, 12)
    dataset = LlavaDataset(tmp_path)
    assert dataset.records.data.column("id").num_chunks > 1 and len(dataset) == len(expected)
    table = pa.table({"texts": [[{"user": "Q", "assistant": "A"}]], "images": [[{"bytes": b"x" * 2000, "path": None}]]})
    pq.write_table(table, tmp_path / "large.parquet")
    monkeypatch.setattr("train_llava.ingest.formats.MOST_IMAGE_BYTES", 1000)
    assert "MB of images" in refusal(tmp_path / "large.parquet")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/cache")
    (tmp_path / "chat.json").write_text(json.dumps(two_records(tmp_path)))
    assert "Set HF_DATASETS_CACHE to a folder that can be written to" in refusal(tmp_path)


def test_a_member_that_needs_a_password_is_named(tmp_path):
    """As programs mark it in the archive's list; zipfile itself writes none."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as zipped:
        zipped.writestr("0.jpg", layouts.image(0))
    raw = bytearray((tmp_path / "images.zip").read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "images.zip").write_bytes(raw)
    (tmp_path / "chat.json").write_text(json.dumps([record(0)]))
    with pytest.raises(InputError, match="encrypted or packed in an unusual way"):
        LlavaDataset(tmp_path)


def test_the_id_in_a_shards_json_is_the_records(tmp_path):
    turns = layouts.llava_turns(layouts.chat("<image>\nWhat?", "A thing."))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("7.jpg", layouts.image(7)),
            ("7.json", json.dumps({"id": "x", "conversations": turns}).encode()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [example["id"] for example in LlavaDataset(tmp_path)] == ["x"]
