"""A floor: blocks that go evenly spread over each stack, and velocity distillation of what is left.

Keeping round(linspace) is a baseline of ShortGPT and TinyFusion; our reading at sizes that no stride meets is an order
in which every next block lies as far as may be from those that went before.
"""

from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.rules.method import Ground, Method, Pick, Place, Whole
from ppcl_toolkit.rules.picking import dropping


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


METHODS = (Method(name="uniform", source="floor", rule=_evenly, whole=Whole()),)
