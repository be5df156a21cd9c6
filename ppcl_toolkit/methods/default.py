"""Ours: what the job itself does.

Candidates are Algorithm 1's intervals (arXiv 2511.16156, Sec. 3.3), text runs and FFNs as far as the job's limits
allow; they go in the job's order: by measured substitution error per share saved, or by an integer program over
intervals of all starts, too. Segments and fine-tuning share the budget as the job's
own steps do. The job's modulation of low rank is the lever of this comparison, given to all methods or to none.
"""

from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.rules.method import Ground, Method, Pick, Segments, Whole, Widths
from ppcl_toolkit.rules.picking import chosen, programmed


def _pick(ground: Ground, desk: Desk) -> Pick:
    del desk
    width = any(target.width for target in ground.job.targets if target.asked)
    if ground.job.select.order == "program":
        return programmed(ground, width=width)
    return chosen(ground, ground.measured, order=ground.job.select.order, width=width)


METHODS = (
    Method(
        name="default",
        source="this package",
        rule=_pick,
        segments=Segments(),
        widths=Widths(),
        whole=Whole(),
    ),
)
