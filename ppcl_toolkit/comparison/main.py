"""The main path of a comparison: what is shared is measured once, then every run is made, then they are told apart."""

import itertools
import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from ppcl_toolkit import processes
from ppcl_toolkit.algorithm import Run, opened
from ppcl_toolkit.artifacts.pipeline import Teacher
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.artifacts.workspace import Progress, Workspace, silent, write_json
from ppcl_toolkit.budget import Schedules
from ppcl_toolkit.comparison.asked import Aim, Comparison
from ppcl_toolkit.comparison.one import BrokeOff, Exams, run_one
from ppcl_toolkit.comparison.page import write_page
from ppcl_toolkit.comparison.table import results
from ppcl_toolkit.comparison.trials import Cell, best_factors
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.rules.choosing import what_may_go
from ppcl_toolkit.rules.method import Ground, Method, Unreachable, Window, find_methods
from ppcl_toolkit.rules.scores import Scores, score_blocks
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.selection.choice import Goal
from ppcl_toolkit.stages.evaluate import examine, load_measurement, measure
from ppcl_toolkit.stages.intervals import Candidates
from ppcl_toolkit.stages.modulation import LowRankChoice, check_modulation
from ppcl_toolkit.surgery.costs import Costs
from ppcl_toolkit.training.substitution import Candidate, Measured, measure_together
from ppcl_toolkit.training.substitution import measure as substitution_errors
from ppcl_toolkit.units import Cost, parse_size


