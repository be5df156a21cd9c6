"""One batch on its way through the blocks of a teacher, and what is read of it there.

A reader needs the teacher's input to its first block and the teacher's output at its last, nothing else, so readers
never wait for each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Adapter, Stack
from ppcl_toolkit.plan import Form
from ppcl_toolkit.running.capture import Arguments, Streams, joint_text, run_block, stack_calls, unpadded
from ppcl_toolkit.running.placement import Placement

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
    unpadded: Tensor | None = None
    """Which tokens of the text belong to it, [B, N] of bool; None where all do."""

    def own(self, streams: Streams) -> Streams:
        """Return the streams without what travels behind the text."""
        return Streams(streams.image, None if streams.text is None else streams.text[:, : self.text_tokens])

    def tokens(self, name: str, value: Tensor) -> Tensor:
        """Return a stream's tokens without padding: [B, N, D] as it is, or [T, D] where text is padded."""
        if name != "text" or self.unpadded is None:
            return value
        return value[self.unpadded.repeat(1, value.shape[1] // self.unpadded.shape[1])]


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


@final
class Ahead:
    """A reader that has taken some of the batches to come already, and lets them pass."""

    def __init__(self, reader: Reader, taken: int) -> None:
        self.stack, self.first, self.last, self.reference = reader.stack, reader.first, reader.last, reader.reference
        self.place = reader.place
        self._reader, self._taken = reader, taken

    def read(self, reading: Reading) -> None:
        """Take one batch's reading, if it is a new one."""
        if self._taken:
            self._taken -= 1
        else:
            self._reader.read(reading)


class Follower(Reader, Protocol):
    """A reader with a student block, which can stand in the teacher's path (`inputs: student`)."""

    def respond(self, reading: Reading) -> Streams:
        """Return what the student makes of a reading."""


class Place(NamedTuple):
    """Where something is read: known of every reader, also of those that another process has."""

    stack: str
    first: int
    last: int
    reference: tuple[int, int] | None = None

    @classmethod
    def of(cls, what: Reader | Form) -> "Place":
        """Return where a reader reads, or where the student of a form is to learn."""
        path = what.stack if isinstance(what.stack, str) else what.stack.path
        return cls(path, what.first, what.last, what.reference)


@dataclass(frozen=True, slots=True)
class Leg:
    """What happens to every batch in one stack: the blocks that it passes here, and who reads it."""

    stack: Stack
    blocks: range
    readers: list[Reader]
    """Those that read here: behind these blocks, or what comes in."""
    places: list[Place]
    """Of all readers of this stack: some may read further on, in another process."""
    text_ends: bool = False
    """Whether nobody reads the text behind these blocks: it is not there to be learned, either."""

    @property
    def midway(self) -> bool:
        """Whether batches come in between two blocks of the stack, or behind its last."""
        return self.blocks.start > 0


@dataclass(slots=True)
class Passage:
    """One batch on its way through a stack."""

    arguments: list[Arguments]
    streams: Streams
    student: Streams | None
    text_tokens: int | None = None
    opened: dict[int, Streams] = field(default_factory=dict)
    """What went into the first blocks of readers that have not read yet."""
    z: dict[int, Tensor] = field(default_factory=dict)
    h: dict[int, Tensor] = field(default_factory=dict)

    def rest(self, placement: Placement) -> "Passage":
        """Return a passage that has just begun, where it waits."""
        self.arguments, self.streams, self.student = placement.leave((self.arguments, self.streams, self.student))
        return self


def enter(
    transformer: nn.Module,
    adapter: Adapter,
    leg: Leg,
    batch: Batch,
    state: Passage | None,
    *,
    placement: Placement,
    follow: bool,
) -> Passage:
    """Let a batch come into a stack, with the state in which it was left: in the stack before, or midway in this one.

    What blocks are given beside their streams does not depend on streams, so it is known midway, too.
    """
    batch, path = placement.bring(batch), leg.stack.path
    before = None if state is None or leg.midway else placement.bring(state.streams)
    calls = stack_calls(transformer, adapter, path, batch, before)
    text_tokens = None if calls.streams.text is None else calls.streams.text.shape[1]
    if leg.midway:
        assert state is not None, f"nothing comes in at block {leg.blocks.start} of {path}"
        state.arguments, state.text_tokens = calls.arguments, text_tokens
        return state.rest(placement)
    student = None
    if follow:
        own = None if state is None else placement.bring(state.student or state.streams)
        student = stack_calls(transformer, adapter, path, batch, own).streams
    return Passage(calls.arguments, calls.streams, student, text_tokens).rest(placement)


def through(transformer: nn.Module, leg: Leg, passages: Sequence[Passage], placement: Placement) -> None:
    """Take batches through the blocks of a leg, one block after another, and let its readers read."""
    kept = {place.reference[1] for place in leg.places if place.reference}
    if waiting := [reader for reader in leg.readers if reader.last < leg.blocks.start]:
        with placement.visit(None, waiting):
            _read(waiting, passages, placement)
    blocks = leg.stack.blocks(transformer)
    for index in leg.blocks:
        finishing = [reader for reader in leg.readers if reader.last == index]
        with placement.visit(blocks[index], finishing):
            # A block's readers keep their order for every batch, and batches theirs for every reader.
            for passage in passages:
                _pass(passage, blocks[index], leg, index, placement)
                if index in kept:
                    assert passage.streams.text is not None
                    passage.h[index] = passage.streams.text
                _read(finishing, [passage], placement)
        _forget(passages, leg, index)


def _pass(passage: Passage, block: nn.Module, leg: Leg, index: int, placement: Placement) -> None:
    """Bring one batch through one block, on the teacher's path and on the student's."""
    if any(place.first == index for place in leg.places):
        passage.opened[index] = passage.student or passage.streams
    arguments, streams = placement.bring((passage.arguments[index], passage.streams))
    covered = any(place.first <= index <= place.last for place in leg.places)
    if passage.student is not None and not covered:
        own = run_block(block, leg.stack, arguments, placement.bring(passage.student))
        passage.student = placement.leave(own)
    if any(place.reference and place.reference[0] == index for place in leg.places):
        with joint_text(block, leg.stack) as seen:
            streams = run_block(block, leg.stack, arguments, streams)
        passage.z[index] = placement.leave(seen[0])
    else:
        streams = run_block(block, leg.stack, arguments, streams)
    if leg.text_ends and index == leg.blocks.stop - 1:
        streams = Streams(streams.image)
    passage.streams = placement.leave(streams)


def _read(readers: Sequence[Reader], passages: Sequence[Passage], placement: Placement) -> None:
    for passage in passages:
        for reader in readers:
            reading = _reading(reader, passage, placement)
            reader.read(reading)
            if passage.student is not None:
                follower: Any = reader
                passage.student = placement.leave(follower.respond(reading))


def _reading(reader: Reader, passage: Passage, placement: Placement) -> Reading:
    packed = None
    if reader.reference is not None:
        packed = torch.cat([passage.h[reader.reference[1]], passage.z[reader.reference[0]]], dim=1)
    arguments, inputs = passage.arguments[reader.first], passage.opened[reader.first]
    mask = unpadded(reader.stack, arguments)
    found = Reading(arguments, inputs, passage.streams, packed, passage.text_tokens, mask)
    return Reading(*placement.bring(tuple(found)))


def _forget(passages: Sequence[Passage], leg: Leg, index: int) -> None:
    own = {Place.of(reader) for reader in leg.readers}
    needed = {place.first for place in leg.places if place.last > index or place not in own}
    for passage in passages:
        for first in passage.opened.keys() - needed:
            del passage.opened[first]
