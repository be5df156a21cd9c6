"""The deterministic scorer: reads a picture back into a scene and compares it with what a caption asks for.

Exact-set match, stricter than GenEval: every object asked for is found, and nothing else is.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ppcl_toolkit.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    SIZE,
    TEMPLATES,
    Expectation,
    Image,
    Object,
    Scene,
    parse,
)

UNKNOWN = "?"
FOREGROUND = 55.0  # RGB distance from the background at which a pixel belongs to an object
SPECK = 5  # components of fewer pixels are noise
COLOR_RADIUS = 70.0  # an object's colour is the nearest of the palette, and at most this far from it
OVERLAP = 0.75  # soft intersection over union with a template below which a component is no known shape
APART = 8  # pixels by which a relation must hold
WINDOW = 15  # pixels around a component's centre that are compared with the templates

Floats = NDArray[np.float32]


def _bank() -> tuple[list[str], Floats]:
    names, stack = [], []
    for name, template in TEMPLATES.items():
        height, width = template.shape
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                placed = np.zeros((WINDOW, WINDOW), dtype=np.float32)
                top, left = WINDOW // 2 - height // 2 + dy, WINDOW // 2 - width // 2 + dx
                placed[top : top + height, left : left + width] = template
                names.append(name)
                stack.append(placed.ravel())
    return names, np.stack(stack)


_BANK_NAMES, _BANK = _bank()


def _nearest(color: Floats, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    names = list(palette)
    distances = np.linalg.norm(np.array([palette[n] for n in names], dtype=np.float32) - color, axis=1)
    best = int(distances.argmin())
    return names[best], float(distances[best])


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.intp]]:
    """8-connected components of `mask` as (pixels, 2) arrays of row and column."""
    waiting = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    found = []
    while waiting:
        stack = [waiting.pop()]
        component = []
        while stack:
            y, x = stack.pop()
            component.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & waiting
            waiting -= near
            stack += near
        found.append(np.array(component))
    return found


def _read(component: NDArray[np.intp], pixels: Floats, background: Floats) -> Object:
    rows, columns = component.T
    own = pixels[rows, columns]
    distance = np.linalg.norm(own - background, axis=1)
    core = np.median(own[distance >= np.median(distance)], axis=0)
    color, far = _nearest(core, COLORS)
    top, left = (int(component[:, axis].min() + component[:, axis].max() + 1) // 2 for axis in (0, 1))
    # Soft coverage from the colour: anti-aliased edges count by the share of the pixel they fill.
    direction = core - background
    coverage = np.clip((own - background) @ direction / max(float(direction @ direction), 1.0), 0, 1)
    padded = np.zeros((SIZE + 2 * WINDOW,) * 2, dtype=np.float32)
    padded[rows + WINDOW, columns + WINDOW] = coverage
    start_y, start_x = top + WINDOW - WINDOW // 2, left + WINDOW - WINDOW // 2
    window = padded[start_y : start_y + WINDOW, start_x : start_x + WINDOW].ravel()
    outside = coverage.sum() - window.sum()
    overlap = np.minimum(_BANK, window).sum(1) / (np.maximum(_BANK, window).sum(1) + outside)
    best = int(overlap.argmax())
    shape = _BANK_NAMES[best] if overlap[best] >= OVERLAP else UNKNOWN
    x, y = (float((component[:, axis].min() + component[:, axis].max()) / 2) for axis in (1, 0))
    return Object(shape, color if far <= COLOR_RADIUS else UNKNOWN, x, y)


def detect(image: Image) -> Scene:
    """Read a (32, 32, 3) uint8 picture; what cannot be named is an object, colour or background "?"."""
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 picture of (32, 32, 3), got {image.dtype} of {image.shape}")
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    color = np.median(border, axis=0)
    background, far = _nearest(color, BACKGROUNDS)
    mask = np.linalg.norm(pixels - color, axis=2) > FOREGROUND
    objects = [_read(c, pixels, color) for c in _components(mask) if len(c) >= SPECK]
    objects.sort(key=lambda found: (found.x, found.y))
    return Scene(background if far <= FOREGROUND else UNKNOWN, tuple(objects))


def _relation_holds(expectation: Expectation, scene: Scene) -> bool:
    first, second = (next(o for o in scene.objects if o.shape == shape) for shape, _ in expectation.objects)
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[
        expectation.relation
    ]
    return along >= APART and along > abs(across)


def matches(expectation: Expectation, scene: Scene) -> bool:
    """Whether `scene` is exactly what is expected: the same objects, nothing more, and where it was asked."""
    if expectation.background and scene.background != expectation.background:
        return False
    if scene.background == UNKNOWN or any(UNKNOWN in (o.shape, o.color) for o in scene.objects):
        return False
    if expectation.category == "text":
        return [o.shape for o in scene.objects] == [letter for letter, _ in expectation.objects]
    named_colors = any(color for _, color in expectation.objects)
    found = Counter((o.shape, o.color if named_colors else "") for o in scene.objects)
    if found != Counter(expectation.objects):
        return False
    return not expectation.relation or _relation_holds(expectation, scene)


def score(caption: str, image: Image) -> bool:
    """Whether `image` shows exactly what `caption` says."""
    return matches(parse(caption), detect(image))


def _means(rows: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Mean per category in order of appearance, then "overall", the mean over all rows."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for category, value in rows:
        grouped[category].append(value)
    means = {category: float(np.mean(values)) for category, values in grouped.items()}
    return means | {"overall": float(np.mean([value for _, value in rows]))}


def score_by_category(captions: Sequence[str], images: Sequence[Image]) -> dict[str, float]:
    """Share of pictures that match their caption, per category and "overall"."""
    pairs = zip(captions, images, strict=True)
    return _means([(parse(caption).category, float(score(caption, image))) for caption, image in pairs])


def chance(captions: Sequence[str], images: Sequence[Image]) -> dict[str, float]:
    """Chance level: every caption against the pictures of the other captions of its category; {} where none has any."""
    expectations = [parse(caption) for caption in captions]
    scenes = [detect(image) for image in images]
    rows = []
    for i, expectation in enumerate(expectations):
        others = [
            matches(expectation, scene)
            for j, scene in enumerate(scenes)
            if captions[j] != captions[i] and expectations[j].category == expectation.category
        ]
        if others:
            rows.append((expectation.category, float(np.mean(others))))
    return _means(rows) if rows else {}
