"""Whether what a plan takes away of a stream is really read by nobody else."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ppcl_toolkit.adapter import Stack, Stream
from ppcl_toolkit.checking.witness import BlockCall, Witness, middle
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import map_tensors, run_block
from ppcl_toolkit.running.schedule import Runner


@torch.no_grad()
def check_dead(runner: Runner, witness: Witness) -> None:
    """Spoil what only makes a block's own text (`text_query`, `text_out`): its image must come out as it was.

    Raises `PpclError` with the module that the image needs, or with another one that it does not.
    """
    runner.settle()
    for stack in runner.adapter.stacks:
        if stack.joint_attention is None:
            continue
        index, block, call = middle(runner, witness, stack)
        for field in ("text_query", "text_out"):
            for path in [path for path in getattr(stack, field) if path in dict(block.named_modules())]:
                if not _left(runner, stack, block, call, path)["image"]:
                    raise PpclError(
                        f"adapter {runner.adapter.family}: {field} of {stack.path} names {path!r}, without which the "
                        f"image of block {index} is another one: it may not be taken out"
                    )
        if path := _forgotten(runner, stack, block, call):
            raise PpclError(
                f"adapter {runner.adapter.family}: {stack.joint_attention} of {stack.path} makes nothing but its own "
                f"text with {path!r}, and neither text_query nor text_out names that: read by nobody, it would stay "
                "where text streams go"
            )


@torch.no_grad()
def check_networks(runner: Runner, witness: Witness) -> None:
    """Spoil the feed-forward network of each stream: that stream must change, and no other.

    Raises `PpclError` with the network that is another stream's.
    """
    runner.settle()
    for stack in runner.adapter.stacks:
        index, block, call = middle(runner, witness, stack)
        for stream, path in stack.ffn.items():
            if path not in dict(block.named_modules()):
                continue
            changed = [name for name, same in _left(runner, stack, block, call, path).items() if not same]
            if changed != [stream]:
                what = f"has another {' and another '.join(changed)}" if changed else "is as it was"
                raise PpclError(
                    f"adapter {runner.adapter.family}: ffn of {stack.path} names {path!r} for the {stream}, and "
                    f"without it block {index} {what}"
                )


def _forgotten(runner: Runner, stack: Stack, block: nn.Module, call: BlockCall) -> str | None:
    """Return a module with weights in the joint attention that has a part in its text alone, and is not named."""
    assert stack.joint_attention is not None
    for name, module in block.get_submodule(stack.joint_attention).named_modules():
        path = f"{stack.joint_attention}.{name}"
        named = any(f"{path}.".startswith(f"{other}.") for other in (*stack.text_query, *stack.text_out))
        if name and not named and any(True for _ in module.parameters(recurse=False)):
            left = _left(runner, stack, block, call, path)
            if left["image"] and not left.get("text", True):
                return path
    return None


def _left(runner: Runner, stack: Stack, block: nn.Module, call: BlockCall, path: str) -> dict[Stream, bool]:
    """Return which streams of a block are as they were where a module in it is spoiled."""
    arguments, streams = runner.placement.bring((call.arguments, call.streams))
    with runner.placement.visit(block):
        whole = run_block(block, stack, arguments, streams).of(stack.returns)
        with _spoiled([block.get_submodule(path)]):
            left = run_block(block, stack, arguments, streams).of(stack.returns)
    return {stream: torch.equal(value, left[stream]) for stream, value in whole.items()}


@contextlib.contextmanager
def _spoiled(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have modules return NaN."""

    def spoil(_: nn.Module, __: Any, output: Any) -> Any:
        return map_tensors(output, lambda tensor: torch.full_like(tensor, float("nan")))

    handles = [module.register_forward_hook(spoil) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
