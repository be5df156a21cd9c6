"""Stage `select`: which candidates go for which target, by measured substitution error.

Every candidate is put into the teacher alone, with least-squares maps and no training, and costs the relative error of
the velocity that results. Candidates are taken by error per share saved of what a target is short of, smallest first,
until it is met in every unit; smaller targets go on from larger ones, so that one bank serves all.

    targets: [{name: "70", params: 70%, width: false}, {name: fast, params: 8B, flops: 55%}, {name: fits, bytes: 12GB}]
    select: {batches: 4, batch: 8}
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, final

import torch
from annotated_types import Len
from pydantic import ValidationError

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.files import write_json
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import AnyOperation, FfnSwap, Interval, ModulationSwap, Plan, TextRun
from ppcl_toolkit.recipe import Recipe, Target, Width
from ppcl_toolkit.records import read_record
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.surgery.costs import Costs
from ppcl_toolkit.surgery.program import Limit, Program
from ppcl_toolkit.training.substitution import Candidate, Measured, measure, measure_together
from ppcl_toolkit.units import UNITS, Cost, parse_size

Together = Callable[[Sequence[Candidate]], tuple[float, Sequence[float]]]
"""Returns the error of several operations in place together, and that without each of the first of them."""
_ROUNDS = 4
"""Choices of a program that are measured together, for each target."""
_LEAST = 0.01
"""Share of its error alone that an operation adds at least: others may undo what it does by chance."""
_NOTES = "measured-*.json"
_Notes = dict[str, Annotated[list[float], Len(1)]]
"""What each process has measured: {label: [error]}; earlier versions also noted parameters saved."""


def select(
    runner: Runner,
    plan: Plan,
    found: tuple[Sequence[Candidate], Sequence[ModulationSwap]],
    batches: Batches,
    recipe: Recipe,
    desk: Desk,
) -> None:
    """Measure all candidates and all FFNs that may become linear, and write the choice for every target of the recipe.

    `found` are the candidates, and the modulation of low rank for targets that ask for it. Several processes share the
    candidates. What a killed run has measured is kept.
    """
    candidates, modulation = found
    operations: list[Candidate] = [candidate for candidate in candidates if isinstance(candidate, Interval)]
    if recipe.searches and any(target.width for target in recipe.targets):
        runs = [candidate for candidate in candidates if isinstance(candidate, TextRun)]
        operations += recipe.width.given or [*runs, *ffn_candidates(runner, recipe.width)]
    if recipe.select.order == "program":
        operations = list(dict.fromkeys([*operations, *more_candidates(runner, plan, operations, recipe)]))
    costs = Costs(runner.transformer, runner.adapter, batches[0], getattr(torch, recipe.export.dtype))
    measured = _measured(runner, plan, operations, (batches, recipe.select.batches, costs), desk)
    if processes.is_main():
        order = recipe.select.order
        if order == "program":
            together = partial(_together, runner, plan, (batches, recipe.select.batches), desk)
            choice = choose_by_program(
                plan, measured, recipe.targets, costs, recipe.width, together=together, modulation=modulation
            )
        else:
            choice = choose(plan, measured, recipe.targets, costs, recipe.width, order=order, modulation=modulation)
        choice.save(desk.folder, measured)
        for path in desk.folder.glob(_NOTES):
            path.unlink()


def _measured(
    runner: Runner, plan: Plan, candidates: Sequence[Candidate], means: tuple[Batches, int, Costs], desk: Desk
) -> list[Measured]:
    """Measure this process's share of what nobody has measured yet; return the figures of all, in their order."""
    rank, ranks = processes.world()
    batches, count, costs = means
    before = _noted(desk.folder)
    processes.wait()  # nobody notes anything before all have looked
    left = [each for each in candidates if str(each) not in before]
    own = desk.folder / _NOTES.replace("*", str(rank))
    notes = read_record(own, _Notes) if own.exists() else {}
    for number, (each, error) in enumerate(measure(runner, plan, left[rank::ranks], batches, count), start=1):
        notes[str(each)] = [error]
        write_json(own, notes)
        done = min(len(before) + number * ranks, len(candidates))
        desk.progress(done, len(candidates), f"{each}: {error:.3f}")
    processes.wait()
    known = _noted(desk.folder)
    processes.wait()  # nobody clears the notes away before all have read them
    saves = {str(each): costs(plan) - costs(plan.with_operations([each])) for each in candidates}
    return [Measured(operation=each, error=known[str(each)][0], saves=saves[str(each)]) for each in candidates]


