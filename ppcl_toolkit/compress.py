"""The main path: Algorithm 1, from a teacher to verified variants of every size that was asked for."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.pipeline import Teacher, load_teacher
from ppcl_toolkit.artifacts.storage import Bank, Desk
from ppcl_toolkit.artifacts.workspace import Progress, Workspace, silent, write_json
from ppcl_toolkit.budget import check_machine
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import ModulationSwap, Plan, low_rank_forms, trained_forms
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.noise import Batches, Calibration, Sample
from ppcl_toolkit.running.placement import Placement, host_bytes
from ppcl_toolkit.running.schedule import Batch, Runner
from ppcl_toolkit.stages.depth import distill_depth
from ppcl_toolkit.stages.evaluate import evaluate, summarise
from ppcl_toolkit.stages.export import Variant, export
from ppcl_toolkit.stages.finetune import finetune, load_weights, record_velocities
from ppcl_toolkit.stages.intervals import Candidates, detect
from ppcl_toolkit.stages.modulation import LowRankChoice, bank_low_rank, check_modulation, find_modulation
from ppcl_toolkit.stages.probe import Probes, probe
from ppcl_toolkit.stages.report import write_report
from ppcl_toolkit.stages.samples import EMPTY, load_samples, record_samples
from ppcl_toolkit.stages.select import Choice, parse_size, select
from ppcl_toolkit.stages.width import distill_width
from ppcl_toolkit.surgery.assemble import count_parameters, student_of
from ppcl_toolkit.training.means import check_optimizer
from ppcl_toolkit.training.substitution import Candidate
from ppcl_toolkit.training.targets import Velocities

# Resident or streamed, results are the same: a run that was too large for its device may go on otherwise.
_RECORDING = {"teacher": {"path", "revision", "dtype", "call"}, "samples": True, "seed": True}
_DETECTION = {"intervals": True, "width": {"text_threshold"}}
_ANSWERS = {"finetune": {"steps", "batch", "features"}}
_CHOICE = {"targets": True, "select": True, "width": {"given", "text_threshold", "text_blocks", "ffn_blocks"}}


def compress(recipe: Recipe, out: str | Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Run Algorithm 1 on the recipe's teacher in the folder `out`, or go on where an earlier run stopped.

    Returns what `out/summary.json` holds: {"teacher": {...}, "variants": [{"name", "path", "opens", "params", "score",
    "drop_percent", "rmse", ...}], "warnings": [...]}. Raises `PpclError` for bad input; finished stages are never lost.
    """
    device = processes.pick_device(recipe.device)
    check_optimizer(recipe.finetune.optimizer)
    run = Workspace(out, progress=progress)
    if not run.is_begun:
        check_machine(recipe, device)
    run.open(recipe.dump())
    teacher, runner = _opened(recipe, device)
    if recipe.modulation is not None:
        check_modulation(runner, recipe.modulation)

    asked = {"source": teacher.source, **_part(recipe, _RECORDING)}
    asked |= {"empty_prompt": True} if recipe.modulation else {}
    record = partial(record_samples, runner, teacher, recipe)
    samples = run.stage("samples", asked, record, load_samples, together=True)
    noised = partial(_noised, recipe, teacher, samples)
    low = None
    if recipe.modulation is not None:
        of_low_rank = partial(find_modulation, runner, _calibration(recipe, run, noised), recipe.modulation)
        low = run.stage("modulation", recipe.modulation, of_low_rank, LowRankChoice.load, together=True)
    candidates = _detected(recipe, runner, run, noised) if recipe.searches else ()
    held_out = noised("select", recipe.select.batch)
    choose = partial(select, runner, teacher.plan(), (candidates, low.swaps if low else ()), held_out, recipe)
    choice = run.stage("select", _part(recipe, _CHOICE), choose, Choice.load, together=True)

    plans = list(choice.plans.values())
    bank = Bank(*([run.path / "modulation"] if low else []))
    if recipe.searches:
        bank = _trained(recipe, runner, run, plans, noised).joined(*bank.folders)
    if low and recipe.searches:
        factor = partial(bank_low_rank, runner, plans, bank, low)
        bank = run.stage("low_rank", {}, factor, bank.joined, together=True)

    batches = noised("finetune", recipe.finetune.batch)
    velocities = Velocities(run.path / "velocities")
    if recipe.learns:
        answers = partial(record_velocities, runner, plans, batches, recipe.finetune)
        velocities = run.stage("velocities", _part(recipe, _ANSWERS), answers, Velocities, together=True)
    variants = []
    learning = {target.name for target in recipe.targets if target.finetune and recipe.learns}
    for name, plan in choice.plans.items():
        tuned = None
        if name in learning:
            tune = partial(finetune, runner, plan, bank, batches, velocities, recipe.finetune)
            tuned = run.stage(f"finetune/{name}", recipe.finetune, tune, Path, together=True)
        variant = _variant(recipe, run.path, name, teacher.whole(plan), low)
        make = partial(_export, teacher, runner, variant, plan, (bank, tuned), batches[0])
        variants.append(run.stage(f"export/{name}", recipe.export, make, variant.read))
    velocities.discard()

    batches = noised("evaluate", recipe.samples.batch)
    compare = partial(evaluate, runner, teacher, recipe, variants, batches)
    summary = run.stage("evaluate", recipe.evaluate, compare, partial(summarise, variants), together=True)
    summary["warnings"] = run.warnings
    run.close(recipe.dump())
    if processes.is_main():
        write_json(run.path / "summary.json", summary)
        write_report(run.path)
    return summary


