"""Whatever is done to a folder of data: every record is read, refused with a reason, or its file passed over by name.

Cases are drawn by a seed and a number, so that each can be made again: see `case`. 300 of each of four seeds always
run, and of twenty more with `-m slow`.
"""

import io
import json
import os
import resource
import shutil
import time
from collections import Counter
from contextlib import suppress
from copy import deepcopy

import layouts
import numpy as np
import pytest
from PIL import Image

from train_llava.cli import InputError
from train_llava.data import LlavaDataset
from train_llava.ingest.sources import Source
from train_llava.processing.images import open_image

CASES = 300  # of one seed
SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 24))]
SECONDS, KILOBYTES = 20, 1_500_000  # the most that a case may take, and that all may add to this process


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Six records in each published layout."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, (writer, _, _) in layouts.LAYOUTS.items():
        writer(folder / name, 6)
    return folder


# ---------------------------------------------------------------- what is done to bytes


def flipped(rng, data):
    data = bytearray(data)
    for _ in range(rng.integers(1, 12)):
        if data:
            data[rng.integers(len(data))] = rng.integers(256)
    return bytes(data)


def cut(rng, data):
    return data[: rng.integers(len(data) + 1)]


def joined(rng, data):
    return data + [data, b"\n", b"[]", b"{}", b"\0" * 600, data[:50]][rng.integers(6)]


def encoded(rng, data):
    text = data.decode("utf-8", errors="replace") + "é红"
    kinds = ("utf-16", "utf-8-sig", "gb18030", "latin-1", "utf-16-be", "utf-32")
    return text.encode(kinds[rng.integers(len(kinds))], errors="replace")


def emptied(rng, data):
    return b"" if rng.random() < 0.5 else b" \n\n"


BYTES = (flipped, cut, joined, encoded, emptied)

# ---------------------------------------------------------------- what is done to records

ABSURD = [None, 7, -1.5, 1e400, True, "", " ", "x", "<image>", "<image>" * 9, [], {}, [None], [[]], ["a", 1], "../../x"]
ABSURD += ["/etc/passwd", "\0", "\ud800", "é" * 300, "x" * 5000, "data:image/png;base64,AAAA", "a\\b.jpg", "::0:0:0"]
ABSURD += [{"from": 3}, {"bytes": "x"}, {"path": 7}, "train.parquet::image::0:0:0", "x.zip::a::1:2:8", "[{", "a.jpg\n"]
NAMES = ["system", "video", "image", "images", "messages", "conversations", "id", "texts", "caption", "tools", "weight"]


def changed(rng, record):
    """A record with one thing in it replaced, added or taken away, anywhere."""
    here = record
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return record
        key = keys[rng.integers(len(keys))]
        if isinstance(here[key], dict | list) and len(here[key]) and rng.random() < 0.7:
            here = here[key]
            continue
        kind = rng.integers(4)
        if kind == 0 and isinstance(here, dict):
            del here[key]
        elif kind == 1 and isinstance(here, dict):
            here[NAMES[rng.integers(len(NAMES))]] = deepcopy(ABSURD[rng.integers(len(ABSURD))])
        else:
            here[key] = deepcopy(ABSURD[rng.integers(len(ABSURD))])
        return record


def change_records(rng, path):
    """In a file of JSON; others are left."""
    text = path.read_text(errors="replace")
    try:
        records = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError:
        return
    for _ in range(rng.integers(1, 4)):
        at = rng.integers(len(records)) if records else 0
        if records and isinstance(records[at], dict):
            records[at] = changed(rng, records[at])
    separate = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, records)) if separate else json.dumps(records))


# ---------------------------------------------------------------- what is done to images and folders


def odd_image(rng):
    kind = rng.integers(9)
    file = io.BytesIO()
    if kind == 0:
        Image.new("RGB", (int(rng.integers(1, 3)), int(rng.integers(300, 60_000)))).save(file, "PNG")
    elif kind == 1:
        Image.fromarray(rng.integers(0, 70_000, (5, 6)).astype(np.int32)).save(file, "TIFF")
    elif kind == 2:
        Image.fromarray((rng.random((5, 6)) * 10.0 ** rng.integers(-3, 6)).astype(np.float32)).save(file, "TIFF")
    elif kind == 3:
        Image.new(["1", "L", "P", "LA", "RGBA"][rng.integers(5)], (7, 5)).save(file, "PNG", exif=rng.bytes(30))
    elif kind == 4:
        return [b"%!PS\n", b"<html>", b"version https://git-lfs", b"%PDF", b"\0\0\0\x18ftypheic" + rng.bytes(40)][
            rng.integers(5)
        ]
    elif kind == 5:
        return rng.bytes(rng.integers(1, 500))
    else:
        kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000")
        Image.new("RGB", (40, 30), "red").save(file, kinds[rng.integers(len(kinds))])
        return flipped(rng, file.getvalue())
    return file.getvalue()


