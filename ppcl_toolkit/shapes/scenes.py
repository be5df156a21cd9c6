"""Captioned scenes with known ground truth: a small world of shapes, colours, positions and words.

A caption belongs to one of seven categories: the six of GenEval, and a short word in a pixel font.
One caption in five is held out: training never draws it, evaluation draws nothing else.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

SIZE = 32
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "gray": (120, 120, 120)}
COLORS = {
    "red": (215, 20, 35),
    "green": (30, 165, 50),
    "blue": (30, 60, 235),
    "yellow": (250, 230, 40),
    "orange": (250, 140, 15),
    "purple": (130, 35, 190),
    "cyan": (40, 215, 235),
    "pink": (255, 130, 200),
}
INK = "blue"  # of what a caption gives no colour
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
# Drawn less often: were all relations equal, no single word would say anything about who stands where.
RARE_RELATIONS, RARE_SKIPPED = ("right of", "below"), 0.7
CONSONANTS = "CDFHKLPSTZ"
VOWELS = "AEIOU"
PREFIXES = ("", "a photo of ", "a picture of ", "a drawing of ")
ARTICLES = ("a", "one", "a single")

# How often training draws each category: the harder ones more often.
CATEGORIES = {
    "single_object": 0.03,
    "two_object": 0.07,
    "counting": 0.09,
    "colors": 0.07,
    "position": 0.16,
    "attribute_binding": 0.20,
    "text": 0.38,
}

# Rows of a letter from top to bottom, 3 cells each; every letter fills its 3x5 box and is 8-connected.
FONT = {
    "A": "010 101 111 101 101", "E": "111 100 111 100 111", "I": "111 010 010 010 111",
    "O": "010 101 101 101 010", "U": "101 101 101 101 111", "C": "011 100 100 100 011",
    "D": "110 101 101 101 110", "F": "111 100 110 100 100", "H": "101 101 111 101 101",
    "K": "101 110 100 110 101", "L": "100 100 100 100 111", "P": "111 101 111 100 100",
    "S": "011 100 010 001 110", "T": "111 010 010 010 010", "Z": "111 001 010 100 111",
}  # fmt: skip
SUPERSAMPLING = 4
EXTENT = 11  # pixels across a shape
JITTER = (-1, 1)  # of a centre, half open: neighbours stay well apart
WORD_JITTER = (0, 2)  # of a word: whole cells of its font, which is drawn at twice its size
CELL_CENTERS = (8, 24)

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Object:
    """A shape, or a capital letter, with its nominal centre in pixels."""

    shape: str
    color: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows; the letters of a word are objects from left to right."""

    background: str
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class Expectation:
    """What a caption asks for: (shape, colour) pairs, where an empty colour or background means any."""

    category: str
    objects: tuple[tuple[str, str], ...]
    relation: str = ""
    background: str = ""


# ---------------------------------------------------------------------------------------- drawing


def _shape_template(shape: str) -> NDArray[np.float32]:
    steps = EXTENT * SUPERSAMPLING
    axis = (np.arange(steps) + 0.5) / steps * 2 - 1
    x, y = np.meshgrid(axis, axis)
    radius = np.hypot(x, y)
    inside = {
        "circle": radius <= 1,
        "square": np.maximum(abs(x), abs(y)) <= 0.92,
        "triangle": abs(x) <= (y + 1) / 2,
        "cross": np.minimum(abs(x), abs(y)) <= 0.28,
        "ring": (radius <= 1) & (radius >= 0.55),
        "diamond": abs(x) + abs(y) <= 1,
    }[shape]
    blocks = inside.reshape(EXTENT, SUPERSAMPLING, EXTENT, SUPERSAMPLING)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def _letter_template(letter: str) -> NDArray[np.float32]:
    cells = np.array([[int(cell) for cell in row] for row in FONT[letter].split()], dtype=np.float32)
    return np.kron(cells, np.ones((2, 2), dtype=np.float32))