def _detected(
    recipe: Recipe, runner: Runner, run: Workspace, noised: Callable[[str, int], Batches]
) -> Sequence[Candidate]:
    """Return what may go: stages `probe` and `intervals`."""
    fit = partial(probe, runner, noised("probe", recipe.probe.batch), recipe.probe)
    probes = run.stage("probe", recipe.probe, fit, Probes.load, together=True)
    find = partial(detect, runner, noised("intervals", recipe.intervals.batch), probes.weights, recipe)
    return run.stage("intervals", _part(recipe, _DETECTION), find, Candidates.load, together=True).operations()


def _trained(
    recipe: Recipe, runner: Runner, run: Workspace, plans: Sequence[Plan], noised: Callable[[str, int], Batches]
) -> Bank:
    """Return the blocks that stand in for others: stages `depth` and `width`."""
    deep = partial(distill_depth, runner, plans, noised("depth", recipe.depth.batch), recipe.depth)
    depth = run.stage("depth", recipe.depth, deep, Bank, together=True)
    wide = partial(distill_width, runner, plans, depth, noised("width", recipe.width.batch), recipe.width)
    return run.stage("width", recipe.width, wide, depth.joined, together=True)


def export_target(out: str | Path, params: str, name: str | None = None) -> dict[str, Any]:
    """Assemble another size from the bank of a run, without training, and verify it.

    `params` is a share of the teacher (`60%`) or a number (`8B`). Returns {"name", "path", "opens", "params"}. Raises
    `PpclError` where no plan of the bank is that small, with the smallest there is.
    """
    path = Path(out)
    recipe = Recipe.load(path / "recipe.yaml") if (path / "select").is_dir() else None
    last = "width" if recipe is None or recipe.searches else "modulation"
    if recipe is None or not (path / last).is_dir():
        raise PpclError(f"{path} has no bank: run `ppcl compress --out {path}` until its {last} stage is done")
    teacher, runner = _opened(recipe, processes.pick_device(recipe.device))
    bank = Bank(*(path / name for name in ("depth", "width", "modulation", "low_rank")))
    low = LowRankChoice.load(path / "modulation") if recipe.modulation else None
    example = _noised(recipe, teacher, load_samples(path / "samples"), "finetune", recipe.finetune.batch)[0]
    choice = Choice.load(path / "select")
    plan, count = _first_that_fits(runner, (choice, low.swaps if low else ()), bank, params, example)
    name = name or params.strip().removesuffix("%")
    variant = _variant(recipe, path, name, teacher.whole(plan), low)
    if (path / "export" / name).exists():
        raise PpclError(f"{variant.folder} exists already; choose another --name")
    run = Workspace(path)
    make = partial(_export, teacher, runner, variant, plan, (bank, None), example)
    made = run.stage(f"export/{name}", {"params": params, "dtype": variant.dtype}, make, variant.read)
    return {**made, "params": count}


