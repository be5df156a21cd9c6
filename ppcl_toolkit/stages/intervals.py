"""Which blocks one block can stand in for: CKA under chained probes, its differences, Algorithm 1 (Eq. 3-5).

Block numbers are 0-based and inclusive, per stack; the paper counts from 1. Shapes: M blocks of a stack, B batch,
N tokens, D features. A curve [M, M] holds cka(u, k) in row u, column k.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self, final

import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

from ppcl_toolkit import processes
from ppcl_toolkit.adapter import Adapter, Stack
from ppcl_toolkit.artifacts.files import write_json
from ppcl_toolkit.artifacts.passes import Part, Pass
from ppcl_toolkit.artifacts.storage import Desk, save_tensors
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Interval, TextRun
from ppcl_toolkit.recipe import Intervals, Recipe
from ppcl_toolkit.records import read_record, reading
from ppcl_toolkit.running.schedule import Batch, Runner
from ppcl_toolkit.running.similarity import CkaReader, Similarities
from ppcl_toolkit.statistics.chains import ChainedCka, Heatmap
from ppcl_toolkit.statistics.trend import differences, text_runs, threshold_intervals, trend_intervals

Key = tuple[str, int, str]
"""Stack path, block, stream."""
_DRAWS = 200
"""Bootstrap samples of the calibration set."""


class Curves(NamedTuple):
    """How alike the blocks of a stack are in one stream, averaged over samples and timesteps; each [M, M]."""

    cka: Tensor
    """Eq. 3: block u's output against the probes of u + 1 to k chained behind it; the upper triangle, 1 at k = u."""
    delta: Tensor
    """Eq. 4: the differences of `cka`."""
    heatmap: Tensor
    """CKA of the outputs of any two blocks (Fig. 5); of long streams, over the first few samples."""


class Found(BaseModel):
    """What `candidates.json` holds."""

    intervals: dict[str, tuple[Interval, ...]]
    text_runs: tuple[TextRun, ...]
    compared: dict[str, dict[str, tuple[int, int]]] = {}
    stability: dict[str, tuple[float, ...]] = {}
    elsewhere: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {}


