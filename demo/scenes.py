"""The demo world: small images of one to four coloured things, handwritten digits and drawn shapes.

The handwriting is real: 1,797 scans of 8 x 8 pixels that scikit-learn ships (`sklearn.datasets.load_digits`, from the
UCI "Optical Recognition of Handwritten Digits" set). Two things are held out, from training and from pretraining:

- of digits the handwriting: those of a held-out image are scans that no other split has;
- of shapes pairs with a colour. No image, caption or text that was trained on has a green square, and every held-out
  image has a shape of such a pair. Who has learned things by heart cannot name it; who has learned what green is, and
  what a square is, can. (CLEVR's "compositional generalization test" is built so: Johnson et al. 2017.)
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

IMAGE_SIZE, CELL = 112, 28  # pixels on a side: an image of 4 x 4 cells, and one cell, which is a patch of the CLIP
SMALL, LARGE = 20, 28  # pixels: a thing's side
SPLITS = {"train": slice(0, 1400), "validation": slice(1400, 1500), "held_out": slice(1500, 1797)}  # of all scans

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SHAPES = ["circle", "square", "triangle", "star", "cross", "heart"]
KINDS = DIGITS + SHAPES
COLOURS = {
    "red": (225, 45, 45),
    "orange": (245, 140, 30),
    "yellow": (245, 225, 60),
    "green": (60, 190, 70),
    "cyan": (70, 215, 225),
    "blue": (65, 100, 255),
    "purple": (190, 80, 225),
    "white": (240, 240, 240),
}
PLACES = ["top left", "top right", "bottom left", "bottom right"]  # quadrants of 2 x 2 cells


@dataclass(frozen=True)
class Item:
    """One thing of a scene.

    kind: an index into KINDS. colour: a key of COLOURS. place: an index into PLACES. large: or small.
    cell: which of the four cells of its place. scan: which handwriting, for a digit.
    """

    kind: int
    colour: str
    place: int
    large: bool = False
    cell: int = 0
    scan: int = 0

    @property
    def is_digit(self) -> bool:
        return self.kind < len(DIGITS)

    @property
    def patch(self) -> int:
        """Which of the image's 16 patches shows it, in reading order."""
        row, column = self.place // 2 * 2 + self.cell // 2, self.place % 2 * 2 + self.cell % 2
        return row * (IMAGE_SIZE // CELL) + column


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


@cache
def scans_of(split: str, digit: int) -> np.ndarray:
    """The indices of a digit's scans."""
    return np.flatnonzero(load_scans(split)[1] == digit)


def home(kind: int, colour: str) -> str:
    """The split that has this pair: each shape is held out in one colour, and in another for validation."""
    if kind < len(DIGITS):
        return "train"
    return {0: "held_out", 1: "validation"}.get((list(COLOURS).index(colour) - kind) % len(COLOURS), "train")


def random_item(rng: np.random.Generator, split: str, place: int) -> Item:
    """Anything of any colour at this place."""
    kind, scan = int(rng.integers(len(KINDS))), 0
    if kind < len(DIGITS):
        scan = int(rng.choice(scans_of(split, kind)))
    return Item(kind, str(rng.choice(list(COLOURS))), place, bool(rng.random() < 0.5), int(rng.integers(4)), scan)


def belongs(scene: Scene, split: str) -> bool:
    """Whether a scene has the pairs of its split: no held-out one in training, in the others at least one of theirs."""
    homes = {home(item.kind, item.colour) for item in scene}
    return homes <= {"train", split} and split in homes


def random_scene(rng: np.random.Generator, split: str) -> Scene:
    """One to four things in different places, listed in reading order."""
    while True:
        count = rng.choice([1, 2, 3, 4], p=[0.2, 0.3, 0.3, 0.2])
        places = sorted(rng.choice(len(PLACES), size=count, replace=False))
        scene = tuple(random_item(rng, split, int(place)) for place in places)
        if belongs(scene, split):
            return scene


def draw(scene: Scene, rng: np.random.Generator, split: str, spread: float = 1.0) -> Image.Image:
    """The image of a scene, 112 x 112 RGB; `rng` sets the background and moves, tilts and stretches each thing.

    `spread` scales tilt, slant and stretch; pretraining draws wilder images than the demo shows.
    """
    background = rng.integers(10, 40, size=3)
    canvas = np.broadcast_to(background, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32).copy()
    for item in scene:
        ink = scan_ink(load_scans(split)[0][item.scan]) if item.is_digit else shape_ink(KINDS[item.kind])
        size = LARGE if item.large else SMALL
        alpha = vary(ink.resize((size, size), Image.BICUBIC), rng, spread)[..., None]
        row, column = divmod(item.patch, IMAGE_SIZE // CELL)
        room = CELL - size
        dy, dx = rng.integers(room // 4, room - room // 4 + 1, size=2)  # near the middle of its cell
        window = canvas[row * CELL + dy :, column * CELL + dx :][:size, :size]
        window += alpha * (np.array(COLOURS[item.colour], dtype=np.float32) - window)
    return Image.fromarray(canvas.round().astype(np.uint8))


def scan_ink(scan: np.ndarray) -> Image.Image:
    """A scan (8, 8) in [0, 1] as a grey image."""
    return Image.fromarray((scan * 255).astype(np.uint8))


@cache
def shape_ink(name: str) -> Image.Image:
    """A shape of SHAPES, white on black, 112 x 112."""
    side = 112
    middle, radius = side / 2, side * 0.42
    ink = Image.new("L", (side, side))
    pen = ImageDraw.Draw(ink)

    def corners(angles: np.ndarray, radii: np.ndarray | float) -> list[tuple[float, float]]:
        x, y = middle + radii * np.sin(angles), middle - radii * np.cos(angles)
        return list(zip(x, y, strict=True))

    if name == "circle":
        pen.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], fill=255)
    elif name == "square":
        pen.rectangle([middle - radius * 0.85] * 2 + [middle + radius * 0.85] * 2, fill=255)
    elif name == "triangle":
        pen.polygon(corners(np.arange(3) * 2 * np.pi / 3, radius * 1.1), fill=255)
    elif name == "star":
        pen.polygon(corners(np.arange(10) * np.pi / 5, np.tile([radius * 1.1, radius * 0.45], 5)), fill=255)
    elif name == "cross":
        arm = radius * 0.3
        pen.rectangle([middle - arm, middle - radius, middle + arm, middle + radius], fill=255)
        pen.rectangle([middle - radius, middle - arm, middle + radius, middle + arm], fill=255)
    else:
        t = np.linspace(0, 2 * np.pi, 100)  # the well-known curve of a heart
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        pen.polygon(list(zip(middle + x * radius / 16, middle - y * radius / 16, strict=True)), fill=255)
    return ink


def vary(ink: Image.Image, rng: np.random.Generator, spread: float) -> np.ndarray:
    """Ink as opacity in [0, 1], tilted by up to 8 degrees, slanted by 0.1 and stretched by 8%, at the size it has."""
    tilt = np.deg2rad(rng.uniform(-8, 8) * spread)
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    slant = np.array([[1, rng.uniform(-0.1, 0.1) * spread], [0, 1]])
    inverse = turn @ slant / (1 + rng.uniform(-0.08, 0.08, size=2) * spread)
    middle = (ink.size[0] - 1) / 2
    shift = middle - inverse @ [middle, middle]
    coefficients = (*inverse[0], shift[0], *inverse[1], shift[1])  # where each output pixel comes from
    ink = ink.transform(ink.size, Image.AFFINE, coefficients, Image.BICUBIC)
    return np.asarray(ink, dtype=np.float32) / 255.0
