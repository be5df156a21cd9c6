"""Table 2 of PPCL (arXiv 2511.16156) row by row, at equal parameters and block passes; the last row is `paper`.

The paper's rows have 12B, 12B, ... 10B; here every row has the size that is asked for, or no comparison were fair.

- `table2_baseline`: "layer output sensitivity using CKA" (Sec. 4.4). Reading: s_i = 1 - CKA of the last hidden state
  with and without block i; the lowest go, and runs of them become intervals; sequential distillation.
- `table2_lp_a`: an interval ends at the last block whose CKA is above a threshold. The value is nowhere: reading: the
  highest of a list whose intervals, the cheapest first, come nearest to the size.
- `table2_lp`: Algorithm 1, sequential. Which of its intervals go is not said: ours go by measured substitution error.
- `table2_lp_b`: the same, ends moved by one block where the next interval permits, until sizes match.
- `table2_dp`: Algorithm 1's intervals, non-sequential distillation (Eq. 6 and 7).
- `table2_wp_text`, `table2_wp_ffn`: a ninth of what goes goes by text streams (Eq. 8); then a tenth by text, a tenth
  by FFNs (Eq. 9), as 20B becomes 12B, 11B, 10B. Steps: 6000 by depth, 2000 by width.

Where blocks whose text or FFN may go are too few, the row says so.
"""

import contextlib
from collections.abc import Sequence
from functools import partial

from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.plan import FfnSwap, Interval, Plan
from ppcl_toolkit.rules.method import Ground, Method, Pick, Segments, Unreachable, Widths
from ppcl_toolkit.rules.picking import chosen, dropping, miss, search_passes
from ppcl_toolkit.statistics.trend import threshold_intervals
from ppcl_toolkit.training.substitution import Measured

SOURCE = "arXiv 2511.16156"
_THRESHOLDS = (0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.92, 0.88, 0.8, 0.7, 0.5, 0.3, 0.0)
_SEQUENTIAL = Segments(share=1.0, inputs="student", loss="direction", init="first")
PARALLEL = Segments(share=6.0, inputs="teacher", loss="direction", init="first")


def _intervals(ground: Ground) -> list[Measured]:
    return [one for one in ground.measured if isinstance(one.operation, Interval)]


def _sensitive(ground: Ground, desk: Desk) -> Pick:
    del desk
    ranked = [place for _, place in sorted(zip(ground.scores.sensitivity, ground.places, strict=True))]
    return dropping(ground, ranked, passes=ground.scores.removed)


def _threshold(ground: Ground, desk: Desk) -> Pick:
    """LP-a: candidates of one threshold; their errors are 1 - CKA, no other is measured."""
    del desk
    best: Plan | None = None
    for threshold in _THRESHOLDS:
        with contextlib.suppress(Unreachable):
            plan = chosen(ground, spans_at(ground, threshold)).plan
            best = plan if best is None or miss(ground, plan) < miss(ground, best) else best
    if best is None:
        raise Unreachable("table2_lp_a: the intervals of no threshold save enough")
    return Pick(plan=best, passes=search_passes(ground, 0))


def spans_at(ground: Ground, threshold: float) -> list[Measured]:
    """Return the intervals of LP-a, each with 1 - cka(u, v) as its error: nothing else of it is measured."""
    found = []
    for stack, curves in ground.found.curves.items():
        cka = curves[ground.job.intervals.stream].cka
        for first, last in threshold_intervals(cka, threshold):
            if first < last:
                operation = Interval(stack=stack, first=first, last=last)
                saves = ground.costs(ground.plan) - ground.costs(ground.plan.with_operations([operation]))
                found.append(Measured(operation=operation, error=1 - float(cka[first, last]), saves=saves))
    return found


def _moved(ground: Ground, desk: Desk) -> Pick:
    """LP-b: the ends of the intervals that LP takes, one block further where the next one permits."""
    del desk
    measured = _intervals(ground)
    taken = chosen(ground, measured).plan.intervals
    return chosen(ground, [_longer(one, taken, ground) if one.operation in taken else one for one in measured])


def _longer(one: Measured, taken: Sequence[Interval], ground: Ground) -> Measured:
    operation = one.operation
    assert isinstance(operation, Interval)
    end = operation.last + 1
    starts = [interval.first for interval in taken if interval.stack == operation.stack]
    if end >= ground.plan.depths[operation.stack] or end in starts:
        return one
    moved = Interval(stack=operation.stack, first=operation.first, last=end)
    saves = ground.costs(ground.plan) - ground.costs(ground.plan.with_operations([moved]))
    return Measured(operation=moved, error=one.error, saves=saves)


def _trend(ground: Ground, desk: Desk) -> Pick:
    del desk
    return chosen(ground, _intervals(ground))


def narrow(depth: float, ffns: bool, ground: Ground, desk: Desk) -> Pick:
    """Take the share `depth` of what has to go by intervals, the rest by text streams and, if asked, FFNs."""
    del desk
    candidates = [one for one in ground.measured if ffns or not isinstance(one.operation, FfnSwap)]
    pick = chosen(ground, candidates, order="paper", width=True, depth=depth)
    if not pick.plan.text_runs and not pick.plan.ffn_swaps:
        raise Unreachable(
            f"no text stream {'or FFN ' if ffns else ''}of this teacher goes: of width.text_threshold "
            f"{ground.job.width.text_threshold:g} there are {len(ground.found.text_runs)} runs"
        )
    return pick


METHODS = (
    Method(name="table2_baseline", source=f"{SOURCE}, Table 2", rule=_sensitive, segments=_SEQUENTIAL),
    Method(name="table2_lp_a", source=f"{SOURCE}, Table 2", rule=_threshold, segments=_SEQUENTIAL),
    Method(name="table2_lp", source=f"{SOURCE}, Table 2", rule=_trend, segments=_SEQUENTIAL),
    Method(name="table2_lp_b", source=f"{SOURCE}, Table 2", rule=_moved, segments=_SEQUENTIAL),
    Method(name="table2_dp", source=f"{SOURCE}, Table 2", rule=_trend, segments=PARALLEL),
    Method(
        name="table2_wp_text",
        source=f"{SOURCE}, Table 2",
        rule=partial(narrow, 8 / 9, False),
        segments=PARALLEL,
        widths=Widths(share=2.0),
    ),
    Method(
        name="table2_wp_ffn",
        source=f"{SOURCE}, Table 2",
        rule=partial(narrow, 0.8, True),
        segments=PARALLEL,
        widths=Widths(share=2.0),
    ),
)
