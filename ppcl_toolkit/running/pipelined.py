"""A teacher shared out: each process runs a slice of its blocks, and what reads them; hidden states travel on.

Readers need no gradient of each other, so none ever travels. Where a slice ends between the blocks of a reader, what
went into its first block travels, too.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, distributed

from ppcl_toolkit import processes
from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.running.capture import Streams
from ppcl_toolkit.running.passage import Leg, Passage, Place, Reader
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.slices import Span, slices

UNDER_WAY = 2
"""Batches that a process may be ahead of the next one."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DIMENSIONS = 4


class Baggage(NamedTuple):
    """What travels beside the streams, by block: what readers further on need of the blocks behind them."""

    opened: tuple[int, ...] = ()
    z: tuple[int, ...] = ()
    h: tuple[int, ...] = ()

    @classmethod
    def of(cls, places: Sequence[Place], done: int) -> "Baggage":
        """Return what readers at `places` of one stack need where `done` of its blocks are done."""
        references = [place.reference for place in places if place.reference]
        return cls(
            tuple(sorted({place.first for place in places if place.first < done})),
            tuple(sorted({first for first, _ in references if first < done})),
            tuple(sorted({last for _, last in references if last < done})),
        )


@final
@dataclass(frozen=True, slots=True)
class Share:
    """This process's part in a pass over the teacher, and what it must know of the others'."""

    blocks: range
    places: tuple[Place, ...]
    """Of all readers."""
    mine: frozenset[tuple[str, int, int]]
    """Stack, first and last block of the readers of this process."""
    incoming: Baggage | None = None
    """What the process before hands on; None for the first."""
    outgoing: Baggage | None = None
    """What the next one takes; None for the last."""
    idle: int = 0
    """Processes for which there is nothing to do."""

    @classmethod
    def whole(cls, depths: Mapping[str, int], places: Sequence[Place]) -> "Share":
        """Return the share of a process that does all by itself."""
        end = max((last + 1 for _, last in _spans(depths, places)), default=0)
        return cls(range(end), tuple(places), frozenset(place[:3] for place in places))

    @classmethod
    def of(cls, costs: Sequence[int], depths: Mapping[str, int], places: Sequence[Place]) -> "Share":
        """Return this process's share."""
        rank, ranks = processes.world()
        spans = dict(zip(places, _spans(depths, places), strict=True))
        shares = slices(costs, list(_spans(depths, places)), ranks)
        if rank >= len(shares):
            return cls(range(0), tuple(places), frozenset(), idle=ranks - len(shares))
        own = frozenset(place[:3] for place in places if spans[place] in shares[rank].spans)

        def baggage(first: int) -> Baggage:
            """Of what comes to the process number `first` and goes on to those behind it."""
            later = [place for place in places if any(spans[place] in share.spans for share in shares[first:])]
            stack, done = _within(depths, shares[first].blocks.start)
            return Baggage.of([place for place in later if place.stack == stack], done)

        incoming = baggage(rank) if rank > 0 else None
        outgoing = baggage(rank + 1) if rank + 1 < len(shares) else None
        return cls(shares[rank].blocks, tuple(places), own, incoming, outgoing, ranks - len(shares))

    def legs(self, adapter: Adapter, depths: Mapping[str, int], readers: Sequence[Reader]) -> list[Leg]:
        """Return what there is to do in each stack for the readers of this process."""
        legs, offset = [], 0
        for stack in adapter.stacks:
            start, end = (min(max(at - offset, 0), depths[stack.path]) for at in (self.blocks.start, self.blocks.stop))
            own = [r for r in readers if r.stack.path == stack.path and Place.of(r)[:3] in self.mine]
            if start < end or own:
                legs.append(Leg(stack, range(start, end), own, [p for p in self.places if p.stack == stack.path]))
            offset += depths[stack.path]
        return legs

    def held(self, depths: Mapping[str, int]) -> set[tuple[str, int]]:
        """Return stack and number of every block that this process needs: its slice's, and those of its readers."""
        own = {_within(depths, block + 1) for block in self.blocks}
        held = {(stack, done - 1) for stack, done in own}
        return held | {(stack, block) for stack, first, last in self.mine for block in range(first, last + 1)}


