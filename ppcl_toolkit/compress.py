"""The main path: Algorithm 1, from a teacher to verified variants of every size that was asked for."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.pipeline import Teacher, load_pipeline, load_teacher
from ppcl_toolkit.artifacts.storage import Bank, Desk
from ppcl_toolkit.artifacts.workspace import Progress, Workspace, silent, write_json
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan, trained_forms
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.noise import Batches, Sample
from ppcl_toolkit.running.schedule import Batch, Runner, Schedule, settle
from ppcl_toolkit.stages.depth import distill_depth
from ppcl_toolkit.stages.evaluate import compare, examine, load_measurement, measure, relative_error, velocities
from ppcl_toolkit.stages.export import Variant, export
from ppcl_toolkit.stages.finetune import finetune, load_weights
from ppcl_toolkit.stages.intervals import Candidates, find_intervals
from ppcl_toolkit.stages.probe import Probes, fit_probes
from ppcl_toolkit.stages.report import write_report
from ppcl_toolkit.stages.samples import load_samples, record_samples
from ppcl_toolkit.stages.select import Choice, parse_size, select
from ppcl_toolkit.stages.width import distill_width
from ppcl_toolkit.surgery.assemble import count_parameters, student_of

_CHOICE = {"targets": True, "select": True, "width": {"given", "text_threshold", "text_blocks", "ffn_blocks"}}


def compress(recipe: Recipe, out: str | Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Run Algorithm 1 on the recipe's teacher in the folder `out`, or go on where an earlier run stopped.

    Returns what `out/summary.json` holds: {"teacher": {...}, "variants": [{"name", "path", "opens", "params", "score",
    "drop_percent", "rmse", ...}], "warnings": [...]}. Raises `PpclError` for bad input; finished stages are never lost.
    """
    device = processes.pick_device(recipe.device)
    run = Workspace(out, progress=progress)
    run.open(recipe.dump())
    teacher = load_teacher(recipe, device)
    runner = _runner(recipe, teacher, device)

    asked = {"source": teacher.source, **_part(recipe, {"teacher", "samples", "seed"})}
    record = partial(record_samples, teacher, recipe)
    samples = run.stage("samples", asked, record, load_samples, together=True)
    noised = partial(_noised, recipe, teacher, samples)
    probes = run.stage(
        "probe",
        recipe.probe,
        lambda desk: fit_probes(runner, noised("probe", recipe.probe.batch), recipe.probe, desk.progress).save(
            desk.folder
        ),
        Probes.load,
    )
    found = run.stage(
        "intervals",
        _part(recipe, {"intervals": True, "width": {"text_threshold"}}),
        lambda desk: find_intervals(
            runner,
            noised("intervals", recipe.intervals.batch),
            recipe.intervals,
            probes.weights,
            text_threshold=recipe.width.text_threshold,
            progress=desk.progress,
        ).save(desk.folder),
        Candidates.load,
    )
    choice = run.stage(
        "select",
        _part(recipe, _CHOICE),
        lambda desk: select(
            runner, teacher.plan(), found.operations(), noised("select", recipe.select.batch), recipe, desk
        ),
        Choice.load,
    )
    plans = list(choice.plans.values())
    depth = run.stage(
        "depth",
        recipe.depth,
        lambda desk: distill_depth(runner, plans, noised("depth", recipe.depth.batch), recipe.depth, desk),
        Bank,
        together=True,
    )
    bank = run.stage(
        "width",
        recipe.width,
        lambda desk: distill_width(runner, plans, depth, noised("width", recipe.width.batch), recipe.width, desk),
        lambda folder: Bank(*depth.folders, folder),
        together=True,
    )
    variants = []
    for name, plan in choice.plans.items():
        batches = noised("finetune", recipe.finetune.batch)
        tuned = run.stage(
            f"finetune/{name}",
            recipe.finetune,
            partial(finetune, runner, plan, bank, batches, recipe.finetune),
            load_weights,
            together=True,
        )
        student = student_of(runner.transformer, runner.adapter, plan, bank, batches[0])
        student.load_state_dict(tuned)
        variant = _variant(recipe, run.path, name, teacher.whole(plan))
        make = partial(export, teacher.pipeline, student, variant, batches[0])
        variants.append(run.stage(f"export/{name}", recipe.export, make, variant.read))
    summary = run.stage(
        "evaluate",
        recipe.evaluate,
        partial(_evaluate, teacher, recipe, variants, noised("evaluate", recipe.samples.batch)),
        partial(_summary, variants),
    )
    summary["warnings"] = run.warnings
    run.close(recipe.dump())
    if processes.is_main():
        write_json(run.path / "summary.json", summary)
        write_report(run.path)
    return summary