def move(rng, path, others):
    """Renamed, doubled, linked, or in the place of another kind of thing."""
    kind = rng.integers(8)
    suffixes = (".json", ".jsonl", ".parquet", ".tar", ".zip", ".JSON", ".json.gz", ".csv", "", ".bak")
    if kind == 0:
        path.rename(path.with_suffix(suffixes[rng.integers(len(suffixes))]))
    elif kind == 1:
        copy = path.with_name(f"copy-{path.name}")
        copy.is_symlink() or shutil.copy(path, copy)
    elif kind == 2:
        link = path.with_name(f"link-{path.name}")
        link.exists() or link.is_symlink() or os.symlink(path, link)
    elif kind == 3:
        path.unlink()
        os.symlink(path, path)  # to itself
    elif kind == 4:
        path.unlink()
        path.mkdir()
    elif kind == 5:
        path.unlink()
        os.mkfifo(path)
    elif kind == 6:
        other = others[rng.integers(len(others))].read_bytes()
        path.write_bytes(other)
    else:
        path.rename(path.with_name(path.name.upper()))


def case(originals, folder, seed, number):
    """A folder that something was done to, and its caption fields; the same for the same seed and number."""
    rng = np.random.default_rng([seed, number])
    name = [*layouts.LAYOUTS][number % len(layouts.LAYOUTS)]
    shutil.copytree(originals / name, folder)
    for _ in range(rng.integers(1, 4)):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            break
        data = [path for path in files if path.suffix.lower() in (".json", ".jsonl", ".parquet", ".tar", ".zip")]
        path = data[rng.integers(len(data))] if data and rng.random() < 0.7 else files[rng.integers(len(files))]
        kind = rng.integers(4)
        if kind == 0 and path.suffix in (".json", ".jsonl"):
            change_records(rng, path)
        elif kind == 1 and path.suffix in (".jpg", ".png"):
            path.write_bytes(odd_image(rng))
        elif kind == 2:
            move(rng, path, files)
        else:
            path.write_bytes(BYTES[rng.integers(len(BYTES))](rng, path.read_bytes()))
    return folder, layouts.LAYOUTS[name][2]


# ---------------------------------------------------------------- what must hold


def records_of(path):
    """How many records `json` finds in a file, None if it finds the file broken."""
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
        return len(found) if isinstance(found, list) else None
    except (ValueError, RecursionError, OSError):
        return None


def account(folder, fields):
    """What became of a folder: "refused", or how many records were read, were bad, or had a bad image. Whatever is not
    an InputError, and whatever is lost, fails."""
    try:
        source = Source.find(folder, fields)
    except InputError as error:
        assert str(error) and len(str(error)) < 3000
        return Counter(refused=1)
    fate = Counter()
    rows = list(source.read())
    for row in rows:
        if row["problem"]:
            fate["bad"] += 1
            continue
        try:
            [open_image(image) for image in row["images"]]
            fate["read"] += 1
        except InputError:
            fate["bad image"] += 1
    for at, file in enumerate(source.files):
        count = records_of(folder / file) if file.lower().endswith((".json", ".jsonl")) else None
        if count is not None and source.format != "caption":  # of which a record may hold several
            assert sum(row["file"] == at for row in rows) == count, file
    seen = {*source.files, *source.passed_over}
    top = {str(path) for path in folder.iterdir() if path.suffix in (".json", ".jsonl", ".parquet") and path.is_file()}
    assert top <= seen, top - seen
    return fate


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_and_nothing_breaks(originals, tmp_path, seed):
    fates, before = Counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(CASES):
        folder, fields = case(originals, tmp_path / str(number), seed, number)
        began = time.perf_counter()
        try:
            fate = account(folder, fields)
            if number % 20 == 0:  # the whole way, with its Arrow copy
                with suppress(InputError):
                    LlavaDataset(folder, on_bad_record="skip", caption_fields=fields)
        except BaseException:
            print(f"seed {seed}, number {number}: {folder}")
            raise
        assert time.perf_counter() - began < SECONDS, (seed, number)
        fates += fate
        shutil.rmtree(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES
    assert min(fates[name] for name in ("read", "bad", "bad image", "refused")) > CASES / 30, fates
