"""The demo world: small images of one or two coloured handwritten digits, and their exact captions.

The handwriting is real: 1,797 scans of 8 x 8 pixels that scikit-learn ships (`sklearn.datasets.load_digits`,
from the UCI "Optical Recognition of Handwritten Digits" set). The scans are split once, so that a held-out
image shows handwriting that no training image, and no pretraining, has used.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

IMAGE_SIZE = 56  # pixels on a side
DIGIT_SIZE = 24  # pixels; fits a quadrant of 28 with room to move
SPLITS = {"train": slice(0, 1400), "validation": slice(1400, 1500), "held_out": slice(1500, 1797)}  # of all scans

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = {
    "red": (235, 60, 50),
    "green": (60, 200, 80),
    "blue": (70, 120, 255),
    "yellow": (245, 215, 60),
    "purple": (200, 90, 230),
    "white": (240, 240, 240),
}
PLACES = ["top left", "top right", "bottom left", "bottom right"]

# How a person may ask for a description: the wordings are ours, the kind is that of LLaVA-CC3M-Pretrain-595K.
INSTRUCTIONS = [
    "Describe this picture in one sentence.",
    "What do you see in the image?",
    "Give a short caption for the picture.",
    "Say briefly what the image shows.",
    "What is in this picture?",
    "Write a brief description of the image.",
]


@dataclass(frozen=True)
class Item:
    """One digit of a scene: which, in which colour, where (an index into PLACES), written by which scan."""

    digit: int
    colour: str
    place: int
    scan: int


Scene = tuple[Item, ...]


@cache
def load_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scans and labels of a split of SPLITS: (count, 8, 8) float in [0, 1] and (count,) int.

    The order is one fixed permutation of the data set, so that the split never depends on another seed. Settings were
    chosen on "validation"; "held_out" is for the final figures alone.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    chosen = order[SPLITS[split]]
    return digits.images[chosen] / 16.0, digits.target[chosen]


def random_scene(rng: np.random.Generator, split: str) -> Scene:
    """One digit (a quarter of the scenes) or two, in different places, listed in reading order."""
    labels = load_scans(split)[1]
    count = 2 if rng.random() < 0.75 else 1
    places = sorted(rng.choice(len(PLACES), size=count, replace=False))
    scans = rng.integers(len(labels), size=count)
    colours = rng.choice(list(COLOURS), size=count)
    return tuple(Item(int(labels[s]), str(c), int(p), int(s)) for s, c, p in zip(scans, colours, places, strict=True))


def caption(scene: Scene) -> str:
    """The one right caption: "a red seven at the top left and a blue one at the bottom right"."""
    return " and ".join(f"a {item.colour} {DIGITS[item.digit]} at the {PLACES[item.place]}" for item in scene)


def draw(scene: Scene, rng: np.random.Generator, split: str, spread: float = 1.0) -> Image.Image:
    """The image of a scene, 56 x 56 RGB; `rng` sets the background and moves, tilts and stretches each digit.

    `spread` scales tilt, slant and stretch; pretraining draws wilder images than the demo shows.
    """
    scans = load_scans(split)[0]
    background = rng.integers(10, 40, size=3)
    canvas = np.broadcast_to(background, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32).copy()
    half = IMAGE_SIZE // 2
    for item in scene:
        alpha = vary(Image.fromarray((scans[item.scan] * 255).astype(np.uint8)), rng, spread)[..., None]
        top, left = (item.place // 2) * half, (item.place % 2) * half
        dy, dx = rng.integers(0, half - DIGIT_SIZE + 1, size=2)
        window = canvas[top + dy : top + dy + DIGIT_SIZE, left + dx : left + dx + DIGIT_SIZE]
        window += alpha * (np.array(COLOURS[item.colour], dtype=np.float32) - window)
    return Image.fromarray(canvas.round().astype(np.uint8))


def vary(ink: Image.Image, rng: np.random.Generator, spread: float) -> np.ndarray:
    """A scan as opacity (24, 24) in [0, 1], tilted by up to 8 degrees, slanted by 0.1 and stretched by 8%."""
    tilt = np.deg2rad(rng.uniform(-8, 8) * spread)
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    slant = np.array([[1, rng.uniform(-0.1, 0.1) * spread], [0, 1]])
    inverse = turn @ slant / (1 + rng.uniform(-0.08, 0.08, size=2) * spread)
    middle = (DIGIT_SIZE - 1) / 2
    shift = middle - inverse @ [middle, middle]
    coefficients = (*inverse[0], shift[0], *inverse[1], shift[1])  # where each output pixel comes from
    ink = ink.resize((DIGIT_SIZE, DIGIT_SIZE), Image.BICUBIC)
    ink = ink.transform(ink.size, Image.AFFINE, coefficients, Image.BICUBIC)
    return np.asarray(ink, dtype=np.float32) / 255.0
