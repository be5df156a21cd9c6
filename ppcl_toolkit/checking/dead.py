"""Whether what a plan takes away of a stream is really read by nobody else."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ppcl_toolkit.adapter import Stack, Stream
from ppcl_toolkit.checking.witness import BlockCall, Witness
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import map_tensors, run_block
from ppcl_toolkit.running.schedule import Runner


@torch.no_grad()
def check_dead(runner: Runner, witness: Witness) -> None:
    """Spoil what only makes a block's own text (`text_query`, `text_out`): its image must come out as it was.

    Raises `PpclError` with the module that the image needs.
    """
    runner.settle()
    for stack in runner.adapter.stacks:
        if stack.joint_attention is None:
            continue
        # As the first blocks may lack what later ones have, or the last one: the one in the middle.
        index = len(witness.calls[stack.path]) // 2
        block, call = runner.blocks(stack.path)[index], witness.calls[stack.path][index]
        for field in ("text_query", "text_out"):
            for path in [path for path in getattr(stack, field) if path in dict(block.named_modules())]:
                if not _is_dead(runner, stack, block, call, path):
                    raise PpclError(
                        f"adapter {runner.adapter.family}: {field} of {stack.path} names {path!r}, without which the "
                        f"image of block {index} is another one: it may not be taken out"
                    )


@torch.no_grad()
def check_networks(runner: Runner, witness: Witness) -> None:
    """Spoil the feed-forward network of each stream: that stream must change, and no other.

    Raises `PpclError` with the network that is another stream's.
    """
    runner.settle()
    for stack in runner.adapter.stacks:
        index = len(witness.calls[stack.path]) // 2
        block, call = runner.blocks(stack.path)[index], witness.calls[stack.path][index]
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


def _left(runner: Runner, stack: Stack, block: nn.Module, call: BlockCall, path: str) -> dict[Stream, bool]:
    """Return which streams of a block are as they were where a module in it is spoiled."""
    arguments, streams = runner.placement.bring((call.arguments, call.streams))
    with runner.placement.visit(block):
        whole = run_block(block, stack, arguments, streams).of(stack.returns)
        with _spoiled([block.get_submodule(path)]):
            left = run_block(block, stack, arguments, streams).of(stack.returns)
    return {stream: torch.equal(value, left[stream]) for stream, value in whole.items()}


def _is_dead(runner: Runner, stack: Stack, block: nn.Module, call: BlockCall, path: str) -> bool:
    return _left(runner, stack, block, call, path)["image"]


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
