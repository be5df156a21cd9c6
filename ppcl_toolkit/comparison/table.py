"""From runs to rows: a row for each method, target and lever, set against the reference at the same of both."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ppcl_toolkit.comparison.asked import Comparison
from ppcl_toolkit.comparison.trials import Cell, cell_of, told
from ppcl_toolkit.comparison.verdict import Paired, holm, paired

HEADER = (
    "budget",
    "target",
    "method",
    "modulation",
    "parameters",
    "FLOPs",
    "score",
    "rate",
    "v error",
    "RMSE",
    "against",
    "p",
    "b",
    "note",
)
TRIED = ("budget", "target", "method", "modulation", "learning rate and velocity error")


def results(
    asked: Comparison,
    teacher: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    trials: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return teacher, runs, trials and rows as JSON: every setting that was run, losing and failed ones, too."""
    groups: dict[tuple[int, str, bool], dict[str, list[Mapping[str, Any]]]] = {}
    for run in runs:
        by_method = groups.setdefault((run["budget"], run["target"], run["modulation"]), {})
        by_method.setdefault(run["method"], []).append(run)
    # Where there is no scorer, the error that nothing can be said without decides: less of it is better.
    figure = "score" if teacher["score"] is not None else "velocity_error"
    rows: list[dict[str, Any]] = []
    for (budget, target, lever), methods in groups.items():
        own = [_row(name, found, figure) for name, found in methods.items()]
        reference = next((row for row in own if row["method"] == asked.reference), None)
        others = [row for row in own if row is not reference]
        tests = [_tested(row, reference, asked.tolerance) for row in others]
        for row, test, p in zip(others, tests, holm([test.p if test else None for test in tests]), strict=True):
            row |= {"difference": test.difference if test else None, "error": test.error if test else None, "p": p}
        rows += [{"budget": budget, "target": target, "modulation": lever, **row} for row in own]
    facts = {"reference": asked.reference, "figure": figure, "passes": list(asked.passes), "tolerance": asked.tolerance}
    every = {"rows": rows, "runs": [dict(run) for run in runs], "trials": [dict(trial) for trial in trials]}
    return {**facts, "teacher": dict(teacher), **every}


def cells(row: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[str]:
    """Return a row as text, in the order of `HEADER`."""
    head = [f"{row['budget'] / 1e3:,g}k", row["target"], row["method"], "low rank" if row["modulation"] else "whole"]
    if row["params"] is None:
        return [*head, *["–"] * 9, row["note"]]
    against = "–"
    if row.get("difference") is not None:
        against = f"{row['difference']:+.3f}" + (f" ± {row['error']:.3f}" if row["error"] is not None else "")
    return [
        *head,
        f"{row['params']:,.0f} ({row['params'] / teacher['params']:.1%})",
        f"{row['flops'] / teacher['flops']:.1%}",
        "–" if row["score"] is None else f"{row['score']:.3f}" + _deviation(row["score_deviation"]),
        " ".join(f"×{factor:.3g}" for factor in row["factors"]),
        f"{row['velocity_error']:.3f}",
        f"{row['rmse']:.1f}",
        against,
        "–" if row.get("p") is None else f"{row['p']:.3f}",
        f"{row['spent'] / 1e3:,.0f}k ({row['search'] / max(row['spent'], 1):.0%} search)",
        row["note"],
    ]


def markdown(summary: Mapping[str, Any]) -> str:
    """Return all rows as a table of Markdown, and all trials as another."""
    lines = _table(HEADER, [cells(row, summary["teacher"]) for row in summary["rows"]])
    if summary["trials"]:
        lines += ["", *_table(TRIED, tried(summary))]
    return "\n".join(lines) + "\n"


def tried(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return every trial as text, those of a row beside each other, in the order of `TRIED`."""
    found: dict[Cell, list[str]] = {}
    for trial in summary["trials"]:
        found.setdefault(cell_of(trial), []).append(told(trial))
    return [
        [f"{budget / 1e3:,g}k", target, method, "low rank" if lever else "whole", "; ".join(said)]
        for (budget, target, lever, method), said in found.items()
    ]


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *rows]


def _tested(row: dict[str, Any], reference: Mapping[str, Any] | None, tolerance: float) -> Paired | None:
    """Set a row against the reference, if they are of one size; if not, the row says by how much."""
    if reference is None or not row["size"] or not reference["size"]:
        return None
    apart = row["size"] / reference["size"] - 1
    if abs(apart) > tolerance:
        row["note"] += ("; " if row["note"] else "") + f"not tested: {apart:+.1%} of the size of {reference['method']}"
        return None
    return paired(row["by_seed"], reference["by_seed"])


def _row(name: str, runs: Sequence[Mapping[str, Any]], figure: str) -> dict[str, Any]:
    """Join the training seeds of one method; a seed that failed is said, and left out."""
    made = [run for run in runs if "failed" not in run]
    failed = list(dict.fromkeys(run["failed"] for run in runs if "failed" in run))
    off = next((run["off"] for run in made if run["off"]), 0.0)
    notes = [f"off the target: {off:+.1%}"] if off else []
    notes += [f"{len(runs) - len(made)} of {len(runs)} failed: {why}" for why in failed]
    notes += dict.fromkeys(said for run in runs for said in run.get("warnings", ()))
    row: dict[str, Any] = {"method": name, "seeds": len(made), "note": "; ".join(notes)}
    for key in ("params", "flops", "size", "score", "velocity_error", "rmse", "latency_ms"):
        row[key] = _mean([run[key] for run in made])
    scores = [run["score"] for run in made if run["score"] is not None]
    row["score_deviation"] = statistics.stdev(scores) if len(scores) > 1 else None
    row["factors"] = sorted({run["factor"] for run in made})
    row["by_seed"] = {str(run["seed"]): run[figure] for run in made if run[figure] is not None}
    row["spent"] = _mean([sum(run["passes"].values()) for run in made])
    row["search"] = _mean([run["passes"]["search"] + run["passes"]["modulation"] for run in made])
    return row


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _deviation(value: float | None) -> str:
    return "" if value is None else f" ± {value:.3f}"
