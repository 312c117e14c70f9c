"""A client of the web page and of `transformers serve`, for the tests and for benchmarks.speed.serving."""

import base64
import io
import json
import random
import socket
import subprocess
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from aiohttp import web
from PIL import Image

from train_llava.app import App

ROOT = Path(__file__).parent.parent
QUESTION = "Give a short caption for the picture."
TOKENS = 64  # of an answer: by then those about different images differ


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(*command: Any) -> Iterator[tuple[str, int]]:
    """Address and process id of a server, which is started with a free --port and ended afterwards."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([*map(str, command), "--port", str(port)], cwd=ROOT, stdout=log, stderr=log)
        try:
            for _ in range(600):
                time.sleep(0.2)
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if server.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().decode())
            yield f"http://127.0.0.1:{port}", server.pid
        finally:
            server.terminate()
            server.wait(30)


def post(url: str, body: Any, **headers: str) -> tuple[int, bytes]:
    """Status and body of the reply."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(url, body, {"Content-Type": "application/json", **headers}), timeout=120) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        return error.code, error.read()


def ask_app(url: str, messages: list[dict[str, Any]], **settings) -> list[dict[str, Any]]:
    """The lines that the page gets about a conversation."""
    status, body = post(f"{url}/answer", {"messages": messages, "max_new_tokens": TOKENS, **settings})
    return [{"status": status, **json.loads(line)} for line in body.splitlines()]


def user(text: str, *photos: bytes) -> dict[str, Any]:
    """A question as the page sends it."""
    return {"role": "user", "content": text, "images": [base64.b64encode(data).decode() for data in photos]}


def answer_in(lines: list[dict[str, Any]]) -> str:
    """The pieces of an answer together, or the error."""
    return "".join(line.get("text", "") + line.get("error", "") for line in lines).strip()


def ask_openai(url: str, model: str, data: bytes, tokens: int = TOKENS) -> str:
    """An answer by chat completions."""
    image = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(data).decode()}}
    message = {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}
    _, body = post(f"{url}/v1/chat/completions", {"model": model, "messages": [message], "max_tokens": tokens})
    return json.loads(body)["choices"][0]["message"]["content"].strip()


def bad_uploads(good: list[bytes], seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Without end: files that Pillow cannot read to their end, other kinds of files, and images of 100 megapixels."""
    rng, image = random.Random(seed), Image.new("RGB", (64, 64), "red")
    others = [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"PK\x03\x04" + bytes(99)]
    for kind in ("EPS", "TIFF", "PPM"):
        image.save(file := io.BytesIO(), kind)
        others.append(file.getvalue())
    while True:
        yield "mutated", mutated(rng, rng.choice(good))
        yield "mutated", mutated(rng, rng.choice(good))
        yield "wrong type", rng.choice([*others, rng.randbytes(2000)])
        yield "bomb", bomb(10_000 + rng.randrange(50_000), 10_000)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Cut, overwritten or turned around somewhere, such that Pillow cannot read it any more."""
    while True:
        start, size = rng.randrange(len(data)), 1 << rng.randrange(9)
        middle = rng.choice([b"", rng.randbytes(size), data[start : start + size][::-1]])
        changed = data[:start] + middle + data[start + rng.choice([size, len(data)]) :]
        try:
            Image.open(io.BytesIO(changed)).convert("RGB")
        except Exception:
            return changed


def bomb(width: int, height: int) -> bytes:
    """A whole PNG, one bit per pixel, all black: some kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def megabytes(process: int, field: str = "VmRSS") -> int:
    """Memory of a process now, or (VmHWM) at most so far."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))


def ask_about(url: str, text: str, *files: Path, **settings: Any) -> list[dict[str, Any]]:
    """The lines about one question with images."""
    return ask_app(url, [user(text, *(file.read_bytes() for file in files))], max_new_tokens=TOKENS, **settings)


@asynccontextmanager
async def running(one: App) -> AsyncIterator[str]:
    """Address of an App in this process."""
    runner = web.AppRunner(one.routes(), handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    yield f"http://{host}:{port}"
    await runner.cleanup()
