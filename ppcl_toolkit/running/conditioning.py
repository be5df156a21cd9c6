"""What modulation layers are fed: the conditioning vectors of a call, found and proved by running.

Shapes: B samples, N tokens, V vectors (a multiple of B), D features.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import Arguments, Streams, map_tensors, rerouted, run_block, stack_calls
from ppcl_toolkit.running.schedule import Batch, Runner


class Layer(NamedTuple):
    """A linear layer of a block."""

    stack: str
    block: int
    path: str

    def __str__(self) -> str:
        return f"{self.stack}.{self.block}.{self.path}"


class _Enough(Exception):
    """Raised by the last layer of interest: nothing of the block behind it is needed."""


@torch.no_grad()
def vectors(runner: Runner, layers: Sequence[Layer], batch: Batch, *, prove: bool = False) -> dict[Layer, Tensor]:
    """Return what each layer is fed in the teacher's call of `batch`, [V, D]; no attention is run.

    With `prove`, blocks run twice, on different streams: a `PpclError` names a layer that is never run, or is fed by
    more than the conditioning, or by other than a whole number of vectors for each sample. Where reference tokens have
    a modulation of their own there are two.
    """
    runner.settle()
    batch = runner.placement.bring(batch)
    samples = len(batch[runner.adapter.latents])
    found: dict[Layer, Tensor] = {}
    before = None
    for stack in runner.adapter.stacks:
        calls = stack_calls(runner.transformer, runner.adapter, stack.path, batch, before)
        before = calls.streams
        other = map_tensors(calls.streams, lambda tensor: 2 * tensor + 1)
        for index, block in enumerate(runner.blocks(stack.path)):
            wanted = [layer for layer in layers if layer[:2] == (stack.path, index)]
            if wanted:
                with runner.placement.visit(block):
                    given = _fed(block, stack, calls.arguments[index], calls.streams, wanted)
                    again = _fed(block, stack, calls.arguments[index], other, wanted) if prove else given
                for layer in wanted:
                    _check(layer, given.get(layer), again.get(layer), samples)
                found |= given
    return found


def sources(fed: Mapping[Layer, Tensor]) -> dict[Layer, Layer]:
    """Return for each layer the first one that is fed the same vectors: in most families one feeds all."""
    first: list[Layer] = []
    origin = {}
    for layer, given in fed.items():
        same = next((one for one in first if fed[one].shape == given.shape and torch.equal(fed[one], given)), None)
        if same is None:
            first.append(layer)
        origin[layer] = same or layer
    return origin


@contextlib.contextmanager
def replaced(runner: Runner, states: Mapping[Layer, Mapping[str, Tensor]]) -> Iterator[None]:
    """Let pairs of linear maps, as `LowRank.at` returns them, run in place of layers of the teacher."""
    with contextlib.ExitStack() as stack:
        for layer, state in states.items():
            module = runner.blocks(layer.stack)[layer.block].get_submodule(layer.path)
            stack.enter_context(rerouted(module, _pair(state)))
        yield


def _pair(state: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(e_VD: Tensor) -> Tensor:
        down, up, bias = (state[name].to(e_VD) for name in ("0.weight", "1.weight", "1.bias"))
        return nn.functional.linear(nn.functional.linear(e_VD, down), up, bias)

    return forward


def _fed(
    block: nn.Module, stack: Stack, arguments: Arguments, streams: Streams, wanted: Sequence[Layer]
) -> dict[Layer, Tensor]:
    found: dict[Layer, Tensor] = {}

    def watch(layer: Layer) -> Any:
        def note(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            found[layer] = given[0].detach()
            if len(found) == len(wanted):
                raise _Enough

        return block.get_submodule(layer.path).register_forward_pre_hook(note)

    handles = [watch(layer) for layer in wanted]
    try:
        with contextlib.suppress(_Enough):
            run_block(block, stack, arguments, streams)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _check(layer: Layer, given: Tensor | None, again: Tensor | None, samples: int) -> None:
    if given is None or again is None:
        raise PpclError(f"{layer} is never run: it is no modulation")
    if given.ndim != 2 or len(given) % samples:
        raise PpclError(f"{layer} is fed {list(given.shape)} for {samples} samples, modulation is one vector for each")
    if not torch.equal(given, again):
        raise PpclError(f"{layer} is fed by more than the conditioning: what it is given changes with the streams")
