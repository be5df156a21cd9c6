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
from ppcl_toolkit.running.capture import Arguments, Streams, joint_text, map_tensors, predict, run_block, stack_calls

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a teacher is run: where, and how many batches go through a block at a time."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    streamed: bool = False
    """Blocks come to the device one at a time, and activations wait on the CPU."""
    chunk: int = 1
    """Batches that share one visit to a block, when streamed."""

    @property
    def rest(self) -> torch.device:
        """Where blocks and activations wait."""
        return torch.device("cpu") if self.streamed else self.device


def settle(transformer: nn.Module, adapter: Adapter, schedule: Schedule) -> None:
    """Put a teacher where a schedule wants it: all of it on the device, or its blocks on the CPU."""
    transformer.to(schedule.rest)
    for name, child in transformer.named_children():
        if not any(stack.path.split(".")[0] == name for stack in adapter.stacks):
            child.to(schedule.device)


@dataclass(frozen=True, slots=True)
class Runner:
    """A teacher, and how it is run."""

    transformer: nn.Module
    adapter: Adapter
    schedule: Schedule = field(default_factory=Schedule)

    def feed(self, batches: Iterable[Batch], readers: Sequence[Reader], *, follow: bool = False) -> Iterator[int]:
        """Give every reader its reading of every batch, as the function `feed` does."""
        return feed(self.transformer, self.adapter, batches, readers, schedule=self.schedule, follow=follow)

    def blocks(self, stack: str) -> nn.ModuleList:
        """Return the teacher's blocks of a stack."""
        return self.adapter.stack(stack).blocks(self.transformer)

    @torch.no_grad()
    def velocity(self, batch: Batch) -> Tensor:
        """Return what the whole teacher predicts for the noised latents of one batch."""
        with contextlib.ExitStack() as visits:
            if self.schedule.streamed:
                for stack in self.adapter.stacks:
                    for block in stack.blocks(self.transformer):
                        visits.enter_context(_visited(block, self.schedule))
            return predict(self.transformer, self.adapter, _to(batch, self.schedule.device))


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


@torch.no_grad()
def feed(
    transformer: nn.Module,
    adapter: Adapter,
    batches: Iterable[Batch],
    readers: Sequence[Reader],
    *,
    schedule: Schedule | None = None,
    follow: bool = False,
) -> Iterator[int]:
    """Give every reader its reading of every batch; yields the number of batches done, for progress and checkpoints.

    With `follow`, readers are `Follower`s and take their inputs from the student's own path, in which every student
    stands for its blocks (sequential distillation); otherwise from the teacher (the paper's).
    """
    schedule = schedule or Schedule()
    stacks = [s for s in adapter.stacks if any(r.stack.path == s.path for r in readers)]
    last_needed = adapter.stacks.index(stacks[-1])
    done = 0
    for chunk in _chunks(batches, schedule.chunk if schedule.streamed else 1):
        before: list[Streams | None] = [None] * len(chunk)
        student: list[Streams | None] = [None] * len(chunk)
        for stack in adapter.stacks[: last_needed + 1]:
            passages = [
                _enter(transformer, adapter, stack, batch, (before[i], student[i]), schedule, follow=follow)
                for i, batch in enumerate(chunk)
            ]
            own = [r for r in readers if r.stack.path == stack.path]
            end = len(stack.blocks(transformer)) if stack is not stacks[-1] else _needed(own)
            _through(transformer, stack, end, passages, own, schedule)
            before, student = [p.streams for p in passages], [p.student for p in passages]
        done += len(chunk)
        yield done


def _enter(
    transformer: nn.Module,
    adapter: Adapter,
    stack: Stack,
    batch: Batch,
    before: tuple[Streams | None, Streams | None],
    schedule: Schedule,
    *,
    follow: bool,
) -> _Passage:
    batch = _to(batch, schedule.device)
    calls = stack_calls(transformer, adapter, stack.path, batch, _to(before[0], schedule.device))
    student = None
    if follow:
        own = before[1] if before[1] is not None else before[0]
        student = stack_calls(transformer, adapter, stack.path, batch, _to(own, schedule.device)).streams
    text = calls.streams.text
    passage = _Passage(calls.arguments, calls.streams, student, None if text is None else text.shape[1])
    return _to(passage, schedule.rest)


def _through(
    transformer: nn.Module,
    stack: Stack,
    end: int,
    passages: list[_Passage],
    readers: list[Reader],
    schedule: Schedule,
) -> None:
    blocks = stack.blocks(transformer)
    taps = {r.reference[0] for r in readers if r.reference}
    kept = {r.reference[1] for r in readers if r.reference}
    for index in range(end):
        block = blocks[index]
        finishing = [r for r in readers if r.last == index]
        _place(schedule, schedule.device, block, finishing)
        for passage in passages:
            starting = any(r.first == index for r in readers)
            if starting:
                passage.opened[index] = passage.student or passage.streams
            arguments, streams = _to((passage.arguments[index], passage.streams), schedule.device)
            covered = any(r.first <= index <= r.last for r in readers)
            if passage.student is not None and not covered:
                own = run_block(block, stack, arguments, _to(passage.student, schedule.device))
                passage.student = _to(own, schedule.rest)
            if index in taps:
                with joint_text(block, stack) as seen:
                    streams = run_block(block, stack, arguments, streams)
                passage.z[index] = _to(seen[0], schedule.rest)
            else:
                streams = run_block(block, stack, arguments, streams)
            passage.streams = _to(streams, schedule.rest)
            if index in kept:
                assert streams.text is not None
                passage.h[index] = _to(streams.text, schedule.rest)
            for reader in finishing:
                _read(reader, passage, schedule)
        _place(schedule, schedule.rest, block, finishing)
        _forget(passages, readers, index)


def _read(reader: Reader, passage: _Passage, schedule: Schedule) -> None:
    packed = None
    if reader.reference is not None:
        packed = torch.cat([passage.h[reader.reference[1]], passage.z[reader.reference[0]]], dim=1)
    found = Reading(
        passage.arguments[reader.first], passage.opened[reader.first], passage.streams, packed, passage.text_tokens
    )
    reading = Reading(*_to(tuple(found), schedule.device))
    reader.read(reading)
    if passage.student is not None:
        follower: Any = reader
        passage.student = _to(follower.respond(reading), schedule.rest)


def _forget(passages: list[_Passage], readers: list[Reader], index: int) -> None:
    for passage in passages:
        for first in [f for f in passage.opened if not any(r.first == f and r.last > index for r in readers)]:
            del passage.opened[first]


@contextlib.contextmanager
def _visited(block: nn.Module, schedule: Schedule) -> Iterator[None]:
    handles = (
        block.register_forward_pre_hook(lambda module, _: module.to(schedule.device) and None),
        block.register_forward_hook(lambda module, _, __: module.to(schedule.rest) and None),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _needed(readers: list[Reader]) -> int:
    return 1 + max(reader.last for reader in readers)


def _place(schedule: Schedule, device: torch.device, block: nn.Module, readers: list[Reader]) -> None:
    if schedule.streamed:
        block.to(device)
        for reader in readers:
            reader.place(device)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, _Passage):
        arguments, streams, student = (_to(each, device) for each in (value.arguments, value.streams, value.student))
        return _Passage(arguments, streams, student, value.text_tokens)
    return map_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))


def _chunks(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(batches)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
