"""The web page: its answers and its limits. Reference: infer.generate, asked alone."""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from conftest import TOKENS, call
from page_client import (
    QUESTION,
    answer_in,
    ask_about,
    ask_app,
    ask_openai,
    bad_uploads,
    bomb,
    megabytes,
    post,
    served,
    user,
)
from PIL import Image
from transformers.utils.import_utils import is_serve_available

from train_llava import app
from train_llava.app import options_of
from train_llava.model.generate import ask, generate
from train_llava.processing.images import open_image


def test_clients_at_once_get_the_answers_asked_alone(page, alone, files):
    asked = [("What is this?", file) for file in files]
    with ThreadPoolExecutor(2) as pool:
        lines = list(pool.map(lambda one: ask_about(page[0], *one), asked))
    expected = [alone(*one) for one in asked]
    assert [answer_in(one) for one in lines] == expected and len(set(expected)) > 8
    assert any(len(one) > 3 for one in lines)  # in pieces
    assert any(one[0]["waiting"] for one in lines)


def test_a_conversation_is_the_one_of_the_page(page, loaded, files):
    shown = [open_image(file) for file in files[:3]]
    first = ask("What are these?", shown[:2])["messages"] + [{"role": "assistant", "content": "Two digits."}]
    example = {"messages": first + ask("And this?", shown[2:])["messages"], "images": shown}
    data = [file.read_bytes() for file in files[:3]]
    sent = [user("What are these?", *data[:2]), {**first[1], "images": []}, user("And this?", data[2])]
    expected = generate(*loaded, [example], max_new_tokens=TOKENS)[0]
    assert answer_in(ask_app(page[0], sent, max_new_tokens=TOKENS)) == expected
    assert answer_in(ask_app(page[0], sent[2:], max_new_tokens=TOKENS)) != expected


def test_settings(page, alone, files):
    greedy = alone("What?", files[0])
    hot = {answer_in(ask_about(page[0], "What?", files[0], temperature=2)) for _ in range(3)}
    assert len(hot) > 1
    assert (
        answer_in(ask_about(page[0], "What?", files[0], temperature=1, top_p=0)) == greedy
    )  # the likeliest word alone is left
    lines = ask_app(page[0], [user("What?", files[0].read_bytes())], max_new_tokens=3)
    assert answer_in(lines) == alone("What?", files[0], max_new_tokens=3) != greedy
    assert options_of({"max_new_tokens": 10**9, "temperature": 99, "top_p": float("nan")}) == {
        "max_new_tokens": 1024,
        "do_sample": True,
        "temperature": 2.0,
        "top_p": 1e-6,
        "top_k": 0,
    }


def test_bad_uploads_get_a_sentence_each(page, alone, files):
    url, process = page
    before = megabytes(process)
    for kind, data in islice(bad_uploads([file.read_bytes() for file in files], seed=1), 20):
        status, body = post(f"{url}/image?name=mine.png", data)
        reason = {"bomb": "more than 50,000,000 pixels"}.get(kind, "not a readable image")
        assert status == 400 and json.loads(body)["error"].startswith(f"mine.png: {reason}"), (kind, data[:40])
        (line,) = [line for line in ask_app(url, [user("What?", data)]) if "error" in line]
        assert line["error"].startswith(f"image 1: {reason}")
    assert megabytes(process, "VmHWM") - before < 100
    assert answer_in(ask_about(url, "What?", files[0])) == alone("What?", files[0])


def test_limits(page):
    assert post(f"{page[0]}/image", bomb(10_000, 4_999))[0] == 200
    status, body = post(f"{page[0]}/image?name=a.png", bytes((20 << 20) + 1))
    assert (status, json.loads(body)["error"]) == (400, "a.png: larger than 20 MB.")
    status, body = post(f"{page[0]}/image", bytes(81 << 20))
    assert (status, json.loads(body)["error"]) == (413, "more than 80 MB at once.")
    Image.new("RGB", (9, 9)).save(file := io.BytesIO(), "PNG")
    eight = answer_in(ask_app(page[0], [user("What?", *[file.getvalue()] * 8)]))
    assert eight and "more than 8 images" not in eight
    assert [options_of({"max_new_tokens": tokens})["max_new_tokens"] for tokens in (0, -5, 7)] == [1, 1, 7]
    assert "more than 8 images" in answer_in(ask_app(page[0], [user("What?", *[file.getvalue()] * 9)]))
    assert "of the model's 512 positions" in answer_in(ask_app(page[0], [user("word " * 600)]))
    assert "the prompt has 2 <image>" in answer_in(ask_app(page[0], [user("<image> <image>", file.getvalue())]))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"messages": 5}',
        b'{"messages": [{"role": "system", "content": ""}]}',
        b'{"messages": [{"role": "user", "content": "", "images": ["?"]}]}',
        b'{"messages": [], "max_new_tokens": 1e999}',
    ],
)
def test_other_requests_get_a_sentence(page, body):
    _, reply = post(f"{page[0]}/answer", body)
    assert json.loads(reply.splitlines()[-1])["error"].startswith(("not a question", "not a conversation", "image 1"))

    assert urlopen(page[0]).status == 200


def test_examples(page, files):
    about = json.load(urlopen(f"{page[0]}/about"))
    assert (about["name"], about["examples"]) == ("llava", [file.name for file in files[:3]])
    assert urlopen(f"{page[0]}/examples/1").read() == files[1].read_bytes()
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{page[0]}/examples/3")


def test_wrong_usage(llava, page, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # the command sets it for its process

    def refused(*flags):
        done = call(app.main, "--model_name_or_path", llava, *flags)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done

    assert "--auth is USER:PASSWORD" in refused("--auth", "ann").stderr
    assert "no such folder of examples" in refused("--examples", tmp_path / "none").stderr
    port = page[0].rpartition(":")[2]
    assert "ddress already in use. Give others" in refused("--port", port).stderr
    assert "whoever reaches this address can ask" in refused("--port", port, "--host", "0.0.0.0").stdout


@pytest.mark.skipif(not is_serve_available(), reason='needs pip install "transformers[serving]"')
def test_transformers_serve_answers_alike(llava, files, alone):
    """As docs/serving.md has it: no code of this repository."""
    transformers = Path(sys.executable).with_name("transformers")
    with served(transformers, "serve", llava, "--device", "cpu") as (url, _):
        said = [ask_openai(url, str(llava), file.read_bytes(), TOKENS) for file in files[:3]]
    assert said == [alone(QUESTION, file) for file in files[:3]] and len(set(said)) > 1
