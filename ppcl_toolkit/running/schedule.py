"""Run a teacher block by block and feed what reads it: probes, CKA, segments in training.

A reader needs the teacher's input to its first block and the teacher's output at its last, nothing else, so readers
never wait for each other. One engine serves two schedules: *resident* takes one batch through the whole teacher after
another; *streamed* takes a chunk of batches through one block after another, with a single block on the device. Every
reader is given the same readings in the same order by both.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Adapter, Stack
from ppcl_toolkit.running.capture import Arguments, Streams, joint_text, predict, run_block, stack_calls
from ppcl_toolkit.running.placement import HOST, Placement, callable_on

Batch = Mapping[str, Any]
"""Keyword arguments of one forward call of the transformer."""


class Reading(NamedTuple):
    """What a reader gets of one batch; streams are [B, N, D] and carry no gradient."""

    arguments: Arguments
    """Other arguments of the reader's first block."""
    inputs: Streams
    """Streams into its first block."""
    target: Streams
    """The teacher's streams out of its last block."""
    packed_text: Tensor | None = None
    """For a reader with a reference: the reference's h and z of Eq. 8, along the tokens, [B, 2N, D]."""
    text_tokens: int | None = None
    """N of the text itself: between the blocks of a teacher whose text is narrow already, z travels behind it."""

    def own(self, streams: Streams) -> Streams:
        """Return the streams without what travels behind the text."""
        return Streams(streams.image, None if streams.text is None else streams.text[:, : self.text_tokens])


class Reader(Protocol):
    """Anything that learns or measures from single blocks or runs of blocks of the teacher."""

    stack: Stack
    first: int
    last: int
    reference: tuple[int, int] | None
    """Blocks at whose first z and at whose last h is read (Eq. 8); None for most readers."""

    def read(self, reading: Reading) -> None:
        """Take one batch's reading."""

    def place(self, device: torch.device) -> None:
        """Move own weights to `device`: called around a block's readings when streamed."""


class Follower(Reader, Protocol):
    """A reader with a student block, which can stand in the teacher's path (`inputs: student`)."""

    def respond(self, reading: Reading) -> Streams:
        """Return what the student makes of a reading."""


@dataclass(frozen=True, slots=True)
class Runner:
    """A teacher, and how it is run."""

    transformer: nn.Module
    adapter: Adapter
    placement: Placement = field(default_factory=Placement)

    def feed(self, batches: Iterable[Batch], readers: Sequence[Reader], *, follow: bool = False) -> Iterator[int]:
        """Give every reader its reading of every batch, as the function `feed` does."""
        self._settle()
        return feed(self.transformer, self.adapter, batches, readers, placement=self.placement, follow=follow)

    def blocks(self, stack: str) -> nn.ModuleList:
        """Return the teacher's blocks of a stack."""
        return self.adapter.stack(stack).blocks(self.transformer)

    @torch.no_grad()
    def velocity(self, batch: Batch) -> Tensor:
        """Return what the whole teacher predicts for the noised latents of one batch."""
        self._settle()
        with self.placement.whole(self.transformer, self.adapter):
            return predict(self.transformer, self.adapter, self.placement.bring(batch))

    @contextlib.contextmanager
    def calling(self, pipeline: Any) -> Iterator[None]:
        """Let the teacher's own pipeline be called."""
        self._settle()
        with callable_on(pipeline, self.placement.device, streamed=self.placement.streamed):
            yield

    def leave(self) -> None:
        """Have the teacher on the host, so that another model has the device to itself, until it is run again."""
        self.transformer.to(HOST)

    def _settle(self) -> None:
        # Whoever ran the teacher last may have wanted it elsewhere; where it is there already, this is nothing.
        self.placement.settle(self.transformer, self.adapter)


@dataclass(slots=True)
class _Passage:
    """One batch on its way through a stack."""

    arguments: list[Arguments]
    streams: Streams
    student: Streams | None
    text_tokens: int | None = None
    opened: dict[int, Streams] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    h: dict[int, Tensor] = field(default_factory=dict)

    def moved(self, placement: Placement) -> "_Passage":
        """Return a passage that has just begun, where it waits."""
        arguments, streams, student = placement.leave((self.arguments, self.streams, self.student))
        return _Passage(arguments, streams, student, self.text_tokens)


