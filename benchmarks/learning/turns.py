"""Chats of ten turns about held-out scenes: how many answers are exactly right at each turn.

    python -m benchmarks.learning.turns [--model_name_or_path output/demo-use_lora] [--output benchmarks/results/turns]

Each chat is about one image, and asks ten questions of different kinds in a random order. What the model has answered
stays in the chat, right or wrong. Training conversations had at most six turns. A minute on one CPU core. Writes a
table and the first chat of each language as .md, all figures as .json.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.result import RESULTS, ROOT, head, parser, table, write
from demo.questions import KINDS_OF_QUESTION, ONE_SCENE, QA, ask
from demo.scenes import draw, random_scene
from train_llava.ingest.conversation import IMAGE_TOKEN
from train_llava.model.generate import generate
from train_llava.model.load import Model, load

TURNS, CHATS, BATCH = 10, 100, 50
KINDS = [kind for kind in KINDS_OF_QUESTION if kind in ONE_SCENE]


def questions(rng: np.random.Generator, language: str) -> tuple[Any, list[QA]]:
    """A held-out image, and ten different questions about it with their answers."""
    while True:
        scene = random_scene(rng, "held_out")
        asked = [ask(KINDS[i], [scene], language, rng) for i in rng.permutation(len(KINDS))]
        found = dict(filter(None, asked))
        if len(found) >= TURNS:
            return draw(scene, rng, "held_out"), list(found.items())[:TURNS]


def chat(model: Model, processor: Any, language: str) -> tuple[list[float], list[dict[str, str]]]:
    """The share of right answers at each turn, and the messages of the first chat."""
    rng = np.random.default_rng([10, *language.encode()])
    images, asked = zip(*(questions(rng, language) for _ in range(CHATS)), strict=True)
    chats: list[dict[str, Any]] = [{"messages": [], "images": [image]} for image in images]
    right = []
    for turn in range(TURNS):
        said = []
        for one, qas in zip(chats, asked, strict=True):
            text = qas[turn][0] if turn else f"{IMAGE_TOKEN}\n{qas[turn][0]}"
            one["messages"].append({"role": "user", "content": text})
        for start in range(0, CHATS, BATCH):
            said += generate(model, processor, chats[start : start + BATCH], max_new_tokens=128)
        for one, answer in zip(chats, said, strict=True):
            one["messages"].append({"role": "assistant", "content": answer})
        right.append(sum(answer == qas[turn][1] for answer, qas in zip(said, asked, strict=True)) / CHATS)
    return right, chats[0]["messages"]


def main() -> None:
    flags = parser(__doc__, "--output", RESULTS / "turns")
    flags.add_argument("--model_name_or_path", type=Path, default=ROOT / "output" / "demo-use_lora")
    args = flags.parse_args()
    model, processor = load(args.model_name_or_path)
    found = {language: chat(model, processor, language) for language in ("en", "zh")}
    rows = [[name, *(f"{100 * share:.0f}" for share in found[name][0])] for name in found]
    text = table(["exact match, %, at turn", *range(1, TURNS + 1)], rows)
    for _, messages in found.values():
        text += "\n" + table(["", "the first chat"], ([each["role"], each["content"]] for each in messages))
    right = {language: shares for language, (shares, _) in found.items()}
    result = head(__doc__) | {"chats_of_each_language": CHATS, "exact": right}
    write(args.output, result, text.replace(f"{IMAGE_TOKEN}\n", ""))


if __name__ == "__main__":
    main()
