"""A method in a recipe: its rule takes the place of stage `select`, and its start and losses those of the job.

    select: {method: amber_image, batches: 4, batch: 8}

Steps, batches and learning rates stay the recipe's; what a method says of shares belongs to `ppcl compare`.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Interval, ModulationSwap, Plan
from ppcl_toolkit.recipe import Recipe, Target
from ppcl_toolkit.rules.method import Ground, Impossible, Method, Pick, Window, find_methods
from ppcl_toolkit.rules.scores import Scores, score_blocks
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.selection.candidates import allowed, ffn_candidates, more_candidates
from ppcl_toolkit.selection.choice import Begun, Choice
from ppcl_toolkit.stages.intervals import Candidates
from ppcl_toolkit.stages.select import forget_notes, measured_alone
from ppcl_toolkit.surgery.costs import Costs
from ppcl_toolkit.training.substitution import Candidate, measure_together
from ppcl_toolkit.units import parse_size

_BELOW = (0.05, 0.1, 0.2, 0.4)
"""By how much less than a target's size may do: the first that whole blocks come to."""
_NONE = Window(unit="params", aim=0, tolerance=0.0)
"""Until that of a target is known."""


def method_of(recipe: Recipe) -> Method | None:
    """Return the recipe's method, None where it has none; one that a recipe cannot have is a `PpclError`."""
    name = recipe.select.method
    if name is None:
        return None
    found = find_methods([name], "select.method")
    if len(found) > 1:
        raise PpclError(f"select.method: {name} is the file of several; name one: {', '.join(m.name for m in found)}")
    method = found[0]
    if isinstance(method.rule, Impossible):
        raise PpclError(f"select.method: {name} makes no plan: {method.rule.why}")
    if recipe.teacher.streamed is True:
        raise PpclError(f"select.method: {name} scores blocks in the whole teacher; take teacher.streamed: false")
    for target in recipe.targets:
        if len(target.asked) > 1 or target.depth:
            given = [*target.asked, *(["depth"] if target.depth else [])]
            raise PpclError(
                f"select.method: target {target.name!r} gives {', '.join(given)}: {name} goes by one size; "
                "give params, bytes or flops alone"
            )
    return method


def with_method(recipe: Recipe) -> Recipe:
    """Return a recipe whose stages train as its method does; the same where there is none."""
    method = method_of(recipe)
    if method is None:
        return recipe
    own: dict[str, object] = {"steps": 0}
    if method.segments is not None:
        segments = method.segments
        given = {"inputs": segments.inputs, "loss": segments.loss, "init": segments.init}
        own = {key: value for key, value in given.items() if value is not None}
    update: dict[str, object] = {"depth": recipe.depth.model_copy(update=own)}
    if method.whole is not None:
        features = {"features": method.whole.features, "feature_loss": method.whole.feature_loss}
        update["finetune"] = recipe.finetune.model_copy(update=features)
    else:
        update["targets"] = tuple(target.model_copy(update={"finetune": None}) for target in recipe.targets)
    return recipe.model_copy(update=update)


def what_may_go(
    runner: Runner, plan: Plan, found: Sequence[Candidate], job: Recipe, costs: Costs
) -> tuple[list[Candidate], list[Candidate]]:
    """Return what rules may take: Algorithm 1's intervals and text runs, and FFNs; and what a program tries, too.

    The second list begins with the first.
    """
    intervals = [one for one in found if isinstance(one, Interval)]
    runs = [one for one in found if not isinstance(one, Interval)]
    wanted = [*intervals, *(job.width.given or [*runs, *ffn_candidates(runner, job.width)])]
    more = more_candidates(runner, plan, wanted, job) if job.select.order == "program" else ()
    given = (*job.intervals.given, *job.width.given)
    wanted, _ = allowed(wanted, plan, costs, given)
    everything, _ = allowed(dict.fromkeys([*wanted, *more]), plan, costs, given)
    return wanted, everything


