"""Whether what an adapter names in blocks is given what it is to be given: joint attention and modulation."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Stack, Stream
from ppcl_toolkit.checking.alone import shifted
from ppcl_toolkit.checking.witness import BlockCall, Witness, difference, middle
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import Arguments, Streams, named_arguments, run_block
from ppcl_toolkit.running.conditioning import Layer, vectors
from ppcl_toolkit.running.schedule import Runner


@torch.no_grad()
def check_attention(runner: Runner, witness: Witness) -> None:
    """Change the streams of a block, one at a time, and look at what its joint attention is given.

    The text must change with the text alone, and something else with the image. Raises `PpclError` where they do not.
    """
    runner.settle()
    for stack in runner.adapter.stacks:
        if stack.joint_attention is None:
            continue
        _, block, call = middle(runner, witness, stack)
        what = f"adapter {runner.adapter.family}: joint_attention of {stack.path}: {stack.joint_attention}"
        given = {stream: _given(runner, stack, block, call, stream) for stream in (None, *stack.streams)}
        own = given[None]
        if own is None:
            raise PpclError(f"{what} is not run")
        moved: dict[Stream, set[str]] = {stream: _changed(own, given[stream]) for stream in stack.streams}
        text, tokens = own.get(stack.attention_text), call.streams.text
        assert tokens is not None
        if not isinstance(text, Tensor) or text.shape[:2] != tokens.shape[:2]:
            found = list(text.shape) if isinstance(text, Tensor) else type(text).__name__
            raise PpclError(
                f"{what} is given {found} as attention_text {stack.attention_text!r}, and the text is "
                f"{list(tokens.shape)}"
            )
        if stack.attention_text in moved["image"] or stack.attention_text not in moved["text"]:
            raise PpclError(
                f"{what} is given another attention_text {stack.attention_text!r} with another "
                f"{', '.join(stream for stream in moved if stack.attention_text in moved[stream]) or 'nothing'}: it "
                "is to be made of the text alone"
            )
        if not moved["image"]:
            raise PpclError(f"{what} is given nothing of the image: image and text do not meet there")


def _given(runner: Runner, stack: Stack, block: nn.Module, call: BlockCall, other: Stream | None) -> Arguments | None:
    """Return what the joint attention is given where a block is run, with another one of its streams."""
    arguments, streams = runner.placement.bring((call.arguments, call.streams))
    if other is not None:
        streams = Streams(**{**streams._asdict(), other: shifted(getattr(streams, other))})
    found: list[Arguments] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(named_arguments(module, args, kwargs))

    with runner.placement.visit(block):
        assert stack.joint_attention is not None
        handle = block.get_submodule(stack.joint_attention).register_forward_pre_hook(keep, with_kwargs=True)
        try:
            run_block(block, stack, arguments, streams)
        finally:
            handle.remove()
    return found[0] if found else None


def _changed(one: Arguments, other: Arguments | None) -> set[str]:
    return {name for name, value in one.items() if difference((other or {}).get(name), value)}


@torch.no_grad()
def check_modulation(runner: Runner, witness: Witness) -> None:
    """Run a block of every stack on two pairs of streams: its modulation must be fed one vector for each sample.

    Raises `PpclError` where it is fed something else, or runs twice with other vectors.
    """
    layers = []
    try:
        for stack in runner.adapter.stacks:
            index, block, call = middle(runner, witness, stack)
            modules = dict(block.named_modules())
            own = [Layer(stack.path, index, path) for path in stack.modulation if path in modules]
            layers += own
            with _fed_once(block, own):
                arguments, streams = runner.placement.bring((call.arguments, call.streams))
                with runner.placement.visit(block):
                    run_block(block, stack, arguments, streams)
        if layers:
            vectors(runner, layers, witness.batch, prove=True)
    except PpclError as error:
        raise PpclError(f"adapter {runner.adapter.family}: modulation: {error}") from error


@contextlib.contextmanager
def _fed_once(block: nn.Module, layers: list[Layer]) -> Iterator[None]:
    """Raise a `PpclError` where a layer runs twice, with other vectors."""
    seen: dict[Layer, Tensor] = {}

    def note(layer: Layer, given: tuple[Any, ...]) -> None:
        if difference(given[0], seen.setdefault(layer, given[0])):
            raise PpclError(f"{layer} is run twice in a block, with other vectors: it is no modulation")

    handles = [
        block.get_submodule(layer.path).register_forward_pre_hook(lambda _, given, layer=layer: note(layer, given))
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
