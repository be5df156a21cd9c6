"""What single blocks of a teacher and of its students measure: parameters, streams, passes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.budget.model import Model, Size, count
from ppcl_toolkit.budget.passes import Step, forward_peak, learning, training_peak
from ppcl_toolkit.plan import Form, Plan
from ppcl_toolkit.running.capture import Arguments, Streams, map_tensors, run_block
from ppcl_toolkit.running.schedule import Reading
from ppcl_toolkit.surgery.copies import meta_copy
from ppcl_toolkit.surgery.narrow import modulation_layers
from ppcl_toolkit.training.losses import LOSSES
from ppcl_toolkit.training.segment import Segment, block_inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A block that learns."""

    params: int
    widest: int
    """Parameters of its largest weight."""
    wider: int
    """Bytes of the block that its z is aligned with; 0 for most."""
    step: Step


@dataclass(frozen=True, slots=True)
class Call:
    """How a stack's blocks are called with a batch."""

    stack: Stack
    arguments: Arguments
    streams: Streams

    @property
    def flow(self) -> int:
        """Bytes of the streams between two blocks."""
        return _bytes(self.streams)

    @property
    def beside(self) -> int:
        """Bytes of the other arguments."""
        return _bytes(self.arguments)

    def reading(self, form: Form) -> Reading:
        """Return what a block of `form` is given to learn from."""
        text = self.streams.text
        packed = torch.cat([text, text], dim=1) if form.narrow_text and text is not None else None
        tokens = None if text is None else text.shape[1]
        return Reading(self.arguments, self.streams, self.streams, packed, tokens)


