"""Block calls bound by name: what a transformer passes to its blocks, and how one block is run alone.

Shapes: B batch, N tokens of a stream, D features.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Adapter, Stack, Stream
from ppcl_toolkit.errors import PpclError

Arguments = dict[str, Any]
"""Forward arguments of one block by name, without its streams."""


class Streams(NamedTuple):
    """The token streams between two blocks, each [B, N, D]; `text` is None where a stack has one stream."""

    image: Tensor
    text: Tensor | None = None

    def of(self, names: tuple[Stream, ...]) -> dict[Stream, Tensor]:
        """Return the named streams that are present."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def unpadded(stack: Stack, arguments: Arguments) -> Tensor | None:
    """Return which tokens of the text belong to it, [B, N] of bool; None where all do."""
    mask = arguments.get(stack.text_mask) if stack.text_mask else None
    return None if mask is None else mask.bool()


def each_alone(streams: Streams, unpadded_BN: Tensor) -> list[Streams]:
    """Return the streams of every sample by itself, without the padding of its text, and of what travels behind it."""
    if streams.text is None:
        return [Streams(image[None]) for image in streams.image]
    mask_BN = unpadded_BN.repeat(1, streams.text.shape[1] // unpadded_BN.shape[1])
    rows = zip(streams.image, streams.text, mask_BN, strict=True)
    return [Streams(image[None], text[mask][None]) for image, text, mask in rows]


class StackCalls(NamedTuple):
    """How a transformer calls the blocks of one stack for one batch."""

    arguments: list[Arguments]
    """Per block, everything but the streams."""
    streams: Streams
    """What the first block is given."""


class _Entered(Exception):
    """Raised by the last block of interest: nothing after it is needed."""


def bind(block: nn.Module, stack: Stack, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Arguments, Streams]:
    """Bind a block's call to its argument names: diffusers passes keywords, and positions under checkpointing."""
    arguments = named_arguments(block, args, kwargs)
    streams = Streams(*(arguments.pop(stack.argument(stream)) for stream in stack.streams))
    return arguments, streams


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """Return the arguments of a module's call by name, so that `module(**arguments)` is that call."""
    signature = inspect.signature(type(module).forward)
    arguments = dict(signature.bind(module, *args, **kwargs).arguments)
    arguments.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def pack(stack: Stack, streams: Streams) -> Any:
    """Put streams in the order in which a block of `stack` returns them."""
    values = tuple(getattr(streams, name) for name in stack.returns)
    return values if len(values) > 1 else values[0]


def unpack(stack: Stack, output: Any) -> Streams:
    """Read the streams from what a block of `stack` returned."""
    values = output if isinstance(output, tuple) else (output,)
    if len(values) != len(stack.returns) or not all(isinstance(value, Tensor | None) for value in values):
        kinds = ", ".join(type(value).__name__ for value in values)
        raise PpclError(f"the adapter's returns of {stack.path}: {stack.returns!r}, and its blocks return {kinds}")
    return Streams(**dict(zip(stack.returns, values, strict=True)))


def run_block(block: nn.Module, stack: Stack, arguments: Arguments, streams: Streams) -> Streams:
    """Run one block on `streams`."""
    given = {stack.argument(name): value for name, value in streams.of(stack.streams).items()}
    output = unpack(stack, block(**arguments, **given))
    # A stack whose blocks return the image alone leaves the text as it was.
    return output if "text" in stack.returns else Streams(output.image, streams.text)


def answer(transformer: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """Return what a transformer makes of a call, of a list of samples, too: [B, ...]."""
    made: Tensor | list[Tensor] = transformer(**call)[0]
    return torch.stack(made) if isinstance(made, list) else made


def predict(transformer: nn.Module, adapter: Adapter, call: Mapping[str, Any]) -> Tensor:
    """Return the velocity of the noised latents of a call: pipelines throw away that of other tokens."""
    return adapter.noised_of(call, answer(transformer, call))


def stack_calls(
    transformer: nn.Module,
    adapter: Adapter,
    path: str,
    kwargs: Mapping[str, Any],
    before: Streams | None = None,
) -> StackCalls:
    """Record how `transformer(**kwargs)` calls the blocks of the stack at `path`, running no block at all.

    `before` are the streams at the end of the stack before it, where there is one: the transformer's own code carries
    them over to this stack. Without them the streams are not the teacher's, and everything else is.
    """
    recorded: list[tuple[Arguments, Streams]] = []
    order = [stack.path for stack in adapter.stacks]
    with contextlib.ExitStack() as patches:
        for position, stack in enumerate(adapter.stacks[: order.index(path) + 1]):
            blocks = stack.blocks(transformer)
            for index, block in enumerate(blocks):
                final = index == len(blocks) - 1
                forward = passing(block, stack)
                if stack.path == path:
                    forward = _recorder(block, stack, recorded, final=final)
                elif final and position == order.index(path) - 1:
                    forward = passing(block, stack, before)
                patches.enter_context(rerouted(block, forward))
        with contextlib.suppress(_Entered):
            transformer(**kwargs)
    assert recorded, f"the transformer did not call the blocks of {path}"
    return StackCalls([arguments for arguments, _ in recorded], recorded[0][1])


@torch.enable_grad()
def text_is_read(transformer: nn.Module, adapter: Adapter, call: Mapping[str, Any]) -> bool:
    """Tell whether the text behind the last block of all has a part in the velocity; no block is run."""
    last = adapter.stacks[-1]
    if "text" not in last.returns:
        return False
    behind: list[Tensor] = []

    def end(block: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            streams = bind(block, last, args, kwargs)[1]
            assert streams.text is not None
            behind.append(streams.text.detach().requires_grad_(True))
            return pack(last, Streams(streams.image, behind[0]))

        return forward

    with contextlib.ExitStack() as patches:
        for stack in adapter.stacks:
            for block in (blocks := stack.blocks(transformer)):
                ends = stack is last and block is blocks[-1]
                patches.enter_context(rerouted(block, end(block) if ends else passing(block, stack)))
        velocity = predict(transformer, adapter, call)
    if not velocity.requires_grad:
        return False
    return torch.autograd.grad(velocity.sum(), behind[0], allow_unused=True)[0] is not None


@contextlib.contextmanager
def joint_text(block: nn.Module, stack: Stack) -> Iterator[list[Tensor]]:
    """Collect the text that enters the joint attention, z of Eq. 8, [B, N, D], at every run of `block`."""
    assert stack.joint_attention is not None, f"{stack.path} has no joint attention"
    attention = block.get_submodule(stack.joint_attention)
    names = list(inspect.signature(type(attention).forward).parameters)[1:]
    seen: list[Tensor] = []

    def collect(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append({**dict(zip(names, args, strict=False)), **kwargs}[stack.attention_text])

    handle = attention.register_forward_pre_hook(collect, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def map_tensors(value: Any, function: Any) -> Any:
    """Apply `function` to every tensor of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, Streams):
        return Streams(*(map_tensors(item, function) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(item, function) for item in value)
    return value


@contextlib.contextmanager
def rerouted(block: nn.Module, forward: Any) -> Iterator[None]:
    """Let `forward` run in place of a block's own."""
    # On the instance, so that code that looks at the block itself still finds its attributes.
    own = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def passing(block: nn.Module, stack: Stack, streams: Streams | None = None) -> Any:
    """Return a forward that hands on the block's own streams, or the given ones."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return pack(stack, streams or bind(block, stack, args, kwargs)[1])

    return forward


def _recorder(block: nn.Module, stack: Stack, recorded: list[tuple[Arguments, Streams]], *, final: bool) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        recorded.append(bind(block, stack, args, kwargs))
        if final:
            raise _Entered
        return pack(stack, recorded[-1][1])

    return forward