@final
@dataclass(frozen=True, slots=True)
class Candidates:
    """What `find_intervals` found."""

    intervals: Mapping[str, tuple[Interval, ...]]
    """Per stack, disjoint and in order; intervals of one block are left out, nothing would go."""
    text_runs: tuple[TextRun, ...]
    """Runs whose text streams are alike, the deepest first."""
    curves: Mapping[str, Mapping[str, Curves]]
    """Per stack, then per stream: `image`, `text` where there is one, and `mean`."""
    compared: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    """Per stack and stream, how many samples a heatmap averages, and how many there were."""
    stability: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Per stack, the share of resampled calibration sets in which each of its intervals is found, end for end."""
    elsewhere: Mapping[str, Mapping[str, tuple[tuple[int, int], ...]]] = field(default_factory=dict)
    """Per stack, first and last blocks of the intervals that parts of the calibration set, or other streams, have."""

    def operations(self) -> list[Interval | TextRun]:
        """Return everything found, intervals first."""
        return [*(interval for intervals in self.intervals.values() for interval in intervals), *self.text_runs]

    def save(self, folder: Path) -> None:
        """Write `candidates.json` and `curves.safetensors`."""
        found = {
            "intervals": {path: [i.model_dump() for i in intervals] for path, intervals in self.intervals.items()},
            "text_runs": [run.model_dump() for run in self.text_runs],
            "compared": self.compared,
            "stability": self.stability,
            "elsewhere": self.elsewhere,
        }
        write_json(folder / "candidates.json", found)
        tensors = {
            f"{path}.{stream}.{name}": tensor
            for path, streams in self.curves.items()
            for stream, curves in streams.items()
            for name, tensor in curves._asdict().items()
        }
        save_tensors(folder / "curves.safetensors", tensors)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        found: Found = read_record(folder / "candidates.json", Found)
        parts: dict[str, dict[str, dict[str, Tensor]]] = {path: {} for path in found.intervals}
        with reading(folder / "curves.safetensors"):
            for key, tensor in load_file(folder / "curves.safetensors").items():
                path, stream, name = key.rsplit(".", 2)
                parts[path].setdefault(stream, {})[name] = tensor
            curves = {path: {stream: Curves(**c) for stream, c in streams.items()} for path, streams in parts.items()}
        more = found.compared, found.stability, found.elsewhere
        return cls(found.intervals, found.text_runs, curves, *more)


def find_intervals(
    runner: Runner,
    batches: Callable[[int, int], Iterable[Batch]],
    settings: Intervals,
    weights: Mapping[Key, Tensor],
    desk: Desk,
    *,
    text_threshold: float = 0.999,
) -> Candidates:
    """Compute the similarity of all blocks on a calibration set, and pick intervals and text runs from it.

    `weights` are those of the probes, by stack path, block and stream; `batches(start, stop)` yields the batches of
    those numbers, which several processes share. What a killed run left on the desk is continued.
    Raises `PpclError` where `settings` name a stack, block or stream that the transformer has not.
    """
    adapter, depths = runner.adapter, runner.adapter.depths(runner.transformer)
    check_intervals(adapter, depths, settings)
    sums = {stack.path: _sums(runner, stack, depths[stack.path], weights, settings) for stack in adapter.stacks}
    readers = [CkaReader(s, block, sums[s.path]) for s in adapter.stacks for block in range(depths[s.path])]
    levels = _Levels(settings)
    parts = {**_named(sums, readers), "levels": levels}
    calibration = Pass("similarities", desk.folder, range(settings.batches), parts)
    for reader in readers:
        reader.numbers = iter(calibration.left)
    given = levels.noting(calibration.of(batches), calibration.left, adapter.timestep)
    for done in calibration.kept(runner.feed(given, readers)):
        desk.progress(done, settings.batches)
    calibration.add_up(runner.placement.device)
    curves = {path: _curves(by_stream) for path, by_stream in sums.items()}
    carrying = {(reader.stack.path, reader.last) for reader in readers if reader.hands_on_z}
    read = {path: partial(_read, path, by_stream, settings, carrying) for path, by_stream in sums.items()}
    intervals = {path: again(settings.stream) for path, again in read.items()}
    compared = {
        path: {stream: (plain.samples, chained.samples) for stream, (chained, plain) in by_stream.items()}
        for path, by_stream in sums.items()
    }
    runs = tuple(_text_runs(adapter, curves, text_threshold))
    if settings.strategy == "given":
        return Candidates(intervals, runs, curves, compared)
    stability = {path: _stability(intervals[path], again, settings) for path, again in read.items()}
    elsewhere = {path: _elsewhere(again, settings, sums[path], levels) for path, again in read.items()}
    return Candidates(intervals, runs, curves, compared, stability, elsewhere)


def detect(
    runner: Runner,
    batches: Callable[[int, int], Iterable[Batch]],
    weights: Mapping[Key, Tensor],
    recipe: Recipe,
    desk: Desk,
) -> list[str]:
    """Run the stage: find all candidates, and write them with the curves that they were read from.

    Returns what rests on noise.
    """
    threshold = recipe.width.text_threshold
    found = find_intervals(runner, batches, recipe.intervals, weights, desk, text_threshold=threshold)
    if processes.is_main():
        found.save(desk.folder)
        for state in desk.folder.glob("state-*.tmp"):
            state.unlink()
    return list(_doubts(found, recipe.intervals.batches))


def _doubts(found: Candidates, batches: int) -> Iterator[str]:
    """Say which intervals are found in less than half of resampled calibration sets."""
    for path, shares in found.stability.items():
        rare = [f"[{i.first},{i.last}] {s:.0%}" for i, s in zip(found.intervals[path], shares, strict=True) if s < 0.5]
        if rare:
            yield (
                f"{path}: {len(rare)} of {len(shares)} intervals are found in less than half of resampled calibration "
                f"sets ({', '.join(rare)}) and rest on noise: intervals.batches is {batches}"
            )


@final
class _Levels:
    """The timestep of each sample of a calibration set, as the transformer is told it, [batches, batch]."""

    def __init__(self, settings: Intervals) -> None:
        self._told = torch.zeros(settings.batches, settings.batch, dtype=torch.float64)
        self._known = torch.zeros_like(self._told)

    def noting(self, batches: Iterable[Batch], numbers: Iterable[int], timestep: str) -> Iterator[Batch]:
        """Yield batches of these numbers, each after its timesteps are noted."""
        for number, batch in zip(numbers, batches, strict=False):
            told = torch.as_tensor(batch[timestep]).double().flatten()[: self._told.shape[1]]
            self._told[number, : len(told)], self._known[number, : len(told)] = told.cpu(), 1.0
            yield batch

    def state(self) -> dict[str, Tensor]:
        """Return all that is noted."""
        return {"told": self._told, "known": self._known}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned, or from such notes of several added up."""
        self._told, self._known = tensors["told"], tensors["known"]

    def halves(self) -> dict[str, Tensor]:
        """Return masks of the samples below the median and of the others; nothing where all are alike."""
        known = self._known > 0
        if not known.any():
            return {}
        low = known & (self._told < self._told[known].quantile(0.5))
        return {"lower timesteps": low, "higher timesteps": known & ~low} if low.any() else {}


