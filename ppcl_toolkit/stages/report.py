"""Stage `report`: one self-contained page of a run, finished or not. It reads files only, and runs no model.

A section appears as soon as what it shows is there.
"""

import base64
import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from pydantic import ValidationError

from ppcl_toolkit.artifacts.files import RECORD, write_text
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Form, Plan
from ppcl_toolkit.records import read_record
from ppcl_toolkit.running.images import pixels
from ppcl_toolkit.shapes import score
from ppcl_toolkit.stages import figures
from ppcl_toolkit.stages.intervals import Candidates, Found
from ppcl_toolkit.stages.modulation import LowRankChoice
from ppcl_toolkit.stages.probe import Probes
from ppcl_toolkit.stages.shown import Asked, Environment, Event, Exam, Measured, Row, Summary
from ppcl_toolkit.training.distill import Curve, Curves
from ppcl_toolkit.units import Cost

_SHOWN_PROMPTS = 14
_SHOWN_CANDIDATES = 30
"""The best of those that were not chosen; all chosen ones are shown."""
_SMALL, _LARGE = 96, 256
"""Images with fewer pixels a side are enlarged, those with more are reduced."""


def write_report(run: Path) -> Path:
    """Write `run/report.html` from what the run directory holds, and return its path.

    Raises `PpclError` where there is no run.
    """
    if not (run / "recipe.yaml").is_file():
        raise PpclError(f"{run} is no run of ppcl: it has no recipe.yaml")
    rows = results(run)
    plans = _plans(run)
    measured = {row["name"] for row in rows}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ppcl_toolkit", "stages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(si=_si, bytes=_bytes, flop=_flop, clock=_clock)
    page = environment.get_template("report.html").render(
        name=run.resolve().name,
        finished=(run / "summary.json").is_file(),
        recipe=(run / "recipe.yaml").read_text(),
        environment=found.model_dump() if (found := _json(run / "environment.json", Environment)) else None,
        stages=_stages(run),
        warnings=getattr(_json(run / "summary.json", Summary), "warnings", []),
        rows=rows,
        categories=list(dict.fromkeys(category for row in rows for category in row["categories"])),
        strips=[_strip(n if n in measured else f"{n} (not measured)", plan) for n, plan in plans.items()],
        grid=_grid(run, rows),
        figures=_figures(run, rows, plans),
        compared=_compared(run),
        elsewhere=_elsewhere(run),
    )
    write_text(run / "report.html", page)
    return run / "report.html"


def results(run: Path) -> list[dict[str, Any]]:
    """Return the rows of the main table, the teacher first: from summary.json, or from what is measured so far."""
    summary: Summary | None = _json(run / "summary.json", Summary)
    if summary:
        return [{**summary.teacher.model_dump(), "opens": "stock"}, *(row.model_dump() for row in summary.variants)]
    found = {path.parent.name: _json(path, Row) for path in sorted(run.glob("evaluate/*/measurement.json"))}
    names = sorted(found, key=lambda name: (name != "teacher", name))
    return [{**found[name].model_dump(), "name": name} for name in names]


def _plans(run: Path) -> dict[str, Plan]:
    """Return the plans of the targets, then of what was exported since, in the block numbers of this run's teacher."""
    plans: dict[str, Plan] = _json(run / "select" / "targets.json", dict[str, Plan]) or {}
    depths = [plan.depths for plan in plans.values()][:1]
    for path in sorted(run.glob("variants/*/plan.json")):
        plan = Plan.load(path)
        # Where the teacher is a variant itself, plans on disk count the blocks of the teacher before it.
        if not depths or plan.depths == depths[0]:
            plans.setdefault(path.parent.name, plan)
    return plans


def _strip(name: str, plan: Plan) -> dict[str, Any]:
    """Describe one plan block by block: where a form stands, its first block carries the weights."""
    stacks = {}
    for path, depth in plan.depths.items():
        forms = {form.first: form for form in plan.forms() if form.stack == path}
        cells = []
        for index in range(depth):
            form = forms.get(index) or next(f for f in forms.values() if f.first < index <= f.last)
            cells.append(_cell(form, index))
        stacks[path] = {"cells": cells, "kept": len(forms), "depth": depth}
    return {"name": name, "stacks": stacks, "operations": [str(operation) for operation in plan.operations]}


def _cell(form: Form, index: int) -> dict[str, Any]:
    if index > form.first:
        return {"index": index, "kind": "gone", "marks": [], "title": f"block {index}: block {form.first} stands in"}
    linear = (["text"] if form.narrow_text else []) + [f"{stream} FFN" for stream in form.ffn]
    stands = f" stands for {form.first} to {form.last}" if form.last > form.first else " kept"
    said = [f", linear: {', '.join(linear)}"] if linear else []
    said += [f", modulation of rank {form.modulation}"] if form.modulation else []
    kind = "student" if form.last > form.first else "kept"
    marks = linear + (["modulation"] if form.modulation else [])
    return {"index": index, "kind": kind, "marks": marks, "title": f"block {index}{stands}{''.join(said)}"}