def compare(asked: Comparison, out: str | Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Make every run of a comparison in the folder `out`, or go on where an earlier call stopped.

    Several processes share out the runs. Returns what `out/comparison.json` holds: {"teacher": {...}, "runs": [...],
    "rows": [...], "sources": {...}}. Raises `PpclError` for an unknown method or bad input before anything is run.
    """
    methods = find_methods(asked.methods)
    if asked.reference not in {method.name for method in methods}:
        raise PpclError(f"reference: {asked.reference!r} is none of the methods; add it, or choose another")
    job = asked.recipe()
    if True in asked.levers and job.modulation is None:
        raise PpclError(f"modulation: {asked.modulation}: the job {asked.job} has no section modulation")
    if job.select.method is not None:
        raise PpclError(f"job: {asked.job} has select.method {job.select.method}; name it among the methods instead")
    device = processes.pick_device(job.device)
    workspace = Workspace(out, progress=progress)
    examine(job.evaluate, job.teacher.call)
    workspace.open(asked.dump())
    teacher, runner = opened(job, device, workspace)
    if True in asked.levers and job.modulation is not None:
        check_modulation(runner, job.modulation)
    whole = _Shared(asked, job, workspace, teacher, runner, progress if processes.is_main() else silent)
    whole.prepare()
    cells = list(itertools.product(asked.passes, asked.targets, asked.levers, methods))
    tried = itertools.product(cells, asked.trials.factors) if asked.trials else ()
    seed = asked.trials.seed if asked.trials else 0
    trials = whole.all_of([_One(*cell, seed, factor, trial=True) for cell, factor in tried])
    factors = best_factors(trials)
    runs = whole.all_of([_One(*c, s, factors.get(_One(*c, s).cell, 1.0)) for c in cells for s in asked.seeds])
    for folder in workspace.path.glob("answers/*/*") if processes.is_main() else ():
        shutil.rmtree(folder)
    summary = results(asked, whole.reference(), runs, trials)
    summary["sources"] = {method.name: method.source for method in methods}
    workspace.close(asked.dump())
    if processes.is_main():
        write_json(workspace.path / "comparison.json", summary)
        write_page(workspace.path, summary)
    return summary


@dataclass(frozen=True, slots=True)
class _One:
    """A run that is to be made, or a trial of a learning rate."""

    passes: int
    aim: Aim
    lever: bool
    method: Method
    seed: int
    factor: float = 1.0
    trial: bool = False

    @property
    def cell(self) -> Cell:
        return self.passes, self.aim.name, self.lever, self.method.name

    @property
    def where(self) -> str:
        beneath = "modulation" if self.lever else "plain"
        own = f"trials/{self.passes}" if self.trial else f"runs/{self.passes}"
        return f"{own}/{self.aim.name}/{beneath}/{self.method.name}/{f'{self.factor:g}' if self.trial else self.seed}"


@final
class _Shared:
    """What all runs have in common."""

    def __init__(
        self, asked: Comparison, job: Recipe, workspace: Workspace, teacher: Teacher, runner: Runner, told: Progress
    ) -> None:
        self._asked, self._job, self._workspace = asked, job, workspace
        self._teacher, self._runner, self._told = teacher, runner, told
        self._run = Run(job, workspace, teacher, Schedules(job, runner))
        self._low: LowRankChoice | None = None
        self._exam = examine(job.evaluate, job.teacher.call)
        example = self._run.noised("finetune", job.finetune.batch)[0]
        self._costs = Costs(teacher.transformer, teacher.adapter, example, getattr(torch, job.export.dtype))
        self._total: Cost = self._costs(teacher.plan())
        for aim in asked.targets:
            Goal(aim.target, self._total)

    def prepare(self) -> None:
        """Measure what methods may look at, and the teacher: always all, so that methods may be added later."""
        run, root, section = self._run, self._workspace, self._asked.scoring
        self._low = run.low_rank() if self._job.modulation is not None else None
        candidates = run.candidates()
        self._found = Candidates.load(root.path / "intervals")
        self._measured, self._wider = self._errors(candidates)
        batches = run.noised("scores", section.batch)
        make = partial(score_blocks, self._runner, batches, section.batches)
        self._scores = root.stage("scores", section, make, Scores.load)
        root.stage("teacher", self._job.evaluate, self._examined, lambda folder: folder)

    def reference(self) -> dict[str, Any]:
        """Return the teacher's figures."""
        found = load_measurement(self._workspace.path / "teacher")
        facts = {name: getattr(found, name) for name in ("score", "score_std", "chance", "latency_ms")}
        return {**facts, "params": self._total.params, "flops": self._total.flops}

    def all_of(self, ones: Sequence[_One]) -> list[dict[str, Any]]:
        """Make these, shared out over the processes; return the results of all."""
        rank, ranks = processes.world()
        found = {}
        for number, one in enumerate(ones):
            with processes.apart() as own:
                if number % ranks == rank:
                    self._told("trials" if one.trial else "runs", number, len(ones), one.where)
                    found[number] = self._made(one, own)
        made = processes.joined(found)
        return [made[number] for number in range(len(ones))]

    def _made(self, one: _One, rank: int) -> dict[str, Any]:
        """Make a run, once more at a third of its rates where it broke off; what keeps it from being made is said."""
        facts = {**dict(zip(("budget", "target", "modulation", "method"), one.cell, strict=True)), "seed": one.seed}
        exams = self._exams(one, rank)
        low = self._low if one.lever else None
        ground = self._ground(one)

        def make(ground: Ground, where: str) -> dict[str, Any]:
            try:
                found = run_one(one.method, ground, low, self._teacher, exams, where, self._workspace.branch())
            except BrokeOff as error:
                if one.trial or ground.factor != one.factor:
                    return {"factor": ground.factor, "failed": str(error)}
                found = make(replace(ground, factor=one.factor / 3), f"{where}/again")
                said = f"seed {one.seed} broke off at ×{one.factor:g}, and is of a third of it"
                found["warnings"] = [said, *found.get("warnings", ())]
            except Unreachable as error:
                return {"factor": ground.factor, "failed": str(error)}
            return found

        return {**facts, **make(ground, one.where)}

    def _exams(self, one: _One, rank: int) -> Exams:
        evaluate, trials = self._job.evaluate, self._asked.trials
        count = trials.batches if one.trial and trials else evaluate.velocity_batches
        noised = self._run.noised("trials" if one.trial else "evaluate", self._job.samples.batch)
        return Exams(
            exam=None if one.trial else self._exam,
            teacher=self._workspace.path / "teacher",
            held_out=list(noised(0, count)),
            answers=self._workspace.path / "answers" / str(rank),
        )

    def _ground(self, one: _One) -> Ground:
        unit = next(iter(one.aim.target.asked))
        aim = parse_size(one.aim.target.asked[unit], self._total.of(unit), unit)
        return Ground(
            job=self._job,
            runner=self._runner,
            costs=self._costs,
            plan=self._teacher.plan(),
            lever=self._low.swaps if self._low is not None and one.lever else (),
            window=Window(unit=unit, aim=aim, tolerance=self._asked.tolerance),
            seed=one.seed,
            batches=partial(self._seeded, one.seed),
            scores=self._scores,
            found=self._found,
            measured=self._measured,
            wider=self._wider,
            together=self._together,
            passes=one.passes,
            factor=one.factor,
        )

    def _seeded(self, seed: int, stage: str, size: int) -> Batches:
        return replace(self._run.noised(stage, size), seed=zlib.crc32(f"{stage} {seed}".encode()))

    def _together(self, operations: Sequence[Candidate]) -> tuple[float, list[float]]:
        batches = self._run.noised("select", self._job.select.batch)
        return measure_together(self._runner, self._teacher.plan(), operations, batches, self._job.select.batches)

    def _errors(self, candidates: Sequence[Candidate]) -> tuple[list[Measured], list[Measured]]:
        """Measure what each candidate costs: stage `errors`, by one process; those of Algorithm 1, and all."""
        plan, job = self._teacher.plan(), self._job
        wanted, everything = what_may_go(self._runner, plan, candidates, job, self._costs)
        batches = self._run.noised("select", job.select.batch)

        def make(desk: Desk) -> None:
            found = {}
            for one, error in substitution_errors(self._runner, plan, everything, batches, job.select.batches):
                found[str(one)] = error
                desk.progress(len(found), len(everything), f"{one}: {error:.3f}")
            write_json(desk.folder / "errors.json", found)

        asked = job.select.model_dump(mode="json", exclude={"method"})
        known = self._workspace.stage("errors", asked, make, _read)
        saves = {str(one): self._total - self._costs(plan.with_operations([one])) for one in everything}
        measured = [Measured(operation=one, error=known[str(one)], saves=saves[str(one)]) for one in everything]
        return measured[: len(wanted)], measured

    def _examined(self, desk: Desk) -> None:
        with processes.apart(), self._runner.calling(self._teacher.pipeline):
            measure(self._teacher.pipeline, self._exam, desk.folder, progress=desk.progress)


def _read(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "errors.json").read_text())
    return found
