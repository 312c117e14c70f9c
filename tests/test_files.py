"""Files and folders as people have them: each record is read, refused with a reason, or passed over by name."""

import base64
import gzip
import io
import json
import os
import re
import subprocess
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import call
from PIL import Image

from train_llava import check_data, readers
from train_llava.bad_images import BadImages
from train_llava.command import InputError
from train_llava.data import LlavaDataset
from train_llava.formats import parse
from train_llava.sources import Source, caption_mapping

FIELDS = caption_mapping(None)


def record(i, question="<image>\nWhat?", answer="A thing.", **more):
    turns = layouts.llava_turns(layouts.chat(question, answer))
    return {"id": str(i), "image": f"{i}.jpg", "conversations": turns, **more}


def text(path, content):
    layouts.write(path, content if isinstance(content, bytes) else content.encode())


def images(folder, count, where="images"):
    for i in range(count):
        layouts.write(folder / where / f"{i}.jpg", layouts.picture(i))


def ids(path, **options):
    return [example["id"] for example in LlavaDataset(path, **options)]


def refusal(path, **options):
    with pytest.raises(InputError) as error:
        LlavaDataset(path, **options)
    return str(error.value)


def two_records(folder):
    images(folder, 2)
    return [record(0), record(1)]


# ---------------------------------------------------------------- one file


AS_TEXT = {
    "a list": lambda records: json.dumps(records),
    "two lists": lambda records: json.dumps(records[:1]) + "\n" + json.dumps(records[1:]),
    "lines": lambda records: "\n".join(map(json.dumps, records)) + "\n",
    "lines without an end, with blank ones": lambda records: "\n\n".join(map(json.dumps, records)),
    "objects of many lines": lambda records: "\n".join(json.dumps(one, indent=2) for one in records),
    "a list of many lines": lambda records: json.dumps(records, indent=1),
    "a list in Windows' lines": lambda records: json.dumps(records, indent=1).replace("\n", "\r\n"),
}


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl", "CHAT.JSON"])
@pytest.mark.parametrize("written", AS_TEXT)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_json_in_any_form(tmp_path, name, written, encoding):
    text = AS_TEXT[written](two_records(tmp_path))
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / name).write_bytes(mark + text.encode(encoding))
    assert ids(tmp_path) == ["0", "1"] == ids(tmp_path / name)


@pytest.mark.parametrize("encoding, hint", [("gb18030", "iconv -f GB18030 -t UTF-8"), ("latin-1", "Save it as UTF-8")])
@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_another_encoding_is_said(tmp_path, name, encoding, hint):
    answer = "一个红色的东西" if encoding == "gb18030" else "Un café près de là, été"
    images(tmp_path, 2)
    lines = [json.dumps(record(i, answer=answer), ensure_ascii=False) for i in range(2)]
    text = "\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]"
    (tmp_path / name).write_bytes(text.encode(encoding))
    said = refusal(tmp_path)
    assert "not UTF-8 text" in said and hint in said and name in said
    if encoding == "gb18030":  # the command that is named mends it
        command = re.search(r"iconv .* (?=> )", said)[0]
        (tmp_path / name).write_bytes(subprocess.run(command, shell=True, capture_output=True).stdout)
        assert LlavaDataset(tmp_path)[1]["messages"][1]["content"] == answer


@pytest.mark.parametrize("chunk", [7, 64, 1 << 22])
@pytest.mark.parametrize("at", ["start", "middle", "end"])
def test_the_position_of_an_error_is_that_of_json(chunk, at):
    """Line, column and character as `json.loads` counts them, however the text is cut into chunks."""
    text = json.dumps([record(i, answer="a\u00e9\U0001f600b") for i in range(30)], indent=1, ensure_ascii=False)
    text = {
        "start": text.replace('"id"', "'id", 1),
        "middle": text.replace('"id": "15"', '"id": 1 5'),
        "end": text[:-30],
    }[at]
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(ValueError) as error:
        list(readers.read_values(io.StringIO(text), chunk))
    place = f"line {expected.value.lineno} column {expected.value.colno} (char {expected.value.pos})"
    assert place in str(error.value)


