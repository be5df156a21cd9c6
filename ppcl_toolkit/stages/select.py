"""Stage `select`: which candidates go for which target, by measured substitution error.

Every candidate is put into the teacher alone, with least-squares maps and no training, and costs the relative error of
the velocity that results. Candidates are taken by error per parameter saved, smallest first, until a target is met;
smaller targets go on from larger ones, so that one bank serves all.

    targets: [{name: "70", params: 70%, width: false}, {name: "50", params: 50%, depth: 60%, modulation: true}]
    select: {batches: 4, batch: 8}
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from pydantic import TypeAdapter, ValidationError

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.artifacts.workspace import write_json
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import AnyOperation, FfnSwap, Form, Interval, ModulationSwap, Plan, TextRun
from ppcl_toolkit.recipe import Recipe, Target, Width
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.surgery.assemble import example_calls
from ppcl_toolkit.training.substitution import Candidate, Measured, measure, placed, size_of, thinned
from ppcl_toolkit.values import SIZE

_NOTES = "measured-*.json"
"""What each process has measured: {label: [error, parameters saved]}."""


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
    measured = _measured(runner, plan, operations, batches, recipe.select.batches, desk)
    if processes.is_main():
        example = example_calls(runner.transformer, runner.adapter, batches[0])
        size = Sizes(runner, example)
        order = recipe.select.order
        choice = choose(plan, measured, recipe.targets, size, recipe.width, order=order, modulation=modulation)
        choice.save(desk.folder, measured)
        for path in desk.folder.glob(_NOTES):
            path.unlink()


def _measured(
    runner: Runner, plan: Plan, candidates: Sequence[Candidate], batches: Batches, count: int, desk: Desk
) -> list[Measured]:
    """Measure this process's share of what nobody has measured yet; return the figures of all, in their order."""
    rank, ranks = processes.world()
    before = _noted(desk.folder)
    processes.wait()  # nobody notes anything before all have looked
    left = [each for each in candidates if str(each) not in before]
    own = desk.folder / _NOTES.replace("*", str(rank))
    notes = json.loads(own.read_text()) if own.exists() else {}
    for number, each in enumerate(measure(runner, plan, left[rank::ranks], batches, count), start=1):
        notes[str(each.operation)] = [each.error, each.saves]
        write_json(own, notes)
        done = min(len(before) + number * ranks, len(candidates))
        desk.progress(done, len(candidates), f"{each.operation}: {each.error:.3f}")
    processes.wait()
    known = _noted(desk.folder)
    processes.wait()  # nobody clears the notes away before all have read them
    return [Measured(operation=each, error=known[str(each)][0], saves=known[str(each)][1]) for each in candidates]


def _noted(folder: Path) -> dict[str, tuple[float, int]]:
    return {label: figures for path in folder.glob(_NOTES) for label, figures in json.loads(path.read_text()).items()}


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


def choose(
    plan: Plan,
    measured: Sequence[Measured],
    targets: Sequence[Target],
    size: Callable[[Plan], int],
    width: Width,
    *,
    order: str = "price",
    modulation: Sequence[ModulationSwap] = (),
) -> "Choice":
    """Take candidates as they are `ranked` until every target is met; `size` counts the parameters of a plan's student.

    A target that asks for `modulation` has it first. Of a candidate that does not fit as a whole, what fits is taken.
    Intervals stop at a target's `depth`. What a target does not need after all, since a later candidate saved more, is
    given back, the largest error first. Raises `PpclError` with the nearest size where a target is out of reach.
    """
    total = size(plan)
    chosen: list[Measured] = []
    plans: dict[str, Plan] = {}
    goals = {target.name: _goals(target, total) for target in targets}
    for target in sorted(targets, key=lambda t: -goals[t.name][0]):
        goal, deep = goals[target.name]
        taken = plan.with_operations(m.operation for m in chosen)
        if target.modulation:
            taken = plan.with_operations(modulation)
            for candidate in chosen:
                # Of what larger targets lose, as much as this one needs.
                taken = taken if size(taken) <= goal else _extended(taken, candidate.operation, width) or taken
        for candidate in [m for m in ranked(measured, order) if m not in chosen]:
            if size(taken) <= goal:
                break
            allowed = size(_depth(taken)) > deep if isinstance(candidate.operation, Interval) else target.width
            wider, most = _with_most(taken, candidate, width, size) if allowed else (None, candidate)
            if wider is not None:
                chosen.append(most)
                taken = wider
        left = size(taken)
        if left > goal:
            held = f", intervals stop at depth {target.depth}" if target.depth else ""
            raise PpclError(
                f"target {target.name!r}: {target.params} is {goal:,} parameters, the candidates reach {left:,} "
                f"({left / total:.1%} of the teacher){held}; allow more intervals or width, or ask for that"
            )
        already = [operation for earlier in plans.values() for operation in earlier.operations]
        most_deep = max(deep, size(_depth(taken))) if target.depth else total
        for spare in sorted(chosen, key=lambda m: -m.error):
            less = _without(taken, spare.operation) if spare.operation not in already else None
            if less is not None and size(less) <= goal and size(_depth(less)) <= most_deep:
                chosen.remove(spare)
                taken = less
        plans[target.name] = taken
    return Choice(plans=plans, order=tuple(m.operation for m in chosen))


