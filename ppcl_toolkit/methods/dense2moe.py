"""Dense2MoE (arXiv 2510.09094): why there is no row."""

from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.comparison.method import Ground, Method, Pick, Unreachable

_WHY = (
    "its FFNs become a mixture of experts: fewer parameters are active for a token, and as many are stored as before; "
    "the activated ones are no size of a model that is to fit somewhere, so nothing here can be matched"
)


def _none(ground: Ground, desk: Desk) -> Pick:
    del ground, desk
    raise Unreachable(_WHY)


METHODS = (Method(name="dense2moe", source="arXiv 2510.09094, Sec. 3", rule=_none),)