def _named(sums: Mapping[str, Mapping[str, Similarities]], readers: Sequence[CkaReader]) -> dict[str, Part]:
    parts: dict[str, Part] = {f"{reader.stack.path}.{reader.last}": reader for reader in readers}
    for path, by_stream in sums.items():
        for stream, (chained, plain) in by_stream.items():
            parts |= {f"{path}.{stream}.chained": chained, f"{path}.{stream}.plain": plain}
    return parts


def _sums(
    runner: Runner, stack: Stack, depth: int, weights: Mapping[Key, Tensor], settings: Intervals
) -> dict[str, Similarities]:
    """Nothing yet of every stream; where the whole teacher is on the device, so are the probes."""
    home = runner.placement.rest
    placed = {key: weight.to(home) for key, weight in weights.items() if key[0] == stack.path}
    return {
        stream: Similarities(
            ChainedCka(
                [placed.get((stack.path, block, stream)) for block in range(depth)], settings.batches, settings.batch
            ),
            Heatmap(depth),
        )
        for stream in stack.streams
    }


def _curves(sums: Mapping[str, Similarities]) -> dict[str, Curves]:
    means = {stream: torch.stack([chained.means(), plain.means()]) for stream, (chained, plain) in sums.items()}
    # NaN stands for a block that returns no text, the last one of SD3.5: the other stream speaks for it.
    means["mean"] = torch.stack(list(means.values())).nanmean(0)
    curves = {}
    for stream, both in means.items():
        cka, heatmap = both.nan_to_num(0.0).unbind()
        curves[stream] = Curves(cka, differences(cka), heatmap)
    return curves


def _read(
    path: str,
    sums: Mapping[str, Similarities],
    settings: Intervals,
    carrying: Collection[tuple[str, int]],
    stream: str,
    drawn: Tensor | slice = slice(None),
) -> tuple[Interval, ...]:
    """Return the intervals of a stack that `drawn` batches or samples have by the curves of a stream, or of all."""
    if settings.strategy == "given":
        found = tuple(interval for interval in settings.given if interval.stack == path)
        return within_runs(found, carrying, settings)
    means = [own.chained.means(drawn) for name, own in sums.items() if stream in (name, "mean")]
    cka, first_block = torch.stack(means).nanmean(0).nan_to_num(0.0), settings.first_block.get(path, 0)
    if settings.strategy == "threshold":
        spans = threshold_intervals(cka, settings.threshold, first_block)
    else:
        spans = trend_intervals(differences(cka), first_block)
    found = tuple(Interval(stack=path, first=u, last=v) for u, v in spans if u < v)
    return within_runs(found, carrying, settings)


