"""Learning rates, tried before the runs: which one a method keeps, and what the others came to."""

from collections.abc import Mapping, Sequence
from typing import Any

Cell = tuple[int, str, bool, str]
"""Budget, target, whether modulation is of low rank, method."""


def cell_of(run: Mapping[str, Any]) -> Cell:
    """Return what the seeds and trials of one row share."""
    return run["budget"], run["target"], run["modulation"], run["method"]


def best_factors(trials: Sequence[Mapping[str, Any]]) -> dict[Cell, float]:
    """Return the factor with the least velocity error for each cell; none where all of its trials failed."""
    best: dict[Cell, Mapping[str, Any]] = {}
    for trial in (trial for trial in trials if "failed" not in trial):
        known = best.setdefault(cell_of(trial), trial)
        if trial["velocity_error"] < known["velocity_error"]:
            best[cell_of(trial)] = trial
    return {cell: trial["factor"] for cell, trial in best.items()}


def told(trial: Mapping[str, Any]) -> str:
    """Return a trial in a few words: its factor, and what it came to."""
    if "failed" in trial:
        return f"×{trial['factor']:g} failed: {trial['failed']}"
    return f"×{trial['factor']:g} {trial['velocity_error']:.4f}"
