"""Small data as people have them: records of their own, images beside them, and what becomes of them."""

import io
import json
import tarfile

import layouts
import pytest

from train_llava.cli import InputError
from train_llava.data import LlavaDataset


def record(i, question="<image>\nWhat?", answer="A thing.", **more):
    turns = layouts.llava_turns(layouts.chat(question, answer))
    return {"id": str(i), "image": f"{i}.jpg", "conversations": turns, **more}


def text(path, content):
    layouts.write(path, content if isinstance(content, bytes) else content.encode())


def images(folder, count, where="images"):
    for i in range(count):
        layouts.write(folder / where / f"{i}.jpg", layouts.image(i))


def ids(path, **options):
    return [example["id"] for example in LlavaDataset(path, **options)]


def refusal(path, **options):
    with pytest.raises(InputError) as error:
        LlavaDataset(path, **options)
    return str(error.value)


def two_records(folder):
    images(folder, 2)
    return [record(0), record(1)]


def shard(path, spoil=None):
    """Four records; one of them has `spoil` for its JSON."""
    with tarfile.open(path, "w") as tar:
        for i in range(4):
            text = json.dumps({"conversations": layouts.llava_turns(layouts.chat("<image>\nWhat?", f"{i}"))}).encode()
            for suffix, data in ((".jpg", layouts.image(i)), (".json", spoil if spoil and i == 1 else text)):
                info = tarfile.TarInfo(f"{i}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
