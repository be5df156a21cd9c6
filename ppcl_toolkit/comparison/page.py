"""A comparison as one self-contained page: the table, the score over parameters and over FLOPs."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppcl_toolkit.artifacts.workspace import write_text
from ppcl_toolkit.comparison.table import HEADER, TRIED, cells, markdown, tried
from ppcl_toolkit.stages import figures

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name} · PPCL comparison</title><style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0 auto; max-width: 1180px; padding: 30px 24px 60px; font: 14px/1.5 system-ui, sans-serif; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 12.5px; }}
th, td {{ text-align: right; padding: 4px 0 4px 12px; border-bottom: 1px solid #8884; }}
th:nth-child(3), td:nth-child(3), th:last-child, td:last-child {{ text-align: left; }}
figure svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{name}</h1>
<p>{lead}</p>
<table><thead><tr>{header}</tr></thead><tbody>
{rows}
</tbody></table>
{trials}
{figures}
<p>{sources}</p>
</body></html>
"""


def write_page(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `comparison.html` and `comparison.md` into a folder."""
    teacher = summary["teacher"]
    lines = [cells(row, teacher) for row in summary["rows"]]
    page = _PAGE.format(
        name=html.escape(folder.resolve().name),
        lead=html.escape(_lead(summary)),
        header=_header(HEADER),
        rows=_rows(lines),
        sources=html.escape("; ".join(f"{name}: {source}" for name, source in summary["sources"].items())),
        trials=_trials(summary),
        figures="\n".join(f"<figure>{drawn}</figure>" for drawn in _figures(summary)),
    )
    write_text(folder / "comparison.html", page)
    write_text(folder / "comparison.md", markdown(summary))


def _header(names: Sequence[str]) -> str:
    return "".join(f"<th>{html.escape(name)}</th>" for name in names)


def _rows(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)


def _trials(summary: Mapping[str, Any]) -> str:
    if not summary["trials"]:
        return ""
    said = (
        "Every method tried these factors of the learning rates before its runs, at a training seed that no run has; "
        "the least velocity error, on batches of their own, decided. Trials are not in the budget."
    )
    head = f"<thead><tr>{_header(TRIED)}</tr></thead>"
    return f"<p>{said}</p>\n<table>{head}<tbody>\n{_rows(tried(summary))}\n</tbody></table>"


def _lead(summary: Mapping[str, Any]) -> str:
    teacher = summary["teacher"]
    score = "" if teacher["score"] is None else f" and scores {teacher['score']:.3f}"
    return (
        f"Each run spends at most {' or '.join(f'{each:,}' for each in summary['passes'])} block passes, search and "
        "teacher included, and is within "
        f"{summary['tolerance']:.0%} of its target, or marked. "
        f"The teacher has {teacher['params']:,} parameters{score}. "
        f"± is the deviation over training seeds. `against` is the mean difference of the {summary['figure']} to "
        f"{summary['reference']} with its standard error, p that of a paired test with the training seed as the unit, "
        "after Holm's correction over the methods of the same target and modulation."
    )


def _label(row: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    budget = f", {row['budget'] / 1e3:,g}k" if len(summary["passes"]) > 1 else ""
    return f"{row['method']}{budget}"


def _figures(summary: Mapping[str, Any]) -> list[str]:
    teacher, figure = summary["teacher"], summary["figure"]
    rows = [row for row in summary["rows"] if row[figure] is not None]
    if not rows:
        return []
    labels = {id(row): _label(row, summary) for row in rows}
    names = list(dict.fromkeys(labels.values()))
    whole = [] if teacher["score"] is None else [("teacher", 100.0, teacher["score"], 0.0, False)]
    drawn = []
    for unit, label in (("params", "transformer parameters kept, %"), ("flops", "FLOPs of a step kept, %")):
        points = whole + [
            (
                labels[id(row)],
                100 * row[unit] / teacher[unit],
                row[figure],
                row["score_deviation"] or 0.0,
                row["modulation"],
            )
            for row in sorted(rows, key=lambda row: names.index(labels[id(row)]))
        ]
        drawn.append(figures.methods(points, (label, figure.replace("_", " "))))
    return drawn