@dataclass
class Blocks:
    """Measures the blocks of one model, each kind once."""

    model: Model
    _known: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def params(self) -> dict[str, list[int]]:
        """Parameters of the teacher's blocks, by stack."""
        return {s.path: [count(b) for b in s.blocks(self.model.transformer)] for s in self.model.adapter.stacks}

    @cached_property
    def modulation(self) -> list[tuple[int, int]]:
        """Rows and features of every modulation layer of the teacher."""
        stacks = [
            (stack, block) for stack in self.model.adapter.stacks for block in stack.blocks(self.model.transformer)
        ]
        return [
            (layer.out_features, layer.in_features)
            for stack, block in stacks
            for layer in modulation_layers(block, stack).values()
        ]

    @cached_property
    def largest(self) -> int:
        """Bytes of the teacher's largest block."""
        return max(max(own) for own in self.params.values()) * self.model.dtype.itemsize

    @cached_property
    def fixed(self) -> int:
        """Count the parameters of the teacher without its blocks."""
        return count(self.model.transformer) - sum(map(sum, self.params.values()))

    @cached_property
    def buffers(self) -> int:
        """Bytes of what no optimizer sees, as tables of positions: those of SD3.5 take 0.2 and 0.5 GB."""
        return sum(buffer.nbytes for buffer in self.model.transformer.buffers())

    @cached_property
    def teacher(self) -> int:
        """Bytes of the whole teacher."""
        return self.outside + sum(map(sum, self.params.values())) * self.model.dtype.itemsize

    @cached_property
    def outside(self) -> int:
        """Bytes of the teacher without its blocks."""
        return self.fixed * self.model.dtype.itemsize + self.buffers

    def calls(self, batch: int) -> list[Call]:
        """Return how each stack is called with `batch` pictures."""
        return [self.call(stack, batch) for stack in self.model.adapter.stacks]

    def call(self, stack: Stack, batch: int) -> Call:
        """Return how a stack is called with `batch` pictures."""
        arguments, streams = self.model.calls[stack.path]

        def many(tensor: Tensor) -> Tensor:
            # What has no batch dimension is told by its length: one picture was asked for.
            alone = tensor.ndim > 1 and len(tensor) == 1
            return torch.empty((batch, *tensor.shape[1:]), dtype=tensor.dtype, device="meta") if alone else tensor

        return Call(stack, map_tensors(arguments, many), map_tensors(streams, many))

    def forward(self, batch: int) -> int:
        """Bytes that running a block of the teacher takes at most, without gradients, its output included."""
        return max(self._forward(call, batch, cast=False) for call in self.calls(batch))

    def visit(self, batch: int, *, cast: bool = False) -> int:
        """Bytes that a block which comes and runs takes at most, its weights included; `cast` is under autocast."""
        return max(
            self._forward(call, batch, cast=cast) + max(self.params[call.stack.path]) * self.model.dtype.itemsize
            for call in self.calls(batch)
        )

    def flow(self, batch: int) -> int:
        """Bytes of the streams between two blocks, at most."""
        return max(call.flow for call in self.calls(batch))

    def beside(self, batch: int) -> int:
        """Bytes of what else blocks are given."""
        return max(call.beside for call in self.calls(batch))

    def once(self, key: Any, measure: Callable[[], Any]) -> Any:
        """Return what `measure` found, and call it at the first time alone."""
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def measured(self, name: str, plan: Plan) -> Size:
        """Measure the student of `plan`."""
        cost = self.model.costs(plan)
        return Size(
            name=name,
            params=cost.params,
            bytes=cost.bytes if plan.operations else self.teacher - self.buffers,
            teraflops=cost.flops / 1e12,
            blocks={stack: len(kept) for stack, kept in plan.kept().items()},
            operations=tuple(str(operation) for operation in plan.operations),
        )

    def size(self, form: Form) -> int:
        """Count the parameters of the block of a form."""
        return self.model.costs.form(form).params

    def trained(self, form: Form, batch: int, alignment: float | None = 0.0, *, exact: bool = True) -> Trained:
        """Measure a block that learns, in fp32 if `exact`: alone, or in a whole student where `alignment` is None."""
        key = ("trained", *self.model.costs.kind(form), batch, alignment, exact)
        if key not in self._known:
            block = meta_copy(self.model.costs.block(form))
            aligned = alignment and form.narrow_text and not form.ffn
            wider = self.model.costs.block(form.previous) if aligned and form.previous else None
            self._known[key] = self._train(form, block.float() if exact else block, wider, (batch, alignment))
        found: Trained = self._known[key]
        return found

    def _train(self, form: Form, block: Any, wider: Any, asked: tuple[int, float | None]) -> Trained:
        batch, alignment = asked
        stack = self.model.adapter.stack(form.stack)
        segment: Any = Segment(form, stack, block, None, LOSSES["direction"])  # type: ignore[arg-type]
        if wider is not None:
            segment.wider = wider
        segment.alignment = 0.0 if form.is_stock or alignment is None else alignment
        reading = self.call(stack, batch).reading(form)
        with learning(block):
            run = segment._objective if alignment is not None else lambda given: _passed(form, stack, block, given)
            step = training_peak(lambda: run(reading), self.model.dtype)
        aligned = 0 if wider is None else count(wider) * self.model.dtype.itemsize
        widest = max(parameter.numel() for parameter in block.parameters())
        return Trained(params=count(block), widest=widest, wider=aligned, step=step)

    def _forward(self, call: Call, batch: int, *, cast: bool) -> int:
        def measure() -> int:
            block = meta_copy(call.stack.blocks(self.model.transformer)[0])
            half = self.model.dtype if cast and self.model.dtype != torch.float32 else None
            return forward_peak(lambda: run_block(block, call.stack, call.arguments, call.streams), half)

        found: int = self.once(("forward", call.stack.path, batch, cast), measure)
        return found


def _passed(form: Form, stack: Stack, block: Any, reading: Reading) -> Tensor:
    """Return something to begin a backward pass with, that costs nothing itself."""
    return run_block(block, stack, reading.arguments, block_inputs(form, reading)).image[..., :1].mean()


def _bytes(value: Any) -> int:
    seen: dict[int, int] = {}
    map_tensors(value, lambda tensor: seen.setdefault(id(tensor), tensor.nbytes))
    return sum(seen.values())
