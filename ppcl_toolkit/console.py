"""What commands show on a terminal: progress and tables. In a file, a table is as wide as it wants."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


@contextlib.contextmanager
def drawn() -> Iterator[Any]:
    """Show how stages go on, by the calls of what is yielded: `(stage, done, total, note)`."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description:14}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[rate]:>8}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bars(progress)


def print_table(summary: Mapping[str, Any]) -> None:
    """Show teacher and variants of a summary side by side."""
    measured = ("ms/step", "faster", "score", "R %", "RMSE", "v error")
    table = Table("model", "parameters", "share", "weights", "step", "share", *measured, box=None)
    teacher = summary["teacher"]
    for row in [{**teacher, "name": "teacher"}, *summary["variants"]]:
        table.add_row(
            row["name"],
            f"{row['params']:,}",
            f"{row['params'] / teacher['params']:.1%}",
            _scaled(row["bytes"], "B"),
            *_step(row.get("flops"), teacher.get("flops")),
            f"{row['latency_ms']:.1f}",
            f"{teacher['latency_ms'] / row['latency_ms']:.2f}x",
            "–" if row["score"] is None else f"{row['score']:.3f}±{row['score_std']:.3f}",
            _number(row["drop_percent"], ".1f"),
            _number(row["rmse"], ".1f"),
            _number(row["velocity_error"], ".3f"),
        )
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header == "model" else "right"
    _wide().print(table)
    if teacher["score"] is not None:
        _wide().print(f"chance: {_number(teacher['chance'], '.3f')}", highlight=False)


def print_plan(found: Any) -> None:
    """Show what a recipe asks for, a `DryRun`."""
    called = ["is called by"] if found.calling else []
    sizes = Table("model", "parameters", "share", "weights", "step", "share", "ms/step", "blocks", *called, box=None)
    for number, size in enumerate((found.teacher, *found.variants)):
        share = f"{size.params / found.teacher.params:.1%}"
        step = _step(size.teraflops * 1e12, found.teacher.teraflops * 1e12)
        blocks = " + ".join(map(str, size.blocks.values()))
        took = f"{1000 * size.teraflops / found.tflops:.3g}"
        sizes.add_row(
            size.name,
            f"{size.params:,}",
            share,
            _scaled(size.bytes, "B"),
            *step,
            took,
            blocks,
            *found.calling[number:][:1],
        )
    _wide().print(sizes, _verdicts(found.stages) if found.stages else _needs(found.memory), sep="\n\n")
    hours = ", ".join(f"{stage} {_duration(value)}" for stage, value in found.hours.items() if value)
    written = ", ".join(f"{kind} {_scaled(size, 'B')}" for kind, size in found.disk.items() if size)
    lines = [f"\ntime: {hours}", f"disk: {written}"]
    lines += [f"{each.name}: {'; '.join(each.operations)}" for each in found.variants if each.operations]
    lines += [f"({line})" for line in found.basis]
    sys.stdout.write("\n".join(lines) + "\n")


def print_rows(header: Sequence[str], *rows: Sequence[str]) -> None:
    """Show a table."""
    table = Table(*header, box=None)
    for row in rows:
        table.add_row(*row)
    _wide().print(table)


def markdown(header: Sequence[str], *rows: Sequence[str]) -> str:
    """Return a table in Markdown: the first column to the left, figures to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _needs(memory: Any) -> Table:
    """Draw what every stage takes under every schedule."""
    table = Table("stage", *memory, box=None)
    for stage in next(iter(memory.values())):
        taken = (stages[stage] for stages in memory.values())
        table.add_row(stage, *(f"{_scaled(n['device'], 'B')} + {_scaled(n['host'], 'B')} host" for n in taken))
    return table


def _verdicts(stages: Any) -> Table:
    """Draw what a machine has to say to every stage."""
    table = Table("stage", "device", "host", "files", "by", "fits", box=None)
    for stage in stages:
        told = "yes" if stage.fits else f"no: {stage.otherwise}"
        sizes = (_scaled(size, "B") for size in (stage.device, stage.host, stage.pages))
        table.add_row(stage.name, *sizes, stage.means, told)
    return table


def _wide() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=200)


def _scaled(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} T{unit}"


def _step(flops: float | None, teachers: float | None) -> tuple[str, str]:
    """Show the operations of a step, and their share of the teacher's."""
    return (_scaled(flops, "FLOP"), f"{flops / teachers:.1%}") if flops and teachers else ("–", "–")


def _duration(hours: float) -> str:
    seconds = 3600 * hours
    return f"{seconds:.2g} s" if seconds < 60 else f"{seconds / 60:.0f} min" if hours < 1 else f"{hours:.1f} h"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


class _Bars:
    """A bar per stage, with rate and remaining time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, note="", rate="")
        task = self._progress.tasks[self._tasks[stage]]
        rate = f"{task.speed:.1f}/s" if task.speed else ""
        self._progress.update(self._tasks[stage], completed=done, total=total, note=note, rate=rate)


class _Lines:
    """A line now and then, for logs: stage, units, share, rate, remaining time."""

    def __init__(self) -> None:
        self._started: dict[str, tuple[float, int]] = {}
        self._last = 0.0

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        started, first = self._started.setdefault(stage, (now, done))
        if done < total and now - self._last < 5:
            return
        self._last = now
        line = f"{stage} {done}/{total} {done / max(total, 1):.0%}"
        if done > first:
            rate = (done - first) / (now - started)
            line += f" {rate:.1f}/s" + (f" {(total - done) / rate:.0f} s left" if done < total else "")
        sys.stderr.write(f"{line}  {note}".rstrip() + "\n")
