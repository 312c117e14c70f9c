"""Ten people at once for a minute on the web page and on `transformers serve`, and 200 bad uploads.

    python -m benchmarks.speed.serving [--seconds 60] [--json benchmarks/results/serving.json]

Needs the demo's adapter (bash run_zero2.sh) and pip install "transformers[serving]". Every answer is compared with the
one that infer.generate gives about that image alone, in this process.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from benchmarks.result import ROOT, head, parser, write
from tests.page_client import (
    QUESTION,
    TOKENS,
    answer_in,
    ask_app,
    ask_openai,
    bad_uploads,
    megabytes,
    post,
    served,
    user,
)
from train_llava.model.generate import ask, generate
from train_llava.model.load import load
from train_llava.processing.images import open_image

ADAPTER, DATA = ROOT / "output" / "demo-use_lora", ROOT / "output" / "demo" / "data" / "held_out"
CLIENTS, IMAGES, BAD = 10, 40, 200


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
    flags = parser(__doc__, "--json")
    flags.add_argument("--model_name_or_path", type=Path, default=ADAPTER, help="adapter of the demo")
    flags.add_argument("--images", type=Path, default=DATA / "images", help="held-out images of the demo")
    flags.add_argument("--seconds", type=float, default=60)
    args = flags.parse_args()
    result = {**head(__doc__), "seconds": args.seconds}
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

        def ask_page(data: bytes) -> str:
            return answer_in(ask_app(url, [user(QUESTION, data)]))

        show("the page", crowd(ask_page, expected, process, args.seconds))
        show("bad uploads to the page", refused(url, process, good, BAD))
        right = sum(ask_page(data) == answer for data, answer in expected.items())
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
    write(args.json, result)


if __name__ == "__main__":
    main()
