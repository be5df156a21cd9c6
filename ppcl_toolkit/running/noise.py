"""Recorded samples, and the noised batches that are made of them.

Noise is added in the space in which the transformer sees latents: x_t = (1 - sigma) x_0 + sigma noise, on the noised
tokens only; reference tokens of edit models follow them unchanged.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final, overload

import torch
from torch import Tensor

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import map_tensors
from ppcl_toolkit.running.schedule import Batch

Shape = tuple[Any, ...]
"""Of a sample: the shapes of all its tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Clean latents and the recorded conditioning of one prompt, with a batch dimension of one."""

    latents: Tensor
    """As the transformer takes them: [1, N, C] where the family packs, [1, C, H, W] where not."""
    arguments: dict[str, Any]
    """Every other argument of the recorded call but the timestep."""
    reference: Tensor | None = None
    """Tokens behind the noised ones, [1, M, C]."""


@final
class Recorded(Sequence[Sample]):
    """Samples in files, read anew whenever they are asked for: nothing stays open, and only shapes stay in memory."""

    def __init__(self, paths: Iterable[Path], read: Callable[[Path], Sequence[Sample]]) -> None:
        """`read` returns the samples of a file, whose tensors may be maps of it."""
        self._read = read
        self._places: list[tuple[Path, int]] = []
        self.shapes: list[Shape] = []
        """What `shape` says of each sample."""
        known: dict[Shape, Shape] = {}
        for path in paths:
            for index, sample in enumerate(read(path)):
                found = shape(sample)
                self._places.append((path, index))
                self.shapes.append(known.setdefault(found, found))

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        path, row = self._places[index]
        sample = self._read(path)[row]
        # Copies: every map of a file that is alive counts, and a process may have 65,530.
        return Sample(**{name: map_tensors(getattr(sample, name), Tensor.clone) for name in Sample.__slots__})


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Noised batches by number: the same number always gives the same batch, of samples of one shape."""

    samples: Sequence[Sample]
    adapter: Adapter
    size: int
    seed: int
    sigma_mean: float = 0.0
    sigma_std: float = 1.0
    dtype: torch.dtype = torch.float32
    uniform: bool = False
    """Whether all noise levels from 0 to 1 are as likely, instead."""
    guidance: tuple[float, ...] = ()
    """What to draw the guidance of a guidance-distilled model from, instead of what was recorded."""

    def __call__(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield batches `start` to `stop - 1`."""
        for number in range(start, stop):
            yield self[number]

    def __getitem__(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        chosen = self._choose(generator)
        sigma = self._levels(len(chosen), generator)
        clean = torch.cat([sample.latents for sample in chosen]).float()
        noise = torch.randn(clean.shape, generator=generator)
        level = sigma.view(-1, *[1] * (clean.ndim - 1))
        noised = (1 - level) * clean + level * noise
        if chosen[0].reference is not None:
            noised = torch.cat([noised, torch.cat([s.reference for s in chosen if s.reference is not None])], dim=1)
        batch = collate([sample.arguments for sample in chosen], self.adapter.shared)
        batch[self.adapter.latents] = noised.to(self.dtype)
        batch[self.adapter.timestep] = sigma * self.adapter.timestep_scale
        batch["return_dict"] = False
        if self.guidance:
            self._guide(batch, generator)
        return batch

    def _levels(self, count: int, generator: torch.Generator) -> Tensor:
        if self.uniform:
            # The ends themselves, too: a run of the pipeline begins at 1.
            return (1.02 * torch.rand(count, generator=generator) - 0.01).clamp(0, 1)
        return torch.sigmoid(self.sigma_mean + self.sigma_std * torch.randn(count, generator=generator))

    def _guide(self, batch: dict[str, Any], generator: torch.Generator) -> None:
        recorded = batch.get(self.adapter.distilled)
        if not isinstance(recorded, Tensor):
            raise PpclError(
                f"modulation.guidance: the recorded calls have no {self.adapter.distilled!r}, the teacher is not told "
                "its guidance; leave the values out"
            )
        drawn = torch.randint(len(self.guidance), recorded.shape, generator=generator)
        batch[self.adapter.distilled] = torch.tensor(self.guidance).to(recorded)[drawn]

    @cached_property
    def _alike(self) -> dict[Shape, list[int]]:
        """Numbers of samples by the shapes of their tensors: only those of one shape can share a batch."""
        groups: dict[Shape, list[int]] = {}
        for number, found in enumerate(self._shapes):
            groups.setdefault(found, []).append(number)
        return groups

    @cached_property
    def _shapes(self) -> Sequence[Shape]:
        return self.samples.shapes if isinstance(self.samples, Recorded) else [shape(s) for s in self.samples]

    def _choose(self, generator: torch.Generator) -> list[Sample]:
        first = int(torch.randint(len(self.samples), (), generator=generator))
        alike = self._alike[self._shapes[first]]
        rest = torch.randint(len(alike), (self.size - 1,), generator=generator)
        return [self.samples[number] for number in (first, *(alike[i] for i in rest.tolist()))]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Batches at all noise levels, of which every eighth is of the empty prompt alone."""

    batches: Batches
    empty: Batches | None = None
    facts: Mapping[str, Any]
    """What else is to be said of them."""

    def __call__(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield batches `start` to `stop - 1`."""
        for number in range(start, stop):
            yield self[number]

    def __getitem__(self, number: int) -> Batch:
        return self.empty[number] if self.empty is not None and number % 8 == 0 else self.batches[number]

    def covered(self) -> dict[str, Any]:
        """Return what users may rely on, as JSON."""
        name = self.batches.adapter.distilled
        recorded = self.batches.samples[0].arguments.get(name)
        values = recorded.flatten().tolist() if isinstance(recorded, Tensor) else []
        return {
            "samples": len(self.batches.samples),
            "noise_levels": [0, 1],
            "guidance": sorted(self.batches.guidance or set(values)),
            "empty_prompt": self.empty is not None,
            **self.facts,
        }


def collate(calls: Sequence[dict[str, Any]], shared: Sequence[str]) -> dict[str, Any]:
    """Join recorded arguments along the batch; `shared` ones have no batch dimension."""
    joined = {}
    for name, value in calls[0].items():
        values = [call[name] for call in calls]
        if name not in shared and isinstance(value, Tensor):
            value = torch.cat(values)
        elif name not in shared and isinstance(value, list):
            value = [item for items in values for item in items]
        elif not isinstance(value, Tensor) and any(other != value for other in values):
            raise PpclError(f"samples of one batch differ in {name}: {values[0]!r} and others; use batch: 1")
        joined[name] = value
    return joined


def shape(sample: Sample) -> Shape:
    """Return the shapes of all tensors of a sample."""
    shapes: list[Any] = [sample.latents.shape, None if sample.reference is None else sample.reference.shape]
    for name in sorted(sample.arguments):
        map_tensors(sample.arguments[name], lambda tensor: shapes.append(tensor.shape))
    return tuple(shapes)
