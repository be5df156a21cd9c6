"""The main path: Algorithm 1, from a teacher to verified variants of every size that was asked for."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from pydantic import ValidationError
from torch import nn

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.files import write_json
from ppcl_toolkit.artifacts.identity import NOTES, asked_of_check, early_identity, source_of
from ppcl_toolkit.artifacts.pipeline import Teacher, load_teacher
from ppcl_toolkit.artifacts.storage import Bank, Desk
from ppcl_toolkit.artifacts.workspace import Progress, Workspace, silent
from ppcl_toolkit.budget import Schedules, check_machine
from ppcl_toolkit.budget.model import Model
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import ModulationSwap, Plan, low_rank_forms, trained_forms
from ppcl_toolkit.recipe import Recipe, Target
from ppcl_toolkit.recipe_files import read_recipe
from ppcl_toolkit.rules.choosing import choose_by_method, with_method
from ppcl_toolkit.running.noise import Batches, Calibration, Sample, share_of_negatives
from ppcl_toolkit.running.noising import Noising
from ppcl_toolkit.running.placement import Placement, host_bytes
from ppcl_toolkit.running.schedule import Batch, Runner
from ppcl_toolkit.selection.choice import Choice, Goal
from ppcl_toolkit.stages.check import check, load_noising
from ppcl_toolkit.stages.depth import distill_depth
from ppcl_toolkit.stages.evaluate import evaluate, examine, summarise
from ppcl_toolkit.stages.export import Variant, export
from ppcl_toolkit.stages.finetune import finetune, load_weights, record_velocities
from ppcl_toolkit.stages.intervals import Candidates, check_intervals, detect
from ppcl_toolkit.stages.modulation import LowRankChoice, bank_low_rank, check_modulation, find_modulation
from ppcl_toolkit.stages.probe import Probes, probe
from ppcl_toolkit.stages.report import write_report
from ppcl_toolkit.stages.samples import EMPTY, load_samples, record_samples, rehearse, sources
from ppcl_toolkit.stages.select import check_given, select
from ppcl_toolkit.stages.width import distill_width
from ppcl_toolkit.surgery.assemble import student_of
from ppcl_toolkit.surgery.costs import Costs
from ppcl_toolkit.training.means import check_optimizer
from ppcl_toolkit.training.substitution import Candidate
from ppcl_toolkit.training.targets import Velocities
from ppcl_toolkit.units import Cost, is_share

# Resident or streamed, results are the same: a run that was too large for its device may go on otherwise.
_RECORDING = {"teacher": {"path", "revision", "dtype", "call"}, "samples": True, "seed": True}
_DETECTION = {"intervals": True, "width": {"text_threshold"}}
_EXPORTED = {"export": {"dtype"}}
_ANSWERS = {"steps", "batch", "features"}
_CHOICE = {"targets": True, "select": True, "width": {"given", "text_threshold", "text_blocks", "ffn_blocks"}}
_SEARCHED = {"finetune": {"steps", "batch", "learning_rate"}}
_BANKS = ("depth", "width", "modulation", "low_rank")
_UNKNOWN = 10**30
"""FLOPs of a teacher that is not run yet: more than any target's."""