def _stability(
    intervals: Sequence[Interval], read: Callable[..., Sequence[Interval]], settings: Intervals
) -> tuple[float, ...]:
    """Return the share of bootstrap samples of the batches in which each interval is found again."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(settings.batches, (_DRAWS, settings.batches), generator=generator)
    again = [set(read(settings.stream, drawn)) for drawn in draws]
    return tuple(sum(interval in found for found in again) / _DRAWS for interval in intervals)


def _elsewhere(
    read: Callable[..., Sequence[Interval]], settings: Intervals, streams: Collection[str], levels: _Levels
) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return what halves and a quarter of the batches have, halves of the timesteps, and all by other streams."""
    count = settings.batches
    parts = {
        "the first half": slice(0, count // 2),
        "the second half": slice(count // 2, count),
        "a quarter": slice(0, count // 4),
    }
    asked: dict[str, tuple[str, slice | Tensor]] = {
        name: (settings.stream, part) for name, part in parts.items() if part.stop > part.start and count > 1
    }
    asked |= {name: (settings.stream, half) for name, half in levels.halves().items()}
    asked |= {f"{stream} stream": (stream, slice(None)) for stream in streams if stream != settings.stream}
    return {name: tuple((interval.first, interval.last) for interval in read(*each)) for name, each in asked.items()}


def within_runs(
    intervals: tuple[Interval, ...], carrying: Collection[tuple[str, int]], settings: Intervals
) -> tuple[Interval, ...]:
    """End intervals where their last block returns what the first one does: both with the z of one run, or neither."""
    kept = []
    for interval in intervals:
        after = range(interval.first + 1, interval.last + 1)
        ends = [v for v in after if (interval.stack, v) not in carrying]
        if (interval.stack, interval.first) in carrying:
            ends = [*after][: ends[0] - after[0] if ends else len(after)]
        if settings.strategy == "given" and interval.last not in ends:
            raise PpclError(f"{interval}: a text run of the teacher begins or ends inside it")
        kept += [interval.model_copy(update={"last": ends[-1]})] if ends else []
    return tuple(kept)


def _text_runs(adapter: Adapter, curves: Mapping[str, Mapping[str, Curves]], threshold: float) -> Iterator[TextRun]:
    for stack in reversed(adapter.stacks):
        # Eq. 8 needs a block with text weights of its own.
        if stack.joint_attention and "text" in stack.streams:
            like = curves[stack.path]["text"].heatmap.clone()
            if len(like) > 2 and not like[:-1, -1].any():
                # Nobody reads the text that the last block writes; what it reads itself, the block before it wrote.
                like[:-2, -1], like[-2, -1] = like[:-2, -2], like[-3, -2]
            for reference, last in text_runs(like, threshold):
                yield TextRun(stack=stack.path, reference=reference, last=last)


def check_intervals(adapter: Adapter, depths: Mapping[str, int], settings: Intervals) -> None:
    """Raise a `PpclError` where `settings` name a stack, block or stream that the transformer has not."""
    for path in [*settings.first_block, *(interval.stack for interval in settings.given)]:
        adapter.stack(path)
    for interval in settings.given:
        if not interval.first < interval.last < depths[interval.stack]:
            raise PpclError(f"{interval}: the stack has blocks 0 to {depths[interval.stack] - 1}, first below last")
    for stack in adapter.stacks:
        if settings.stream not in (*stack.streams, "mean"):
            raise PpclError(f"intervals.stream is {settings.stream!r}: {stack.path} has none; take image or mean")
