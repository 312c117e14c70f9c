"""What one image, text or template may cost (train_llava/ingest/limits.py)."""

import os
import resource
import subprocess
import sys
import time
import zipfile

import pytest
from conftest import ROOT
from PIL import Image
from transformers import CLIPImageProcessorPil

from train_llava.cli import InputError
from train_llava.ingest import limits
from train_llava.model.backbones import load_tokenizer
from train_llava.processing.chat import ChatEncoder
from train_llava.processing.images import FastImageProcessor, open_image


@pytest.fixture
def tokenizer(qwen_tokenizer, tmp_path):
    qwen_tokenizer.save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("size", [(20_000, 10), (1, 40_000), (201, 1)])
def test_thin_images_are_refused_before_they_are_decoded(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "thin.png")
    with pytest.raises(InputError, match=rf"thin\.png: {size[0]} x {size[1]}, more than 200 times as long as wide"):
        open_image(tmp_path / "thin.png")
    Image.new("RGB", (200, 1), "red").save(tmp_path / "fits.png")
    began = time.perf_counter()
    pixels = FastImageProcessor(CLIPImageProcessorPil())([open_image(tmp_path / "fits.png")])
    assert pixels.data.shape == (1, 224, 224, 3) and time.perf_counter() - began < 5


def test_a_member_that_grows_is_not_unpacked(tmp_path):
    """3 MB in the zip, 600 MB out of it: read in a process of its own, whose memory is looked at."""
    with (
        zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zipped,
        zipped.open("a.png", "w") as file,
    ):
        for _ in range(600):
            file.write(bytes(1 << 20))
    code = """
import resource, sys
from train_llava.cli import InputError
from train_llava.processing.images import open_image
from train_llava.ingest.image_index import ImageIndex
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_image({"path": ImageIndex(sys.argv[1]).find("a.png"), "bytes": None})
except InputError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT)
    said, kilobytes = done.stdout.splitlines()
    assert "images.zip, a.png: more than 300 MB" in said, done.stderr
    assert int(kilobytes) < 1.6 * limits.MOST_IMAGE_BYTES / 1024


def test_what_is_no_file_is_not_waited_for(tmp_path):
    """A pipe that nobody writes to, a folder."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        with pytest.raises(InputError, match=rf"{name}: no file\."):
            open_image(tmp_path / name)


def test_what_is_remembered_is_bounded(tokenizer):
    """In entries and in bytes, whatever is asked; what is beyond a bound is refused before it is tokenised."""
    encoder = ChatEncoder(tokenizer, 1, tokenizer.chat_template)
    for i in range(3):
        encoder.encode([{"role": "user", "content": f"{i} " + "word " * 150_000}], add_generation_prompt=True)
    assert max(map(len, encoder.known_ids)) <= limits.LONGEST_KNOWN
    for i in range(3000):
        encoder.encode([{"role": "user", "content": f"{i}"}], add_generation_prompt=True)
    rounds = [{"role": role, "content": "a"} for _ in range(60) for role in ("user", "assistant")]
    for turns in range(1, 121):
        encoder.encode(rounds[:turns], add_generation_prompt=bool(turns % 2))
    for _ in range(4):
        encoder.planned = limits.MOST_PLANNED  # as after many kinds of conversation
        encoder.encode([{"role": "system", "content": "S"}, *rounds[:2]])
        encoder.plans.pop(next(iter(encoder.plans)))
    assert len(encoder.known_ids) <= limits.MOST_KNOWN and len(encoder.plans) <= 2
    for large in ([{"role": "user", "content": "x" * (limits.MOST_CHARACTERS + 1)}], rounds * 4):
        with pytest.raises(InputError, match="are the most"):
            encoder.encode(large, add_generation_prompt=True)


@pytest.mark.parametrize("text", ["'x' * 8000000000", "'x'|center(8000000000)", "'%8000000000d'|format(1)"])
def test_a_template_that_grows_is_ended(tokenizer, text):
    """Eight gigabytes, of which none are taken; the process may grow afterwards as before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(InputError, match="chat template"):
        ChatEncoder(tokenizer, 1, f"{{{{ {text} }}}}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_200_000
    assert resource.getrlimit(resource.RLIMIT_AS) == limit
