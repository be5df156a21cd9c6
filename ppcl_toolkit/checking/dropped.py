"""Whether a transformer with fewer blocks is still the same one around those that are left."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ppcl_toolkit.checking.witness import BlockCall, Witness, difference
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Form, Interval, Plan
from ppcl_toolkit.running.capture import bind, predict, rerouted
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.surgery.assemble import drop_blocks, student_blocks
from ppcl_toolkit.surgery.graph import sharing_copy
from ppcl_toolkit.surgery.narrow import NarrowBlock

_PLAIN = (bool, int, float, str)


def intervals(depths: dict[str, int]) -> Iterator[Interval]:
    """Yield the intervals that are tried of each stack: two blocks at its start and end, three in its middle."""
    for stack, depth in depths.items():
        spans = {(0, 1), (depth // 2 - 1, depth // 2 + 1), (depth - 2, depth - 1)}
        for first, last in sorted(spans):
            if first >= 0 and last < depth:
                yield Interval(stack=stack, first=first, last=last)


@torch.no_grad()
def check_dropped(runner: Runner, witness: Witness) -> None:
    """Drop intervals, one at a time, and let what replaces them answer as the teacher's blocks did.

    No block is run. Whatever is left must be called with what it was called with in the teacher, end in the teacher's
    velocity, and be what the stock class makes of the new config. Raises `PpclError` with what is not.
    """
    runner.settle()
    adapter = runner.adapter
    depths = adapter.depths(runner.transformer)
    for interval in intervals(depths):
        plan = Plan(family=adapter.family, depths=depths, operations=(interval,))
        student = sharing_copy(runner.transformer)
        what = f"adapter {adapter.family}: with {interval} one block"
        drop_blocks(student, adapter, plan)
        if wrong := _unlike_stock(student):
            raise PpclError(
                f"{what}, {wrong}: it depends on the numbers of blocks, so a shorter model is another one. Without "
                "a `remap` that brings it along, blocks of this family cannot be taken out"
            )
        with contextlib.ExitStack() as patches:
            for block, form in student_blocks(student, adapter, plan):
                calls = witness.calls[form.stack]
                patches.enter_context(rerouted(block, _answering(runner, block, form, calls, what)))
            velocity = predict(student, adapter, runner.placement.bring(witness.batch))
        if wrong := difference(velocity, witness.velocity, "velocity"):
            raise PpclError(
                f"{what} that answers as all of them did, the transformer makes {wrong}: it reads something of "
                "blocks beside what the last one returns"
            )


def _answering(runner: Runner, block: nn.Module, form: Form, calls: list[BlockCall], what: str) -> Any:
    stack = runner.adapter.stack(form.stack)
    own = calls[form.first]

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments, streams = bind(block, stack, args, kwargs)
        if wrong := difference((arguments, tuple(streams)), (own.arguments, tuple(own.streams))):
            raise PpclError(
                f"{what}, {form.stack}[{form.first}] is called with {wrong}, unlike in the teacher: the forward "
                "depends on the numbers of blocks, or reads something of them beside what the last one returns. Blocks "
                "of this family cannot be taken out"
            )
        return runner.placement.bring(calls[form.last].output)

    return forward


def _unlike_stock(student: nn.Module) -> str:
    """Say what of a student is not as its stock class makes it of its config; weights are compared by shape."""
    with torch.device("meta"):
        stock = type(student).from_config(student.config)  # type: ignore[attr-defined]
    narrow = tuple(f"{name}." for name, module in student.named_modules() if isinstance(module, NarrowBlock))
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        own, others = ({n: tuple(t.shape) for n, t in tensors(m) if not n.startswith(narrow)} for m in (student, stock))
        others = {name: shape for name, shape in others.items() if not name.startswith(narrow)}
        for name in sorted(own.keys() | others.keys()):
            if own.get(name) != others.get(name):
                return f"{name} is {_shape(own.get(name))} and {_shape(others.get(name))} in {type(stock).__name__}"
    for name, module in student.named_modules():
        if name.startswith(narrow) or isinstance(module, NarrowBlock):
            continue
        given, made = (_settings(each) for each in (module, stock.get_submodule(name)))
        for key in given.keys() & made.keys():
            if given[key] != made[key]:
                return f"{name}.{key} is {given[key]!r} and {made[key]!r} in {type(stock).__name__}"
    return ""


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return what a module was made with: its plain attributes."""
    found = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
    return {key: value for key, value in found.items() if isinstance(value, _PLAIN)}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
