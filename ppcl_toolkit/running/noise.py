"""Recorded samples, and the noised batches that are made of them.

Noise is added in the space in which the transformer sees latents, as `Noising` says, on the noised tokens only;
reference tokens of edit models stay beside them, unchanged.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, final, overload

import torch
from torch import Tensor

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import map_tensors
from ppcl_toolkit.running.noising import Noising
from ppcl_toolkit.running.rows import common, joined
from ppcl_toolkit.running.schedule import Batch

Shape = tuple[tuple[str, Any], ...]
"""Of a sample: the shapes of all its tensors by name, and whether it is a negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Clean latents and the recorded conditioning of one prompt, with a batch dimension of one."""

    latents: Tensor
    """As the transformer takes them: [1, N, C] where the family packs, [1, C, H, W] where not."""
    arguments: dict[str, Any]
    """Every other argument of the recorded call but the timestep."""
    reference: Tensor | None = None
    """Tokens behind the noised ones, or before them where these are last, [1, M, C]."""
    listed: bool = False
    """Whether the transformer takes latents as a list of samples without a batch dimension, [C, ...] each."""
    negative: bool = False
    """Whether it is what classifier-free guidance leads away from: there is a sample of the prompt itself, too."""


@final
class Recorded(Sequence[Sample]):
    """Samples in files, read anew whenever they are asked for: nothing stays open, and only shapes stay in memory."""

    def __init__(
        self,
        paths: Iterable[Path],
        read: Callable[[Path, slice], Sequence[Sample]],
        check: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """`read` returns those samples of a file, and reads no others; their tensors may be maps of it.

        `check` comes before they are used.
        """
        self._read, self._check = read, check
        self._places: list[tuple[Path, int]] = []
        self.shapes: list[Shape] = []
        """What `shape` says of each sample."""
        known: dict[Shape, Shape] = {}
        for path in paths:
            for index, sample in enumerate(read(path, slice(None))):
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
        self._check(path)
        (sample,) = self._read(path, slice(row, row + 1))
        # Copies: every map of a file that is alive counts, and a process may have 65,530.
        return Sample(**{name: map_tensors(getattr(sample, name), Tensor.clone) for name in Sample.__slots__})


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Noised batches by number: the same number always gives the same batch.

    Samples of a batch have one shape, but for the length of their text where the family can mask its padding. Negatives
    take their turns among the others.
    """

    samples: Sequence[Sample]
    adapter: Adapter
    size: int
    seed: int
    noising: Noising = Noising()
    sigma_mean: float = 0.0
    sigma_std: float = 1.0
    dtype: torch.dtype = torch.float32
    uniform: bool = False
    """Whether all noise levels from 0 to 1 are as likely, instead."""
    guidance: tuple[float, ...] = ()
    """What to draw the guidance of a guidance-distilled model from, instead of what was recorded."""
    negatives: float = 0.5
    """Share of samples that are negatives, where there are any; see `share_of_negatives`."""

    def __call__(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield batches `start` to `stop - 1`."""
        for number in range(start, stop):
            yield self[number]

    def __getitem__(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        chosen = self._choose(number, generator)
        sigma = self._levels(len(chosen), generator)
        clean = torch.cat([sample.latents for sample in chosen]).float()
        noise = torch.randn(clean.shape, generator=generator)
        noised = self.noising.noised(clean, noise, sigma)
        if chosen[0].reference is not None:
            others = torch.cat([s.reference for s in chosen if s.reference is not None])
            noised = torch.cat([others, noised] if self.adapter.noised_last else [noised, others], dim=1)
        calls = [sample.arguments for sample in chosen]
        calls = calls if self.adapter.padded is None else padded(calls, *self.adapter.padded)
        listed = chosen[0].listed
        batch = collate(calls, self.adapter.shared, listed=listed)
        batch[self.adapter.latents] = [*noised.to(self.dtype)] if listed else noised.to(self.dtype)
        batch[self.adapter.timestep] = self.noising.told(sigma)
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
        if recorded.ndim != 1:
            raise PpclError(
                f"modulation.guidance: {self.adapter.distilled!r}, the adapter's `distilled`, is {list(recorded.shape)}"
                ", and guidance is one number for each sample"
            )
        drawn = torch.randint(len(self.guidance), recorded.shape, generator=generator)
        batch[self.adapter.distilled] = torch.tensor(self.guidance).to(recorded)[drawn]

    @cached_property
    def _alike(self) -> dict[Shape, dict[bool, list[int]]]:
        """Numbers of samples by what they must share in a batch, and by whether they are negatives."""
        groups: dict[Shape, dict[bool, list[int]]] = {}
        for number, found in enumerate(self._shapes):
            groups.setdefault(self._common(found), {False: [], True: []})[_is_negative(found)].append(number)
        return groups

    @cached_property
    def _by_turns(self) -> dict[bool, list[int]]:
        """Numbers of all samples by whether they are negatives."""
        kinds: dict[bool, list[int]] = {False: [], True: []}
        for number, found in enumerate(self._shapes):
            kinds[_is_negative(found)].append(number)
        return kinds

    @cached_property
    def _shapes(self) -> Sequence[Shape]:
        return self.samples.shapes if isinstance(self.samples, Recorded) else [shape(s) for s in self.samples]

    def _common(self, shape: Shape) -> Shape:
        free = ("negative", *(self.adapter.padded or ()))
        return tuple((name, size) for name, size in shape if name not in free)

    def _choose(self, number: int, generator: torch.Generator) -> list[Sample]:
        mixed = any(group[True] and group[False] for group in self._alike.values())
        rows = range(number * self.size, (number + 1) * self.size) if mixed else [number] * self.size
        first, *rest = (int((row + 1) * self.negatives) > int(row * self.negatives) for row in rows)
        chosen = [_drawn(self._by_turns, first, generator)]
        alike = self._alike[self._common(self._shapes[chosen[0]])]
        chosen += [_drawn(alike, negative, generator) for negative in rest]
        return [self.samples[index] for index in chosen]


def share_of_negatives(guidance: float | None) -> float:
    """Return how many of all samples shall be negatives, at a scale of classifier-free guidance.

    The guided velocity is s c - (s - 1) n, of the prompt's c and the negative's n: an error of n counts (s - 1)^2 where
    one of c counts s^2. Without a scale, half.
    """
    if guidance is None:
        return 0.5
    return (guidance - 1) ** 2 / ((guidance - 1) ** 2 + guidance**2) if guidance > 1 else 0.0


def padded(calls: Sequence[dict[str, Any]], text: str, mask: str) -> list[dict[str, Any]]:
    """Bring the texts [1, N, C] of recorded calls to the length of the longest, with masks [1, N] if that takes any."""
    masks = [_mask_of(call, text, mask) for call in calls]
    longest = max(int(own.nonzero()[:, 1].max()) + 1 for own in masks)
    if all(own.shape[1] >= longest and bool(own[:, :longest].all()) for own in masks):
        return [{**call, text: call[text][:, :longest], mask: None} for call in calls]
    return [
        {**call, text: _to_length(call[text], longest), mask: _to_length(own, longest)}
        for call, own in zip(calls, masks, strict=True)
    ]


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


def collate(calls: Sequence[dict[str, Any]], shared: Sequence[str], *, listed: bool = False) -> dict[str, Any]:
    """Join recorded arguments along the batch; `shared` ones have no batch dimension. For `listed` see `Sample`."""
    return {
        name: (common if name in shared else partial(joined, listed=listed))([call[name] for call in calls], name)
        for name in calls[0]
    }


def shape(sample: Sample) -> Shape:
    """Return the shapes of all tensors of a sample, and whether it is a negative."""
    reference = None if sample.reference is None else sample.reference.shape
    shapes: list[tuple[str, Any]] = [("negative", sample.negative), ("latents", sample.latents.shape)]
    shapes.append(("reference", reference))
    for name in sorted(sample.arguments):
        map_tensors(sample.arguments[name], lambda tensor, name=name: shapes.append((name, tensor.shape)))
    return tuple(shapes)


def _is_negative(shape: Shape) -> bool:
    return bool(dict(shape)["negative"])


def _drawn(numbers: Mapping[bool, Sequence[int]], negative: bool, generator: torch.Generator) -> int:
    """Draw one of the kind whose turn it is, or of the other where there is none."""
    pool = numbers[negative] or numbers[not negative]
    return pool[int(torch.randint(len(pool), (), generator=generator))]


def _mask_of(call: Mapping[str, Any], text: str, mask: str) -> Tensor:
    given: Tensor | None = call.get(mask)
    return torch.ones(call[text].shape[:2], dtype=torch.bool) if given is None else given.bool()


def _to_length(value: Tensor, tokens: int) -> Tensor:
    """Cut or pad tokens [1, N, ...] with zeros."""
    short = max(0, tokens - value.shape[1])
    return torch.cat([value[:, :tokens], value.new_zeros(1, short, *value.shape[2:])], dim=1)