def _figures(run: Path, rows: Sequence[Mapping[str, Any]], plans: Mapping[str, Plan]) -> dict[str, Markup]:
    drawn = {
        "tradeoff": _tradeoff(rows),
        "ranks": _ranks(run),
        "candidates": _candidates(run),
        "unexplained": _unexplained(run),
        "losses": _losses(run),
        **_similarity(run, plans),
    }
    # The one place where text enters the page as it is; labels from files are escaped by matplotlib.
    return {name: Markup(svg) for name, svg in drawn.items() if svg}


def _tradeoff(rows: Sequence[Mapping[str, Any]]) -> str:
    scored = [row for row in rows if row.get("score") is not None]
    if len(scored) < 2:
        return ""
    whole = scored[0]["params"]
    return figures.tradeoff([(r["name"], 100 * r["params"] / whole, r["score"], r["score_std"] or 0) for r in scored])


def _ranks(run: Path) -> str:
    if not (run / "modulation" / "curve.json").is_file():
        return ""
    found = LowRankChoice.load(run / "modulation")
    return figures.ranks(dict(found.curve), found.rank, _settings(run / "modulation").get("error"))


def _candidates(run: Path) -> str:
    kinds = dict(zip(("interval", "text_run", "ffn_swap"), figures.KINDS, strict=True))
    known: list[Measured] = _json(run / "select" / "measured.json", list[Measured]) or []
    measured = sorted(known, key=lambda one: one.error)
    if not measured:
        return ""
    again = _found_again(run)
    others = [one for one in measured if not one.chosen][:_SHOWN_CANDIDATES]
    found = [one for one in measured if one.chosen or one in others]
    return figures.candidates(
        [
            (
                one.label,
                kinds[one.operation.kind],
                one.error,
                _saved(one.saves)
                + again.get(one.label, "")
                + (f" · chosen for {', '.join(one.chosen)}" if one.chosen else ""),
                bool(one.chosen),
            )
            for one in found
        ]
    )


def _found_again(run: Path) -> dict[str, str]:
    """Say by label in how many resampled calibration sets an interval is found."""
    found: Found | None = _json(run / "intervals" / "candidates.json", Found)
    if found is None:
        return {}
    pairs = (
        (i, share)
        for path, shares in found.stability.items()
        for i, share in zip(found.intervals[path], shares, strict=True)
    )
    return {str(interval): f" · found again {share:.0%}" for interval, share in pairs}


def _elsewhere(run: Path) -> list[tuple[str, str, str]]:
    """Return stack, what was looked at, and the intervals that it has."""
    found: Found | None = _json(run / "intervals" / "candidates.json", Found)
    if found is None or not found.elsewhere:
        return []
    rows = []
    for path, intervals in found.intervals.items():
        own = tuple((i.first, i.last) for i in intervals)
        for name, spans in {"all of it": own, **found.elsewhere.get(path, {})}.items():
            rows.append((path, name, " ".join(f"[{first},{last}]" for first, last in spans)))
    return rows


def _saved(saves: Cost | int) -> str:
    # Earlier runs noted parameters alone.
    if isinstance(saves, int):
        return f"−{_si(saves)}"
    return f"−{_si(saves.params)}, −{_flop(saves.flops)}"


def _unexplained(run: Path) -> str:
    path = run / "probe" / "probes.safetensors"
    if not path.is_file():
        return ""
    found = Probes.load(path.parent).unexplained
    stacks: dict[str, dict[str, dict[int, float]]] = {}
    for (stack, block, stream), value in found.items():
        stacks.setdefault(stack, {}).setdefault(stream, {})[block] = value
    return figures.shares(
        [
            (stack, {stream: [values[block] for block in sorted(values)] for stream, values in streams.items()})
            for stack, streams in stacks.items()
        ]
    )


def _similarity(run: Path, plans: Mapping[str, Plan]) -> dict[str, str]:
    folder = run / "intervals"
    if not (folder / "curves.safetensors").is_file():
        return {}
    candidates = Candidates.load(folder)
    curves = {
        stack: {
            stream: {name: tensor.float().numpy() for name, tensor in found._asdict().items()}
            for stream, found in streams.items()
        }
        for stack, streams in candidates.curves.items()
        if streams
    }
    spans = {s: [(i.first, i.last) for i in found] for s, found in candidates.intervals.items()}
    maps, boxes = [], {}
    for stack in sorted(curves, key=list(candidates.intervals).index):
        for stream in ("image", "text"):
            if stream in curves[stack]:
                title = f"{stack} · {stream}"
                maps.append((title, _seen(curves[stack][stream]["heatmap"])))
                boxes[title] = _removed(plans, stack, stream)
    decides = _decisive_stream(run)
    deltas = [
        (
            f"{stack} · {decides}",
            curves[stack][decides]["delta"],
            [(*span, span in _removed(plans, stack, "image")) for span in found],
        )
        for stack, found in spans.items()
    ]
    return {"heatmaps": figures.heatmaps(maps, boxes), "differences": figures.differences(deltas)}


