"""The plans that a recipe comes to: its own operations where it lists them, assumed ones where the run is to find them.

Assumed are runs of two and of three blocks in turn, so that three blocks go for every two that learn: as in the plans
that the paper published. Stacks lose blocks alike, their first ones first; in turn with them, text streams and FFNs
become linear, as many as may.
"""

import itertools

from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.budget.model import Model
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Interval, ModulationSwap, Plan, TextRun
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.selection.candidates import allowed, ffn_candidates
from ppcl_toolkit.selection.greedy import choose
from ppcl_toolkit.stages.modulation import check_modulation, swaps
from ppcl_toolkit.training.substitution import Candidate, Measured
from ppcl_toolkit.units import Cost

RANK = 32
"""Assumed of modulation where the run is to find it."""


def are_given(recipe: Recipe) -> bool:
    """Whether the recipe lists its intervals."""
    return recipe.intervals.strategy == "given"


def plans(recipe: Recipe, model: Model) -> dict[str, Plan]:
    """Return the plan of every target; operations are taken in the order given.

    Raises `PpclError` where a target is out of reach.
    """
    if are_given(recipe) or not recipe.searches:
        return _chosen(recipe, model, [*recipe.intervals.given, *recipe.width.given])
    deepest = max(model.plan.depths.values())
    for longer in range(deepest):
        try:
            pairs = itertools.zip_longest(_intervals(recipe, model, longer), _width(recipe, model))
            return _chosen(recipe, model, [each for pair in pairs for each in pair if each is not None])
        except PpclError:
            if longer == deepest - 1:
                raise
    raise AssertionError("a stack has blocks")


def _chosen(recipe: Recipe, model: Model, operations: list[Candidate]) -> dict[str, Plan]:
    alike = Cost(params=1, bytes=1, flops=1)
    measured = [Measured(operation=each, error=float(rank), saves=alike) for rank, each in enumerate(operations)]
    low = _modulation(recipe, model)
    asked = recipe.targets, model.costs, recipe.width
    return choose(model.plan, measured, *asked, order=recipe.select.order, modulation=low).plans


def _modulation(recipe: Recipe, model: Model) -> tuple[ModulationSwap, ...]:
    if recipe.modulation is None:
        return ()
    limit = check_modulation(model.runner, recipe.modulation, call=recipe.teacher.call)
    return swaps(model.adapter, recipe.modulation.rank or min(RANK, limit))


def _intervals(recipe: Recipe, model: Model, longer: int) -> list[Interval]:
    found: list[tuple[float, Interval]] = []
    for stack, depth in model.plan.depths.items():
        first = recipe.intervals.first_block.get(stack, 0)
        for length in itertools.cycle((2 + longer, 3 + longer)):
            last = min(first + length, depth) - 1
            if last <= first:
                break
            found.append((first / depth, Interval(stack=stack, first=first, last=last)))
            first = last + 1
    return [interval for _, interval in sorted(found, key=lambda place: place[0])]


def _width(recipe: Recipe, model: Model) -> list[Candidate]:
    if recipe.width.given or not any(target.width for target in recipe.targets):
        return list(recipe.width.given)
    runs: list[Candidate] = []
    for stack in model.adapter.stacks if recipe.width.text_blocks else ():
        runs += _text_runs(stack, model.plan.depths[stack.path])
    # Of the first run, as much is taken as may go; the others are for what is left beside blocks that went.
    found = [*runs[:1], *reversed(ffn_candidates(model.runner, recipe.width)), *runs[1:]]
    return allowed(found, model.plan, model.costs)[0]


def _text_runs(stack: Stack, depth: int) -> list[TextRun]:
    """Runs that end with the stack, the longest first: what the limits allow is taken."""
    if stack.joint_attention is None or "text" not in stack.streams:
        return []
    return [TextRun(stack=stack.path, reference=first, last=depth - 1) for first in range(depth - 1)]
