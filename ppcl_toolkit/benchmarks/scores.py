"""What the official scorers of benchmarks wrote, read back, and the table of the paper: one row a model, R in percent.

R of a benchmark is `100 (1 - score / reference's score)`; a model's R is the mean over the benchmarks (Table 1).
"""

import csv
import io
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl_toolkit.errors import PpclError

_ONEIG = {
    "alignment": "alignment",
    "text": "text score",
    "reasoning": "reasoning",
    "style": "style",
    "diversity": "total average",
}
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "DPG": (),
    "GenEval": (),
    "LongText EN": (),
    "LongText ZH": (),
    "OneIG EN": tuple(_ONEIG),
    "OneIG ZH": tuple(_ONEIG),
    "B-VQA": ("color", "shape", "texture"),
    "UniDet": ("spatial", "3d_spatial", "numeracy"),
    "S-CoT": (),
}
"""Columns of the paper's Table 1, and the parts whose mean each is; those of S-CoT are whatever was scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One number of one model."""

    model: str
    column: str
    part: str = ""
    value: float


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table: its score and its drop R in percent for each column that could be computed."""

    model: str
    values: Mapping[str, float]
    drops: Mapping[str, float]

    @property
    def drop(self) -> float | None:
        """R averaged over the benchmarks; None where nothing compares."""
        return statistics.fmean(self.drops.values()) if self.drops else None


def tabulate(scores: Sequence[Score]) -> tuple[list[Row], list[str]]:
    """Return a row for each model, the first as the reference, and what keeps columns from being computed.

    Raises `PpclError` where one number is given twice.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for score in scores:
        parts = found.setdefault(score.model, {}).setdefault(score.column, {})
        if score.part in parts:
            raise PpclError(f"{score.column} {score.part}".rstrip() + f" of {score.model} is given twice")
        parts[score.part] = score.value
    reference = next(iter(found), "")
    rows: list[Row] = []
    notes: list[str] = []
    for model, columns in found.items():
        values, problems = _complete(columns, found[reference])
        notes += [f"{model}: {problem}" for problem in problems]
        base = rows[0].values if rows else values
        drops = {name: 100 * (1 - value / base[name]) for name, value in values.items() if base.get(name)}
        rows.append(Row(model, values, drops))
    return rows, notes