def ranked(measured: Sequence[Measured], order: str) -> list[Measured]:
    """Return candidates best first: by error per parameter saved, or in the paper's order (appendix 6).

    The paper's: intervals, the cheapest first; then text runs, the deepest first; then FFNs, the most linear first.
    """

    def paper(m: Measured) -> tuple[int, float]:
        if isinstance(m.operation, Interval):
            return 0, m.price
        return (1, -m.operation.last) if isinstance(m.operation, TextRun) else (2, m.error)

    return sorted(measured, key=paper if order == "paper" else lambda m: m.price)


@final
class Sizes:
    """Parameters of a plan's student, block by block, without building it."""

    def __init__(self, runner: Runner, example: Mapping[str, Any]) -> None:
        self._runner, self._example = runner, example
        self._known: dict[tuple[Any, ...], int] = {}
        self._rest = size_of(runner.transformer) - sum(
            size_of(block) for stack in runner.adapter.stacks for block in runner.blocks(stack.path)
        )

    def __call__(self, plan: Plan) -> int:
        """Return the number of parameters of the student of `plan`."""
        return self._rest + sum(self._block(form) for form in plan.forms())

    def _block(self, form: Form) -> int:
        key = (form.stack, form.first, form.last, form.text, form.ffn, form.modulation)
        if key not in self._known:
            block = placed(self._runner, form)
            if not form.is_stock:
                block = thinned(block, self._runner.adapter.stack(form.stack), form, self._example[form.stack])
            self._known[key] = size_of(block)
        return self._known[key]


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
                "saves": m.saves,
                "chosen": [name for name, plan in self.plans.items() if any(_is_of(o, m) for o in plan.operations)],
            }
            for m in measured
        ]
        _write(folder / "measured.json", rows)

    @classmethod
    def load(cls, folder: Path) -> "Choice":
        """Read what `save` wrote."""
        plans = {n: Plan.model_validate(p) for n, p in json.loads((folder / "targets.json").read_text()).items()}
        operations = TypeAdapter(tuple[Candidate, ...]).validate_json((folder / "order.json").read_text())
        return cls(plans=plans, order=operations)


def check_targets(recipe: Recipe, plan: Plan, total: int) -> None:
    """Raise a `PpclError` for sizes that no plan for a teacher of `total` parameters has, and for impossible givens."""
    for target in recipe.targets:
        _goals(target, total)
    for operation in (*recipe.intervals.given, *recipe.width.given):
        try:
            plan.with_operations([operation])
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise PpclError(f"the recipe's given operations: {reason}") from error


def parse_size(text: str, total: int) -> int:
    """Return the number of parameters that `70%`, `8B`, `650M` or `12000` means for a teacher of `total`."""
    match = SIZE.fullmatch(text)
    if not match or float(match[1]) <= 0:
        raise PpclError(f"target size {text!r}: expected a share such as 70%, or a number such as 8B, 650M or 12000")
    scale = {"%": total / 100, "": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2].upper()]
    size = int(float(match[1]) * scale)
    if size >= total:
        raise PpclError(f"target size {text!r} is not smaller than the teacher's {total:,} parameters")
    return size


def _goals(target: Target, total: int) -> tuple[int, int]:
    """Return the parameters at which a target is met, and those at which its intervals stop."""
    goal = total if target.params is None else parse_size(target.params, total)
    deep = parse_size(target.depth, total) if target.depth else goal
    if deep < goal:
        raise PpclError(f"target {target.name!r}: depth {target.depth} is below params {target.params}")
    return goal, deep


def _with_most(
    plan: Plan, candidate: Measured, width: Width, size: Callable[[Plan], int]
) -> tuple[Plan | None, Measured]:
    """Return `plan` with the most of a candidate that fits and saves something, None where nothing does; and that."""
    below = size(plan)
    for operation in _versions(plan, candidate.operation, width):
        wider = _extended(plan, operation, width)
        # A candidate may save nothing beside those that are taken already.
        if wider is not None and _fits(wider, below, size):
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


def _fits(plan: Plan, below: int, size: Callable[[Plan], int]) -> bool:
    """Whether `plan` saves something: an interval may leave its block without the text FFN that is to become linear."""
    try:
        return size(plan) < below
    except PpclError:
        return False


def _without(plan: Plan, operation: Candidate) -> Plan | None:
    """Return `plan` without an operation, or None where the rules forbid it: others may build on it."""
    try:
        return plan.with_operations(other for other in plan.operations if other != operation)
    except ValueError:
        return None


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
