"""Train segments side by side, with checkpoints, and bank what they become."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.storage import Desk, save_tree
from ppcl_toolkit.plan import Form
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.training import loop
from ppcl_toolkit.training.segment import Segment


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
    """Train this process's `segments` for `settings.steps` steps and bank each by its key; return who stopped early.

    A state on the desk is continued. From step `follow_from` on, inputs come from the students' own path.
    """
    rank, ranks = processes.world()
    stride, writer = (1, rank) if settings.split == "segments" else (ranks, 0)
    own, parts = segments, {s.form.key: (s.student, s.optimization) for s in segments}
    # Of these segments: a stage that trains in waves may be killed between two of them.
    state = desk.folder / f"state-{writer}-{zlib.crc32(' '.join(parts).encode()):08x}.safetensors.tmp"
    done = loop.load_state(state, parts)
    turn = settings.steps if follow_from is None else follow_from
    for end, follow in ((turn, False), (settings.steps, True)):
        numbers = range(done * stride + rank % stride, end * stride, stride)
        wanted = (batches[number] for number in numbers)
        start = done
        for count in runner.feed(wanted, own, follow=follow) if own else ():
            before, done = done, start + count
            if done // settings.checkpoint_every > before // settings.checkpoint_every:
                loop.save_state(state, done, parts, write=rank == writer)
            desk.progress(done, settings.steps, _note(own))
    if rank == writer:
        _bank(own, desk.folder, rank)
        state.unlink(missing_ok=True)
    processes.wait()
    return [s.optimization.stopped for s in own if s.optimization.stopped]


def shared_out(forms: Sequence[Form], split: str) -> list[Form]:
    """Return the forms that this process trains, before anything is made of them: all, or its share of `segments`."""
    rank, ranks = processes.world()
    return list(forms[rank::ranks] if split == "segments" else forms)


def finish(folder: Path) -> None:
    """Join the curves of all processes, {segment key: [[step, loss], ...]}, in `losses.json`; forget all states."""
    if processes.is_main():
        curves = {}
        for path in sorted(folder.glob("losses-*.json")):
            curves.update(json.loads(path.read_text()))
        (folder / "losses.json").write_text(json.dumps(curves))
        for state in folder.glob("state-*.tmp"):
            state.unlink()


def _bank(segments: Sequence[Segment], folder: Path, rank: int) -> None:
    # Curves first: what is in the bank has its curve.
    path = folder / f"losses-{rank}.json"
    curves = json.loads(path.read_text()) if path.exists() else {}
    curves.update({s.form.key: s.optimization.losses for s in segments})
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(curves))
    partial.replace(path)
    for segment in segments:
        save_tree(folder / f"{segment.form.key}.safetensors", dict(segment.student.state_dict()))


def _note(segments: Sequence[Segment]) -> str:
    last = [s.optimization.losses[-1][1] for s in segments if s.optimization.losses]
    stopped = sum(bool(s.optimization.stopped) for s in segments)
    note = f"loss {sum(last) / len(last):.4g}" if last else ""
    return note + (f", {stopped} stopped" if stopped else "")