def compress(
    recipe: Recipe, out: str | Path, *, progress: Progress = silent, remake: bool = False, verify: bool = True
) -> dict[str, Any]:
    """Run Algorithm 1 on the recipe's teacher in the folder `out`, or go on where an earlier run stopped.

    Returns what `out/summary.json` holds: {"teacher": {...}, "variants": [{"name", "path", "opens", "params", "bytes",
    "flops", "latency_ms", "score", "drop_percent", "rmse", ...}], "warnings": [...]}. Raises `PpclError` for bad input;
    finished stages are never lost. One that is not as it was made is a `PpclError`, too; with `remake` it is made anew,
    and what depends on it. Without `verify` its files are compared by name and size alone.
    """
    device = processes.pick_device(recipe.device)
    check_optimizer(recipe.finetune.optimizer)
    asked, recipe = recipe, with_method(recipe)
    workspace = Workspace(out, progress=progress, remake=remake, verify=verify)
    if not workspace.is_begun:
        check_machine(recipe, device)
        # What hours would end with is cheap to know now.
        sources(recipe.samples, recipe.seed)
        examine(recipe.evaluate, recipe.teacher.call)
    workspace.open(asked.dump())
    teacher, runner = opened(recipe, device, workspace)
    whole = _whole(recipe, teacher)
    for target in recipe.targets:
        Goal(target, whole)
    if recipe.modulation is not None:
        check_modulation(runner, recipe.modulation, call=recipe.teacher.call)
    check_intervals(teacher.adapter, teacher.adapter.depths(teacher.transformer), recipe.intervals)
    check_given(recipe, teacher.plan())

    run = Run(recipe, workspace, teacher, Schedules(recipe, runner))
    low = run.low_rank() if recipe.modulation is not None else None
    candidates = run.candidates() if recipe.searches else ()
    choice = run.choice(candidates, low)
    bank = run.bank(choice, low)
    variants = run.variants(choice, bank, low)
    summary = run.evaluated(choice.plans, variants)

    workspace.close(asked.dump())
    if processes.is_main():
        write_json(workspace.path / "summary.json", summary)
        write_report(workspace.path)
    return summary


