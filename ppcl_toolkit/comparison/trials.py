"""Learning rates, tried before the runs: which one a method keeps, and what the others came to."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Cell = tuple[int, str, bool, str]
"""Budget, target, whether modulation is of low rank, method."""


def cell_of(run: Mapping[str, Any]) -> Cell:
    """Return what the seeds and trials of one row share."""
    return run["budget"], run["target"], run["modulation"], run["method"]


def best_factors(trials: Sequence[Mapping[str, Any]]) -> dict[Cell, float]:
    """Return the factor with the least velocity error for each cell; one that broke off loses to all that did not."""
    best: dict[Cell, Mapping[str, Any]] = {}
    for trial in trials:
        known = best.get(cell_of(trial))
        if "failed" not in trial and (known is None or _badness(trial) < _badness(known)):
            best[cell_of(trial)] = trial
    return {cell: trial["factor"] for cell, trial in best.items()}


def told(trial: Mapping[str, Any]) -> str:
    """Return a trial in a few words: its factor, and what it came to."""
    if "failed" in trial:
        return f"×{trial['factor']:g} failed: {trial['failed']}"
    return f"×{trial['factor']:g} {trial['velocity_error']:.4f}" + (" broke off" if trial["broke_off"] else "")


def _badness(trial: Mapping[str, Any]) -> tuple[bool, float]:
    error = trial["velocity_error"]
    return trial["broke_off"], error if math.isfinite(error) else math.inf
