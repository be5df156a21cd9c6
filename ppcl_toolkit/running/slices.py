"""Where a teacher is cut into slices, one for each process, and by what counts of work.

Slices are cut where the work divides most evenly, be it between the blocks of a reader. Blocks are counted through all
stacks, in forward order.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.func import functional_call

from ppcl_toolkit.adapter import Adapter, Stack
from ppcl_toolkit.running.capture import Arguments, Streams, map_tensors, stack_calls
from ppcl_toolkit.running.flops import counting
from ppcl_toolkit.running.meta import without_data
from ppcl_toolkit.running.placement import device_of, moved

Span = tuple[int, int]
"""First and last block of a reader."""
TRAINING = 3
"""What training a student takes, in forwards of its block: one forward, and a backward of two."""
_Unit = tuple[int, int, Span | None]
"""What it costs, how many blocks come before it, and the reader that it is; None for a block."""
_Best = tuple[int, int, tuple[int, ...]]
"""The largest slice, the sum of squares of all, and where they are cut."""


class Slice(NamedTuple):
    """What one process has: consecutive blocks, and the readers that read there."""

    blocks: range
    spans: tuple[Span, ...]
    """Where readers end at one of these blocks, or at the one before: they read what comes in."""


def slices(costs: Sequence[int], spans: Sequence[Span], count: int) -> list[Slice]:
    """Share out blocks and readers in forward order, so that the most that one of `count` processes does is least.

    `costs` are those of each block's forward; a reader takes `TRAINING` times that of its first block. Blocks behind
    the last reader are left out. There are fewer slices where there is too little to share.
    """
    units = list(_units(costs, spans))
    done = [0, *itertools.accumulate(cost for cost, _, _ in units)]
    # By number of units at the front: the best way to cut them.
    best: dict[int, _Best] = {end: (done[end], done[end] ** 2, (0, end)) for end in range(1, len(done))}
    for _ in range(min(count, len(units)) - 1):
        best = {
            end: min(_joined(best[cut], done[end] - done[cut], end) for cut in best if cut < end)
            for end in range(min(best) + 1, len(done))
        }
    cuts = best[len(units)][2] if units else ()
    return [_slice(units[start:end]) for start, end in itertools.pairwise(cuts)]


def _units(costs: Sequence[int], spans: Sequence[Span]) -> Iterator[_Unit]:
    """Yield (cost, blocks before, span read or None) in the order in which one process would do it all."""
    for block in range(max((last + 1 for _, last in spans), default=0)):
        yield costs[block], block, None
        for span in dict.fromkeys(span for span in spans if span[1] == block):
            # Readers of the same blocks stay together.
            yield TRAINING * costs[span[0]] * list(spans).count(span), block + 1, span


def _joined(best: _Best, cost: int, end: int) -> _Best:
    return max(best[0], cost), best[1] + cost**2, (*best[2], end)


def _slice(units: Sequence[_Unit]) -> Slice:
    start, blocks = units[0][1], sum(span is None for _, _, span in units)
    return Slice(range(start, start + blocks), tuple(span for _, _, span in units if span is not None))


def block_costs(transformer: nn.Module, adapter: Adapter, batch: Mapping[str, Any]) -> list[int]:
    """Count the floating-point operations of every block's forward, without weights and without running any."""
    batch = moved(dict(batch), device_of(transformer, adapter))
    costs, before = [], None
    for stack in adapter.stacks:
        with without_data():
            calls = stack_calls(transformer, adapter, stack.path, batch, before)
        before = calls.streams
        known: dict[Any, int] = {}
        for block, arguments in zip(stack.blocks(transformer), calls.arguments, strict=True):
            kind = (type(block), *(value.shape for value in block.state_dict().values()))
            if kind not in known:
                known[kind] = _operations(block, stack, arguments, calls.streams)
            costs.append(known[kind])
    return costs


def _operations(block: nn.Module, stack: Stack, arguments: Arguments, streams: Streams) -> int:
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    given = {stack.argument(name): value for name, value in streams.of(stack.streams).items()}
    weights, call = map_tensors((tensors, {**arguments, **given}), lambda tensor: tensor.detach().to("meta"))
    with counting() as counter, without_data():
        functional_call(block, weights, (), call)
    return max(1, counter.get_total_flops())