def test_values_equal_those_of_json():
    for values in ([1, 23, 456], ["a", {"b": [1, [2]]}, None, True, 1.5], [[1, 2], [3]], [], [{}] * 50):
        for chunk in (1, 3, 10, 1000):
            assert list(readers.read_values(io.StringIO(json.dumps(values)), chunk)) == values


@pytest.mark.parametrize("tail", [" x", ",{", '"', "[{]"])
def test_what_stands_behind_a_list_is_not_dropped(tmp_path, tail):
    (tmp_path / "chat.json").write_text(json.dumps(two_records(tmp_path)) + tail)
    assert "1 of 3 records cannot be trained on" in refusal(tmp_path)
    dataset = LlavaDataset(tmp_path, on_bad_record="skip")
    assert len(dataset) == 2 and "1 records cannot be trained on and are left out; the first: " in dataset.summary()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" + "9" * 5000 + "]", "[NaN, Infinity]"])
def test_json_that_python_cannot_hold(tmp_path, text):
    images(tmp_path, 1)
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(record(0))}\n{text}\n")
    assert ids(tmp_path, on_bad_record="skip") == ["0"]
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    (tmp_path / "a.json").write_text(text)
    assert "a.json" in refusal(tmp_path) or ids(tmp_path, on_bad_record="skip") == ["0"]


def test_a_record_beyond_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MOST_RECORD_BYTES", 1000)
    images(tmp_path, 3)
    large = record(1, answer="x" * 30_000)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [record(0), large, record(2)])))
    assert "a record of more than" in refusal(tmp_path) and ids(tmp_path, on_bad_record="skip") == ["0", "2"]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "chat.json").write_text(json.dumps([record(0), large]))
    text = io.StringIO((tmp_path / "chat.json").read_text())
    with pytest.raises(ValueError, match="a record of more than"):
        list(readers.read_values(text, 500))


# ---------------------------------------------------------------- records


def messages_of(**changes):
    return parse({**record(0), **changes}, "llava", FIELDS)[0]


def test_a_system_prompt_beside_the_turns():
    expected = layouts.chat("<image>\nWhat?", "A thing.", system="Be brief.")
    assert messages_of(system="Be brief.") == messages_of(system_prompt="Be brief.") == expected
    own = layouts.llava_turns(expected)
    assert messages_of(system="Be brief.", conversations=own) == expected
    assert messages_of(system=" ") == messages_of(system=None) == expected[1:]
    for other in ("Be long.", 7):
        with pytest.raises(InputError, match='the field "system"'):
            messages_of(system=other, conversations=own)


def test_an_answer_without_words_is_not_learned_as_silence():
    turns = layouts.llava_turns(layouts.chat("<image>\nWhat?", "A thing.", "And?", " \n"))
    with pytest.raises(InputError, match="an answer without words"):
        messages_of(conversations=turns)


@pytest.mark.parametrize("field", ["video", "videos", "audio", "audios", "tools"])
def test_what_would_not_be_seen_is_refused(tmp_path, field):
    images(tmp_path, 1)
    (tmp_path / "chat.json").write_text(json.dumps([record(0, **{field: ["a"]})]))
    assert f'the field "{field}"' in refusal(tmp_path)
    done = call(check_data.main, "--data_path", tmp_path, "--output_dir", f"{tmp_path}-report", "--workers", 0)
    assert done.returncode == 2 and f'the field "{field}"' in done.stdout
    assert len(messages_of(**{field: []})) == 2  # as tables have it, where other rows have some


