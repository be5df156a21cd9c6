"""Plain end-to-end velocity distillation of copied blocks: the rival to beat.

The blocks go whose removal alone costs least velocity error; what is left are copies, and all of it learns E |v_S -
v_T|^2 on the student's own states (output distillation, as in BK-SDM, arXiv 2305.15798, Sec. 3, without its other
terms). Which blocks go is a reading: no source gives a rule with it.
"""

from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.rules.method import Ground, Method, Pick, Whole
from ppcl_toolkit.rules.picking import dropping


def _pick(ground: Ground, desk: Desk) -> Pick:
    del desk
    ranked = [place for _, place in sorted(zip(ground.scores.removal, ground.places, strict=True))]
    return dropping(ground, ranked, passes=ground.scores.removed)


METHODS = (Method(name="velocity", source="arXiv 2305.15798, output term alone", rule=_pick, whole=Whole()),)
