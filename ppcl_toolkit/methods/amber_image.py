"""Amber-Image (arXiv 2602.17047): removal errors weighted towards high noise, means as a start, two phases.

- Its rule: I_l is the mean over prompts of sum_t w_t |v - v_without_l|^2 / sum_t w_t, w larger at high noise; the
  lowest go. The weights are nowhere: reading: w = sigma.
- Its start: a kept block followed by k dropped ones is the plain mean of those k + 1.
- Phase 1: only these learn, squared error to the teacher's state behind the run. Whose inputs is nowhere: reading:
  the teacher's; the error is relative to the target's energy. Phase 2: all parameters, task loss: reading: the
  velocity.
- How the two share the steps is nowhere: reading: halves.

Its hybrid, in which deep dual blocks become single-stream, is no operation of a `Plan`: it is left out.
"""

from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.rules.method import Ground, Method, Pick, Segments, Whole
from ppcl_toolkit.rules.picking import dropping


def _pick(ground: Ground, desk: Desk) -> Pick:
    del desk
    ranked = [place for _, place in sorted(zip(ground.scores.early, ground.places, strict=True))]
    return dropping(ground, ranked, average=True, passes=ground.scores.removed)


METHODS = (
    Method(
        name="amber_image",
        source="arXiv 2602.17047",
        rule=_pick,
        segments=Segments(share=0.5, inputs="teacher", loss="relative_mse", init="average"),
        whole=Whole(share=0.5),
    ),
)
