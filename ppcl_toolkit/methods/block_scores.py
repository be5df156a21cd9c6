"""Rules that rank blocks one by one, and then train the whole by the teacher's velocity.

- `block_influence`: ShortGPT (arXiv 2403.03853, Sec. 3.2): BI = 1 - E cos(h_{i-1}, h_i), the lowest go. TinyFusion's
  code uses it for DiTs. Reading: the mean over the tokens of both streams.
- `flux_lite`: FLUX.1 Lite 8B's card (Freepik): the mean squared difference between what goes in and what comes out,
  the lowest go. Reading: relative to the energy of what goes in, streams averaged, without which the stream with the
  larger values alone decides. The model itself has lost dual blocks 5 to 15.
- `laptop_diff`: LAPTOP-Diff (arXiv 2404.11098, Sec. 3.2): the output error of each removal is taken to add up, and a
  knapsack finds the set of least error that saves what has to be saved. Its normalised feature losses are left out:
  they belong to layers of one U-Net stage.

None has a recovery of its own that a `Plan` could not say: all of them train output and task losses end to end.
"""

from collections.abc import Sequence

from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.rules.method import Ground, Method, Pick, Place, Whole
from ppcl_toolkit.rules.picking import dropping, without


def knapsack(errors: Sequence[float], saves: Sequence[int], least: int, most: int) -> list[int] | None:
    """Return the numbers of the set of least summed error whose savings are from `least` to `most`; None for none."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for number, (error, saved) in enumerate(zip(errors, saves, strict=True)):
        for total, (sum_of, chosen) in list(best.items()):
            more = (sum_of + error, (*chosen, number))
            if total + saved <= most and more < best.get(total + saved, (float("inf"), ())):
                best[total + saved] = more
    fitting = [found for total, found in best.items() if total >= least]
    return list(min(fitting)[1]) if fitting else None


def ranked(ground: Ground, scores: Sequence[float]) -> list[Place]:
    """Return all blocks, the lowest score first."""
    return [place for _, place in sorted(zip(scores, ground.places, strict=True))]


def _influence(ground: Ground, desk: Desk) -> Pick:
    del desk
    return dropping(ground, ranked(ground, ground.scores.influence), passes=ground.scores.looked)


def _change(ground: Ground, desk: Desk) -> Pick:
    del desk
    return dropping(ground, ranked(ground, ground.scores.change), passes=ground.scores.looked)


def _laptop(ground: Ground, desk: Desk) -> Pick:
    del desk
    errors = dict(zip(ground.places, ground.scores.removal, strict=True))
    order = ranked(ground, ground.scores.removal)
    dearest = {stack: (stack, block) for stack, block in order}
    free = [place for place in order if place != dearest[place[0]]]
    total = ground.whole
    saves = [ground.cost(place) for place in free]
    least, most = total - ground.window.most, total - ground.window.least
    numbers = knapsack([errors[place] for place in free], saves, least, most)
    if numbers is None:
        return dropping(ground, order, passes=ground.scores.removed)
    return without(ground, [free[number] for number in numbers], passes=ground.scores.removed)


METHODS = (
    Method(name="block_influence", source="arXiv 2403.03853, Sec. 3.2", rule=_influence, whole=Whole()),
    Method(name="flux_lite", source="model card of FLUX.1 Lite 8B", rule=_change, whole=Whole()),
    Method(name="laptop_diff", source="arXiv 2404.11098, Sec. 3.2", rule=_laptop, whole=Whole()),
)