def _noted(folder: Path) -> dict[str, list[float]]:
    return {label: figures for path in folder.glob(_NOTES) for label, figures in read_record(path, _Notes).items()}


def ffn_candidates(runner: Runner, width: Width) -> list[FfnSwap]:
    """Return every block whose FFNs may become linear."""
    if not width.ffn_blocks:
        return []
    found = []
    for stack in runner.adapter.stacks:
        for index, block in enumerate(stack.blocks(runner.transformer)):
            # Blocks of one stack may differ: the last one of SD3 has no text FFN.
            modules = dict(block.named_modules())
            streams = tuple(stream for stream, path in stack.ffn.items() if path in modules)
            if streams:
                found.append(FfnSwap(stack=stack.path, block=index, streams=streams))
    return found


def more_candidates(runner: Runner, plan: Plan, found: Sequence[Candidate], recipe: Recipe) -> Iterator[Candidate]:
    """Yield what a program tries beside what was found, and what of that the recipe has not given."""
    if recipe.intervals.strategy != "given":
        for stack, depth in plan.depths.items():
            kinds = [type(block) for block in runner.blocks(stack)]
            for first in range(recipe.intervals.first_block.get(stack, 0), depth):
                for last in range(first + 1, min(first + recipe.select.longest, depth)):
                    # Between blocks that are narrow already, some return more than others.
                    if len(set(kinds[first : last + 1])) == 1:
                        yield Interval(stack=stack, first=first, last=last)
    for operation in found if not recipe.width.given else ():
        yield from _parts(operation, recipe.width.text_blocks)


def _parts(operation: Candidate, most: int) -> Iterator[Candidate]:
    """Yield what is in a text run, up to `most` blocks, and FFNs without the text's."""
    if isinstance(operation, TextRun):
        for reference in range(operation.reference, operation.last):
            for last in range(reference + 1, min(reference + most, operation.last) + 1):
                yield TextRun(stack=operation.stack, reference=reference, last=last)
    elif isinstance(operation, FfnSwap) and len(operation.streams) > 1:
        yield operation.model_copy(update={"streams": tuple(s for s in operation.streams if s != "text")})


