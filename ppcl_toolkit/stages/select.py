"""Stage `select`: which candidates go for which target, by measured substitution error.

Every candidate is put into the teacher alone, with least-squares maps and no training, and costs the relative error of
the velocity that results. Candidates are taken by error per share saved of what a target is short of, smallest first,
until it is met in every unit, or all at once by an integer program, from more candidates (`order: program`); smaller
targets go on from larger ones, so that one bank serves all.

    targets: [{name: "70", params: 70%, width: false}, {name: fast, params: 8B, flops: 55%}, {name: fits, bytes: 12GB}]
    select: {batches: 4, batch: 8}
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Len
from pydantic import ValidationError

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.files import write_json
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Interval, ModulationSwap, Plan, TextRun
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.records import read_record
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.selection.candidates import allowed, ffn_candidates, more_candidates
from ppcl_toolkit.selection.greedy import choose
from ppcl_toolkit.selection.joint import choose_by_program
from ppcl_toolkit.surgery.costs import Costs
from ppcl_toolkit.training.substitution import Candidate, Measured, measure, measure_together

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
) -> list[str]:
    """Measure all candidates and all FFNs that may become linear, and write the choice for every target of the recipe.

    `found` are the candidates, and the modulation of low rank for targets that ask for it. Several processes share the
    candidates. What a killed run has measured is kept. Returns warnings: what the architecture does not allow is left
    out, unless the recipe gives it.
    """
    candidates, modulation = found
    operations: list[Candidate] = [candidate for candidate in candidates if isinstance(candidate, Interval)]
    if recipe.searches and any(target.width for target in recipe.targets):
        runs = [candidate for candidate in candidates if isinstance(candidate, TextRun)]
        operations += recipe.width.given or [*runs, *ffn_candidates(runner, recipe.width)]
    if recipe.select.order == "program":
        operations = list(dict.fromkeys([*operations, *more_candidates(runner, plan, operations, recipe)]))
    costs = Costs(runner.transformer, runner.adapter, batches[0], getattr(torch, recipe.export.dtype))
    operations, said = allowed(operations, plan, costs, (*recipe.intervals.given, *recipe.width.given))
    measured = measured_alone(runner, plan, operations, (batches, recipe.select.batches, costs), desk)
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
        forget_notes(desk.folder)
    return said


def forget_notes(folder: Path) -> None:
    """Remove what was noted on the way: the choice has it."""
    for path in folder.glob(_NOTES):
        path.unlink()


def measured_alone(
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


def _together(
    runner: Runner, plan: Plan, means: tuple[Batches, int], desk: Desk, operations: Sequence[Candidate]
) -> tuple[float, Sequence[float]]:
    """Measure operations together, or read what a killed run measured."""
    note, label = desk.folder / _NOTES.replace("*", "together"), " and ".join(map(str, operations))
    notes: dict[str, list[float]] = read_record(note, _Notes) if note.exists() else {}
    if label not in notes:
        error, without = measure_together(runner, plan, operations, *means)
        notes[label] = [error, *without]
        write_json(note, notes)
        desk.progress(len(notes), len(notes), f"{len(operations)} together: {error:.3f}")
    error, *without = notes[label]
    return error, without


def check_given(recipe: Recipe, plan: Plan) -> None:
    """Raise a `PpclError` for given operations that no plan for a teacher has."""
    for operation in (*recipe.intervals.given, *recipe.width.given):
        try:
            plan.with_operations([operation])
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise PpclError(f"the recipe's given operations: {reason}") from error