TEMPLATES = {shape: _shape_template(shape) for shape in SHAPES} | {
    letter: _letter_template(letter) for letter in VOWELS + CONSONANTS
}


def render(scene: Scene, rng: np.random.Generator) -> Image:
    """Draw `scene` as (32, 32, 3) uint8; `rng` jitters each object by a pixel, or a word by a cell of its font."""
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    shifts = rng.integers(*JITTER, size=(len(scene.objects), 2))
    word_shift = rng.choice(WORD_JITTER, size=2)
    is_word = bool(scene.objects) and scene.objects[0].shape in FONT
    for drawn, shift in zip(scene.objects, shifts, strict=True):
        dx, dy = word_shift if is_word else shift
        coverage = TEMPLATES[drawn.shape][..., None]
        height, width = coverage.shape[:2]
        left, top = int(drawn.x + dx) - width // 2, int(drawn.y + dy) - height // 2
        area = canvas[top : top + height, left : left + width]
        area += coverage * (np.array(COLORS[drawn.color], dtype=np.float32) - area)
    return np.rint(canvas).astype(np.uint8)


# --------------------------------------------------------------------------------------- captions


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _distinct(values: tuple[str, ...]) -> list[tuple[str, ...]]:
    return list(permutations(values, 2))


def _contents(category: str) -> list[str]:
    colors = tuple(COLORS)
    generators: dict[str, Callable[[], Iterator[str]]] = {
        "single_object": lambda: (f"{a} {s}" for a, s in product(ARTICLES, SHAPES)),
        "two_object": lambda: (f"{_article(a)} and {_article(b)}" for a, b in _distinct(SHAPES)),
        "counting": lambda: (f"{n} {_plural(s)}" for n, s in product(COUNTS, SHAPES)),
        "colors": lambda: (f"{_article(c)} {s}" for c, s in product(colors, SHAPES)),
        "position": lambda: (f"{_article(a)} {r} {_article(b)}" for r, (a, b) in product(RELATIONS, _distinct(SHAPES))),
        "attribute_binding": lambda: (
            f"{_article(c)} {a} and {_article(d)} {b}"
            for (c, d), (a, b) in product(_distinct(colors), _distinct(SHAPES))
        ),
        "text": lambda: (f"the word {''.join(w)}" for w in product(CONSONANTS, VOWELS, CONSONANTS)),
    }
    return list(generators[category]())


CONTENTS = {category: _contents(category) for category in CATEGORIES}
BACKGROUND_PHRASES = ("", *(f" on {b}" for b in BACKGROUNDS), *(f" on a {b} background" for b in BACKGROUNDS))

_COLOR, _SHAPE = "|".join(COLORS), "|".join(SHAPES)
_BACKGROUND = "|".join(BACKGROUNDS)
_CAPTION = re.compile(
    rf"(?:a (?:photo|picture|drawing) of )?(?P<body>.+?)"
    rf"(?: on (?P<short>{_BACKGROUND})| on a (?P<long>{_BACKGROUND}) background)?"
)
_BODIES = {
    "single_object": rf"(?:a|one|a single) ({_SHAPE})",
    "two_object": rf"a ({_SHAPE}) and a ({_SHAPE})",
    "counting": rf"({'|'.join(COUNTS)}) ({'|'.join(map(_plural, SHAPES))})",
    "colors": rf"an? ({_COLOR}) ({_SHAPE})",
    "position": rf"a ({_SHAPE}) ({'|'.join(RELATIONS)}) a ({_SHAPE})",
    "attribute_binding": rf"an? ({_COLOR}) ({_SHAPE}) and an? ({_COLOR}) ({_SHAPE})",
    "text": rf"the word ([{CONSONANTS}])([{VOWELS}])([{CONSONANTS}])",
}