def _seen(heatmap: np.ndarray) -> np.ndarray:
    """Leave out a last block whose output of this stream nobody reads: it was not compared."""
    return heatmap if len(heatmap) < 2 or heatmap[:-1, -1].any() else heatmap[:-1, :-1]


def _compared(run: Path) -> str:
    """Say of which heatmaps only the first samples were compared."""
    found: Found | None = _json(run / "intervals" / "candidates.json", Found)
    few = [
        f"{stack} · {stream}: the first {own} of {of}"
        for stack, streams in (found.compared if found else {}).items()
        for stream, (own, of) in streams.items()
        if own < of
    ]
    return f" Outputs of whole stacks are large, and not all samples are in: {'; '.join(few)}." if few else ""


def _removed(plans: Mapping[str, Plan], stack: str, stream: str) -> list[tuple[int, int]]:
    """Return the blocks that any variant merges (image) or whose text it makes linear (text)."""
    if stream == "image":
        return sorted({(i.first, i.last) for plan in plans.values() for i in plan.intervals if i.stack == stack})
    return sorted({(r.reference, r.last) for plan in plans.values() for r in plan.text_runs if r.stack == stack})


def _decisive_stream(run: Path) -> str:
    settings = _settings(run / "intervals")
    own = settings.get("intervals", settings)
    return str(own.get("stream", "image")) if isinstance(own, dict) else "image"


def _losses(run: Path) -> str:
    panels = [(name, _json(run / name / "losses.json", Curves)) for name in ("depth", "width")]
    tuned = {path.parent.name: _json(path, Curve) for path in sorted(run.glob("finetune/*/losses.json"))}
    panels.append(("fine-tuning", tuned))
    drawn = [(title, {key: points for key, points in found.items() if points}) for title, found in panels if found]
    return figures.losses([panel for panel in drawn if panel[1]]) if any(curves for _, curves in drawn) else ""


def _grid(run: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [row["name"] for row in rows if (run / "evaluate" / row["name"] / "exam.json").is_file()]
    if not names:
        return {}
    exam: Exam = read_record(run / "evaluate" / names[0] / "exam.json", Exam)
    prompts, seeds = exam.prompts[:_SHOWN_PROMPTS], exam.seeds
    lines = [
        {
            "prompt": prompt,
            "images": [
                [
                    _picture(run / "evaluate" / name / "images" / f"seed-{seed}" / f"{index:04d}.png", prompt, exam)
                    for seed in seeds
                ]
                for name in names
            ],
        }
        for index, prompt in enumerate(prompts)
    ]
    return {"names": names, "seeds": seeds, "lines": lines, "scored": exam.scored}


def _picture(path: Path, prompt: str, exam: Exam) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = pixels(path)
    image, right = Image.fromarray(found), score.score(prompt, found) if exam.scored else None
    if max(image.size) < _SMALL:
        times = _SMALL // max(image.size)
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    image.thumbnail((_LARGE, _LARGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return {"data": base64.b64encode(buffer.getvalue()).decode(), "right": right, "width": image.width}


def _stages(run: Path) -> list[dict[str, Any]]:
    """Return each stage with its seconds; None where it has started and not finished."""
    events = run / "events.jsonl"
    stages: dict[str, float | None] = {}
    for line in events.read_text(errors="replace").splitlines() if events.is_file() else ():
        # A killed run leaves half a line.
        with contextlib.suppress(ValidationError):
            event = Event.model_validate_json(line)
            if event.event in ("started", "finished"):
                stages[event.stage] = event.seconds
    total = sum(seconds or 0 for seconds in stages.values()) or 1
    return [{"name": name, "seconds": s, "share": 100 * (s or 0) / total} for name, s in stages.items()]


def _settings(stage: Path) -> dict[str, Any]:
    found: Asked | None = _json(stage / RECORD, Asked)
    return found.settings if found else {}


def _json(path: Path, kind: Any) -> Any:
    return read_record(path, kind) if path.is_file() else None


def _si(number: float) -> str:
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {letter}"
    return f"{number:.0f}"


def _flop(number: float) -> str:
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g} {letter}FLOP"
    return f"{number:.0f} FLOP"


def _bytes(number: float) -> str:
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f} B"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
