"""Files of JSON as people have them: each record is read or refused with a reason, in any form and encoding."""

import io
import json
import re
import subprocess

import pytest
from own_data import ids, images, record, refusal, two_records

from train_llava.data import LlavaDataset
from train_llava.ingest import readers

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


def test_a_line_that_is_too_deep_is_one_bad_record(tmp_path):
    """Python refuses it with another error than a broken one."""
    good = [json.dumps(each) for each in two_records(tmp_path)]
    (tmp_path / "a.jsonl").write_text("\n".join([good[0], '{"id": "deep", "x": ' + "[" * 100_000, good[1]]))
    assert "line 2: not valid JSON" in refusal(tmp_path)
    assert ids(tmp_path, on_bad_record="skip") == ["0", "1"]
