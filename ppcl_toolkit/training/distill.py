"""Train segments side by side, with checkpoints, and bank what they become."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.files import write_json
from ppcl_toolkit.artifacts.storage import Desk, save_tree
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Form
from ppcl_toolkit.records import read_record
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.training import loop
from ppcl_toolkit.training.loop import Optimization
from ppcl_toolkit.training.segment import Segment

Curve = list[tuple[int, float]]
Curves = dict[str, Curve]
"""Losses of segments by their keys: [[step, loss], ...]."""


class Settings(loop.Settings, Protocol):
    """What distillation needs to know beyond a training."""

    @property
    def checkpoint_every(self) -> int: ...  # noqa: D102
    @property
    def split(self) -> str: ...  # noqa: D102


def train_segments(
    runner: Runner,
    segments: Sequence[Segment],
    batches: Batches,
    settings: Settings,
    desk: Desk,
    *,
    keys: Sequence[str],
    follow_from: int | None = None,
) -> list[str]:
    """Train this process's `segments` for `settings.steps` steps and bank each by its key; return what went wrong.

    `keys` are those of all processes' segments. A state on the desk is continued, whatever number of processes left it.
    From step `follow_from` on, inputs come from the students' own path.
    """
    rank, ranks = processes.world()
    shared = settings.split == "segments"
    stride, writes = (1, True) if shared else (ranks, rank == 0)
    states = _States(desk.folder, keys, {s.form.key: (s.student, s.optimization) for s in segments})
    done = states.load()
    turn = settings.steps if follow_from is None else follow_from
    for end, follow in ((turn, False), (settings.steps, True)):
        numbers = range(done * stride + rank % stride, end * stride, stride)
        wanted = (batches[number] for number in numbers)
        start = done
        for count in runner.feed(wanted, segments, follow=follow):
            before, done = done, start + count
            if writes and done // settings.checkpoint_every > before // settings.checkpoint_every:
                states.save(done)
            desk.progress(done, settings.steps, _note(segments))
    if writes:
        _bank(segments, desk.folder, rank)
    processes.wait()  # until all is banked, a run goes on from states
    if writes:
        states.forget()
    return [*_idle(runner), *(s.optimization.stopped for s in segments if s.optimization.stopped)]


def shared_out(
    runner: Runner, forms: Sequence[Form], batches: Batches, settings: Settings
) -> tuple[Runner, list[Form]]:
    """Return how this process runs the teacher, and those of `forms` that it trains, before anything is made of them.

    With `split: segments` that is a slice of the teacher, and the segments that are read there; else all of both.
    """
    if settings.split == "segments" and forms:
        runner = runner.pipelined(forms, batches[0])
    # Students are copies of blocks, made where those are.
    runner.settle()
    return runner, [form for form in forms if runner.has(form)]


def finish(folder: Path, keys: Sequence[str]) -> None:
    """Join the curves of all processes, {segment key: [[step, loss], ...]}, in `losses.json`; forget all states."""
    if processes.is_main():
        whole = folder / "losses.json"
        parts = sorted(folder.glob("losses-*.json"))
        curves: dict[str, Any] = {}
        for path in [whole, *parts] if whole.exists() else parts:
            curves.update(read_record(path, Curves))
        if lost := [key for key in keys if key not in curves]:
            raise PpclError(
                f"{folder} has no losses of {', '.join(lost)}: all processes need this folder, and its files"
            )
        # In one order, whoever trained what.
        write_json(whole, {key: curves[key] for key in keys})
        for leftover in [*parts, *folder.glob("state-*.tmp"), *folder.glob(".state-*.partial")]:
            leftover.unlink(missing_ok=True)  # its process may be at it


@dataclass(frozen=True, slots=True)
class _States:
    """Segments on their way, on disk: a file for each and step, so that other processes can go on with them.

    Processes are not at the same step at the same time: a file goes when every segment has a later one.
    """

    folder: Path
    keys: Sequence[str]
    parts: Mapping[str, tuple[nn.Module, Optimization]]

    def load(self) -> int:
        """Restore the last step that all segments have; return it, 0 where there is none."""
        step: int = processes.agreed(max(set.intersection(*map(self._steps, self.keys)) if self.keys else {0}))
        for key in self.parts if step else ():
            loop.load_state(self._path(key, step), {key: self.parts[key]})
        processes.wait()  # nobody writes before all have read
        return step

    def save(self, step: int) -> None:
        """Write this process's segments after `step` steps."""
        for key, part in self.parts.items():
            loop.save_state(self._path(key, step), step, {key: part})
        passed = min(max(self._steps(key)) for key in self.keys)
        self._remove(lambda found: found < passed)

    def forget(self) -> None:
        """Remove the states of this process's segments."""
        self._remove(lambda _: True)

    def _remove(self, unwanted: Callable[[int], bool]) -> None:
        for key in self.parts:
            for step in self._steps(key):
                if step and unwanted(step):
                    self._path(key, step).unlink(missing_ok=True)

    def _steps(self, key: str) -> set[int]:
        """Return the steps at which there is a state, and 0."""
        found = self.folder.glob(f"state-{key}-*.safetensors.tmp")
        return {0, *(int(path.name.split(".safetensors")[0].rpartition("-")[2]) for path in found)}

    def _path(self, key: str, step: int) -> Path:
        return self.folder / f"state-{key}-{step}.safetensors.tmp"


def _bank(segments: Sequence[Segment], folder: Path, rank: int) -> None:
    # Curves first: what is in the bank has its curve.
    path = folder / f"losses-{rank}.json"
    curves = read_record(path, Curves) if path.exists() else {}
    curves.update({s.form.key: s.optimization.losses for s in segments})
    write_json(path, curves)
    for segment in segments:
        save_tree(folder / f"{segment.form.key}.safetensors", dict(segment.student.state_dict()))


def _idle(runner: Runner) -> list[str]:
    idle = runner.share.idle if runner.share else 0
    return [f"{idle} processes had nothing to do: there are fewer blocks and segments than processes"] if idle else []


def _note(segments: Sequence[Segment]) -> str:
    last = [s.optimization.losses[-1][1] for s in segments if s.optimization.losses]
    stopped = sum(bool(s.optimization.stopped) for s in segments)
    note = f"loss {sum(last) / len(last):.4g}" if last else ""
    return note + (f", {stopped} stopped" if stopped else "")
