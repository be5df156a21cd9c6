"""HierarchicalPrune (arXiv 2508.04663): late blocks go first, what lies before the first of them is frozen.

- `hierarchical_prune_text`: the rank is |dP(i)| W_pos(i) with W_pos = exp((i - B) / B). As printed, a late block's
  score is more negative, the contrary of the text; reading: |dP| / W_pos, the lowest go, so that late ones are easier
  to prune.
- `hierarchical_prune_code` (SamsungLabs/HierarchicalPrune at d960264): no W_pos; |dP| alone, within a hand-given
  range of late blocks. The ranges are of SD3.5; reading: the later half, and where it is used up, earlier ones from
  its end on.
- dP is HPSv2 of images there; reading: the velocity error of the removal.
- Everything before the first pruned block is frozen (PWP, and SGDistill as the code has it). Loss: velocity, and 1e-4
  of feature errors; reading: at the ends of intervals, relative to the target's energy.

Single components of blocks (an attention or an FFN as a pass-through) are no operation of a `Plan`: whole blocks go.
"""

import math
from dataclasses import replace

from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.rules.method import Ground, Method, Pick, Whole
from ppcl_toolkit.rules.picking import dropping


def frozen(pick: Pick) -> int:
    """Return how many blocks of the student, from its first one on, lie before the first block that went."""
    for number, form in enumerate(pick.plan.forms()):
        if form.last > form.first:
            # The kept block itself lies before those that went, unless it stands there for earlier ones.
            return number + (pick.sources[replace(form, modulation=0).key] == (form.first,))
    return 0


def _from_text(ground: Ground, desk: Desk) -> Pick:
    del desk
    blocks = len(ground.places)
    scores = [error / math.exp((i - blocks) / blocks) for i, error in enumerate(ground.scores.removal, start=1)]
    return _frozen(ground, [place for _, place in sorted(zip(scores, ground.places, strict=True))])


def _from_code(ground: Ground, desk: Desk) -> Pick:
    del desk
    half = len(ground.places) // 2
    late = sorted(zip(ground.scores.removal[half:], ground.places[half:], strict=True))
    return _frozen(ground, [*(place for _, place in late), *reversed(ground.places[:half])])


def _frozen(ground: Ground, ranked: list[tuple[str, int]]) -> Pick:
    pick = dropping(ground, ranked, passes=ground.scores.removed)
    return Pick(plan=pick.plan, sources=pick.sources, passes=pick.passes, frozen=frozen(pick))


METHODS = tuple(
    Method(name=f"hierarchical_prune_{kind}", source="arXiv 2508.04663", rule=rule, whole=Whole(features=1e-4))
    for kind, rule in (("text", _from_text), ("code", _from_code))
)
