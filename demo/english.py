"""How the demo world is spoken about in English. `demo/chinese.py` has the same names.

In TEMPLATES each line is a question and its answer: who words a question so, is answered so. The fields in braces are
filled by `demo/questions.py`.
"""

from demo.scenes import COLOURS, DIGITS, KINDS, PLACES, SHAPES, Item, Scene

SYSTEM_PROMPTS = ["You look at images and answer in short sentences.", "Answer what you are asked."]

# How a person may ask for a description: the wordings are ours, the kind is that of LLaVA-CC3M-Pretrain-595K.
INSTRUCTIONS = [
    "Describe this image in one sentence.",
    "What do you see in the image?",
    "Give a short caption for the image.",
    "Say briefly what the image shows.",
    "What is in this image?",
    "Write a brief description of the image.",
]
DETAILED = ["Describe the image in detail.", "Tell me everything about this image."]

GROUPS = {"thing": "things", "digit": "digits", "shape": "shapes"}
ORDINALS = ["first", "second", "third"]
SIDES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}

TEMPLATES = {
    "colour": [
        ("What colour is the {x}?", "The {x} is {colour}."),
        ("Which colour does the {x} have?", "{colour}."),
    ],
    "place": [
        ("Where is the {x}?", "The {x} is at the {place}."),
        ("In which corner is the {x}?", "At the {place}."),
    ],
    "thing": [
        ("What is at the {place}?", "A {size} {colour} {kind} is at the {place}."),
        ("What can you see at the {place}?", "A {size} {colour} {kind}."),
    ],
    "no thing": [
        ("What is at the {place}?", "Nothing is at the {place}."),
        ("What can you see at the {place}?", "Nothing."),
    ],
    "side": [
        ("What is {side} the {x}?", "The {y} is {side} the {x}."),
        ("Which thing is {side} the {x}?", "The {y}."),
    ],
    "no side": [
        ("What is {side} the {x}?", "Nothing is {side} the {x}."),
        ("Which thing is {side} the {x}?", "Nothing."),
    ],
    "yes": [
        ("Is there {a_x} in the image?", "Yes, there is {a_x}."),
        ("Do you see {a_x}?", "Yes."),
    ],
    "no": [
        ("Is there {a_x} in the image?", "No, there is no {x}."),
        ("Do you see {a_x}?", "No."),
    ],
    "larger": [
        ("Which is larger, the {x} or the {y}?", "The {larger} is larger."),
        ("Is the {x} larger than the {y}, or smaller?", "The {x} is {relation} the {y}."),
    ],
    "size": [("Is the {x} large or small?", "The {x} is {size}."), ("How large is the {x}?", "It is {size}.")],
    "count": [
        ("How many {group} are in the image?", "There {are} {number} {counted} in the image."),
        ("Count the {group}.", "{alone}."),
    ],
    "reading": [
        ("Read the digits from left to right, the top row first.", "{digits}."),
        ("Which digits does the image show?", "It shows {digits}."),
    ],
    "no reading": [
        ("Read the digits from left to right, the top row first.", "There is no digit."),
        ("Which digits does the image show?", "There is no digit."),
    ],
    "absent": [
        ("What colour is the {x}?", "There is no {x} in the image."),
        ("Where is the {x}?", "There is no {x} in the image."),
        ("Is the {x} large or small?", "There is no {x} in the image."),
        ("What is {side} the {x}?", "There is no {x} in the image."),
    ],
    "which image": [
        ("Describe the {nth} image.", "It shows {caption}."),
        ("What does the {nth} image show?", "{caption}."),
    ],
    "find image": [("Which image shows {a_x}?", "The {nth} image shows {a_x}.")],
    "in no image": [("Which image shows {a_x}?", "None of them shows {a_x}.")],
    "next": [
        ("Which number comes after {a}?", "After {a} comes {b}."),
        ("Which number comes before {b}?", "Before {b} comes {a}."),
    ],
    "more": [("Which number is larger, {a} or {b}?", "{larger} is larger than {smaller}.")],
    "hello": [
        ("Hello!", "Hello! What would you like to know?"),
        ("What can you do?", "I can tell you what is in an image of digits and shapes."),
        ("Thank you!", "You are welcome."),
    ],
    "group": [
        ("Is a {shape} a digit or a shape?", "A {shape} is a shape."),
        ("Is {digit} a digit or a shape?", "{digit} is a digit."),
    ],
}


def join(words: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def kind(index: int) -> str:
    return KINDS[index]


def colour(name: str) -> str:
    assert name in COLOURS
    return name


def size(item: Item) -> str:
    return "large" if item.large else "small"


def place(index: int) -> str:
    return PLACES[index]


def coloured(colour: str, index: int) -> str:
    """ "red seven"."""
    return f"{colour} {KINDS[index]}"


def one(name: str) -> str:
    """ "a red seven", "an eight", "a one"."""
    return f"{'an' if name[0] in 'aeio' and name != 'one' else 'a'} {name}"


def relation(larger: bool) -> str:
    return "larger than" if larger else "smaller than"


def counting(group: str, count: int) -> dict[str, str]:
    """The fields of a question how many there are."""
    fields = {"group": GROUPS[group], "are": "is" if count == 1 else "are"}
    fields |= {"number": DIGITS[count] if count else "no", "alone": DIGITS[count] if count else "none"}
    return fields | {"counted": group if count == 1 else GROUPS[group]}


def shape(index: int) -> str:
    return SHAPES[index]


def caption(scene: Scene) -> str:
    """The one right caption: "a small red seven at the top left and a large blue star at the bottom right"."""
    return join([f"a {size(item)} {item.colour} {kind(item.kind)} at the {PLACES[item.place]}" for item in scene])


def detail(scene: Scene) -> str:
    """How many things there are, and a sentence about each."""
    count = "There is one thing." if len(scene) == 1 else f"There are {DIGITS[len(scene)]} things."
    each = [f"The {kind(i.kind)} at the {PLACES[i.place]} is {size(i)} and {i.colour}." for i in scene]
    return " ".join([count, *each])


def note(item: Item) -> list[str]:
    """A thing in loose words."""
    return [size(item), item.colour, kind(item.kind), *PLACES[item.place].split()]


def sentence(text: str) -> str:
    """With a capital letter."""
    return text[0].upper() + text[1:]
