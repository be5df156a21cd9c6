"""Rules that methods share: from an order of blocks, or from measured candidates, to a plan of the asked size."""

from collections.abc import Iterable, Sequence

from ppcl_toolkit.comparison.method import Ground, Pick, Place, Unreachable
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Interval, Plan
from ppcl_toolkit.recipe import Target, Width
from ppcl_toolkit.stages.select import choose
from ppcl_toolkit.training.substitution import Measured

_STEPS = 12
"""Sizes at which a chooser is asked, from one end of what counts as matched to the other, and as many below."""


def first_that_fits(saves: Sequence[int], least: int, most: int) -> list[int]:
    """Return the numbers of the first set whose savings come to `least` to `most`, in the order that is given.

    The first: an item is in it whenever a set that has it, and all taken before it, comes out right. Where none does,
    the set that comes nearest. Sums are kept as sets, of which there are few: blocks are of few kinds.
    """
    reachable: list[set[int]] = [{0}]
    for saved in reversed(saves):
        reachable.append(reachable[-1] | {total + saved for total in reachable[-1]})
    reachable.reverse()
    if not any(least <= total <= most for total in reachable[0]):
        least = most = min(reachable[0], key=lambda total: max(least - total, total - most))
    chosen: list[int] = []
    taken = 0
    for number, saved in enumerate(saves):
        if least <= taken <= most:
            break
        if any(least <= taken + saved + rest <= most for rest in reachable[number + 1]):
            chosen.append(number)
            taken += saved
    return chosen


def dropping(ground: Ground, ranked: Sequence[Place], *, average: bool = False, passes: int = 0) -> Pick:
    """Drop blocks in an order, the first of it first, down to the asked size; each stack keeps its last-ranked one.

    A kept block stands for itself and for the dropped ones behind it; before the first kept one, for those before it.
    It begins as itself, or with `average` as the mean of all that it stands for.
    """
    kept_last = {stack: (stack, block) for stack, block in ranked}
    free = [place for place in ranked if place != kept_last[place[0]]]
    total = ground.whole
    numbers = first_that_fits([ground.cost(p) for p in free], total - ground.window.most, total - ground.window.least)
    return without(ground, [free[number] for number in numbers], average=average, passes=passes)


def without(ground: Ground, dropped: Iterable[Place], *, average: bool = False, passes: int = 0) -> Pick:
    """Return the pick that drops these blocks."""
    gone, operations, sources = set(dropped), [], {}
    for stack, depth in ground.plan.depths.items():
        kept = [block for block in range(depth) if (stack, block) not in gone]
        ends = [*(block - 1 for block in kept[1:]), depth - 1]
        for number, (block, last) in enumerate(zip(kept, ends, strict=True)):
            first = 0 if number == 0 else block
            if last > first:
                operations.append(Interval(stack=stack, first=first, last=last))
                sources[f"{stack}.{first}-{last}"] = tuple(range(first, last + 1)) if average else (block,)
    return Pick(plan=ground.plan.with_operations([*operations, *ground.lever]), sources=sources, passes=passes)


def chosen(
    ground: Ground, candidates: Sequence[Measured], *, order: str = "price", width: bool = False, depth: float = 1.0
) -> Pick:
    """Let the product's own choice pick among measured candidates, at the size that comes to be matched.

    It takes what is at most as large as asked, so it is asked from the upper end of the window downwards. `depth` is
    the share of what has to go that goes by intervals; the rest is left to width.
    """
    window, best = ground.window, None
    limits = ground.job.width if width else Width(text_blocks=0, ffn_blocks=0)
    for step in range(2 * _STEPS + 1):
        size = window.most - step * (window.most - window.least) // _STEPS
        sizes = {window.unit: str(size)}
        if depth < 1 and window.unit == "params":
            sizes["depth"] = str(ground.costs(ground.plan).params - int((ground.whole - size) * depth))
        target = Target.model_validate({"name": "asked", "width": width, "modulation": bool(ground.lever), **sizes})
        try:
            plan = _choice(ground, candidates, target, limits, order)
        except PpclError as error:
            if best is None:
                raise Unreachable(str(error)) from error
            break
        if best is None or abs(_size(ground, plan) - window.aim) < abs(_size(ground, best) - window.aim):
            best = plan
        if not window.off(_size(ground, plan)):
            return Pick(plan=plan, passes=search_passes(ground))
    assert best is not None
    return Pick(plan=best, passes=search_passes(ground))


def search_passes(ground: Ground) -> int:
    """Return what probes, CKA and substitution errors take, in b: every candidate is a pass of the whole teacher."""
    job, blocks = ground.job, sum(ground.plan.depths.values())
    looked = job.probe.batches * job.probe.batch + job.probe.steps * job.probe.batch
    looked += job.intervals.batches * job.intervals.batch
    looked += (len(ground.measured) + 2) * job.select.batches * job.select.batch
    return looked * blocks


def _choice(ground: Ground, candidates: Sequence[Measured], target: Target, limits: Width, order: str) -> Plan:
    choice = choose(ground.plan, candidates, [target], ground.costs, limits, order=order, modulation=ground.lever)
    return choice.plans["asked"]


def _size(ground: Ground, plan: Plan) -> int:
    return ground.costs(plan).of(ground.window.unit)