def choose_by_program(
    plan: Plan,
    measured: Sequence[Measured],
    targets: Sequence[Target],
    costs: Callable[[Plan], Cost],
    width: Width,
    *,
    together: Together,
    modulation: Sequence[ModulationSwap] = (),
) -> "Choice":
    """Choose for the largest target from all that was `measured`, and for smaller ones what goes beside that.

    A target that nothing reaches beside
    what larger ones lose is chosen for by itself; one that is out of reach is a `PpclError`, as `choose` says it.
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
            plans |= choose(plan, measured, [target], costs, width, modulation=modulation).plans
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
    while chosen and tuple(chosen) not in seen and len(seen) < _ROUNDS:
        error, without = together([*(operations[number] for number in chosen), *(m.operation for m in fixed)])
        seen[tuple(chosen)] = error
        for number, each in zip(chosen, without, strict=False):
            if not isinstance(operations[number], TextRun):
                adds[number] = max(error**2 - each**2, _LEAST * measured[number].error ** 2)
        chosen = program.solve(adds)
    best = min(seen.items(), key=lambda item: item[1], default=None)
    return chosen if best is None else list(best[0])


def _limits(
    measured: Sequence[Measured], fixed: Sequence[Measured], goal: "Goal", width: Width, total: Cost
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


def _together(
    runner: Runner, plan: Plan, means: tuple[Batches, int], desk: Desk, operations: Sequence[Candidate]
) -> tuple[float, Sequence[float]]:
    """Measure operations together, or read what a killed run measured."""
    note, label = desk.folder / _NOTES.replace("*", "together"), " and ".join(map(str, operations))
    notes = json.loads(note.read_text()) if note.exists() else {}
    if label not in notes:
        error, without = measure_together(runner, plan, operations, *means)
        notes[label] = [error, *without]
        write_json(note, notes)
        desk.progress(len(notes), len(notes), f"{len(operations)} together: {error:.3f}")
    error, *without = notes[label]
    return error, without


def choose(
    plan: Plan,
    measured: Sequence[Measured],
    targets: Sequence[Target],
    costs: Callable[[Plan], Cost],
    width: Width,
    *,
    order: str = "price",
    modulation: Sequence[ModulationSwap] = (),
) -> "Choice":
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
            held = f", intervals stop at depth {target.depth}" if target.depth else ""
            raise PpclError(
                f"target {target.name!r}: {goal.told(costs(taken), total)}{held}; "
                "allow more intervals or width, or ask for that"
            )
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


@final
class Goal:
    """What a target comes to for one teacher; a size that makes no sense for it is a `PpclError`."""

    def __init__(self, target: Target, total: Cost) -> None:
        self._target = target
        self._most = {unit: parse_size(size, total.of(unit), unit) for unit, size in target.asked.items()}
        self.depth = parse_size(target.depth, total.params) if target.depth else 0
        """Parameters at which intervals stop."""
        if target.depth and self.depth < self._most.get("params", 0):
            raise PpclError(f"target {target.name!r}: depth {target.depth} is below params {target.params}")

    def missing(self, cost: Cost) -> dict[str, int]:
        """Return what a student of such costs is short of, by unit; nothing where it meets the target."""
        return {unit: short for unit, most in self._most.items() if (short := cost.of(unit) - most) > 0}

    def shares(self, total: Cost) -> list[float]:
        """Return what may stay of the teacher in each unit, the least first: targets are met in this order."""
        return sorted(self._most.get(unit, total.of(unit)) / total.of(unit) for unit in UNITS)

    def told(self, nearest: Cost, total: Cost, who: str = "the candidates reach") -> str:
        """Say of every unit what is asked for, and what is the nearest."""
        return "; ".join(
            f"{self._target.asked[unit]} is {most:,} {UNITS[unit]}, {who} {nearest.of(unit):,} "
            f"({nearest.of(unit) / total.of(unit):.1%} of the teacher)"
            for unit, most in self._most.items()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The plan of every target, and the order in which operations were taken."""

    plans: dict[str, Plan]
    order: tuple[Candidate, ...]

    def save(self, folder: Path, measured: Sequence[Measured]) -> None:
        """Write `targets.json` and `order.json`, and every candidate's figures in `measured.json`."""
        _write(folder / "targets.json", {name: plan.model_dump(mode="json") for name, plan in self.plans.items()})
        _write(folder / "order.json", [operation.model_dump(mode="json") for operation in self.order])
        rows = [
            {
                "operation": m.operation.model_dump(mode="json"),
                "label": str(m.operation),
                "error": m.error,
                "saves": asdict(m.saves),
                "chosen": [name for name, plan in self.plans.items() if any(_is_of(o, m) for o in plan.operations)],
            }
            for m in measured
        ]
        _write(folder / "measured.json", rows)

    @classmethod
    def load(cls, folder: Path) -> "Choice":
        """Read what `save` wrote."""
        plans = read_record(folder / "targets.json", dict[str, Plan])
        return cls(plans=plans, order=read_record(folder / "order.json", tuple[Candidate, ...]))


def check_given(recipe: Recipe, plan: Plan) -> None:
    """Raise a `PpclError` for given operations that no plan for a teacher has."""
    for operation in (*recipe.intervals.given, *recipe.width.given):
        try:
            plan.with_operations([operation])
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise PpclError(f"the recipe's given operations: {reason}") from error


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


def _is_of(operation: AnyOperation, measured: Measured) -> bool:
    """Whether an operation is what was measured, or what was left of it."""
    whole = measured.operation
    if isinstance(operation, TextRun) and isinstance(whole, TextRun) and operation.stack == whole.stack:
        return whole.reference <= operation.reference and operation.last <= whole.last
    if isinstance(operation, FfnSwap) and isinstance(whole, FfnSwap):
        return (operation.stack, operation.block) == (whole.stack, whole.block)
    return operation == whole


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


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
