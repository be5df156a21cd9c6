"""A reference, no rival: all pairs of blocks are tried, and the search is free of charge.

The error of a set S of dropped blocks is taken as sum_i e_i + sum_{i<j} (e_ij - e_i - e_j), with e_i and e_ij the
measured velocity errors without one block and without two, on one batch; the set of least error of the asked size is
found among all of them. What is left are copies that learn the velocity, as for `velocity`. It says how much a better
choice of blocks could be worth, as far as pairs tell.
"""

import contextlib
import itertools

import torch
from torch import Tensor

from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.rules.method import Ground, Method, Pick, Unreachable, Whole
from ppcl_toolkit.rules.picking import without
from ppcl_toolkit.running.capture import passing, rerouted

_MOST = 24
"""Blocks whose sets can be tried: what is known of all of them takes half a gigabyte."""


def best_set(alone: Tensor, both: Tensor, saves: Tensor, least: int, most: int, whole: list[range]) -> list[int]:
    """Return the set of least error whose savings are from `least` to `most`, or come nearest; of `whole` none goes.

    `alone` [N], `both` [N, N] and `saves` [N] are of N blocks; `whole` are the stacks, in their order.
    """
    blocks, half = len(alone), len(alone) // 2
    excess = (both - alone[:, None] - alone).triu(1)
    parts = [_subsets(half), _subsets(blocks - half)]
    (left, right), columns = parts, (slice(None, half), slice(half, None))
    errors, sizes = [], []
    for part, own in zip(parts, columns, strict=True):
        errors.append(part @ alone[own] + ((part @ excess[own, own]) * part).sum(1))
        sizes.append(part @ saves[own])
    total = errors[0][:, None] + errors[1] + left @ excess[:half, half:] @ right.T
    size = sizes[0][:, None] + sizes[1]
    for stack in whole:
        inside = torch.tensor([float(number in stack) for number in range(blocks)], dtype=torch.float64)
        gone = left @ inside[:half], right @ inside[half:]
        total[gone[0][:, None] + gone[1] == len(stack)] = torch.inf
    missed = torch.maximum(least - size, size - most).clamp(min=0)
    missed[total.isinf()] = torch.inf
    total[missed > missed.min()] = torch.inf
    i, j = divmod(int(total.argmin()), len(right))
    return [n for n, gone in enumerate(torch.cat([left[i], right[j]])) if gone]


def _subsets(blocks: int) -> Tensor:
    """Return all subsets, [2^N, N]."""
    return (torch.arange(2**blocks)[:, None] >> torch.arange(blocks) & 1).double()


@torch.no_grad()
def _pick(ground: Ground, desk: Desk) -> Pick:
    places, runner = ground.places, ground.runner
    if len(places) > _MOST:
        raise Unreachable(f"all sets of {len(places)} blocks are too many; the oracle is for teachers of up to {_MOST}")
    stacks = {stack.path: stack for stack in runner.adapter.stacks}
    batch = runner.placement.bring(ground.batches("search", ground.job.select.batch)[0])
    wanted = runner.velocity(batch).float()
    both = torch.zeros(len(places), len(places), dtype=torch.float64)
    pairs = list(itertools.combinations_with_replacement(range(len(places)), 2))
    for done, pair in enumerate(pairs, start=1):
        with contextlib.ExitStack() as gone:
            for path, index in {places[number] for number in pair}:
                block = runner.blocks(path)[index]
                gone.enter_context(rerouted(block, passing(block, stacks[path])))
            both[pair] = both[pair[::-1]] = float((runner.velocity(batch).float() - wanted).square().mean())
        desk.progress(done, len(pairs))
    ends = list(itertools.accumulate(ground.plan.depths.values(), initial=0))
    whole = [range(first, last) for first, last in itertools.pairwise(ends)]
    saves = torch.tensor([ground.cost(place) for place in places], dtype=torch.float64)
    least, most = ground.whole - ground.window.most, ground.whole - ground.window.least
    numbers = best_set(both.diagonal().clone(), both, saves, least, most, whole)
    return without(ground, [places[number] for number in numbers])


METHODS = (Method(name="oracle", source="reference, its search uncharged", rule=_pick, whole=Whole()),)
