"""Blocks of several families, tiny and real, with their stacks as data and one real call of each."""

import tiny
import torch

from ppcl_toolkit.adapter import Stack, load_adapter
from ppcl_toolkit.running.capture import Streams, stack_calls

FLUX, SD3, QWEN_IMAGE = (load_adapter(name) for name in ("flux", "sd3", "qwen_image"))

TRANSFORMERS = {
    "flux": lambda: (tiny.flux_transformer(), FLUX, tiny.flux_inputs()),
    "sd3": lambda: (tiny.sd3_transformer(), SD3, tiny.sd3_inputs()),
    "qwenimage": lambda: (tiny.qwen_image_transformer(), QWEN_IMAGE, tiny.qwen_image_inputs()),
    "zero_cond_t": lambda: (tiny.qwen_image_transformer(zero_cond_t=True), QWEN_IMAGE, tiny.qwen_image_inputs(2)),
}


def blocks_of(family: str) -> list[tuple]:
    """(stack, block, arguments, streams) of every block, each with streams of its own."""
    transformer, adapter, kwargs = TRANSFORMERS[family]()
    found = []
    streams = None
    with torch.no_grad():
        for stack in adapter.stacks:
            calls = stack_calls(transformer, adapter, stack.path, kwargs, streams)
            g = torch.Generator().manual_seed(1)
            streams = Streams(*(torch.randn(value.shape, generator=g) for value in calls.streams))
            found += [(stack, b, a, streams) for b, a in zip(stack.blocks(transformer), calls.arguments, strict=True)]
    return found


FAMILIES = {family: lambda family=family: blocks_of(family) for family in TRANSFORMERS}


def block_call(stack: Stack, arguments: dict, streams: Streams) -> dict:
    return {**arguments, **{stack.argument(name): value for name, value in streams.of(stack.streams).items()}}
