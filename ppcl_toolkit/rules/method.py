"""What a method is: a rule that says what goes, how the student begins, how it recovers. A file in `methods/` has some.

Costs are in block passes, b: a block forward on a sample is 1, forward and backward 3.
"""

import difflib
import importlib
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Form, ModulationSwap, Plan
from ppcl_toolkit.recipe import Lossname, Recipe
from ppcl_toolkit.rules.scores import Scores
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.selection.joint import Together
from ppcl_toolkit.stages.intervals import Candidates
from ppcl_toolkit.surgery.costs import Costs
from ppcl_toolkit.training.substitution import Measured

Place = tuple[str, int]
"""A stack's path and a block of it."""


class Unreachable(PpclError):
    """A method cannot make what is asked for: its row says so, and the others go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What a student may cost, in one unit."""

    unit: str
    aim: int
    tolerance: float

    @classmethod
    def at_most(cls, unit: str, size: int, below: float) -> "Window":
        """Return that of a target, which may be smaller by the share `below` than it is asked for, and no larger."""
        return cls(unit=unit, aim=int(size / (1 + below / 2)), tolerance=below / 2)

    @property
    def least(self) -> int:
        """Smallest size that counts as matched."""
        return int(self.aim * (1 - self.tolerance)) + 1

    @property
    def most(self) -> int:
        """Largest size that counts as matched."""
        return int(self.aim * (1 + self.tolerance))

    def off(self, size: int) -> float:
        """Return by how much a size misses the aim, relative to it; 0 within the tolerance."""
        return 0.0 if self.least <= size <= self.most else size / self.aim - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """What a rule decides."""

    plan: Plan
    sources: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """For intervals, by `Form.key`: the teacher's blocks whose mean the student begins with. Default: the first."""
    passes: int = 0
    """What the search took, in b."""
    frozen: int = 0
    """Blocks of the student, from its first one on, that do not learn."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a rule may look at: the same for all, measured once, and charged to each that looks."""

    job: Recipe
    runner: Runner
    costs: Costs
    plan: Plan
    """Of the whole teacher."""
    lever: tuple[ModulationSwap, ...]
    """Modulation of low rank beneath the method, or none."""
    window: Window
    seed: int
    batches: Callable[[str, int], Batches]
    """`batches(stage, size)`: noised batches of the training seed."""
    scores: Scores
    found: Candidates
    """Intervals and text runs of Algorithm 1, and the curves of CKA."""
    measured: Sequence[Measured]
    """These, and FFNs, with what each costs alone."""
    wider: Sequence[Measured] = ()
    """These, and what else an integer program tries, where the job chooses by one."""
    together: Together | None = None
    """Measures several operations together."""
    passes: int
    """All that the run may spend, in b."""
    factor: float = 1.0
    """Of the job's learning rates, in recovery."""

    @cached_property
    def whole(self) -> int:
        """What the teacher costs, with the lever."""
        return self.costs(self.plan.with_operations(self.lever)).of(self.window.unit)

    @property
    def places(self) -> list[Place]:
        """All blocks, in the order in which they run."""
        return [(stack, block) for stack, depth in self.plan.depths.items() for block in range(depth)]

    def cost(self, place: Place) -> int:
        """Return what a block costs, with the lever."""
        rank = next((swap.rank for swap in self.lever if swap.stack == place[0]), 0)
        return self.costs.form(Form(place[0], place[1], place[1], modulation=rank)).of(self.window.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Each interval's student by itself (stage `depth`); None leaves it to the job."""

    share: float | None = None
    """Of what the search leaves; None: as the job's own steps have it."""
    inputs: Literal["teacher", "student", "mixed"] | None = None
    loss: Lossname | None = None
    init: Literal["first", "best", "average"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Linear text streams and FFNs (stage `width`)."""

    share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """Velocity matching of the whole student (stage `finetune`)."""

    share: float | None = None
    features: float = 0.0
    """Weight of the feature loss at interval ends."""
    feature_loss: Lossname = "relative_mse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to compress, as its source has it, as far as the `Plan` language can say it."""

    name: str
    source: str
    """Where it comes from."""
    rule: Callable[[Ground, Desk], Pick]
    """Says what goes; raises `Unreachable` where it cannot."""
    segments: Segments | None = None
    widths: Widths | None = None
    whole: Whole | None = None


@dataclass(frozen=True, slots=True)
class Impossible:
    """A rule that no `Plan` can say."""

    why: str

    def __call__(self, _ground: Ground, _desk: Desk) -> Pick:
        """Raise `Unreachable` with the reason."""
        raise Unreachable(self.why)


def known_methods() -> dict[str, tuple[Method, ...]]:
    """Return all methods by the file that has them."""
    files = sorted(
        entry.name.removesuffix(".py")
        for entry in importlib.resources.files("ppcl_toolkit.methods").iterdir()
        if entry.name.endswith(".py") and not entry.name.startswith("_")
    )
    return {name: importlib.import_module(f"ppcl_toolkit.methods.{name}").METHODS for name in files}


def find_methods(names: Sequence[str], key: str = "methods") -> list[Method]:
    """Return methods by name, or by that of their file; an unknown one is a `PpclError` with a suggestion."""
    known = known_methods()
    single = {method.name: (method,) for methods in known.values() for method in methods}
    choices = {**known, **single}
    found: dict[str, Method] = {}
    for name in names:
        if name not in choices:
            close = difflib.get_close_matches(name, choices, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(single)}"
            raise PpclError(f"{key}: no method {name!r}; {hint}")
        found |= {method.name: method for method in choices[name]}
    return list(found.values())