def _spans(depths: Mapping[str, int], places: Sequence[Place]) -> list[Span]:
    offsets = dict(zip(depths, itertools.accumulate([0, *depths.values()]), strict=False))
    return [(offsets[place.stack] + place.first, offsets[place.stack] + place.last) for place in places]


def _within(depths: Mapping[str, int], done: int) -> tuple[str, int]:
    """Return the stack of the last of `done` blocks, and how many of its own are done."""
    for stack, depth in depths.items():
        if done <= depth:
            return stack, done
        done -= depth
    raise AssertionError(f"{done} blocks more than there are")


@final
class Link:
    """Takes batches from the process before, and hands them on to the next, a few of them under way."""

    def __init__(self, share: Share, placement: Placement) -> None:
        self._share, self._placement = share, placement
        self._rank, _ = processes.world()
        self._device = processes.messages_on(placement.device)
        self._under_way: deque[list[Any]] = deque()

    def receive(self) -> Passage | None:
        """Wait for the next batch, and return how it comes; None in the first process."""
        if (baggage := self._share.incoming) is None:
            return None
        values = iter(self._placement.leave(self._take(4 + sum(map(len, baggage)) + len(baggage.opened))))

        def streams() -> Streams | None:
            image, text = next(values), next(values)
            return None if image is None else Streams(image, text)

        teacher, student = streams(), streams()
        assert teacher is not None
        opened = {block: found for block in baggage.opened if (found := streams()) is not None}
        z = {block: next(values) for block in baggage.z}
        return Passage([], teacher, student, None, opened, z, {block: next(values) for block in baggage.h})

    def send(self, passage: Passage) -> None:
        """Hand a batch on, and wait only for one that was handed on some batches ago."""
        if (baggage := self._share.outgoing) is None:
            return
        values: list[Tensor | None] = [*passage.streams, *(passage.student or (None, None))]
        values += [stream for block in baggage.opened for stream in passage.opened[block]]
        values += [passage.z[block] for block in baggage.z] + [passage.h[block] for block in baggage.h]
        header = torch.tensor([_described(value) for value in values]).to(self._device)
        tensors = [header, *(value.to(self._device).contiguous() for value in values if value is not None)]
        # One by one: sent as a batch they would share one queue with what comes in, and wait for it.
        self._under_way.append([(distributed.isend(tensor, self._rank + 1), tensor) for tensor in tensors])
        self._settle(UNDER_WAY)

    def close(self) -> None:
        """Wait until everything is delivered."""
        self._settle(0)

    def _settle(self, left: int) -> None:
        while len(self._under_way) > left:
            _await(work for work, _ in self._under_way.popleft())

    def _take(self, count: int) -> list[Tensor | None]:
        header = torch.empty(count, 2 + _DIMENSIONS, dtype=torch.int64, device=self._device)
        _await([distributed.irecv(header, self._rank - 1)])
        tensors = [_empty(row, self._device) for row in header.tolist()]
        _await([distributed.irecv(tensor, self._rank - 1) for tensor in tensors if tensor is not None])
        return tensors


def _await(works: Iterable[Any]) -> None:
    for work in works:
        work.wait()


def _described(value: Tensor | None) -> list[int]:
    """Return a row that tells number of dimensions, dtype and shape; -1 for nothing."""
    if value is None:
        return [-1] + [0] * (1 + _DIMENSIONS)
    return [value.ndim, _DTYPES.index(value.dtype), *value.shape, *[0] * (_DIMENSIONS - value.ndim)]


def _empty(row: Sequence[int], device: torch.device) -> Tensor | None:
    dimensions, dtype, *shape = row
    return None if dimensions < 0 else torch.empty(shape[:dimensions], dtype=_DTYPES[dtype], device=device)