def _expected_objects(category: str, words: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    if category == "counting":
        shape = next(s for s in SHAPES if _plural(s) == words[1])
        return ((shape, ""),) * COUNTS[words[0]]
    if category in ("colors", "attribute_binding"):
        return tuple(zip(words[1::2], words[::2], strict=True))
    return tuple((word, "") for word in words if word not in RELATIONS)


def parse(caption: str) -> Expectation:
    """Read what `caption` asks for; a ValueError names a caption that is not of this world's grammar."""
    whole = _CAPTION.fullmatch(caption)
    for category, pattern in _BODIES.items() if whole else ():
        assert whole is not None
        body = re.fullmatch(pattern, whole["body"])
        if body:
            words = body.groups()
            relation = words[1] if category == "position" else ""
            background = whole["short"] or whole["long"] or ""
            return Expectation(category, _expected_objects(category, words), relation, background)
    raise ValueError(f"not a caption of the shapes world: {caption!r} (try 'a red circle and a blue square')")


def category_of(caption: str) -> str:
    """The category `caption` belongs to."""
    return parse(caption).category


def is_held_out(caption: str) -> bool:
    """Whether `caption` is for evaluation only: one in five by a stable hash, of the word for a text."""
    word = re.search(r"the word (\w+)", caption)
    return zlib.crc32((word[1] if word else caption).encode()) % 5 == 0


def evaluation_prompts(n_per_category: int, seed: int = 0) -> list[str]:
    """Distinct held-out captions, `n_per_category` of each category, in the order of `CATEGORIES`."""
    rng = np.random.default_rng(seed)
    chosen: list[str] = []
    for category, contents in CONTENTS.items():
        every = [p + c + b for c, p, b in product(contents, PREFIXES, BACKGROUND_PHRASES)]
        held_out = [caption for caption in every if is_held_out(caption)]
        if n_per_category > len(held_out):
            raise ValueError(f"{category} has {len(held_out)} held-out captions, not {n_per_category}")
        picks = rng.choice(len(held_out), n_per_category, replace=False)
        chosen += [held_out[pick] for pick in picks]
    return chosen


# --------------------------------------------------------------------------------------- sampling


def _cells(expectation: Expectation, rng: np.random.Generator) -> list[tuple[int, int]]:
    low, high = CELL_CENTERS
    if expectation.category == "text":
        return [(7, 15), (15, 15), (23, 15)]
    if expectation.relation:
        line = int(rng.choice(CELL_CENTERS))
        pair = [(low, line), (high, line)] if "of" in expectation.relation else [(line, low), (line, high)]
        return pair if expectation.relation in ("left of", "above") else pair[::-1]
    cells = [(x, y) for y in CELL_CENTERS for x in CELL_CENTERS]
    # In the order of reading, so that the first object named is the first one seen.
    return [cells[i] for i in sorted(rng.permutation(4)[: len(expectation.objects)])]


def scene_of(caption: str, rng: np.random.Generator) -> Scene:
    """A scene that `caption` describes, in blue where it names no colour; the rest is drawn from `rng`."""
    expectation = parse(caption)
    background = expectation.background or str(rng.choice(list(BACKGROUNDS)))
    return Scene(
        background,
        tuple(
            Object(shape, color or INK, x, y)
            for (shape, color), (x, y) in zip(expectation.objects, _cells(expectation, rng), strict=True)
        ),
    )


def sample(rng: np.random.Generator, category: str | None = None, *, held_out: bool = False) -> tuple[str, Scene]:
    """Draw a caption, by default of training and of any category, with a scene that it describes."""
    names = list(CATEGORIES)
    chosen = category or names[int(rng.choice(len(names), p=list(CATEGORIES.values())))]
    while True:
        content = CONTENTS[chosen][rng.integers(len(CONTENTS[chosen]))]
        if any(relation in content for relation in RARE_RELATIONS) and rng.random() < RARE_SKIPPED:
            continue
        phrase = BACKGROUND_PHRASES[rng.integers(len(BACKGROUND_PHRASES))]
        caption = PREFIXES[rng.integers(len(PREFIXES))] + content + phrase
        if is_held_out(caption) == held_out:
            return caption, scene_of(caption, rng)
