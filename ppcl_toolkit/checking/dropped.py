"""Whether a transformer with fewer blocks is still the same one around those that are left."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_toolkit.checking.witness import BlockCall, Witness, difference
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Form, Interval, Plan
from ppcl_toolkit.running.capture import bind, predict, rerouted, run_block, unpack
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.surgery.assemble import drop_blocks, stock_of, student_blocks
from ppcl_toolkit.surgery.copies import sharing_copy
from ppcl_toolkit.surgery.narrow import NarrowBlock

_PLAIN = (bool, int, float, str)
_MODULE = {*vars(nn.Module()), "save_pretrained", "forward", "_internal_dict"}
"""What every module has, and what is put on one from outside."""
_NUMBERED = (
    "it depends on the numbers of blocks, so a shorter model is another one. Without a `remap` that brings it along, "
    "blocks of this family cannot be taken out"
)


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

    No block is run, but those that know their number. Whatever is left must be called with what it was called with in
    the teacher, end in the teacher's velocity, and be what the stock class makes of the new config. Raises `PpclError`
    with what is not.
    """
    runner.settle()
    adapter = runner.adapter
    depths = adapter.depths(runner.transformer)
    for interval in intervals(depths):
        plan = Plan(family=adapter.family, depths=depths, operations=(interval,))
        student = sharing_copy(runner.transformer)
        what = f"adapter {adapter.family}: with {interval} one block"
        try:
            drop_blocks(student, adapter, plan)
            stock = stock_of(student, buffers=True)
        except PpclError as error:
            raise PpclError(f"{what}: {error}") from error
        if wrong := _other_weights(student, stock):
            raise PpclError(f"{what}, {wrong}: {_NUMBERED}")
        for block, form in student_blocks(student, adapter, plan):
            if _is_changed(block, runner.blocks(form.stack)[form.first]):
                own = witness.calls[form.stack][form.first]
                said = f"{what}, {form.stack}[{form.first}], whose weights `remap` changes"
                # At the end of its stack it may make no text.
                _check_alone(runner, block, form, own, f"{said}, computes another image", text=False)
        # As it is when it is opened again.
        changed = _made_anew(student, stock)
        for block, form in student_blocks(student, adapter, plan):
            if told := ", ".join(said for module, said in changed if module in {*block.modules()}):
                own = witness.calls[form.stack][form.first]
                said = f"{what}, {form.stack}[{form.first}], {told}"
                _check_alone(runner, block, form, own, f"{said}, computes something else: {_NUMBERED}")
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


def _is_changed(block: nn.Module, own: nn.Module) -> bool:
    """Whether a block has other weights than the teacher's, whose memory a student shares."""
    one, other = ({(n, p.shape, p.data_ptr()) for n, p in b.named_parameters()} for b in (block, own))
    return one != other


def _check_alone(
    runner: Runner, block: nn.Module, form: Form, call: BlockCall, wrong: str, *, text: bool = True
) -> None:
    """Run a block that is another position's: what it returns must be what it did; else it is `wrong`."""
    stack = runner.adapter.stack(form.stack)
    arguments, streams = runner.placement.bring((call.arguments, call.streams))
    with runner.placement.visit(block):
        output = run_block(block, stack, arguments, streams)
    names = stack.returns if text else ("image",)
    if difference(output.of(names), unpack(stack, call.output).of(names)):
        raise PpclError(wrong)


def _other_weights(student: nn.Module, stock: nn.Module) -> str:
    """Say which weight or buffer of a student has another shape in its stock class of the same config."""
    narrow = tuple(f"{name}." for name, module in student.named_modules() if isinstance(module, NarrowBlock))
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        own, others = ({n: tuple(t.shape) for n, t in tensors(m) if not n.startswith(narrow)} for m in (student, stock))
        for name in sorted(own.keys() | others.keys()):
            if own.get(name) != others.get(name):
                return f"{name} is {_shape(own.get(name))} and {_shape(others.get(name))} in {type(stock).__name__}"
    return ""


def _made_anew(student: nn.Module, stock: nn.Module) -> list[tuple[nn.Module, str]]:
    """Give the modules of a student what its stock class gives them beside weights; say what has changed."""
    changed = []
    known = dict(stock.named_modules())
    for name, module in student.named_modules():
        if isinstance(module, NarrowBlock) or name not in known:
            continue
        own, others = _settings(module), _settings(known[name])
        for key in sorted(own.keys() & others.keys()):
            one, other = _told(own[key]), _told(others[key])
            if one is not None and other is not None and difference(one, other):
                setattr(module, key, others[key])
                changed.append((module, f"whose {key} was {_brief(one)} and is {_brief(other)}"))
    return changed


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return what a module was made with: its attributes, and the buffers that are not saved."""
    found = {key: value for key, value in vars(module).items() if key not in _MODULE}
    lost = module._non_persistent_buffers_set
    return found | {name: value for name, value in module._buffers.items() if name in lost and value is not None}


def _told(value: Any, depth: int = 4) -> Any:
    """Return the plain values and tensors of which an attribute is made; None where there are others."""
    if isinstance(value, Tensor):
        return None if value.is_meta else value
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        found = [_told(item, depth - 1) if depth else None for item in value]
        return None if any(item is None for item in found) else found
    if isinstance(value, Mapping):
        held = {str(key): _told(item, depth - 1) if depth else None for key, item in value.items()}
        return {key: item for key, item in held.items() if item is not None}
    # An attention's processor, as diffusers calls it.
    plain = depth and not isinstance(value, nn.Module | type) and not callable(type(value).__dict__.get("__get__"))
    return _told(getattr(value, "__dict__", {}), depth - 1) if plain else None


def _brief(value: Any) -> str:
    return f"a tensor {value.tolist()!r}"[:60] if isinstance(value, Tensor) else repr(value)[:60]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
