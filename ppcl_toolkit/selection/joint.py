"""All at once: an integer program chooses, what it chose is measured together, and it chooses again."""

from collections.abc import Callable, Sequence

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, ModulationSwap, Plan, TextRun
from ppcl_toolkit.recipe import Target, Width
from ppcl_toolkit.selection.choice import Choice, Goal
from ppcl_toolkit.selection.greedy import choose
from ppcl_toolkit.selection.program import Limit, Program
from ppcl_toolkit.training.substitution import Candidate, Measured
from ppcl_toolkit.units import Cost

Together = Callable[[Sequence[Candidate]], tuple[float, Sequence[float]]]
"""Returns the error of several operations in place together, and that without each of the first of them."""
ROUNDS = 4
"""Choices of a program that are measured together, for each target."""
_LEAST = 0.01
"""Share of its error alone that an operation adds at least: others may undo what it does by chance."""


def choose_by_program(
    plan: Plan,
    measured: Sequence[Measured],
    targets: Sequence[Target],
    costs: Callable[[Plan], Cost],
    width: Width,
    *,
    together: Together,
    modulation: Sequence[ModulationSwap] = (),
) -> Choice:
    """Choose for the largest target from all that was `measured`, and for smaller ones what goes beside that.

    A target that nothing reaches beside what larger ones lose is chosen for by itself; one that is out of reach is a
    `PpclError` with the nearest that any combination comes to.
    """
    total = costs(plan)
    goals = {target.name: Goal(target, total) for target in targets}
    plans: dict[str, Plan] = {}
    taken: list[Measured] = []
    for target in sorted(targets, key=lambda t: goals[t.name].shares(total), reverse=True):
        goal, base = goals[target.name], plan.with_operations(modulation if target.modulation else [])
        allowed = [m for m in measured if isinstance(m.operation, Interval) or target.width]
        before = [m for m in taken if m in allowed]
        ways: list[tuple[list[Measured], list[Measured]]] = [([], before), (before, allowed), ([], allowed)]
        for fixed, others in ways:
            start = base.with_operations([*base.operations, *(m.operation for m in fixed)])
            among = [m for m in others if m not in fixed and _valid(start, m.operation)]
            limits = _limits(among, fixed, goal, width, total)
            program = Program(start, [m.operation for m in among], costs, goal.missing, limits)
            chosen = _improved(program, among, fixed, together)
            if chosen is not None:
                plans[target.name] = program.with_chosen(chosen)
                added = sorted((among[number] for number in chosen), key=lambda m: m.price({"params": 1}))
                taken += [m for m in added if m not in taken]
                break
        else:
            try:
                plans |= choose(plan, measured, [target], costs, width, modulation=modulation).plans
            except PpclError as error:
                nearest = costs(program.with_chosen(program.nearest()))
                raise goal.out_of_reach(nearest, total) from error
    return Choice(plans={t.name: plans[t.name] for t in targets}, order=tuple(m.operation for m in taken))


def _improved(
    program: Program,
    measured: Sequence[Measured],
    fixed: Sequence[Measured],
    together: Together,
) -> list[int] | None:
    """Solve a program for squares of errors, then for what they come to together; return the best choice of those.

    What was measured together adds what is spared without it; the rest, and text runs, what they add alone.
    """
    operations, adds = [m.operation for m in measured], [m.error**2 for m in measured]
    chosen = program.solve(adds)
    seen: dict[tuple[int, ...], float] = {}
    while chosen and tuple(chosen) not in seen and len(seen) < ROUNDS:
        error, without = together([*(operations[number] for number in chosen), *(m.operation for m in fixed)])
        seen[tuple(chosen)] = error
        for number, each in zip(chosen, without, strict=False):
            if not isinstance(operations[number], TextRun):
                adds[number] = max(error**2 - each**2, _LEAST * measured[number].error ** 2)
        chosen = program.solve(adds)
    best = min(seen.items(), key=lambda item: item[1], default=None)
    return chosen if best is None else list(best[0])


def _limits(
    measured: Sequence[Measured], fixed: Sequence[Measured], goal: Goal, width: Width, total: Cost
) -> list[Limit]:
    """Return what the limits of a recipe leave beside `fixed`, and that of a target on what intervals save."""
    weights: list[tuple[Callable[[Measured], float], float]] = []
    if not width.given:
        weights = [
            (
                lambda m: m.operation.last - m.operation.reference if isinstance(m.operation, TextRun) else 0,
                width.text_blocks,
            ),
            (lambda m: isinstance(m.operation, FfnSwap), width.ffn_blocks),
        ]
    if goal.depth:
        by_block = [m.saves.params / m.operation.removed for m in measured if isinstance(m.operation, Interval)]
        # Less than a block more than asked for: blocks do not add up to it.
        most = total.params - goal.depth + max(by_block, default=0.0)
        weights.append((lambda m: m.saves.params / most if isinstance(m.operation, Interval) else 0, 1.0))
    return [([weigh(m) for m in measured], limit - sum(map(weigh, fixed))) for weigh, limit in weights]


def _valid(plan: Plan, operation: Candidate) -> bool:
    try:
        plan.with_operations([*plan.operations, operation])
    except ValueError:
        return False
    return True
