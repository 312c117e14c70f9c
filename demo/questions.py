"""Questions about scenes and their answers, all worked out from the scene, in English and in Chinese.

KINDS_OF_QUESTION names what can be asked. A thing is spoken of by its kind where there is one of that kind alone ("the
seven"), or with its colour ("the red seven").
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypeVar

import numpy as np

from demo import chinese, english
from demo.scenes import COLOURS, DIGITS, KINDS, PLACES, SHAPES, Item, Scene, home, random_scene

LANGUAGES = {"en": english, "zh": chinese}
QA = tuple[str, str]
Rng = np.random.Generator
T = TypeVar("T")


def pick(rng: Rng, some: Sequence[T]) -> T:
    """One of them; numpy's choice would turn tuples into arrays."""
    return some[int(rng.integers(len(some)))]


def fill(words: ModuleType, rng: Rng, template: str, **fields: str) -> QA:
    """A question and an answer of TEMPLATES, with the fields filled."""
    question, answer = pick(rng, words.TEMPLATES[template])
    return words.sentence(question.format(**fields)), words.sentence(answer.format(**fields))


def names(scene: Scene, item: Item, words: ModuleType) -> list[str]:
    """Every name by which this item alone is meant: by its kind, by colour and kind, by both or none of them."""
    same_kind = [other for other in scene if other.kind == item.kind]
    found = [words.kind(item.kind)] if len(same_kind) == 1 else []
    if sum(other.colour == item.colour for other in same_kind) == 1:
        found.append(words.coloured(item.colour, item.kind))
    return found


def name(scene: Scene, item: Item, words: ModuleType, rng: Rng) -> str | None:
    """One of `names`, three times in four the shorter."""
    found = names(scene, item, words)
    return None if not found else found[0] if rng.random() < 0.75 else found[-1]


def named(scene: Scene, words: ModuleType, rng: Rng) -> tuple[Item, str] | None:
    """Any item that has a name, with it."""
    able = [item for item in scene if names(scene, item, words)]
    if not able:
        return None
    item = pick(rng, able)
    return item, str(name(scene, item, words, rng))


def missing(scene: Scene, words: ModuleType, rng: Rng) -> str:
    """The name of what is not there: half of the time a kind that is there, in another colour.

    In training no pair that is held out is named: who hears "there is no green square" each time would learn just that.
    Where the scene has a new pair, it is another new one three in ten times: to say yes to all of them scores nothing.
    """
    pairs = {(item.kind, item.colour) for item in scene}
    homes = {home(*pair) for pair in pairs} - {"train"}
    if homes and rng.random() < 0.3:
        new = [(kind, colour) for kind in range(len(KINDS)) for colour in COLOURS if home(kind, colour) in homes]
        kind, colour = pick(rng, [pair for pair in new if pair not in pairs])
        return words.coloured(colour, kind)
    if rng.random() < 0.5:
        kind = pick(rng, scene).kind
        there = {item.colour for item in scene if item.kind == kind}
    else:
        kind = pick(rng, [index for index in range(len(KINDS)) if index not in {item.kind for item in scene}])
        there = set()
        if rng.random() < 0.75:
            return words.kind(kind)
    colours = [colour for colour in COLOURS if colour not in there and home(kind, colour) == "train"]
    return words.coloured(pick(rng, colours), kind)


# ---------------------------------------------------------------- one scene; None where the question does not fit


def ask_colour(scene: Scene, words: ModuleType, rng: Rng) -> QA | None:
    able = [item for item in scene if words.kind(item.kind) in names(scene, item, words)]
    if not able:
        return None
    item = pick(rng, able)
    return fill(words, rng, "colour", x=words.kind(item.kind), colour=words.colour(item.colour))


def ask_place(scene: Scene, words: ModuleType, rng: Rng) -> QA | None:
    if (found := named(scene, words, rng)) is None:
        return None
    return fill(words, rng, "place", x=found[1], place=words.place(found[0].place))


