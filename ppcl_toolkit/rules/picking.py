"""Rules that methods share: from an order of blocks, or from measured candidates, to a plan of the asked size."""

from collections.abc import Callable, Iterable, Sequence

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Interval, Plan, TextRun
from ppcl_toolkit.recipe import Target, Width
from ppcl_toolkit.rules.method import Ground, Pick, Place, Unreachable
from ppcl_toolkit.selection.greedy import choose
from ppcl_toolkit.selection.joint import choose_by_program
from ppcl_toolkit.training.substitution import Candidate, Measured

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


def programmed(ground: Ground, *, width: bool) -> Pick:
    """Let an integer program pick among all that was measured, what it takes together included, as `chosen` does."""
    job, looks = ground.job, 0
    assert ground.together is not None

    def together(operations: Sequence[Candidate]) -> tuple[float, Sequence[float]]:
        nonlocal looks
        assert ground.together is not None
        looks += 2 + sum(not isinstance(each, TextRun) for each in operations)
        return ground.together(operations)

    def choice(target: Target, limits: Width) -> Plan:
        found = choose_by_program(
            ground.plan, ground.wider, [target], ground.costs, limits, together=together, modulation=ground.lever
        )
        return found.plans[target.name]

    plan = _matched(ground, choice, width=width)
    measured = looks * job.select.batches * job.select.batch * sum(ground.plan.depths.values())
    return Pick(plan=plan, passes=search_passes(ground, len(ground.wider)) + measured)


def chosen(
    ground: Ground, candidates: Sequence[Measured], *, order: str = "price", width: bool = False, depth: float = 1.0
) -> Pick:
    """Let the product's own choice pick among measured candidates, at the size that comes to be matched.

    It takes what is at most as large as asked, so it is asked from the upper end of the window downwards. Where none of
    its choices is matched, the first set in the order of its prices is taken that is. `depth` is the share of what has
    to go that goes by intervals; the rest is left to width.
    """

    def choice(target: Target, limits: Width) -> Plan:
        found = choose(ground.plan, candidates, [target], ground.costs, limits, order=order, modulation=ground.lever)
        return found.plans[target.name]

    best = _matched(ground, choice, width=width, depth=depth)
    if miss(ground, best):
        other = _by_price(ground, [one for one in candidates if isinstance(one.operation, Interval)])
        best = other if miss(ground, other) < miss(ground, best) else best
    return Pick(plan=best, passes=search_passes(ground, len(candidates)))


def _by_price(ground: Ground, intervals: Sequence[Measured]) -> Plan:
    """Return the first set of disjoint intervals, the cheapest per share first, that is matched, or the nearest."""
    unit = ground.window.unit
    beneath = ground.plan.with_operations(ground.lever)
    ranked = sorted(intervals, key=lambda one: one.price({unit: 1}))
    free: list[Measured] = []
    for one in ranked:
        apart = [other for other in free if _overlap(one, other)]
        free += [] if apart else [one]
    saves = [
        ground.whole - ground.costs(beneath.with_operations([one.operation, *ground.lever])).of(unit) for one in free
    ]
    least, most = ground.whole - ground.window.most, ground.whole - ground.window.least
    return beneath.with_operations([*(free[n].operation for n in first_that_fits(saves, least, most)), *ground.lever])


def _overlap(one: Measured, other: Measured) -> bool:
    a, b = one.operation, other.operation
    assert isinstance(a, Interval) and isinstance(b, Interval)
    return a.stack == b.stack and a.first <= b.last and b.first <= a.last


def search_passes(ground: Ground, candidates: int) -> int:
    """Return what probes, CKA and substitution errors take, in b: every candidate is a pass of the whole teacher.

    Two more are the teacher's own, and the one that fits the maps.
    """
    job, blocks = ground.job, sum(ground.plan.depths.values())
    looked = (job.probe.batches + job.probe.steps) * job.probe.batch
    looked += job.intervals.batches * job.intervals.batch
    looked += (candidates + 2 if candidates else 0) * job.select.batches * job.select.batch
    return looked * blocks


def _matched(ground: Ground, choice: Callable[[Target, Width], Plan], *, width: bool, depth: float = 1.0) -> Plan:
    """Ask for sizes from the upper end of the window downwards until one is matched; return what comes nearest."""
    window, best = ground.window, None
    limits = ground.job.width if width else Width(text_blocks=0, ffn_blocks=0)
    for step in range(2 * _STEPS + 1):
        size = window.most - step * (window.most - window.least) // _STEPS
        sizes = {window.unit: str(size)}
        if depth < 1:
            # Of another unit, as many parameters as its share: blocks have nearly all of both.
            total = ground.costs(ground.plan)
            sizes["depth"] = str(
                total.params - int((ground.whole - size) / total.of(window.unit) * depth * total.params)
            )
        target = Target.model_validate({"name": "asked", "width": width, "modulation": bool(ground.lever), **sizes})
        try:
            plan = choice(target, limits)
        except PpclError as error:
            if best is None:
                raise Unreachable(str(error)) from error
            break
        best = plan if best is None or miss(ground, plan) < miss(ground, best) else best
        if not miss(ground, best):
            break
    assert best is not None
    return best


def miss(ground: Ground, plan: Plan) -> float:
    """Return by how much a plan misses the asked size, relative to it; 0 where it is matched."""
    return abs(ground.window.off(ground.costs(plan).of(ground.window.unit)))
