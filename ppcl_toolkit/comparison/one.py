"""One run of a comparison: search, start, recovery and evaluation, each a stage that is made once."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ppcl_toolkit.artifacts.pipeline import Teacher
from ppcl_toolkit.artifacts.storage import Bank, Desk
from ppcl_toolkit.artifacts.workspace import Workspace, write_json
from ppcl_toolkit.comparison.spending import lever_passes, planned
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.rules.method import Ground, Method, Pick, Unreachable
from ppcl_toolkit.running.images import Exam
from ppcl_toolkit.running.placement import callable_on
from ppcl_toolkit.stages.depth import bank_starts, distill_depth
from ppcl_toolkit.stages.evaluate import compare, measure, relative_error, velocities
from ppcl_toolkit.stages.finetune import finetune, load_weights
from ppcl_toolkit.stages.modulation import LowRankChoice, bank_low_rank
from ppcl_toolkit.stages.width import distill_width
from ppcl_toolkit.surgery.assemble import student_of
from ppcl_toolkit.training.targets import Velocities

_RESULT = "result.json"


class BrokeOff(Unreachable):
    """A training diverged: its student is not measured."""


@dataclass(frozen=True, kw_only=True)
class Exams:
    """What all students are measured by, and the teacher was."""

    exam: Exam | None
    """None where the velocity error decides alone, as for trials."""
    teacher: Path
    """Folder of the teacher's measurement and images."""
    held_out: list[Mapping[str, Any]]
    """Batches of the velocity error."""
    answers: Path
    """What the teacher says to the batches of each seed, of this process's runs."""


def run_one(
    method: Method,
    ground: Ground,
    low: LowRankChoice | None,
    teacher: Teacher,
    exams: Exams,
    where: str,
    run: Workspace,
) -> dict[str, Any]:
    """Make one run in the folders `where/...` of a workspace, or go on with it; return its figures.

    Raises `BrokeOff` where a training diverged, and `Unreachable` where a rule cannot make what is asked for.
    """
    asked = {"method": method.name, "aim": dataclasses.asdict(ground.window), "seed": ground.seed}
    told = len(run.warnings)
    settings = {**asked, "lever": [str(swap) for swap in ground.lever]}
    pick = run.stage(f"{where}/pick", settings, partial(_pick, method, ground), partial(_load_pick, ground.plan))
    before = pick.passes + (lever_passes(ground, low.curve) if low else 0)
    sections, taken = planned(ground, method, pick, before=before)
    settled = {name: section.model_dump(mode="json") for name, (section, _) in sections.items()}
    bank = _bank(ground, pick, low, sections, where, run)
    tuned = None
    if "finetune" in sections:
        section = sections["finetune"][0]
        batches = ground.batches("finetune", section.batch)
        # Answers are the same for all runs of a seed, but for features, which are those of a plan's own intervals.
        own = run.path / where / "answers" if section.features else exams.answers / str(ground.seed)
        answers = Velocities(own)
        answers.folder.mkdir(parents=True, exist_ok=True)
        tune = partial(finetune, ground.runner, pick.plan, bank, batches, answers, section, frozen=pick.frozen)
        tuned = run.stage(f"{where}/finetune", section, tune, Path)
        if section.features:
            shutil.rmtree(own)
    for name, (section, _) in sections.items():
        _check(run.path / where / name, section.steps)
    make = partial(_evaluate, ground, pick.plan, (bank, tuned), teacher, exams)
    found: dict[str, Any] = run.stage(f"{where}/evaluate", {"stages": settled}, make, _load_result)
    spent = {"search": pick.passes, "modulation": before - pick.passes, **taken}
    size = ground.costs(pick.plan)
    return {
        **found,
        "params": size.params,
        "flops": size.flops,
        "size": size.of(ground.window.unit),
        "off": ground.window.off(size.of(ground.window.unit)),
        "passes": spent,
        "steps": {name: section.steps for name, (section, _) in sections.items()},
        "plan": [str(operation) for operation in pick.plan.operations],
        "warnings": run.warnings[told:],
        "factor": ground.factor,
    }


