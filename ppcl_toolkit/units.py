"""What a transformer costs, in three units, and how a user says how much of it a target may keep."""

import math
import re
from dataclasses import dataclass

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.values import shortened

UNITS = {"params": "parameters", "bytes": "bytes", "flops": "FLOPs"}
_EXAMPLES = {"params": "8B, 650M or 12000", "bytes": "12GB or 800MB", "flops": "40T or 900G"}
_SCALES = {
    "params": {"": 1, "K": 1e3, "M": 1e6, "B": 1e9},
    "bytes": {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12},
    "flops": {"": 1, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a block or a whole transformer."""

    params: int
    bytes: int
    """Of the parameters, as exported."""
    flops: int
    """Floating-point operations of one call with one picture; with classifier-free guidance, a step takes two."""

    def of(self, unit: str) -> int:
        """Return the figure in one of `UNITS`."""
        found: int = getattr(self, unit)
        return found

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{unit: self.of(unit) + other.of(unit) for unit in UNITS})

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(**{unit: self.of(unit) - other.of(unit) for unit in UNITS})


def parse_size(text: str, total: int, unit: str = "params") -> int:
    """Return what `70%`, or `8B`, `12GB`, `40T` in their units, means for a teacher of `total`.

    Raises `PpclError` for what is no size, and for one that is not smaller than the teacher's.
    """
    number = _read(text, unit)
    size = int(number * (total / 100)) if is_share(text) else int(number)
    if size >= total:
        raise PpclError(f"target size {shortened(text)} is not smaller than the teacher's {total:,} {UNITS[unit]}")
    return size


def check_size(text: str, unit: str) -> None:
    """Raise a `PpclError` for what is no size of any teacher."""
    if _read(text, unit) >= 100 and is_share(text):
        raise PpclError(f"target size {shortened(text)}: a share is below 100%")


def is_share(text: str) -> bool:
    """Whether a size is a share of the teacher's."""
    return text.rstrip().endswith("%")


def _read(text: str, unit: str) -> float:
    """Return a number in percent of the teacher's, or in the unit itself."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[A-Z]{0,2})\s*", text, re.IGNORECASE)
    scales = {**_SCALES[unit], "%": 1}
    if not match or match[2].upper() not in scales or not 0 < float(match[1]) < math.inf:
        example = f"a share such as 70%, or a number such as {_EXAMPLES[unit]}"
        raise PpclError(f"target size {shortened(text)}: expected {example}")
    return float(match[1]) * scales[match[2].upper()]
