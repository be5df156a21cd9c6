"""One candidate after another: the cheapest next, until a target is met."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, ModulationSwap, Plan, TextRun
from ppcl_toolkit.recipe import Target, Width
from ppcl_toolkit.selection.choice import Choice, Goal
from ppcl_toolkit.training.substitution import Candidate, Measured
from ppcl_toolkit.units import Cost


def choose(
    plan: Plan,
    measured: Sequence[Measured],
    targets: Sequence[Target],
    costs: Callable[[Plan], Cost],
    width: Width,
    *,
    order: str = "price",
    modulation: Sequence[ModulationSwap] = (),
) -> Choice:
    """Take the `best` candidate until every target is met in every unit that it asks for; what saves nothing stays.

    `costs` are those of a plan's student. A target that asks for `modulation` has it first. Of a candidate that does
    not fit as a whole, what fits is taken. Intervals stop at a target's `depth`. What a target does not need after all,
    since a later candidate saved more, is given back, the largest error first. Raises `PpclError` with the nearest in
    every unit where a target is out of reach.
    """
    total = costs(plan)
    chosen: list[Measured] = []
    plans: dict[str, Plan] = {}
    goals = {target.name: Goal(target, total) for target in targets}
    for target in sorted(targets, key=lambda t: goals[t.name].shares(total), reverse=True):
        goal = goals[target.name]
        taken = plan.with_operations(m.operation for m in chosen)
        if target.modulation:
            taken = plan.with_operations(modulation)
            for candidate in chosen:
                # Of what larger targets lose, as much as this one needs.
                taken = _extended(taken, candidate.operation, width) or taken if goal.missing(costs(taken)) else taken
        left = [m for m in measured if m not in chosen]
        while (missing := goal.missing(costs(taken))) and left:
            candidate = best(left, order, missing)
            left.remove(candidate)
            deep = isinstance(candidate.operation, Interval)
            allowed = costs(_depth(taken)).params > goal.depth if deep else target.width
            wider, most = _with_most(taken, candidate, width, costs, missing) if allowed else (None, candidate)
            if wider is not None:
                chosen.append(most)
                taken = wider
        if missing:
            raise goal.out_of_reach(costs(taken), total)
        already = [operation for earlier in plans.values() for operation in earlier.operations]
        deepest = max(goal.depth, costs(_depth(taken)).params) if target.depth else total.params
        for spare in sorted(chosen, key=lambda m: -m.error):
            less = _without(taken, spare.operation) if spare.operation not in already else None
            if less is not None and not goal.missing(costs(less)) and costs(_depth(less)).params <= deepest:
                chosen.remove(spare)
                taken = less
        plans[target.name] = taken
    return Choice(plans=plans, order=tuple(m.operation for m in chosen))


def best(measured: Sequence[Measured], order: str, missing: Mapping[str, int]) -> Measured:
    """Return the candidate that is next: the least price for what is `missing`, or the paper's order (appendix 6).

    The paper's: intervals, the cheapest first; then text runs, the deepest first; then FFNs, the most linear first.
    """

    def paper(m: Measured) -> tuple[int, float]:
        if isinstance(m.operation, Interval):
            return 0, m.price(missing)
        return (1, -m.operation.last) if isinstance(m.operation, TextRun) else (2, m.error)

    return min(measured, key=paper if order == "paper" else lambda m: m.price(missing))


def _with_most(
    plan: Plan, candidate: Measured, width: Width, costs: Callable[[Plan], Cost], missing: Mapping[str, int]
) -> tuple[Plan | None, Measured]:
    """Return `plan` with the most of a candidate that fits and saves what is missing, None where nothing does; and it.

    A candidate may save nothing beside those that are taken already.
    """
    before = costs(plan)
    for operation in _versions(plan, candidate.operation, width):
        wider = _extended(plan, operation, width)
        if wider is not None and _saves(wider, before, costs, missing):
            return wider, replace(candidate, operation=operation)
    return None, candidate


def _versions(plan: Plan, operation: Candidate, width: Width) -> Iterator[Candidate]:
    """Yield a candidate, then the most of it that may fit beside a plan; what the recipe gives stays as it is."""
    yield operation
    if width.given:
        return
    if isinstance(operation, FfnSwap) and len(operation.streams) > 1:
        # A text run has taken its text FFN.
        yield operation.model_copy(update={"streams": tuple(s for s in operation.streams if s != "text")})
    if isinstance(operation, TextRun):
        yield from _shorter(plan, operation, width.text_blocks)


def _shorter(plan: Plan, run: TextRun, most: int) -> Iterator[TextRun]:
    """Yield what is in a text run, in whole blocks of a plan's student: as deep as it goes, then as long."""
    forms = list(plan.forms())
    left = most - sum(form.narrow_text for form in forms)
    own = [f for f in forms if f.stack == run.stack and f.first >= run.reference and f.last <= run.last]
    for end in reversed(range(len(own))):
        for start in range(max(0, end - left), end):
            if all(form.text == "own" for form in own[start : end + 1]):
                yield TextRun(stack=run.stack, reference=own[start].first, last=own[end].last)


def _depth(plan: Plan) -> Plan:
    return plan.with_operations(plan.intervals)


def _extended(plan: Plan, operation: Candidate, width: Width) -> Plan | None:
    """Return `plan` with one more operation, or None where rules or the recipe's limits forbid it."""
    try:
        wider = plan.with_operations([*plan.operations, operation])
    except ValueError:
        return None
    narrow_texts = sum(form.narrow_text for form in wider.forms())
    within = narrow_texts <= width.text_blocks and len(wider.ffn_swaps) <= width.ffn_blocks
    return wider if within or width.given else None


def _saves(plan: Plan, before: Cost, costs: Callable[[Plan], Cost], missing: Mapping[str, int]) -> bool:
    """Whether `plan` saves what is missing: an interval may leave its block without the text FFN that is to go."""
    try:
        saved = before - costs(plan)
    except PpclError:
        return False
    return any(saved.of(unit) > 0 for unit in missing)


def _without(plan: Plan, operation: Candidate) -> Plan | None:
    """Return `plan` without an operation, or None where the rules forbid it: others may build on it."""
    try:
        return plan.with_operations(other for other in plan.operations if other != operation)
    except ValueError:
        return None