def _opened(recipe: Recipe, device: torch.device) -> tuple[Teacher, Runner]:
    teacher = load_teacher(recipe)
    given = recipe.teacher
    waiting = host_bytes() // 2 if given.waiting_gb is None else int(given.waiting_gb * 1e9)
    placement = Placement(device=device, streamed=given.streamed, chunk=given.chunk, waiting=waiting)
    return teacher, Runner(teacher.transformer, teacher.adapter, placement)


def _noised(recipe: Recipe, teacher: Teacher, samples: Sequence[Sample], stage: str, size: int) -> Batches:
    """Noised batches of one stage: stages draw their own, so none is measured on what another was fitted to."""
    return Batches(
        samples=samples,
        adapter=teacher.adapter,
        size=size,
        seed=zlib.crc32(f"{stage} {recipe.seed}".encode()),
        sigma_mean=recipe.samples.sigma_mean,
        sigma_std=recipe.samples.sigma_std,
        dtype=getattr(torch, recipe.teacher.dtype),
    )


def _calibration(recipe: Recipe, run: Workspace, noised: Callable[[str, int], Batches]) -> Calibration:
    """Return batches at all noise levels, at the recipe's values of guidance, with the empty prompt among them."""
    assert recipe.modulation is not None
    batches = noised("modulation", recipe.modulation.batch)
    batches = replace(batches, uniform=True, guidance=recipe.modulation.guidance)
    empty = load_samples(run.path / "samples", EMPTY)
    call = recipe.teacher.call
    guided = float(call.get(batches.adapter.guidance, 1) or 1) > 1
    facts = {"negative_prompt": call.get("negative_prompt", "") if guided else None}
    return Calibration(batches=batches, empty=replace(batches, samples=empty) if empty else None, facts=facts)


def _variant(recipe: Recipe, run: Path, name: str, plan: Plan, low: LowRankChoice | None) -> Variant:
    call, dtype = recipe.teacher.call, recipe.export.dtype
    covered = low.covered if low and plan.modulation_swaps else {}
    return Variant(name=name, folder=run / "variants" / name, plan=plan, dtype=dtype, call=call, covered=covered)


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
    export(teacher.pipeline, student, variant, example, desk, device=runner.placement.device)


def _first_that_fits(
    runner: Runner, found: tuple[Choice, Sequence[ModulationSwap]], bank: Bank, params: str, example: Batch
) -> tuple[Plan, int]:
    choice, modulation = found
    total = sum(p.numel() for p in runner.transformer.parameters())
    goal = parse_size(params, total)
    smallest = total
    for count in range(0 if modulation else 1, len(choice.order) + 1):
        plan = next(iter(choice.plans.values())).with_operations([*choice.order[:count], *modulation])
        if all(form.key in bank for form in [*trained_forms([plan]), *low_rank_forms([plan])]):
            smallest = count_parameters(runner.transformer, runner.adapter, plan, example)
            if smallest <= goal:
                return plan, smallest
    raise PpclError(
        f"{params} is {goal:,} parameters; the smallest plan of this bank has {smallest:,} ({smallest / total:.1%})"
    )


def _part(recipe: Recipe, include: Any) -> dict[str, Any]:
    return recipe.model_dump(mode="json", include=include)