def choose_by_method(
    runner: Runner,
    plan: Plan,
    found: tuple[Candidates, Sequence[ModulationSwap]],
    noised: Callable[[str, int], Batches],
    recipe: Recipe,
    desk: Desk,
) -> None:
    """Let the recipe's method pick for every target, and write its choice as stage `select` does.

    All that rules may look at is measured, on batches of stage `select`; several processes share out the candidates,
    and one picks. Raises `PpclError` where a pick is larger than its target, or is nothing that one bank can hold.
    """
    method, batches = method_of(recipe), noised("select", recipe.select.batch)
    assert method is not None
    costs = Costs(runner.transformer, runner.adapter, batches[0], getattr(torch, recipe.export.dtype))
    wanted, everything = what_may_go(runner, plan, found[0].operations(), recipe, costs)
    measured = measured_alone(runner, plan, everything, (batches, recipe.select.batches, costs), desk)
    if processes.is_main():
        score_blocks(runner, batches, recipe.select.batches, desk)
        ground = partial(
            Ground,
            runner=runner,
            costs=costs,
            plan=plan,
            seed=recipe.seed,
            batches=noised,
            scores=Scores.load(desk.folder),
            found=found[0],
            measured=measured[: len(wanted)],
            wider=measured,
            together=partial(_together, runner, plan, (batches, recipe.select.batches)),
            passes=recipe.finetune.steps * recipe.finetune.batch * 4 * sum(plan.depths.values()),
        )
        _choice(method, recipe, plan, found[1], ground, desk).save(desk.folder, measured)
        forget_notes(desk.folder)


def _together(
    runner: Runner, plan: Plan, means: tuple[Batches, int], operations: Sequence[Candidate]
) -> tuple[float, Sequence[float]]:
    return measure_together(runner, plan, operations, *means)


def _choice(
    method: Method,
    recipe: Recipe,
    plan: Plan,
    low: Sequence[ModulationSwap],
    ground: Callable[..., Ground],
    desk: Desk,
) -> Choice:
    """Pick for each target by itself; those without a size have modulation of low rank alone."""
    plans, picks = {}, {}
    for target in recipe.targets:
        plans[target.name] = plan.with_operations(low)
        if target.asked:
            job = recipe.model_copy(update={"targets": (target,)})
            own = ground(job=job, lever=tuple(low) if target.modulation else (), window=_NONE)
            own = replace(own, window=_window(own, target))
            picks[target.name] = method.rule(own, desk)
            _check(method, target, own, picks[target.name])
            plans[target.name] = picks[target.name].plan
    begun = Begun(starts=_starts(method, picks), frozen={name: pick.frozen for name, pick in picks.items()})
    return Choice(plans=plans, order=(), begun=begun)


def _window(ground: Ground, target: Target) -> Window:
    """Return the narrowest window below a target's size into which blocks, some of each stack, take the teacher."""
    ((unit, asked),) = target.asked.items()
    size = parse_size(asked, ground.costs(ground.plan).of(unit), unit)
    windows = [Window.at_most(unit, size, below) for below in _BELOW]
    ground = replace(ground, window=windows[0])
    each = {stack: ground.cost((stack, 0)) for stack in ground.plan.depths}
    gone = itertools.product(*(range(depth) for depth in ground.plan.depths.values()))
    sizes = [ground.whole - sum(n * cost for n, cost in zip(some, each.values(), strict=True)) for some in gone]
    return next((window for window in windows if any(window.off(s) == 0 for s in sizes)), windows[-1])


def _check(method: Method, target: Target, ground: Ground, pick: Pick) -> None:
    """Raise a `PpclError` for a pick that is not what the target asks for."""
    window, size = ground.window, ground.costs(pick.plan).of(ground.window.unit)
    if size > window.most:
        raise PpclError(
            f"target {target.name!r}: {window.unit} is {target.asked[window.unit]}, {method.name} comes to {size:,} "
            f"({size / ground.costs(ground.plan).of(window.unit):.1%} of the teacher); ask for that"
        )
    if not target.width and (pick.plan.text_runs or pick.plan.ffn_swaps):
        raise PpclError(f"target {target.name!r} has width: false, and {method.name} takes text streams and FFNs")


def _starts(method: Method, picks: Mapping[str, Pick]) -> dict[str, tuple[int, ...]]:
    """Return what the intervals of all targets begin with, where their method does not train them one by one."""
    found: dict[str, tuple[int, ...]] = {}
    for name, pick in picks.items() if method.segments is None else ():
        for key, blocks in pick.sources.items():
            if found.setdefault(key, blocks) != blocks:
                raise PpclError(
                    f"select.method: {method.name} begins {key} with block {found[key]} for one target and {blocks} "
                    f"for {name!r}, and a bank holds it once; give these targets recipes of their own"
                )
    return found
