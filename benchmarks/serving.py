"""Ten people at once for a minute on the web page and on `transformers serve`, and 200 bad uploads.

    python -m benchmarks.serving [--seconds 60] [--json benchmarks/results/serving.json]

Needs the demo's adapter (bash run_zero2.sh) and pip install "transformers[serving]". Every answer is compared with the
one that infer.generate gives about that image alone, in this process.
"""

import argparse
import base64
import io
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from PIL import Image

from benchmarks.machine import machine
from train_llava.model.generate import ask, generate
from train_llava.model.load import load
from train_llava.processing.images import open_image

ROOT = Path(__file__).parent.parent
ADAPTER, DATA = ROOT / "output" / "demo-use_lora", ROOT / "output" / "demo" / "data" / "held_out"
QUESTION = "Give a short caption for the picture."
CLIENTS, IMAGES, BAD = 10, 40, 200
TOKENS = 64


@contextmanager
def served(*command: Any) -> Iterator[tuple[str, int]]:
    """Address and process id of a server, which is started with a free --port and ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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


def post(url: str, body: Any) -> tuple[int, bytes]:
    """Status and body of the reply."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=120) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        return error.code, error.read()


def ask_app(url: str, messages: list[dict[str, Any]], **settings) -> list[dict[str, Any]]:
    """What the page is told about a conversation, line by line."""
    status, body = post(f"{url}/answer", {"messages": messages, "max_new_tokens": TOKENS, **settings})
    return [{"status": status, **json.loads(line)} for line in body.splitlines()]


def user(text: str, *photos: bytes) -> dict[str, Any]:
    """A question as the page sends it."""
    return {"role": "user", "content": text, "images": [base64.b64encode(data).decode() for data in photos]}


def said(lines: list[dict[str, Any]]) -> str:
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


def crowd(answer: Callable[[bytes], str], alone: dict[bytes, str], process: int, seconds: float) -> dict[str, Any]:
    """Ten clients, each asking about images of its own choice, one after another."""
    warm = min(20.0, seconds / 3)
    start, early = time.perf_counter(), []

    def client(number: int) -> list[tuple[float, bool]]:
        rng, seen = random.Random(number), []
        while (now := time.perf_counter()) < start + warm + seconds:
            if number == 0 and not early and now > start + warm:
                early.append(megabytes(process))
            data = rng.choice(list(alone))
            seen.append((answer(data) == alone[data], time.perf_counter() - now))
        return seen

    with ThreadPoolExecutor(CLIENTS) as pool:
        seen = [one for many in pool.map(client, range(CLIENTS)) for one in many]
    waits = sorted(wait for _, wait in seen)
    return {
        "clients": CLIENTS,
        "answers": len(seen),
        "wrong_or_errors": sum(not right for right, _ in seen),
        "median_seconds": round(median(waits), 2),
        "longest_seconds": round(waits[-1], 2),
        f"mb_after_{warm:.0f}_s": early[0],
        "mb_at_the_end": megabytes(process),
    }


def refused(url: str, process: int, good: list[bytes], count: int) -> dict[str, Any]:
    """Bad uploads, each shown to the check and asked about: how many of each kind got a sentence both times."""
    result: dict[str, Any] = {"mb_before": megabytes(process)}
    for kind, data in islice(bad_uploads(good), count):
        status, body = post(f"{url}/image?name={quote('mine.png')}", data)
        checked = status == 400 and json.loads(body)["error"].startswith("mine.png: ")
        last = ask_app(url, [user(QUESTION, data)])[-1]
        right, total = result.get(kind, (0, 0))
        result[kind] = (right + (checked and last.get("error", "").startswith("image 1: ")), total + 1)
    result |= {kind: f"{of[0]} of {of[1]}" for kind, of in result.items() if isinstance(of, tuple)}
    return {**result, "mb_after": megabytes(process), "mb_at_most": megabytes(process, "VmHWM")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", type=Path, default=ADAPTER, help="adapter of the demo")
    parser.add_argument("--images", type=Path, default=DATA / "images", help="held-out images of the demo")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = {"command": "python -m benchmarks.serving", **machine(), "seconds": args.seconds}
    good = [path.read_bytes() for path in sorted(args.images.iterdir())[:IMAGES]]

    def alone(folder: Path) -> dict[bytes, str]:
        model = load(folder)
        shown = {data: open_image({"path": None, "bytes": data}) for data in good}
        return {data: generate(*model, [ask(QUESTION, [shown[data]])], max_new_tokens=TOKENS)[0] for data in good}

    def show(name: str, row: dict[str, Any]) -> None:
        result[name] = row
        print(name, *(f"  {key:<20}{value:>12}" for key, value in row.items()), sep="\n", flush=True)

    expected = alone(args.model_name_or_path)
    result["different_answers_among_images"] = f"{len(set(expected.values()))} of {len(expected)}"
    command = [sys.executable, "-m", "train_llava.app", "--model_name_or_path", args.model_name_or_path.resolve()]
    with served(*command) as (url, process):
        show(
            "the page", crowd(lambda data: said(ask_app(url, [user(QUESTION, data)])), expected, process, args.seconds)
        )
        show("bad uploads to the page", refused(url, process, good, BAD))
        right = sum(said(ask_app(url, [user(QUESTION, data)])) == answer for data, answer in expected.items())
        show("the page afterwards", {"right answers": f"{right} of {len(expected)}"})
    with tempfile.TemporaryDirectory() as folder:
        model, processor = load(args.model_name_or_path)
        model.merge_and_unload().save_pretrained(folder)
        processor.save_pretrained(folder)
        expected = alone(Path(folder))
        serve = [Path(sys.executable).with_name("transformers"), "serve", folder, "--device", model.device]
        with served(*serve) as (url, process):
            show(
                "transformers serve", crowd(lambda data: ask_openai(url, folder, data), expected, process, args.seconds)
            )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