@final
class Run:
    """The stages of a run, a few at a time, in the order in which `compress` goes through them."""

    def __init__(self, recipe: Recipe, workspace: Workspace, teacher: Teacher, schedules: Schedules) -> None:
        self._recipe, self._teacher, self._schedules = recipe, teacher, schedules
        self._workspace, self._runner = workspace, schedules.runner
        self._stage = partial(workspace.stage, together=True)
        # Several stages draw other batches from the same samples.
        asked = {"source": teacher.source, **_part(recipe, _RECORDING)}
        noising = _checked(workspace, self._runner("check"), teacher, recipe)
        asked |= {"empty_prompt": True} if recipe.modulation else {}
        record = partial(record_samples, self._runner("samples"), teacher, recipe)
        samples = self._stage("samples", asked, record, load_samples, pieces=True)
        self.noised = partial(_noised, recipe, (teacher, noising), samples)

    def low_rank(self) -> LowRankChoice:
        """Find the rank of modulation: stage `modulation`."""
        section = self._recipe.modulation
        assert section is not None
        batches = _calibration(self._recipe, self._workspace, self.noised)
        find = partial(find_modulation, self._runner("modulation"), batches, section)
        return self._stage("modulation", section, find, LowRankChoice.load)

    def candidates(self) -> Sequence[Candidate]:
        """Find what may go: stages `probe` and `intervals`."""
        recipe = self._recipe
        fit = partial(probe, self._runner("probe"), self.noised("probe", recipe.probe.batch), recipe.probe)
        probes = self._stage("probe", recipe.probe, fit, Probes.load)
        batches = self.noised("intervals", recipe.intervals.batch)
        find = partial(detect, self._runner("intervals"), batches, probes.weights, recipe)
        return self._stage("intervals", _part(recipe, _DETECTION), find, Candidates.load).operations()

    def choice(self, candidates: Sequence[Candidate], low: LowRankChoice | None) -> Choice:
        """Choose what goes for every target: stage `select`."""
        recipe, found = self._recipe, (candidates, low.swaps if low else ())
        held_out = self.noised("select", recipe.select.batch)
        choose: Any = partial(select, self._runner("select"), self._teacher.plan(), found, held_out, recipe)
        if recipe.select.method is not None:
            seen = Candidates.load(self._workspace.path / "intervals"), found[1]
            choose = partial(choose_by_method, self._runner("select"), self._teacher.plan(), seen, self.noised, recipe)
        asked = _part(recipe, _CHOICE | (_EXPORTED if any(target.bytes for target in recipe.targets) else {}))
        if recipe.select.order != "program":
            del asked["select"]["longest"]
        if recipe.select.method is None:
            del asked["select"]["method"]
        else:
            asked |= _part(recipe, _SEARCHED)
        for target in asked["targets"]:
            # As runs have it that were begun before there were these keys; fine-tuning comes after the choice.
            del target["finetune"]
            for key in ("depth", "bytes", "flops", "modulation"):
                if not target[key]:
                    del target[key]
        return self._stage("select", asked, choose, Choice.load)

    def bank(self, choice: Choice, low: LowRankChoice | None) -> Bank:
        """Make the blocks that stand in for others: stages `depth`, `width` and `low_rank`."""
        recipe, plans, wanted = self._recipe, choice.plans, list(choice.plans.values())
        bank = Bank(*([self._workspace.path / "modulation"] if low else []))
        if not recipe.searches:
            return bank
        batches = self.noised("depth", recipe.depth.batch)
        means = self._runner("depth", plans), wanted, batches, recipe.depth
        deep = partial(distill_depth, *means, starts=choice.begun.starts)
        depth = self._stage("depth", recipe.depth, deep, Bank)
        batches = self.noised("width", recipe.width.batch)
        wide = partial(distill_width, self._runner("width", plans), wanted, depth, batches, recipe.width)
        bank = self._stage("width", recipe.width, wide, depth.joined).joined(*bank.folders)
        if low:
            factor = partial(bank_low_rank, self._runner("low_rank", plans), wanted, bank, low)
            bank = self._stage("low_rank", {}, factor, bank.joined)
        return bank

    def variants(self, choice: Choice, bank: Bank, low: LowRankChoice | None) -> list[dict[str, Any]]:
        """Fine-tune what learns, and export: stages `velocities`, `finetune/<target>` and `export/<target>`."""
        recipe, batches = self._recipe, self.noised("finetune", self._recipe.finetune.batch)
        velocities, plans = Velocities(self._workspace.path / "velocities"), choice.plans
        if recipe.tuned:
            wanted = [plans[name] for name in recipe.tuned]
            answer = partial(record_velocities, self._runner("velocities", plans), wanted, batches, recipe.answered)
            asked = {"finetune": recipe.answered.model_dump(include=_ANSWERS)}
            velocities = self._stage("velocities", asked, answer, Velocities, pieces=True)
        exports = []
        for name, plan in plans.items():
            tuned = None
            if name in recipe.tuned:
                runner = self._runner("finetune", plans)
                tuning, frozen = recipe.tuning(name), choice.begun.frozen.get(name, 0)
                tune = partial(finetune, runner, plan, bank, batches, velocities, tuning, frozen=frozen)
                tuned = self._stage(f"finetune/{name}", tuning, tune, Path)
            variant = _variant(recipe, self._workspace.path, name, self._teacher, plan, low)
            runner = self._runner("export", plans)
            make = partial(_export, self._teacher, runner, variant, plan, (bank, tuned), batches[0])
            job = self._workspace.job(f"export/{name}", recipe.export, make, variant.read)
            exports.append(job._replace(beside=variant.damage))
        found = self._workspace.results(exports)
        # Every student has learned.
        self._workspace.discard("velocities")
        return found

    def evaluated(self, plans: Mapping[str, Plan], variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Set variants beside the teacher: stage `evaluate`."""
        recipe, batches = self._recipe, self.noised("evaluate", self._recipe.samples.batch)
        means = self._runner("evaluate", plans), self._teacher, recipe, variants, batches
        compare = partial(evaluate, *means, verify=self._workspace.verifies)
        summary = self._stage("evaluate", recipe.evaluate, compare, partial(summarise, variants))
        return {**summary, "warnings": [*self._schedules.said(), *self._workspace.warnings]}


def export_target(
    out: str | Path,
    params: str | None = None,
    name: str | None = None,
    *,
    bytes: str | None = None,
    flops: str | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Assemble another size from the bank of a run, without training, and verify it.

    `params`, `bytes` and `flops` are shares of the teacher (`60%`) or numbers (`8B`, `12GB`, `40T`), one or several.
    Without `verify` the files that it is made of are compared by name and size alone.
    Returns {"name", "path", "opens", "params", "flops"}. Raises `PpclError` where no plan is that small.
    """
    sizes = {"params": params, "bytes": bytes, "flops": flops}
    asked = {unit: size for unit, size in sizes.items() if size is not None}
    try:
        target = Target.model_validate({"name": name or _name(asked), **asked})
    except ValidationError as error:
        # A name is made of the size, where there is none.
        problem = min(error.errors(), key=lambda each: each["loc"] == ("name",))
        where = ".".join(map(str, problem["loc"]))
        raise PpclError(f"{where or 'target'}: {problem['msg'].removeprefix('Value error, ')}") from error
    path = Path(out)
    # Not `Recipe.load`: no code is taken from the folder of a run.
    recipe = read_recipe(Recipe, path / "recipe.yaml") if (path / "select").is_dir() else None
    if recipe is not None and recipe.select.method is not None:
        raise PpclError(
            f"{path}: the targets of select.method {recipe.select.method} do not nest; add one to the recipe"
        )
    last = "width" if recipe is None or recipe.searches else "modulation"
    if recipe is None or not (path / last).is_dir():
        raise PpclError(f"{path} has no bank: run `ppcl compress --out {path}` until its {last} stage is done")
    run = Workspace(path, verify=verify)
    run.check("samples", "select", *_BANKS)
    teacher, runner = opened(recipe, processes.pick_device(recipe.device), run)
    bank = Bank(*(path / name for name in _BANKS))
    low = LowRankChoice.load(path / "modulation") if recipe.modulation else None
    run.lock()
    noising = _checked(run, runner, teacher, recipe)
    samples = load_samples(path / "samples")
    example = _noised(recipe, (teacher, noising), samples, "finetune", recipe.finetune.batch)[0]
    choice = Choice.load(path / "select")
    plan, cost = _first_that_fits(runner, (choice, low.swaps if low else ()), bank, (recipe, target), example)
    variant = _variant(recipe, path, target.name, teacher, plan, low)
    if (path / "export" / target.name).exists():
        raise PpclError(f"{variant.folder} exists already; choose another --name")
    make = partial(_export, teacher, runner, variant, plan, (bank, None), example)
    made = run.stage(f"export/{target.name}", {**asked, "dtype": variant.dtype}, make, variant.read)
    run.unlock()
    return {**made, "params": cost.params, "flops": cost.flops}


def _name(asked: Mapping[str, str]) -> str:
    """Name a variant by its size: `60`, or `flops60` and `params60-flops70` where that is not of its parameters."""
    sizes = {unit: size.replace(" ", "").removesuffix("%") for unit, size in asked.items()}
    return sizes["params"] if [*sizes] == ["params"] else "-".join(f"{unit}{size}" for unit, size in sizes.items())


def _whole(recipe: Recipe, teacher: Teacher) -> Cost:
    """Return what a teacher costs before there are samples; its FLOPs only where a target asks for a number of them."""
    params, flops = sum(parameter.numel() for parameter in teacher.transformer.parameters()), _UNKNOWN
    sizes = [target.flops for target in recipe.targets if target.flops is not None]
    if teacher.adapter.example is not None and not all(map(is_share, sizes)):
        model = Model.of(recipe)
        flops = model.costs(model.plan).flops
    return Cost(params=params, bytes=params * getattr(torch, recipe.export.dtype).itemsize, flops=flops)


def opened(recipe: Recipe, device: torch.device, run: Workspace) -> tuple[Teacher, Runner]:
    """Open the recipe's teacher by the name that the run has for it, and say how it is run."""
    teacher = _as_begun(recipe, load_teacher(recipe, verify=run.verifies, notes=run.path / NOTES), run)
    given = recipe.teacher
    waiting = host_bytes() // 2 if given.waiting_gb is None else int(given.waiting_gb * 1e9)
    placement = Placement(device=device, streamed=given.streamed is True, chunk=given.chunk, waiting=waiting)
    return teacher, Runner(teacher.transformer, teacher.adapter, placement)


def _as_begun(recipe: Recipe, teacher: Teacher, run: Workspace) -> Teacher:
    """Return a teacher by the name that a run of an earlier version has for it, where it may be that one.

    Another one is refused before the first stage.
    """
    section, known = recipe.teacher, source_of(run.path)
    if known in (None, teacher.source) or known != early_identity(section.path, teacher.folder, section.revision):
        return teacher
    run.warnings.append(
        f"{run.path} was begun by an earlier version, which noted neither the commit of its teacher nor all of its "
        "files: that it is still the same is known in part only"
    )
    return replace(teacher, source=known)


def _checked(workspace: Workspace, runner: Runner, teacher: Teacher, recipe: Recipe) -> Noising:
    """Check the adapter, and return how the pipeline noises: a stage that no other has to wait to be made again for."""
    asked = asked_of_check(workspace.path, teacher.source, teacher.adapter)
    asked |= {"teacher": _part(recipe, _RECORDING)["teacher"]}
    make = partial(check, runner, teacher.pipeline, partial(rehearse, teacher, recipe))
    return workspace.branch().stage("check", asked, make, load_noising)


def _noised(
    recipe: Recipe, taught: tuple[Teacher, Noising], samples: Sequence[Sample], stage: str, size: int
) -> Batches:
    """Noised batches of one stage: stages draw their own, so none is measured on what another was fitted to."""
    teacher, noising = taught
    return Batches(
        samples=samples,
        adapter=teacher.adapter,
        size=size,
        seed=zlib.crc32(f"{stage} {recipe.seed}".encode()),
        noising=noising,
        sigma_mean=recipe.samples.sigma_mean,
        sigma_std=recipe.samples.sigma_std,
        dtype=getattr(torch, recipe.teacher.dtype),
        negatives=share_of_negatives(teacher.adapter.scale(recipe.teacher.call)),
    )


def _calibration(recipe: Recipe, run: Workspace, noised: Callable[[str, int], Batches]) -> Calibration:
    """Return batches at all noise levels, at the recipe's values of guidance, with the empty prompt among them."""
    assert recipe.modulation is not None
    batches = noised("modulation", recipe.modulation.batch)
    batches = replace(batches, uniform=True, guidance=recipe.modulation.guidance)
    empty = load_samples(run.path / "samples", EMPTY)
    call = recipe.teacher.call
    guided = (batches.adapter.scale(call) or 1) > 1
    facts = {"negative_prompt": call.get("negative_prompt", "") if guided else None}
    return Calibration(batches=batches, empty=replace(batches, samples=empty) if empty else None, facts=facts)


def _variant(recipe: Recipe, run: Path, name: str, teacher: Teacher, plan: Plan, low: LowRankChoice | None) -> Variant:
    return Variant(
        name=name,
        folder=run / "variants" / name,
        plan=teacher.whole(plan),
        step=plan,
        dtype=recipe.export.dtype,
        call=recipe.teacher.call,
        adapter=recipe.adapter,
        covered=low.covered if low and plan.modulation_swaps else {},
    )


def _export(
    teacher: Teacher,
    runner: Runner,
    variant: Variant,
    plan: Plan,
    weights: tuple[Bank, Path | None],
    example: Batch,
    desk: Desk,
) -> None:
    """Make the student of `plan` from the bank, or from the folder of its fine-tuning, and export it."""
    bank, tuned = weights
    student: nn.Module = student_of(runner.transformer, runner.adapter, plan, bank, example)
    if tuned is not None:
        student.load_state_dict(load_weights(tuned), assign=True)
    export((teacher.pipeline, runner.adapter), student, variant, example, desk, device=runner.placement.device)


def _first_that_fits(
    runner: Runner,
    found: tuple[Choice, Sequence[ModulationSwap]],
    bank: Bank,
    asked: tuple[Recipe, Target],
    example: Batch,
) -> tuple[Plan, Cost]:
    (choice, modulation), (recipe, target) = found, asked
    costs = Costs(runner.transformer, runner.adapter, example, getattr(torch, recipe.export.dtype))
    whole = next(iter(choice.plans.values())).with_operations([])
    goal, smallest = Goal(target, costs(whole)), costs(whole)
    for count in range(0 if modulation else 1, len(choice.order) + 1):
        plan = whole.with_operations([*choice.order[:count], *modulation])
        if all(form.key in bank for form in [*trained_forms([plan]), *low_rank_forms([plan])]):
            smallest = costs(plan)
            if not goal.missing(smallest):
                return plan, smallest
    raise PpclError(goal.told(smallest, costs(whole), "the smallest plan of this bank has"))


def _part(recipe: Recipe, include: Any) -> dict[str, Any]:
    return recipe.model_dump(mode="json", include=include)