def ask_thing(scene: Scene, words: ModuleType, rng: Rng) -> QA:
    there = {item.place: item for item in scene}
    item = pick(rng, scene) if rng.random() < 0.75 else there.get(int(rng.integers(len(PLACES))))
    if item is None:
        empty = pick(rng, [index for index in range(len(PLACES)) if index not in there])
        return fill(words, rng, "no thing", place=words.place(empty))
    fields = {"size": words.size(item), "colour": words.colour(item.colour), "kind": words.kind(item.kind)}
    return fill(words, rng, "thing", place=words.place(item.place), **fields)


def neighbour(scene: Scene, item: Item, side: str) -> Item | None:
    """What is beside an item in its row, or over or under it in its column.

    Raises:
        KeyError: on this side ends the image.
    """
    row, column = divmod(item.place, 2)
    at = {(1, "left"): (row, 0), (0, "right"): (row, 1)} if side in ("left", "right") else {}
    if side in ("above", "below"):
        target = {(1, "above"): (0, column), (0, "below"): (1, column)}[row, side]
    else:
        target = at[column, side]
    return {(other.place // 2, other.place % 2): other for other in scene}.get(target)


def ask_side(scene: Scene, words: ModuleType, rng: Rng) -> QA | None:
    if (found := named(scene, words, rng)) is None:
        return None
    item, x = found
    side = pick(rng, ["left" if item.place % 2 else "right", "above" if item.place >= 2 else "below"])
    if (beside := neighbour(scene, item, side)) is None:
        return fill(words, rng, "no side", side=words.SIDES[side], x=x)
    y = words.coloured(beside.colour, beside.kind)
    return fill(words, rng, "side", side=words.SIDES[side], x=x, y=y)


def ask_presence(scene: Scene, words: ModuleType, rng: Rng) -> QA:
    if rng.random() < 0.5:
        x, template = missing(scene, words, rng), "no"
    else:
        item = pick(rng, scene)
        x = words.kind(item.kind) if rng.random() < 0.5 else words.coloured(item.colour, item.kind)
        template = "yes"
    return fill(words, rng, template, x=x, a_x=words.one(x))


def ask_size(scene: Scene, words: ModuleType, rng: Rng) -> QA | None:
    if (found := named(scene, words, rng)) is None:
        return None
    return fill(words, rng, "size", x=found[1], size=words.size(found[0]))


def ask_larger(scene: Scene, words: ModuleType, rng: Rng) -> QA | None:
    able = [item for item in scene if names(scene, item, words)]
    pairs = [(a, b) for a in able for b in able if a.large != b.large]
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    x, y = (str(name(scene, item, words, rng)) for item in (a, b))
    return fill(words, rng, "larger", x=x, y=y, larger=x if a.large else y, relation=words.relation(a.large))


def ask_count(scene: Scene, words: ModuleType, rng: Rng) -> QA:
    group = pick(rng, ["thing", "digit", "shape"])
    count = sum(group == "thing" or item.is_digit == (group == "digit") for item in scene)
    return fill(words, rng, "count", **words.counting(group, count))


def ask_reading(scene: Scene, words: ModuleType, rng: Rng) -> QA:
    digits = [words.kind(item.kind) for item in scene if item.is_digit]
    if not digits:
        return fill(words, rng, "no reading")
    return fill(words, rng, "reading", digits=words.join(digits))


def ask_caption(scene: Scene, words: ModuleType, rng: Rng) -> QA:
    """In the form of LLaVA-CC3M's: without a capital letter and a full stop."""
    text = words.caption(scene)
    return words.sentence(pick(rng, words.INSTRUCTIONS)), text if words is english else words.sentence(text)


def ask_detail(scene: Scene, words: ModuleType, rng: Rng) -> QA:
    return words.sentence(pick(rng, words.DETAILED)), words.sentence(words.detail(scene))


def ask_absent(scene: Scene, words: ModuleType, rng: Rng) -> QA:
    side = pick(rng, list(words.SIDES))
    return fill(words, rng, "absent", x=missing(scene, words, rng), side=words.SIDES[side])


# ---------------------------------------------------------------- several scenes, or none


def ask_several(scenes: list[Scene], words: ModuleType, rng: Rng) -> QA:
    index = int(rng.integers(len(scenes)))
    nth = words.ORDINALS[index]
    if rng.random() < 0.5:
        return fill(words, rng, "which image", nth=nth, caption=words.caption(scenes[index]))
    kinds = [{item.kind for item in scene} for scene in scenes]
    alone = [kind for kind in kinds[index] if sum(kind in some for some in kinds) == 1]
    if alone and rng.random() < 0.8:
        x = words.kind(pick(rng, alone))
        return fill(words, rng, "find image", nth=nth, x=x, a_x=words.one(x))
    x = words.kind(pick(rng, [kind for kind in range(len(KINDS)) if not any(kind in some for some in kinds)]))
    return fill(words, rng, "in no image", x=x, a_x=words.one(x))


def ask_text(words: ModuleType, rng: Rng) -> QA:
    """What needs no image."""
    template = pick(rng, ["next", "more", "hello", "group"])
    low, high = sorted(rng.choice(len(DIGITS), size=2, replace=False))
    first, second = (words.kind(int(index)) for index in rng.permutation([low, high]))
    after = int(rng.integers(len(DIGITS) - 1))
    return fill(
        words,
        rng,
        template,
        **(
            {"a": words.kind(after), "b": words.kind(after + 1)}
            if template == "next"
            else {"a": first, "b": second, "larger": words.kind(int(high)), "smaller": words.kind(int(low))}
        ),
        shape=words.shape(int(rng.integers(len(SHAPES)))),
        digit=words.kind(int(rng.integers(len(DIGITS)))),
    )


ONE_SCENE: dict[str, Callable[[Scene, ModuleType, Rng], QA | None]] = {
    "caption": ask_caption,
    "detail": ask_detail,
    "colour": ask_colour,
    "place": ask_place,
    "thing": ask_thing,
    "side": ask_side,
    "presence": ask_presence,
    "absent": ask_absent,
    "size": ask_size,
    "larger": ask_larger,
    "count": ask_count,
    "reading": ask_reading,
}
# asked more often than the others
HARDER = ("caption", "side", "side", "side", "absent", "presence", "place", "larger", "larger")
KINDS_OF_QUESTION = [
    *("caption", "colour", "count", "place", "side", "reading", "absent", "presence"),  # those that a sheet shows
    *("size", "larger", "thing", "detail", "several", "text"),
]


def ask(kind: str, scenes: list[Scene], language: str, rng: Rng) -> QA | None:
    """A question of this kind with its answer, or None where it does not fit the scenes."""
    words = LANGUAGES[language]
    if kind == "text":
        return ask_text(words, rng)
    if kind == "several":
        return ask_several(scenes, words, rng) if len(scenes) > 1 else None
    return ONE_SCENE[kind](scenes[0], words, rng) if len(scenes) == 1 else None


def rounds(scenes: list[Scene], count: int, rng: Rng, mixed: float = 0.0, more: Sequence[str] = HARDER) -> list[QA]:
    """So many different questions about the scenes with their answers, three in four times in English.

    `mixed` is the share of conversations that may change their language at each question; kinds in `more` are asked
    more often.
    """
    kinds = ["text"] if not scenes else ["several"] if len(scenes) > 1 else [*ONE_SCENE, *more]
    language, changes, found = pick_language(rng), rng.random() < mixed, {}
    for _ in range(20 * count):  # a small scene has few questions of some kinds
        kind = "text" if rng.random() < 0.05 else pick(rng, kinds)
        qa = ask(kind, scenes, pick_language(rng) if changes else language, rng)
        if qa:
            found.setdefault(*qa)
        if len(found) == count:
            break
    return list(found.items())


def several_scenes(rng: Rng, split: str) -> list[Scene]:
    """Two or three scenes."""
    return [random_scene(rng, split) for _ in range(rng.integers(2, 4))]


def question_of(kind: str, rng: Rng, split: str) -> tuple[list[Scene], QA]:
    """A question of this kind with its answer, and the random scenes that it is about."""
    while True:
        scenes = (
            [] if kind == "text" else several_scenes(rng, split) if kind == "several" else [random_scene(rng, split)]
        )
        if qa := ask(kind, scenes, pick_language(rng), rng):
            return scenes, qa


def pick_language(rng: Rng) -> str:
    return "en" if rng.random() < 0.75 else "zh"
