"""What a target comes to for one teacher, and what was chosen for it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from pydantic import BaseModel

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import AnyOperation, FfnSwap, Plan, TextRun
from ppcl_toolkit.recipe import Target
from ppcl_toolkit.records import read_record
from ppcl_toolkit.training.substitution import Candidate, Measured
from ppcl_toolkit.units import UNITS, Cost, parse_size

_BEGUN = "begun.json"


@final
class Goal:
    """What a target comes to for one teacher; a size that makes no sense for it is a `PpclError`."""

    def __init__(self, target: Target, total: Cost) -> None:
        self._target = target
        self._most = {unit: parse_size(size, total.of(unit), unit) for unit, size in target.asked.items()}
        self.depth = parse_size(target.depth, total.params) if target.depth else 0
        """Parameters at which intervals stop."""
        if target.depth and self.depth < self._most.get("params", 0):
            raise PpclError(f"target {target.name!r}: depth {target.depth} is below params {target.params}")

    def missing(self, cost: Cost) -> dict[str, int]:
        """Return what a student of such costs is short of, by unit; nothing where it meets the target."""
        return {unit: short for unit, most in self._most.items() if (short := cost.of(unit) - most) > 0}

    def shares(self, total: Cost) -> list[float]:
        """Return what may stay of the teacher in each unit, the least first: targets are met in this order."""
        return sorted(self._most.get(unit, total.of(unit)) / total.of(unit) for unit in UNITS)

    def told(self, nearest: Cost, total: Cost, who: str = "the candidates reach") -> str:
        """Say of every unit what is asked for, and what is the nearest."""
        return "; ".join(
            f"{self._target.asked[unit]} is {most:,} {UNITS[unit]}, {who} {nearest.of(unit):,} "
            f"({nearest.of(unit) / total.of(unit):.1%} of the teacher)"
            for unit, most in self._most.items()
        )

    def out_of_reach(self, nearest: Cost, total: Cost) -> PpclError:
        """Return the error of a target that no candidates reach."""
        held = f", intervals stop at depth {self._target.depth}" if self._target.depth else ""
        return PpclError(
            f"target {self._target.name!r}: {self.told(nearest, total)}{held}; "
            "allow more intervals or width, or ask for that"
        )


class Begun(BaseModel):
    """What a method says of its students before they learn."""

    starts: dict[str, tuple[int, ...]] = {}
    """For intervals, by `Form.key`: the teacher's blocks whose mean the student begins with. Default: the first."""
    frozen: dict[str, int] = {}
    """By target: blocks of the student, from its first one on, that do not learn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The plan of every target, and the order in which operations were taken."""

    plans: dict[str, Plan]
    order: tuple[Candidate, ...]
    begun: Begun = field(default_factory=Begun)

    def save(self, folder: Path, measured: Sequence[Measured]) -> None:
        """Write `targets.json` and `order.json`, and every candidate's figures in `measured.json`."""
        _write(folder / "targets.json", {name: plan.model_dump(mode="json") for name, plan in self.plans.items()})
        if self.begun != Begun():
            _write(folder / _BEGUN, self.begun.model_dump(mode="json"))
        _write(folder / "order.json", [operation.model_dump(mode="json") for operation in self.order])
        rows = [
            {
                "operation": m.operation.model_dump(mode="json"),
                "label": str(m.operation),
                "error": m.error,
                "saves": asdict(m.saves),
                "chosen": [name for name, plan in self.plans.items() if any(_is_of(o, m) for o in plan.operations)],
            }
            for m in measured
        ]
        _write(folder / "measured.json", rows)

    @classmethod
    def load(cls, folder: Path) -> "Choice":
        """Read what `save` wrote."""
        plans = read_record(folder / "targets.json", dict[str, Plan])
        begun = read_record(folder / _BEGUN, Begun) if (folder / _BEGUN).exists() else Begun()
        return cls(plans=plans, order=read_record(folder / "order.json", tuple[Candidate, ...]), begun=begun)


def _is_of(operation: AnyOperation, measured: Measured) -> bool:
    """Whether an operation is what was measured, or what was left of it."""
    whole = measured.operation
    if isinstance(operation, TextRun) and isinstance(whole, TextRun) and operation.stack == whole.stack:
        return whole.reference <= operation.reference and operation.last <= whole.last
    if isinstance(operation, FfnSwap) and isinstance(whole, FfnSwap):
        return (operation.stack, operation.block) == (whole.stack, whole.block)
    return operation == whole


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
