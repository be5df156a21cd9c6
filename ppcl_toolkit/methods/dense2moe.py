"""Dense2MoE (arXiv 2510.09094): why there is no row."""

from ppcl_toolkit.rules.method import Impossible, Method

_WHY = (
    "its FFNs become a mixture of experts: fewer parameters are active for a token, and as many are stored as before; "
    "the activated ones are no size of a model that is to fit somewhere, so nothing here can be matched"
)

METHODS = (Method(name="dense2moe", source="arXiv 2510.09094, Sec. 3", rule=Impossible(_WHY)),)