def _check(folder: Path, steps: int) -> None:
    """Raise `BrokeOff` where a training took fewer steps than it was to: a loss or a gradient was not finite."""
    found = json.loads((folder / "losses.json").read_text())
    taken = min((len(curve) for curve in (found.values() if isinstance(found, dict) else [found])), default=steps)
    if taken < steps:
        raise BrokeOff(f"{folder.name} broke off after {taken} of {steps} steps: a loss or a gradient was no number")


def _pick(method: Method, ground: Ground, desk: Desk) -> None:
    pick = method.rule(ground, desk)
    (desk.folder / "plan.json").write_text(pick.plan.model_dump_json(indent=1) + "\n")
    facts = {"sources": {key: list(blocks) for key, blocks in pick.sources.items()}}
    write_json(desk.folder / "pick.json", {**facts, "passes": pick.passes, "frozen": pick.frozen})


def _load_pick(whole: Plan, folder: Path) -> Pick:
    facts = json.loads((folder / "pick.json").read_text())
    sources = {key: tuple(blocks) for key, blocks in facts["sources"].items()}
    plan = Plan.load(folder / "plan.json")
    assert plan.depths == whole.depths
    return Pick(plan=plan, sources=sources, passes=facts["passes"], frozen=facts["frozen"])


def _bank(
    ground: Ground, pick: Pick, low: LowRankChoice | None, sections: Mapping[str, Any], where: str, run: Workspace
) -> Bank:
    """Make what stands in for other blocks: trained segments, or copies and means."""
    plans, runner = [pick.plan], ground.runner
    if "depth" in sections:
        section = sections["depth"][0]
        batches = ground.batches("depth", section.batch)
        bank = run.stage(f"{where}/depth", section, partial(distill_depth, runner, plans, batches, section), Bank)
    else:
        bank = run.stage(f"{where}/start", {}, partial(bank_starts, runner, plans, pick.sources), Bank)
    if "width" in sections:
        section = sections["width"][0]
        batches = ground.batches("width", section.batch)
        make: Callable[[Desk], Any] = partial(distill_width, runner, plans, bank, batches, section)
        bank = run.stage(f"{where}/width", section, make, bank.joined)
    if low is not None and ground.lever:
        bank = bank.joined(run.path / "modulation")
        factor = partial(bank_low_rank, runner, plans, bank, low)
        bank = run.stage(f"{where}/low_rank", {}, factor, bank.joined)
    return bank


def _evaluate(
    ground: Ground, plan: Plan, weights: tuple[Bank, Path | None], teacher: Teacher, exams: Exams, desk: Desk
) -> None:
    bank, tuned = weights
    runner, device = ground.runner, ground.runner.placement.device
    student = student_of(runner.transformer, runner.adapter, plan, bank, exams.held_out[0])
    if tuned is not None:
        student.load_state_dict(load_weights(tuned), assign=True)
    student.requires_grad_(False).eval()
    runner.settle()
    wanted = [runner.velocity(batch).float().cpu() for batch in exams.held_out]
    runner.leave()
    shell: Any = copy.copy(teacher.pipeline)
    shell.transformer = student
    with callable_on(shell, device):
        error = relative_error(velocities(student, runner.adapter, exams.held_out, device), wanted)
        if exams.exam is None:
            write_json(desk.folder / _RESULT, {"velocity_error": error})
            return
        measure(shell, exams.exam, desk.folder, progress=desk.progress)
    found = compare(desk.folder, exams.teacher, velocity_error=error)
    kept = ("score", "score_std", "rmse", "velocity_error", "drop_percent", "latency_ms")
    write_json(desk.folder / _RESULT, {name: getattr(found, name) for name in kept})


def _load_result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / _RESULT).read_text())
    return found