def lay_out(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table as text, its header first: `score (R)` for each benchmark of any model, then R."""
    columns = [name for name in COLUMNS if any(name in row.values for row in rows)]
    lines = [["model", *columns, "R %"]]
    for row in rows:
        cells = [
            "-" if name not in row.values else f"{row.values[name]:.4g} ({_percent(row.drops.get(name))})"
            for name in columns
        ]
        lines.append([row.model, *cells, _percent(row.drop)])
    return lines


def read_geneval(path: Path) -> list[Score] | None:
    """Read the results.jsonl of GenEval's `evaluate_images.py`: the mean over tasks of the share of correct images."""
    lines = _json_lines(path)
    if not lines or not {"tag", "correct", "filename"} <= lines[0].keys():
        return None
    tasks: dict[str, list[float]] = {}
    for line in lines:
        tasks.setdefault(line["tag"], []).append(float(line["correct"]))
    value = statistics.fmean(statistics.fmean(correct) for correct in tasks.values())
    return [Score(model=_ancestor(Path(lines[0]["filename"]), 3), column="GenEval", value=value)]


def read_dpg(path: Path) -> list[Score] | None:
    """Read the results file of DPG-Bench's `compute_dpg_bench.py`, which ends with a summary."""
    text = _text(path) if path.suffix == ".txt" else ""
    score = re.search(r"^DPG-Bench score: *([\d.]+)", text, re.MULTILINE)
    model = re.search(r"^Model: *(.*)$", text, re.MULTILINE)
    return [Score(model=model[1] if model else "", column="DPG", value=float(score[1]))] if score else None


def read_longtext(path: Path) -> list[Score] | None:
    """Read the results.jsonl of LongText-Bench, as `summary_scores.py` leaves it: words found, of all words."""
    lines = _json_lines(path)
    if not lines or not {"image", "ocr_gt"} <= lines[0].keys():
        return None
    if "match_word_count" not in lines[0]:
        raise PpclError(f"{path} has no counts yet: run summary_scores.py of LongText-Bench on it")
    value = sum(line["match_word_count"] for line in lines) / sum(line["gt_word_count"] for line in lines)
    image = Path(lines[0]["image"])
    chinese = is_chinese(str(line["ocr_gt"]) for line in lines)
    return [Score(model=_ancestor(image, 1), column=f"LongText {'ZH' if chinese else 'EN'}", value=value)]


def read_oneig(path: Path) -> list[Score] | None:
    """Read a `<dimension>_score_<EN or ZH>_<time>.csv` of OneIG-Bench: one line a model."""
    named = re.match(rf"({'|'.join(_ONEIG)})_score_(EN|ZH)(_|\.)", path.name)
    if path.suffix != ".csv" or named is None:
        return None
    wanted = _ONEIG[named[1]]
    try:
        return [
            Score(model=line[""], column=f"OneIG {named[2]}", part=named[1], value=float(line[wanted]))
            for line in csv.DictReader(io.StringIO(_text(path), newline=""))
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise PpclError(f"{path} has no {wanted!r} of each model: {error}") from error


def read_compbench(path: Path) -> list[Score] | None:
    """Read a vqa_result.json of T2I-CompBench's scorers: the mean answer.

    Its place says what it is: `<category>/<model>/annotation_blip/`, `.../annotation_num/`, `.../sharegpt4v/`, or
    `.../labels/annotation_obj_detection_2d/` and `_3d`.
    """
    if path.name != "vqa_result.json":
        return None
    scorers = {
        "annotation_blip": ("B-VQA", None, 1),
        "sharegpt4v": ("S-CoT", None, 1),
        "annotation_num": ("UniDet", "numeracy", 1),
        "annotation_obj_detection_2d": ("UniDet", "spatial", 2),
        "annotation_obj_detection_3d": ("UniDet", "3d_spatial", 2),
    }
    scorer = _ancestor(path, 1)
    if scorer not in scorers:
        raise PpclError(f"{path}: the paper's table has no scores of {scorer}; it has those of {', '.join(scorers)}")
    column, part, above = scorers[scorer]
    part = part or _ancestor(path, above + 2)
    if COLUMNS[column] and part not in COLUMNS[column]:
        raise PpclError(f"{path}: {column} is of {', '.join(COLUMNS[column])}; expected <category>/<model>/{scorer}/")
    try:
        value = statistics.fmean(float(line["answer"]) for line in json.loads(_text(path)))
    except (KeyError, TypeError, ValueError) as error:
        raise PpclError(f"{path} is no list of answers: {error}") from error
    return [Score(model=_ancestor(path, above + 1), column=column, part=part, value=value)]


def is_chinese(texts: Iterable[str]) -> bool:
    """Whether most texts hold a Chinese character."""
    found = [re.search("[\u4e00-\u9fff]", text) is not None for text in texts]
    return 2 * sum(found) > len(found)


def _complete(
    columns: Mapping[str, Mapping[str, float]], reference: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, float], list[str]]:
    """Return the mean of every column that has the parts it needs, and what others lack."""
    values, problems = {}, []
    for name, needed in COLUMNS.items():
        if name not in columns:
            continue
        wanted = needed or tuple(reference.get(name, columns[name]))
        if lacking := [part for part in wanted if part not in columns[name]]:
            problems.append(f"{name} lacks {', '.join(lacking)}")
        elif extra := [part for part in columns[name] if part not in wanted]:
            problems.append(f"{name} also has {', '.join(extra)}, and the reference has not")
        else:
            values[name] = statistics.fmean(columns[name].values())
    return values, problems


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ancestor(path: Path, levels: int) -> str:
    """Return the name of the folder so many levels above a file; empty where the path is shorter."""
    return path.parts[-1 - levels] if len(path.parts) > levels else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PpclError(f"{path} cannot be read: {error}") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if path.suffix != ".jsonl":
        return []
    try:
        lines = [json.loads(line) for line in _text(path).split("\n") if line.strip()]
    except ValueError as error:
        raise PpclError(f"{path} is not JSON lines: {error}") from error
    return [line for line in lines if isinstance(line, dict)]
