"""What runs say together: means and deviations over training seeds, a paired test of each method, Holm's correction."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student


@dataclass(frozen=True, slots=True)
class Paired:
    """A method against the reference, training seed by training seed."""

    difference: float
    """Mean of the method's score less the reference's."""
    error: float | None
    """Its standard error; None for a single seed."""
    p: float | None
    """Of Student's two-sided paired test, the training seed as the unit; None where there is no test."""


def paired(scores: Mapping[str, float], reference: Mapping[str, float]) -> Paired | None:
    """Compare two methods on the seeds that both have; None where they share none."""
    shared = sorted(scores.keys() & reference.keys())
    if not shared:
        return None
    differences = [scores[seed] - reference[seed] for seed in shared]
    mean = statistics.fmean(differences)
    if len(shared) < 2:
        return Paired(mean, None, None)
    error = statistics.stdev(differences) / math.sqrt(len(shared))
    if error == 0:
        return Paired(mean, 0.0, 1.0 if mean == 0 else 0.0)
    return Paired(mean, error, two_sided(mean / error, len(shared) - 1))


def two_sided(t: float, freedom: int) -> float:
    """Return P(|T| >= |t|) of Student's distribution."""
    return float(2 * student.sf(abs(t), freedom))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's step-down adjustment of p-values; None stays, and counts as no test."""
    tests = sorted((p, number) for number, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (p, number) in enumerate(tests):
        highest = max(highest, min(1.0, (len(tests) - rank) * p))
        adjusted[number] = highest
    return adjusted
