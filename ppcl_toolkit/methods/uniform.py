"""Floors: blocks that are spread evenly, and blocks that are drawn; copies, velocity distillation of the whole.

`uniform` keeps round(linspace) (ShortGPT and TinyFusion have it as a baseline): our reading at sizes that no stride
meets is the order in which blocks go when every next one lies as far as may be from those that went before.
"""

import random

from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.comparison.method import Ground, Method, Pick, Place, Whole
from ppcl_toolkit.comparison.picking import dropping

DRAWS = 5


def spread(depth: int) -> list[int]:
    """Return the numbers 0 to depth - 1, each as far as may be from those before it and from both ends."""
    order: list[int] = []
    while len(order) < depth:
        taken = [-1, *order, depth]
        left = [block for block in range(depth) if block not in order]
        order.append(max(left, key=lambda block: (min(abs(block - other) for other in taken), -block)))
    return order


def _evenly(ground: Ground, desk: Desk) -> Pick:
    del desk
    # Stacks in proportion: each gives the same share of its blocks at any point of the order.
    turns: list[tuple[float, Place]] = []
    for stack, depth in ground.plan.depths.items():
        turns += [((turn + 1) / depth, (stack, block)) for turn, block in enumerate(spread(depth))]
    return dropping(ground, [place for _, place in sorted(turns, key=lambda each: each[0])])


def _drawn(number: int) -> Method:
    def pick(ground: Ground, desk: Desk) -> Pick:
        del desk
        order = ground.places
        random.Random(number).shuffle(order)
        return dropping(ground, order)

    return Method(name=f"random_{number}", source="floor", rule=pick, whole=Whole())


METHODS = (
    Method(name="uniform_blocks", source="floor", rule=_evenly, whole=Whole()),
    *(_drawn(number) for number in range(1, DRAWS + 1)),
)
