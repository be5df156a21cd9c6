"""A floor: five draws of blocks, and velocity distillation of what is left. The draws are the same for all seeds."""

import random

from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.rules.method import Ground, Method, Pick, Whole
from ppcl_toolkit.rules.picking import dropping

DRAWS = 5


def _drawn(number: int) -> Method:
    def pick(ground: Ground, desk: Desk) -> Pick:
        del desk
        order = ground.places
        random.Random(number).shuffle(order)
        return dropping(ground, order)

    return Method(name=f"random_{number}", source="floor", rule=pick, whole=Whole())


METHODS = tuple(_drawn(number) for number in range(1, DRAWS + 1))
