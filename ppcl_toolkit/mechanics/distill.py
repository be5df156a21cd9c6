"""Train segments side by side, with checkpoints, and bank what they become."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ppcl_toolkit.mechanics import loop
from ppcl_toolkit.mechanics.noise import Batches
from ppcl_toolkit.mechanics.schedule import Runner
from ppcl_toolkit.mechanics.segment import Segment
from ppcl_toolkit.mechanics.storage import Desk, save_tree


class Settings(loop.Settings, Protocol):
    """What distillation needs to know beyond the optimizer."""

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
    follow_from: int | None = None,
) -> list[str]:
    """Train `segments` for `settings.steps` steps and bank each by its key; return who stopped early.

    A state on the desk is continued. From step `follow_from` on, inputs come from the students' own path.
    """
    rank, ranks = loop.world()
    own, stride = (segments[rank::ranks], 1) if settings.split == "segments" else (segments, ranks)
    parts = {s.form.key: (s.student, s.optimization) for s in own}
    state = desk.folder / f"state-{rank}.safetensors.tmp"
    done = loop.load_state(state, parts)
    turn = settings.steps if follow_from is None else follow_from
    for end, follow in ((turn, False), (settings.steps, True)):
        numbers = range(done * stride + rank % stride, end * stride, stride)
        wanted = (batches[number] for number in numbers)
        start = done
        for count in runner.feed(wanted, own, follow=follow) if own else ():
            before, done = done, start + count
            if done // settings.checkpoint_every > before // settings.checkpoint_every:
                loop.save_state(state, done, parts)
            desk.progress(done, settings.steps, _note(own))
    _bank(own, desk.folder, rank)
    state.unlink(missing_ok=True)
    return [s.optimization.stopped for s in own if s.optimization.stopped]


def merge_losses(folder: Path) -> None:
    """Join the curves of all processes, {segment key: [[step, loss], ...]}, in `losses.json`."""
    curves = {}
    for path in sorted(folder.glob("losses-*.json")):
        curves.update(json.loads(path.read_text()))
    (folder / "losses.json").write_text(json.dumps(curves))


def _bank(segments: Sequence[Segment], folder: Path, rank: int) -> None:
    writes = rank == 0 or not all(s.optimization.exchanges for s in segments)
    if writes:
        for segment in segments:
            save_tree(folder / f"{segment.form.key}.safetensors", dict(segment.student.state_dict()))
        curves = {s.form.key: s.optimization.losses for s in segments}
        path = folder / f"losses-{rank}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | curves))


def _note(segments: Sequence[Segment]) -> str:
    last = [s.optimization.losses[-1][1] for s in segments if s.optimization.losses]
    stopped = sum(bool(s.optimization.stopped) for s in segments)
    note = f"loss {sum(last) / len(last):.4g}" if last else ""
    return note + (f", {stopped} stopped" if stopped else "")