@torch.no_grad()
def feed(
    transformer: nn.Module,
    adapter: Adapter,
    batches: Iterable[Batch],
    readers: Sequence[Reader],
    *,
    placement: Placement | None = None,
    follow: bool = False,
) -> Iterator[int]:
    """Give every reader its reading of every batch; yields the number of batches done, for progress and checkpoints.

    With `follow`, readers are `Follower`s and take their inputs from the student's own path, in which every student
    stands for its blocks (sequential distillation); otherwise from the teacher (the paper's).
    """
    placement = placement or Placement()
    stacks = [s for s in adapter.stacks if any(r.stack.path == s.path for r in readers)]
    last_needed = adapter.stacks.index(stacks[-1])
    done = 0
    for chunk in _chunks(batches, placement.chunk if placement.streamed else 1):
        before: list[Streams | None] = [None] * len(chunk)
        student: list[Streams | None] = [None] * len(chunk)
        for stack in adapter.stacks[: last_needed + 1]:
            passages = [
                _enter(transformer, adapter, stack, batch, (before[i], student[i]), placement, follow=follow)
                for i, batch in enumerate(chunk)
            ]
            own = [r for r in readers if r.stack.path == stack.path]
            end = len(stack.blocks(transformer)) if stack is not stacks[-1] else _needed(own)
            _through(transformer, stack, end, passages, own, placement)
            before, student = [p.streams for p in passages], [p.student for p in passages]
        done += len(chunk)
        yield done


def _enter(
    transformer: nn.Module,
    adapter: Adapter,
    stack: Stack,
    batch: Batch,
    before: tuple[Streams | None, Streams | None],
    placement: Placement,
    *,
    follow: bool,
) -> _Passage:
    batch = placement.bring(batch)
    calls = stack_calls(transformer, adapter, stack.path, batch, placement.bring(before[0]))
    student = None
    if follow:
        own = before[1] if before[1] is not None else before[0]
        student = stack_calls(transformer, adapter, stack.path, batch, placement.bring(own)).streams
    text = calls.streams.text
    passage = _Passage(calls.arguments, calls.streams, student, None if text is None else text.shape[1])
    return passage.moved(placement)


def _through(
    transformer: nn.Module,
    stack: Stack,
    end: int,
    passages: list[_Passage],
    readers: list[Reader],
    placement: Placement,
) -> None:
    blocks = stack.blocks(transformer)
    kept = {r.reference[1] for r in readers if r.reference}
    for index in range(end):
        block = blocks[index]
        finishing = [r for r in readers if r.last == index]
        with placement.visit(block, finishing):
            for passage in passages:
                if any(r.first == index for r in readers):
                    passage.opened[index] = passage.student or passage.streams
                _pass(passage, block, stack, index, readers, placement)
                if index in kept:
                    assert passage.streams.text is not None
                    passage.h[index] = passage.streams.text
                for reader in finishing:
                    _read(reader, passage, placement)
        _forget(passages, readers, index)


def _pass(
    passage: _Passage, block: nn.Module, stack: Stack, index: int, readers: list[Reader], placement: Placement
) -> None:
    """Bring one batch through one block, on the teacher's path and on the student's."""
    arguments, streams = placement.bring((passage.arguments[index], passage.streams))
    covered = any(r.first <= index <= r.last for r in readers)
    if passage.student is not None and not covered:
        passage.student = placement.leave(run_block(block, stack, arguments, placement.bring(passage.student)))
    if any(r.reference and r.reference[0] == index for r in readers):
        with joint_text(block, stack) as seen:
            streams = run_block(block, stack, arguments, streams)
        passage.z[index] = placement.leave(seen[0])
    else:
        streams = run_block(block, stack, arguments, streams)
    passage.streams = placement.leave(streams)


def _read(reader: Reader, passage: _Passage, placement: Placement) -> None:
    packed = None
    if reader.reference is not None:
        packed = torch.cat([passage.h[reader.reference[1]], passage.z[reader.reference[0]]], dim=1)
    found = Reading(
        passage.arguments[reader.first], passage.opened[reader.first], passage.streams, packed, passage.text_tokens
    )
    reading = Reading(*placement.bring(tuple(found)))
    reader.read(reading)
    if passage.student is not None:
        follower: Any = reader
        passage.student = placement.leave(follower.respond(reading))


def _forget(passages: list[_Passage], readers: list[Reader], index: int) -> None:
    for passage in passages:
        for first in [f for f in passage.opened if not any(r.first == f and r.last > index for r in readers)]:
            del passage.opened[first]


def _needed(readers: list[Reader]) -> int:
    return 1 + max(reader.last for reader in readers)


def _chunks(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(batches)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
