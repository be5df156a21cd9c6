"""Run a teacher block by block and feed what reads it: probes, CKA, segments in training.

One engine serves three schedules: *resident* takes one batch through the whole teacher after another; *streamed* takes
a chunk of batches through one block after another, with a single block on the device; *pipelined* shares the blocks
out over processes. Every reader is given the same readings in the same order by all.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ppcl_toolkit import processes
from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.plan import Form
from ppcl_toolkit.running.capture import predict, text_is_read
from ppcl_toolkit.running.passage import Batch, Follower, Leg, Passage, Place, Reader, Reading, enter, through
from ppcl_toolkit.running.pipelined import Link, Share
from ppcl_toolkit.running.placement import HOST, Homes, Placement, callable_on
from ppcl_toolkit.running.slices import block_costs

__all__ = ["Batch", "Follower", "Reader", "Reading", "Runner"]


@dataclass(frozen=True, slots=True)
class Runner:
    """A teacher, and how it is run."""

    transformer: nn.Module
    adapter: Adapter
    placement: Placement = field(default_factory=Placement)
    share: Share | None = None
    """What of a pass is this process's, where it is shared out."""
    _homes: Homes = field(default_factory=Homes)

    @torch.no_grad()
    def pipelined(self, wanted: Sequence[Reader | Form], example: Batch) -> Self:
        """Return a runner that has this process's slice of the blocks, and no others on the device.

        `wanted` are all readers of the passes to come, or the forms whose students they are: of all processes, and the
        same in each. The slices are balanced for batches like `example`. A process that is alone has everything.
        """
        _, ranks = processes.world()
        if ranks == 1:
            return self
        costs = block_costs(self.transformer, self.adapter, example)
        share = Share.of(costs, self.adapter.depths(self.transformer), [Place.of(each) for each in wanted])
        return replace(self, share=share)

    def has(self, what: Reader | Form) -> bool:
        """Tell whether this process is the one that reads there."""
        return self.share is None or Place.of(what)[:3] in self.share.mine

    def feed(self, batches: Iterable[Batch], readers: Sequence[Reader], *, follow: bool = False) -> Iterator[int]:
        """Give every reader its reading of every batch; yields how many are done, for progress and checkpoints.

        With `follow`, readers are `Follower`s and take their inputs from the student's own path, in which every student
        stands for its blocks (sequential distillation); otherwise from the teacher (the paper's). A pipelined runner
        gives readings to those readers alone that are its own, and all processes feed the same batches.
        """
        depths = self.adapter.depths(self.transformer)
        places = [Place.of(reader) for reader in readers]
        share = self.share or Share.whole(depths, places)
        assert set(places) <= set(share.places), "a pipeline is balanced for its readers before they read"
        legs = share.legs(self.adapter, depths, readers)
        if not legs:
            return
        self.settle()
        link = Link(share, self.placement)
        done = 0
        for chunk in _chunks(batches, self.placement.chunk if self.placement.streamed else 1):
            if not done and self._ends(legs[-1]):
                legs[-1] = replace(legs[-1], text_ends=not self.reads_last_text(chunk[0]))
            self._take(chunk, legs, link, follow=follow)
            done += len(chunk)
            yield done
        link.close()

    def _ends(self, leg: Leg) -> bool:
        """Tell whether a leg takes batches to the end of the transformer."""
        return leg.stack is self.adapter.stacks[-1] and leg.blocks.stop == len(self.blocks(leg.stack.path))

    def reads_last_text(self, batch: Batch) -> bool:
        """Tell whether the teacher reads the text behind its last block: one like `batch` shows it."""
        self.settle()
        return text_is_read(self.transformer, self.adapter, self.placement.bring(batch))

    @torch.no_grad()
    def _take(self, chunk: Sequence[Batch], legs: Sequence[Leg], link: Link, *, follow: bool) -> None:
        """Take some batches through this process's blocks, from the process before to the one behind."""
        states: Sequence[Passage | None] = [link.receive() for _ in chunk]
        for leg in legs:
            passages = [
                enter(self.transformer, self.adapter, leg, batch, state, placement=self.placement, follow=follow)
                for batch, state in zip(chunk, states, strict=True)
            ]
            through(self.transformer, leg, passages, self.placement)
            states = passages
        for state in states:
            assert state is not None
            link.send(state)

    def blocks(self, stack: str) -> nn.ModuleList:
        """Return the teacher's blocks of a stack."""
        return self.adapter.stack(stack).blocks(self.transformer)

    def settle(self) -> None:
        """Put the teacher where it rests: whoever ran it last may have wanted it elsewhere.

        Where it is there already, this is nothing.
        """
        held = None if self.share is None else self.share.held(self.adapter.depths(self.transformer))
        self.placement.settle(self.transformer, self.adapter, self._homes, held)

    @torch.no_grad()
    def velocity(self, batch: Batch) -> Tensor:
        """Return what the whole teacher predicts for the noised latents of one batch."""
        assert self.share is None, "this runner has a slice of the teacher"
        self.settle()
        with self.placement.whole(self.transformer, self.adapter):
            return predict(self.transformer, self.adapter, self.placement.bring(batch))

    @contextlib.contextmanager
    def calling(self, pipeline: Any) -> Iterator[None]:
        """Let the teacher's own pipeline be called, with as many of its parts on the device as it has room for."""
        self.leave()
        with callable_on(pipeline, self.placement.device, streamed=self.placement.streamed):
            yield

    def leave(self) -> None:
        """Have the teacher on the host, so that another model has the device to itself, until it is run again."""
        for tensor in (*self.transformer.parameters(), *self.transformer.buffers()):
            self._homes.move(tensor, HOST)


def _chunks(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(batches)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