@pytest.mark.parametrize("field, value", [("loss", False), ("weight", 0), ("weight", 0.5), ("train", False)])
def test_turns_that_others_would_not_learn(field, value):
    turns = layouts.llava_turns(layouts.chat("<image>\nWhat?", "A thing."))
    with pytest.raises(InputError, match="a turn with a weight of its own"):
        messages_of(conversations=[turns[0], {**turns[1], field: value}])
    assert messages_of(conversations=[turns[0], {**turns[1], field: 1}]) == messages_of()


def test_turns_as_a_text_and_roles_in_capitals():
    turns = [{"from": "Human", "value": "<image>\nWhat?"}, {"from": "GPT ", "value": "A thing."}]
    assert messages_of(conversations=turns) == messages_of(conversations=json.dumps(turns)) == messages_of()
    with pytest.raises(ValueError):
        messages_of(conversations="[{")


def parts(*own):
    content = [{"type": "image", **({"image": each} if each else {})} for each in own] + [{"type": "text", "text": "?"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]


def test_images_in_the_parts_and_beside_them():
    def names(**fields):
        return [image["path"] for image in parse(fields, "messages", FIELDS)[1]]

    assert names(messages=parts("a.jpg")) == names(messages=parts(None), images=["a.jpg"]) == ["a.jpg"]
    assert names(messages=parts("a.jpg", "b.jpg"), images=["a.jpg", "b.jpg"]) == ["a.jpg", "b.jpg"]
    with pytest.raises(InputError, match="both inside the messages and"):
        names(messages=parts("a.jpg"), images=["b.jpg"])
    assert names(messages=layouts.chat("Hi", "Yes."), images=[None]) == names(messages=layouts.chat("Hi", "Yes.")) == []
    with pytest.raises(InputError, match="neither a file name nor"):
        names(messages=layouts.chat("Hi", "Yes."), images=[None, "a.jpg"])


def test_several_captions_of_one_image(tmp_path):
    images(tmp_path, 1)
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "0.jpg", "caption": ["one", "two", "three"]}))
    examples = list(LlavaDataset(tmp_path))
    assert [example["messages"][1]["content"] for example in examples] == ["one", "two", "three"]
    assert [example["id"] for example in examples] == ["0.jpg#0", "0.jpg#1", "0.jpg#2"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "0.jpg", "caption": ["one", 2]}))
    assert "no 'caption' text" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_in_base64(tmp_path, kind):
    """Bare, as an address, and as the bytes of a table that became JSON."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    file = io.BytesIO()
    picture.save(file, kind)
    text = base64.b64encode(file.getvalue()).decode()
    address = f"data:image/{kind.lower()};base64,{text}"
    records = [record(0, image=text), record(1, image=address), record(2, image={"bytes": text, "path": None})]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    for example in LlavaDataset(tmp_path):
        assert np.array_equal(example["images"][0], Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    (tmp_path / "chat.json").write_text(json.dumps([record(0, image="data:image/png;base64,!!!" + "x" * 100_001)]))
    assert len(refusal(tmp_path)) < 1000


# ---------------------------------------------------------------- folders


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
    known = readers.STRANGERS[next(start for start in readers.STRANGERS if content.startswith(start))]
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


def shard(path, spoil=None):
    """Four records; one of them has `spoil` for its JSON."""
    with tarfile.open(path, "w") as tar:
        for i in range(4):
            text = json.dumps({"conversations": layouts.llava_turns(layouts.chat("<image>\nWhat?", f"{i}"))}).encode()
            for suffix, data in ((".jpg", layouts.picture(i)), (".json", spoil if spoil and i == 1 else text)):
                info = tarfile.TarInfo(f"{i}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


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
        zipped.writestr("0.jpg", layouts.picture(0))
    assert f"unpack {tmp_path}/images/part1.zip, or move it into {tmp_path}" in refusal(tmp_path)
    (tmp_path / "images" / "part1.zip").rename(tmp_path / "part1.ZIP")
    assert len(LlavaDataset(tmp_path)) == 1


# ---------------------------------------------------------------- names and links


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
            zipped.writestr(there, layouts.picture(3))
    else:
        layouts.write(tmp_path / "images" / there, layouts.picture(3))
    (tmp_path / "chat.json").write_text(json.dumps([record(0, image=named)]))
    assert len(LlavaDataset(tmp_path)) == 1


def test_names_of_windows(tmp_path):
    """Backslashes; and a zip whose names are in GBK, as Explorer in Chinese writes them, without a word about it."""
    images(tmp_path, 1)
    info = zipfile.ZipInfo("x.jpg")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as zipped:
        zipped.writestr(info, layouts.picture(5))
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
    layouts.write(tmp_path / "images" / "a b.jpg", layouts.picture(1))
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
    layouts.write(tmp_path / "photos" / "gone.jpg", layouts.picture(1))
    dataset = LlavaDataset(tmp_path, bad_images=BadImages(tmp_path / "bad.jsonl", 3))
    assert np.array_equal(dataset[1]["images"][0], layouts.pixels(layouts.picture(1)))


def test_images_elsewhere(tmp_path, monkeypatch):
    """--image_folder, with names relative to it and absolute ones; a name beside it is refused."""
    images(tmp_path / "coco", 2, "train2017")
    data = tmp_path / "texts" / "chat.json"
    for name in ("train2017/1.jpg", str(tmp_path / "coco" / "train2017" / "1.jpg")):
        text(data, json.dumps([record(0, image=name)]))
        assert "--image_folder" in refusal(tmp_path / "texts")
        dataset = LlavaDataset(tmp_path / "texts", image_folder=tmp_path / "coco")
        assert np.array_equal(dataset[0]["images"][0], layouts.pixels(layouts.picture(1)))
        monkeypatch.chdir(tmp_path)
        assert len(LlavaDataset("texts", image_folder="coco")) == 1
    text(data, json.dumps([record(0, image="../other/1.jpg")]))
    assert "must be a file inside" in refusal(data, image_folder=tmp_path / "coco")
    assert "--image_folder" in refusal(data, image_folder=tmp_path / "nowhere")


def test_a_shard_keeps_its_own_images_beside_an_image_folder(tmp_path):
    shard(tmp_path / "d" / "s.tar") if (tmp_path / "d").mkdir() is None else None
    (tmp_path / "other").mkdir()
    assert len(LlavaDataset(tmp_path / "d", image_folder=tmp_path / "other")) == 4


# ---------------------------------------------------------------- small data, large rows, no cache


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
    with pytest.raises(InputError, match=r"2 pictures cannot be read, more than --max_bad_images 0\.001 allows"):
        ids(tmp_path / "d", bad_images=BadImages(tmp_path / "more.jsonl", 0.001))
    with pytest.raises(InputError, match="more than 0"):
        ids(tmp_path / "d", bad_images=BadImages(tmp_path / "none.jsonl", 0))


def test_rows_of_large_images_are_written_in_parts(tmp_path, monkeypatch):
    from train_llava import sources

    monkeypatch.setattr(sources, "BYTES", 10_000)
    expected = layouts.cauldron(tmp_path, 12)
    dataset = LlavaDataset(tmp_path)
    assert dataset.records.data.column("id").num_chunks > 1 and len(dataset) == len(expected)
    table = pa.table({"texts": [[{"user": "Q", "assistant": "A"}]], "images": [[{"bytes": b"x" * 2000, "path": None}]]})
    pq.write_table(table, tmp_path / "large.parquet")
    monkeypatch.setattr("train_llava.formats.MOST_IMAGE_BYTES", 1000)
    assert "MB of pictures" in refusal(tmp_path / "large.parquet")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/cache")
    (tmp_path / "chat.json").write_text(json.dumps(two_records(tmp_path)))
    assert "Set HF_DATASETS_CACHE to a folder that can be written to" in refusal(tmp_path)
