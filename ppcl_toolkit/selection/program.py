"""Which operations go, as an integer program: the least sum of errors that saves enough in every unit.

    minimise    sum_i c_i x_i                                       x_i in {0, 1}: operation i goes
    subject to  sum_i s_iu x_i - sum_ij o_iju y_ij >= missing_u     for every unit u that falls short
                x_i + x_j <= 1                                      where the rules of plans forbid both
                x_i + x_j - y_ij <= 1                               y_ij: both go, and save o_ij less than they do alone
                sum_i w_ik x_i <= limit_k                           limits of the recipe

What two operations save together is asked only of those that a solution holds, and the program solved again with it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
from scipy.optimize import LinearConstraint, milp

from ppcl_toolkit.plan import AnyOperation, FfnSwap, Interval, Plan, TextRun
from ppcl_toolkit.units import Cost

Limit = tuple[Sequence[float], float]
"""A weight for each operation, and the most that those which go may weigh together."""
_MARGIN = 1e-7
"""Share of what is missing by which solvers may fall short: their arithmetic is in floating point."""
_SECONDS = 60.0
"""Until the best choice found so far is taken: on 60 blocks it takes less than one."""


@final
@dataclass
class Program:
    """The choice of some of `operations` beside those of `plan`; `missing` says of a cost what is too much, by unit."""

    plan: Plan
    operations: Sequence[AnyOperation]
    costs: Callable[[Plan], Cost]
    missing: Callable[[Cost], Mapping[str, int]]
    limits: Sequence[Limit] = ()
    _less: dict[tuple[int, int], Cost] = field(default_factory=dict)
    """What two operations save less together than each alone, as far as it was asked for."""

    def __post_init__(self) -> None:
        self._whole = self.costs(self.plan)
        self._short = self.missing(self._whole)
        self._saves = [self._whole - self.costs(self.with_chosen([n])) for n in range(len(self.operations))]
        self._forbidden = self._exclusive()

    def solve(self, errors: Sequence[float]) -> list[int] | None:
        """Return the numbers of the operations that go, for the `errors` that each adds; None where nothing does."""
        margins = dict.fromkeys(self._short, _MARGIN)
        while (chosen := self._solved(errors, margins)) is not None:
            cost = self.costs(self.with_chosen(chosen))
            short = self.missing(cost)
            if not short:
                return chosen
            if not self._learn(chosen):
                # More than two have something in common.
                margins |= {unit: margins[unit] + more / self._short[unit] for unit, more in short.items()}
        return None

    def nearest(self) -> list[int]:
        """Return the numbers of the operations that leave the least missing, in shares of it, of all units together."""
        exact = dict.fromkeys(self._short, 0.0)
        while (chosen := self._solved([0.0] * len(self.operations), exact, elastic=True)) and self._learn(chosen):
            pass
        return chosen or []

    def with_chosen(self, chosen: Sequence[int]) -> Plan:
        """Return the plan with the operations of these numbers."""
        return self.plan.with_operations([*self.plan.operations, *(self.operations[number] for number in chosen)])

    def _learn(self, chosen: Sequence[int]) -> bool:
        """Find out what pairs of a choice save less together than alone; tell whether any was not known."""
        pairs = [p for p in itertools.combinations(chosen, 2) if p not in self._less and self._touch(*p)]
        for one, other in pairs:
            both = self._whole - self.costs(self.with_chosen([one, other]))
            self._less[one, other] = self._saves[one] + self._saves[other] - both
        return bool(pairs)

    def _solved(
        self, errors: Sequence[float], margins: Mapping[str, float], *, elastic: bool = False
    ) -> list[int] | None:
        """Solve for what is known; where that is `elastic`, for the least of what stays missing."""
        count, pairs = len(errors), list(self._less)
        slacks = len(self._short) if elastic else 0
        whole = count + len(pairs)
        if not self._short:
            return []
        if not count:
            return None
        rows, least, most = [], [], []

        def constrain(weights: Mapping[int, float], low: float, high: float) -> None:
            row = np.zeros(whole + slacks)
            row[list(weights)] = list(weights.values())
            rows.append(row)
            least.append(low)
            most.append(high)

        for place, (unit, short) in enumerate(self._short.items()):
            saved = {number: cost.of(unit) / short for number, cost in enumerate(self._saves)}
            less = {count + number: -self._less[pair].of(unit) / short for number, pair in enumerate(pairs)}
            stays = {whole + place: 1.0} if elastic else {}
            constrain(saved | less | stays, 1 + margins[unit], np.inf)
        for exclusive in self._forbidden:
            constrain(dict.fromkeys(exclusive, 1.0), -np.inf, 1.0)
        for number, (one, other) in enumerate(pairs):
            constrain({one: 1.0, other: 1.0, count + number: -1.0}, -np.inf, 1.0)
        for weights, limit in self.limits:
            constrain(dict(enumerate(weights)), -np.inf, limit)
        found = milp(
            np.array([*(e / max([*errors, 1e-300]) for e in errors), *[0.0] * len(pairs), *[1.0] * slacks]),
            integrality=np.array([1] * whole + [0] * slacks),
            bounds=(0, 1),
            constraints=LinearConstraint(np.array(rows), np.array(least), np.array(most)),
            options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
        )
        return None if found.x is None else [number for number in range(count) if found.x[number] > 0.5]

    def _exclusive(self) -> list[Sequence[int]]:
        """Return numbers of operations of which at most one goes."""
        found: list[Sequence[int]] = []
        intervals: dict[tuple[str, int], list[int]] = {}
        for number, operation in enumerate(self.operations):
            if isinstance(operation, Interval):
                for block in range(operation.first, operation.last + 1):
                    intervals.setdefault((operation.stack, block), []).append(number)
        found += [numbers for numbers in intervals.values() if len(numbers) > 1]
        for one, other in itertools.combinations(range(len(self.operations)), 2):
            if self._touch(one, other):
                try:
                    self.with_chosen([one, other])
                except ValueError:
                    found.append([one, other])
        return found

    def _touch(self, one: int, other: int) -> bool:
        """Tell whether two operations have blocks in common; of two intervals it is known what follows."""
        a, b = self.operations[one], self.operations[other]
        if a.stack != b.stack or (isinstance(a, Interval) and isinstance(b, Interval)):
            return False
        (first, last), (start, end) = _span(a), _span(b)
        return first <= end and start <= last


def _span(operation: AnyOperation) -> tuple[int, int]:
    if isinstance(operation, FfnSwap):
        return operation.block, operation.block
    assert isinstance(operation, Interval | TextRun), f"{operation} has no place of its own"
    return (operation.reference if isinstance(operation, TextRun) else operation.first), operation.last
