"""The main path of a comparison: what is shared is measured once, then every run is made, then they are told apart."""

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
from ppcl_toolkit.comparison.method import Ground, Method, Unreachable, Window, find_methods
from ppcl_toolkit.comparison.one import Exams, run_one
from ppcl_toolkit.comparison.page import write_page
from ppcl_toolkit.comparison.scores import Scores, score_blocks
from ppcl_toolkit.comparison.table import results
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Interval
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.selection.candidates import allowed, ffn_candidates, more_candidates
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
    device = processes.pick_device(job.device)
    workspace = Workspace(out, progress=progress)
    examine(job.evaluate, job.teacher.call)
    workspace.open(asked.dump())
    teacher, runner = opened(job, device, workspace)
    if True in asked.levers and job.modulation is not None:
        check_modulation(runner, job.modulation)
    whole = _Shared(asked, job, workspace, teacher, runner)
    whole.prepare()
    runs = [
        _One(method, lever, aim, seed) for aim in asked.targets for lever in asked.levers for method in methods
        for seed in asked.seeds
    ]  # fmt: skip
    rank, ranks = processes.world()
    found = {}
    told = progress if processes.is_main() else silent
    for number, one in enumerate(runs):
        with processes.apart() as own:
            if number % ranks == rank:
                told("runs", number, len(runs), one.where)
                found[number] = whole.made(one, own)
    made = processes.joined(found)
    for folder in workspace.path.glob("answers/*/*") if processes.is_main() else ():
        shutil.rmtree(folder)
    summary = results(asked, whole.reference(), [made[number] for number in range(len(runs))])
    summary["sources"] = {method.name: method.source for method in methods}
    workspace.close(asked.dump())
    if processes.is_main():
        write_json(workspace.path / "comparison.json", summary)
        write_page(workspace.path, summary)
    return summary


@dataclass(frozen=True, slots=True)
class _One:
    """A run that is to be made."""

    method: Method
    lever: bool
    aim: Aim
    seed: int

    @property
    def where(self) -> str:
        beneath = "modulation" if self.lever else "plain"
        return f"runs/{self.aim.name}/{beneath}/{self.method.name}/{self.seed}"


@final
class _Shared:
    """What all runs have in common."""

    def __init__(self, asked: Comparison, job: Recipe, workspace: Workspace, teacher: Teacher, runner: Runner) -> None:
        self._asked, self._job, self._workspace = asked, job, workspace
        self._teacher, self._runner = teacher, runner
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

    def made(self, one: _One, rank: int) -> dict[str, Any]:
        """Make a run; what keeps it from being made is its result."""
        facts = {"method": one.method.name, "modulation": one.lever, "target": one.aim.name, "seed": one.seed}
        ground = self._ground(one)
        low = self._low if one.lever else None
        exams = Exams(
            exam=self._exam,
            teacher=self._workspace.path / "teacher",
            held_out=list(
                self._run.noised("evaluate", self._job.samples.batch)(0, self._job.evaluate.velocity_batches)
            ),
            answers=self._workspace.path / "answers" / str(rank),
        )
        branch = self._workspace.branch()
        try:
            return {**facts, **run_one(one.method, ground, low, self._teacher, exams, one.where, branch)}
        except Unreachable as error:
            return {**facts, "failed": str(error)}

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
            passes=self._asked.passes,
        )

    def _seeded(self, seed: int, stage: str, size: int) -> Batches:
        return replace(self._run.noised(stage, size), seed=zlib.crc32(f"{stage} {seed}".encode()))

    def _together(self, operations: Sequence[Candidate]) -> tuple[float, list[float]]:
        batches = self._run.noised("select", self._job.select.batch)
        return measure_together(self._runner, self._teacher.plan(), operations, batches, self._job.select.batches)

    def _errors(self, candidates: Sequence[Candidate]) -> tuple[list[Measured], list[Measured]]:
        """Measure what each candidate costs: stage `errors`, by one process; those of Algorithm 1, and all."""
        plan, job = self._teacher.plan(), self._job
        intervals = [one for one in candidates if isinstance(one, Interval)]
        runs = [one for one in candidates if not isinstance(one, Interval)]
        wanted = [*intervals, *(job.width.given or [*runs, *ffn_candidates(self._runner, job.width)])]
        more = more_candidates(self._runner, plan, wanted, job) if job.select.order == "program" else ()
        given = (*job.intervals.given, *job.width.given)
        wanted, _ = allowed(wanted, plan, self._costs, given)
        everything, _ = allowed(dict.fromkeys([*wanted, *more]), plan, self._costs, given)
        batches = self._run.noised("select", job.select.batch)

        def make(desk: Desk) -> None:
            found = {}
            for one, error in substitution_errors(self._runner, plan, everything, batches, job.select.batches):
                found[str(one)] = error
                desk.progress(len(found), len(everything), f"{one}: {error:.3f}")
            write_json(desk.folder / "errors.json", found)

        known = self._workspace.stage("errors", job.select, make, _read)
        saves = {str(one): self._total - self._costs(plan.with_operations([one])) for one in everything}
        measured = [Measured(operation=one, error=known[str(one)], saves=saves[str(one)]) for one in everything]
        return measured[: len(wanted)], measured

    def _examined(self, desk: Desk) -> None:
        with processes.apart(), self._runner.calling(self._teacher.pipeline):
            measure(self._teacher.pipeline, self._exam, desk.folder, progress=desk.progress)


def _read(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "errors.json").read_text())
    return found