def export_target(out: str | Path, params: str, name: str | None = None) -> dict[str, Any]:
    """Assemble another size from the bank of a run, without training, and verify it.

    `params` is a share of the teacher (`60%`) or a number (`8B`). Returns {"name", "path", "opens", "params"}. Raises
    `PpclError` where no plan of the bank is that small, with the smallest there is.
    """
    path = Path(out)
    if not (path / "select").is_dir() or not (path / "width").is_dir():
        raise PpclError(f"{path} has no bank: run `ppcl compress --out {path}` until its width stage is done")
    recipe = Recipe.load(path / "recipe.yaml")
    device = processes.pick_device(recipe.device)
    teacher = load_teacher(recipe, device)
    runner = _runner(recipe, teacher, device)
    bank = Bank(path / "depth", path / "width")
    example = _noised(recipe, teacher, load_samples(path / "samples"), "finetune", recipe.finetune.batch)[0]
    plan, count = _first_that_fits(runner, Choice.load(path / "select"), bank, params, example)
    name = name or params.strip().removesuffix("%")
    variant = _variant(recipe, path, name, teacher.whole(plan))
    if (path / "export" / name).exists():
        raise PpclError(f"{variant.folder} exists already; choose another --name")
    student = student_of(runner.transformer, runner.adapter, plan, bank, example)
    run = Workspace(path)
    made = run.stage(
        f"export/{name}",
        {"params": params, "dtype": variant.dtype},
        partial(export, teacher.pipeline, student, variant, example),
        variant.read,
    )
    return {**made, "params": count}


def _runner(recipe: Recipe, teacher: Teacher, device: torch.device) -> Runner:
    schedule = Schedule(device=device, streamed=recipe.teacher.streamed, chunk=recipe.teacher.chunk)
    settle(teacher.transformer, teacher.adapter, schedule)
    return Runner(teacher.transformer, teacher.adapter, schedule)


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


def _variant(recipe: Recipe, run: Path, name: str, plan: Plan) -> Variant:
    return Variant(
        name=name, folder=run / "variants" / name, plan=plan, dtype=recipe.export.dtype, call=recipe.teacher.call
    )


def _evaluate(
    teacher: Teacher, recipe: Recipe, variants: Sequence[Mapping[str, Any]], batches: Batches, desk: Desk
) -> None:
    exam = examine(recipe.evaluate, recipe.teacher.call)
    held_out = list(batches(0, recipe.evaluate.velocity_batches))
    wanted = velocities(teacher.transformer, teacher.adapter, held_out)
    rounds = [("teacher", recipe.teacher.path, teacher.pipeline), *((v["name"], v["path"], None) for v in variants)]
    for number, (name, path, pipeline) in enumerate(rounds):
        pipeline = pipeline or load_pipeline(path, getattr(torch, recipe.teacher.dtype)).to(teacher.pipeline.device)
        progress = partial(_part_of, desk.progress, number, len(rounds), name)
        measure(pipeline, exam, desk.folder / name, source=path, progress=progress)
        error = relative_error(velocities(pipeline.transformer, teacher.adapter, held_out), wanted)
        compare(desk.folder / name, desk.folder / "teacher", velocity_error=error)


def _summary(variants: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    return {
        "teacher": asdict(load_measurement(folder / "teacher")),
        "variants": [{**variant, **asdict(load_measurement(folder / variant["name"]))} for variant in variants],
    }


def _part_of(progress: Callable[..., None], number: int, count: int, name: str, done: int, total: int, *_: str) -> None:
    progress(number * total + done, count * total, name)


def _first_that_fits(runner: Runner, choice: Choice, bank: Bank, params: str, example: Batch) -> tuple[Plan, int]:
    total = sum(p.numel() for p in runner.transformer.parameters())
    goal = parse_size(params, total)
    smallest = total
    for count in range(1, len(choice.order) + 1):
        plan = next(iter(choice.plans.values())).with_operations(choice.order[:count])
        if all(form.key in bank for form in trained_forms([plan])):
            smallest = count_parameters(runner.transformer, runner.adapter, plan, example)
            if smallest <= goal:
                return plan, smallest
    raise PpclError(
        f"{params} is {goal:,} parameters; the smallest plan of this bank has {smallest:,} ({smallest / total:.1%})"
    )


def _part(recipe: Recipe, include: Any) -> dict[str, Any]:
    return recipe.model_dump(mode="json", include=include)
