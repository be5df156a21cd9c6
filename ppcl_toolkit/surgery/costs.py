"""What the student of a plan costs, block by block, without building it: all is counted on the meta device."""

import contextlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.plan import Form, Plan
from ppcl_toolkit.running.capture import Streams, passing, rerouted, run_block
from ppcl_toolkit.running.flops import counting
from ppcl_toolkit.running.meta import without_data
from ppcl_toolkit.running.placement import device_of, moved
from ppcl_toolkit.surgery.assemble import example_calls, standing_in
from ppcl_toolkit.surgery.copies import meta_copy
from ppcl_toolkit.surgery.narrow import narrow
from ppcl_toolkit.units import Cost


@final
class Costs:
    """Costs of students of one teacher, each kind of block measured once.

    `kwargs` is an example call of any number of pictures, `dtype` that of exported weights.
    """

    def __init__(self, transformer: nn.Module, adapter: Adapter, kwargs: Mapping[str, Any], dtype: torch.dtype) -> None:
        self._transformer, self._adapter, self._kwargs, self._dtype = transformer, adapter, kwargs, dtype
        self._blocks: dict[Any, nn.Module] = {}
        self._known: dict[Any, Cost] = {}
        self.calls = example_calls(transformer, adapter, kwargs)

    def __call__(self, plan: Plan) -> Cost:
        """Return what the student of `plan` costs."""
        return sum((self.form(form) for form in plan.forms()), self._outside)

    def form(self, form: Form) -> Cost:
        """Return what a block of a student costs."""
        key = self.kind(form)
        if key not in self._known:
            block = self.block(form)
            self._known[key] = self._cost(_count(block), self._counted(form, block))
        return self._known[key]

    def block(self, form: Form) -> nn.Module:
        """Return the block of a form, without weights; it is not to be changed."""
        key = self.kind(form)
        if key not in self._blocks:
            stack = self._adapter.stack(form.stack)
            first = meta_copy(stack.blocks(self._transformer)[form.first])
            block = standing_in(self._transformer, self._adapter, form, first)
            narrow(block, stack, form, *self.calls[form.stack])
            self._blocks[key] = block
        return self._blocks[key]

    def kind(self, form: Form) -> tuple[Any, ...]:
        """Return what forms of equal blocks have in common."""
        kinds = self._teacher_kinds[form.stack]
        # A stock class may shape a block by its position: SD3's last one returns no text.
        place = (form.last == len(kinds) - 1, form.first == form.last)
        own = form.stack, form.text, form.ffn, form.modulation, kinds[form.first]
        return (*own, place if self._adapter.remap else ())

    @cached_property
    def _teacher_kinds(self) -> dict[str, list[int]]:
        """Number the kinds of a teacher's blocks: class, weights, and what streams come in."""
        seen: dict[Any, int] = {}

        def kind(block: nn.Module, given: Streams) -> int:
            return seen.setdefault(_kind(block, given), len(seen))

        return {
            stack.path: list(map(kind, stack.blocks(self._transformer), self._given[stack.path]))
            for stack in self._adapter.stacks
        }

    @cached_property
    @torch.no_grad()
    def _given(self) -> dict[str, list[Streams]]:
        """Run the teacher without weights, one block of each kind: the streams that each block is given."""
        found: dict[str, list[Streams]] = {}
        known: dict[Any, Streams] = {}
        for stack in self._adapter.stacks:
            arguments, streams = self.calls[stack.path]
            for block in stack.blocks(self._transformer):
                found.setdefault(stack.path, []).append(streams)
                key = (stack.path, _kind(block, streams))
                if key not in known:
                    with without_data():
                        known[key] = run_block(meta_copy(block), stack, arguments, streams)
                streams = known[key]
        return found

    @property
    def _pictures(self) -> int:
        return len(self.calls[self._adapter.stacks[0].path][1].image)

    @cached_property
    def _outside(self) -> Cost:
        """Count what is not in blocks, which hand on their streams meanwhile."""
        device = device_of(self._transformer, self._adapter)
        inside = 0
        with contextlib.ExitStack() as patches:
            for stack in self._adapter.stacks:
                for block in stack.blocks(self._transformer):
                    inside += _count(block)
                    patches.enter_context(rerouted(block, passing(block, stack)))
            counter = patches.enter_context(counting())
            patches.enter_context(without_data())
            with torch.no_grad():
                self._transformer(**moved(dict(self._kwargs), device))
        return self._cost(_count(self._transformer) - inside, counter)

    def _cost(self, params: int, counter: FlopCounterMode) -> Cost:
        flops = counter.get_total_flops() // self._pictures
        return Cost(params=params, bytes=params * self._dtype.itemsize, flops=flops)

    @torch.no_grad()
    def _counted(self, form: Form, block: nn.Module) -> FlopCounterMode:
        stack = self._adapter.stack(form.stack)
        streams = self._given[form.stack][form.first]
        if form.narrow_text and streams.text is not None:
            # The text and the z of the run's reference, behind one another.
            streams = Streams(streams.image, torch.cat([streams.text, streams.text], dim=1))
        with counting() as counter, without_data():
            run_block(block, stack, self.calls[form.stack][0], streams)
        return counter


def _kind(block: nn.Module, given: Streams) -> tuple[Any, ...]:
    weights = tuple((name, value.shape) for name, value in block.named_parameters())
    return type(block), weights, tuple(None if stream is None else stream.shape for stream in given)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
