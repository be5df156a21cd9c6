"""What a teacher's own forward does with its blocks, and whether running them one by one is the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import Arguments, Streams, bind, map_tensors, named_arguments, unpack
from ppcl_toolkit.running.passage import Batch
from ppcl_toolkit.running.placement import HOST, moved
from ppcl_toolkit.running.schedule import Reading, Runner

_ROUNDING = 4
"""Machine epsilons by which two runs of the same kernels may differ."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One call of a block, on the host."""

    arguments: Arguments
    streams: Streams
    output: Any
    """As the block returned it."""


@dataclass(frozen=True, slots=True)
class Witness:
    """One forward of a teacher: its call, those of its blocks by stack, and the velocity."""

    batch: Batch
    calls: dict[str, list[BlockCall]]
    velocity: Tensor


def middle(runner: Runner, witness: Witness, stack: Stack) -> tuple[int, nn.Module, BlockCall]:
    """Return the block in the middle of a stack, with its number and its call: those at the ends may lack something."""
    index = len(witness.calls[stack.path]) // 2
    return index, runner.blocks(stack.path)[index], witness.calls[stack.path][index]


@torch.no_grad()
def witnessed(runner: Runner, batch: Batch) -> Witness:
    """Run the teacher's own forward on one batch, and note how it calls its blocks.

    Raises `PpclError` where it does not call every block of every stack once, in the order of the adapter.
    """
    found: list[tuple[str, int, BlockCall]] = []

    def note(stack: Stack, index: int) -> tuple[Any, Any]:
        before: list[Any] = []

        def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before[:] = [map_tensors(named_arguments(block, args, kwargs), lambda tensor: tensor.to(HOST, copy=True))]

        def end(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            arguments, streams = bind(block, stack, args, kwargs)
            if wrong := difference(named_arguments(block, args, kwargs), before.pop()):
                raise PpclError(
                    f"adapter {runner.adapter.family}: {stack.path}[{index}] changes what it is given in place (there "
                    f"is {wrong} behind it): its input cannot be recorded"
                )
            found.append((stack.path, index, BlockCall(*moved((arguments, streams, output), HOST))))

        return begin, end

    order = [
        (stack, index, block)
        for stack in runner.adapter.stacks
        for index, block in enumerate(runner.blocks(stack.path))
    ]
    handles: list[Any] = []
    for stack, number, block in order:
        begin, end = note(stack, number)
        handles.append(block.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(block.register_forward_hook(end, with_kwargs=True))
    try:
        velocity = runner.velocity(batch)
    finally:
        for handle in handles:
            handle.remove()
    wanted = [(stack.path, index) for stack, index, _ in order]
    called = [(path, index) for path, index, _ in found]
    if called != wanted:
        at = next((n for n, pair in enumerate(zip(called, wanted, strict=False)) if pair[0] != pair[1]), len(called))
        now, due = (f"{pair[0]}[{pair[1]}]" if pair else "none" for pair in (_at(called, at), _at(wanted, at)))
        raise PpclError(
            f"adapter {runner.adapter.family}: the transformer calls {now} where the adapter has {due}: every block of "
            "every stack is to be called once, in the order of the adapter's stacks"
        )
    calls: dict[str, list[BlockCall]] = {}
    for path, _, call in found:
        calls.setdefault(path, []).append(call)
    return Witness(batch, calls, velocity.cpu())


def check_given(runner: Runner, witness: Witness) -> None:
    """Look at what blocks were given as streams: tokens [B, N, D], and each stack's image from the image before it.

    Raises `PpclError` with the first that is something else.
    """
    rows, text = len(witness.batch[runner.adapter.latents]), None
    for stack in runner.adapter.stacks:
        where = f"adapter {runner.adapter.family}: {stack.path}"
        for call in witness.calls[stack.path]:
            for name, value in named(stack, call.streams).items():
                if not isinstance(value, Tensor) or value.ndim != 3 or len(value) != rows:
                    raise PpclError(
                        f"{where} is given {_brief(value)} as a stream, {name!r}: streams are tensors of tokens, "
                        f"[B, N, D], here of {rows} rows"
                    )
        own, last = witness.calls[stack.path][0], witness.calls[stack.path][-1]
        if text is not None and own.streams.text is not None and not difference(own.streams.image, text):
            raise PpclError(f"{where}: its image, {stack.image!r}, is what the stack before it has as text")
        text = unpack(stack, last.output).text


def check_blocks(runner: Runner, witness: Witness) -> None:
    """Run the teacher block by block, as everything that learns is fed, and compare with its own forward.

    Raises `PpclError` with the first block that is given, or returns, something else than there.
    """
    readers = [
        _Comparison(runner, stack, i, c) for stack in runner.adapter.stacks for i, c in _numbered(witness, stack)
    ]
    for _ in runner.feed([witness.batch], readers):
        pass


@final
class _Comparison:
    """Reads one block, and compares."""

    reference: tuple[int, int] | None = None

    def __init__(self, runner: Runner, stack: Stack, index: int, call: BlockCall) -> None:
        self.stack, self.first, self.last = stack, index, index
        self._family, self._call = runner.adapter.family, call

    def place(self, device: torch.device) -> None:
        """Have nothing that moves."""

    def read(self, reading: Reading) -> None:
        own, where = self._call, f"{self.stack.path}[{self.first}]"
        given = {**reading.arguments, **named(self.stack, reading.inputs)}
        if wrong := difference(given, {**own.arguments, **named(self.stack, own.streams)}):
            image, text = reading.inputs
            if text is not None and not difference((text, image), tuple(own.streams)):
                raise PpclError(
                    f"adapter {self._family}: returns of {self.stack.path}: its blocks return the streams in the other "
                    f"order than {self.stack.returns!r}"
                )
            raise PpclError(
                f"adapter {self._family}: {where}, run after the blocks before it alone, is called with {wrong}, "
                "unlike in the transformer's own forward: something happens between the blocks that the adapter does "
                "not tell (a skip, a stream changed on the way, stacks that run side by side)"
            )
        # A block whose text nobody reads is not read for it, either.
        returned = reading.target.of(self.stack.returns)
        expected = unpack(self.stack, own.output).of(tuple(returned))
        if wrong := difference(returned, expected):
            raise PpclError(f"adapter {self._family}: {where}, run alone, returns {wrong}, unlike in the transformer")


def named(stack: Stack, streams: Streams) -> dict[str, Tensor]:
    """Return streams by the names of the block's arguments."""
    return {stack.argument(name): value for name, value in streams.of(stack.streams).items()}


def difference(found: Any, expected: Any, name: str = "") -> str:
    """Say where nested values differ by more than rounding: empty where they do not."""
    if isinstance(expected, Tensor):
        return _unlike(found, expected, name)
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or found.keys() != expected.keys():
            has, wants = (
                sorted(map(str, v)) if isinstance(v, Mapping) else type(v).__name__ for v in (found, expected)
            )
            return f"{name or 'arguments'} {has} for {wants}"
        return next((d for k, v in expected.items() if (d := difference(found[k], v, f"{name}{k} "))), "")
    if isinstance(expected, tuple | list):
        if not isinstance(found, tuple | list) or len(found) != len(expected):
            return f"{name}{_brief(found)} for {_brief(expected)}"
        pairs = enumerate(zip(found, expected, strict=True))
        return next((d for i, (f, e) in pairs if (d := difference(f, e, f"{name}[{i}] "))), "")
    same = found is expected or found == expected
    return "" if same else f"{name}{_brief(found)} for {_brief(expected)}"


def _unlike(found: Any, expected: Tensor, name: str) -> str:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return f"{name}{_brief(found)} for {_brief(expected)}"
    found, expected = found.cpu(), expected.cpu()
    if torch.equal(found, expected):
        return ""
    if not expected.is_floating_point():
        return f"other {name.strip()}"
    distance = float((found.float() - expected.float()).norm())
    size = float(expected.float().norm())
    if distance <= _ROUNDING * torch.finfo(expected.dtype).eps * size:
        return ""
    return f"another {name.strip()} (by {distance / max(size, 1e-30):.2g} of its norm)"


def _brief(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]


def _numbered(witness: Witness, stack: Stack) -> list[tuple[int, BlockCall]]:
    return list(enumerate(witness.calls[stack.path]))


def _at(pairs: list[tuple[str, int]], index: int) -> tuple[str, int] | None:
    return pairs[index] if index < len(pairs) else None
