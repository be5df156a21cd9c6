"""Runs of `compress` that are looked at stage by stage, on the device."""

import functools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from giants import Giant, giant, operations
from torch import nn

from ppcl_toolkit import algorithm
from ppcl_toolkit.artifacts.files import write_json
from ppcl_toolkit.artifacts.pipeline import Teacher
from ppcl_toolkit.artifacts.storage import save_tree
from ppcl_toolkit.artifacts.workspace import Job, Workspace
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.noise import Batches, Sample
from ppcl_toolkit.running.noising import Noising
from ppcl_toolkit.stages.check import check_call

_MAY_FAIL = ("finetune", "export", "evaluate")
"""Stages without whose results others can be run."""


@dataclass
class Stage:
    """What one stage took."""

    name: str
    seconds: float = 0.0
    peak: int = 0
    error: str = ""


def stages(path: str, recipe: str, overrides: list[str], *, tiny: bool) -> list[Stage]:
    """Compress a giant, with made-up samples, and measure every stage; what fails ends it, but says so."""
    found: list[Stage] = []
    model = giant(path, tiny=tiny, samples=2)
    asked = fitting(Recipe.load(recipe, overrides), model)
    pipeline = SimpleNamespace(transformer=model.transformer, components={"transformer": model.transformer})
    teacher = Teacher(pipeline, model.adapter, model.adapter.family, path)
    stage = functools.partial(_watched, found, model)
    with (
        tempfile.TemporaryDirectory() as out,
        mock.patch.object(algorithm, "load_teacher", lambda *_, **__: teacher),
        mock.patch.object(algorithm, "check_machine", lambda *_: None),  # of the published model, which this one is not
        mock.patch.object(algorithm, "export", _run_student),
        mock.patch.object(algorithm, "write_report", lambda _: None),
        mock.patch.object(
            Workspace, "results", lambda run, jobs, **options: [stage(run, job, **options) for job in jobs]
        ),
    ):
        try:
            algorithm.compress(asked, out)
        except Exception:
            if not found or not found[-1].error:
                raise
    return found


def fitting(recipe: Recipe, model: Giant) -> Recipe:
    """Return a recipe without the operations on blocks that a model does not have."""
    given = operations(recipe, model.plan.depths)
    intervals = recipe.intervals.model_copy(update={"given": tuple(g for g in given if g in recipe.intervals.given)})
    width = recipe.width.model_copy(update={"given": tuple(g for g in given if g in recipe.width.given)})
    return recipe.model_copy(update={"intervals": intervals, "width": width})


_results = Workspace.results


def _watched(found: list[Stage], model: Giant, run: Workspace, job: Job[Any], **options: Any) -> Any:
    kind = job.name.split("/")[0]
    found.append(Stage(kind))
    if kind == "samples":
        job = job._replace(make=functools.partial(_write_samples, model))
    if kind == "check":
        job = job._replace(make=functools.partial(_check, model, job.make.args[0]))
    if kind == "evaluate":
        job = job._replace(make=functools.partial(_velocity, *job.make.args))
    if kind in ("export", "evaluate"):
        job = job._replace(load=lambda _: {})
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    try:
        return _results(run, [job], **options)[0]
    except Exception as error:
        found[-1].error = " ".join(str(error).split()) or type(error).__name__
        if kind not in _MAY_FAIL:
            raise
        return {} if kind != "finetune" else None
    finally:
        torch.cuda.synchronize()
        found[-1].seconds = time.monotonic() - began
        found[-1].peak = torch.cuda.max_memory_allocated()


def _write_samples(model: Giant, desk: Any) -> None:
    fields = [{name: getattr(sample, name) for name in Sample.__slots__} for sample in model.samples]
    save_tree(desk.folder / "000000.safetensors", fields)


def _check(model: Giant, runner: Any, desk: Any) -> None:
    """Stand for the check: all of it but the pipeline's steps, of which there is none."""
    check_call(runner, model.call(), desk)
    write_json(desk.folder / "noising.json", Noising().model_dump())


def _run_student(*given: Any, device: torch.device, **_: Any) -> None:
    """Stand for the export: one call of the student that would be written."""
    student = next(each for each in given if isinstance(each, nn.Module))
    example = next(each for each in given if isinstance(each, dict))
    with torch.no_grad():
        velocity = student.to(device)(**{n: v.to(device) if torch.is_tensor(v) else v for n, v in example.items()})[0]
    assert velocity.isfinite().all()


def _velocity(runner: Any, *given: Any) -> None:
    """Stand for the evaluation: one call of the teacher, as velocity errors need it."""
    batches = next(each for each in given if isinstance(each, Batches))
    assert runner.velocity(batches[0]).isfinite().all()


def contract(family: str, folder: Path, schedules: list[str]) -> Iterator[tuple[str, float]]:
    """Yield the velocity error of a tiny pipeline's variant, made on the CPU and then on the card."""
    from worlds import made

    from ppcl_toolkit.stages import evaluate

    world = made(family, folder)
    world.teacher.pipeline.save_pretrained(folder / "teacher")
    given = [{"stack": "transformer_blocks", "first": 2, "last": 3}]
    recipe = world.recipe(
        intervals={"batches": 1, "batch": 2, "strategy": "given", "given": given},
        select={"batches": 1, "batch": 2},
        depth={"steps": 4, "batch": 2},
        width={"steps": 2, "batch": 2, "ffn_blocks": 1},
        finetune={"steps": 2, "batch": 2},
        export={"dtype": "float32"},
        targets=[{"name": "small", "params": "85%"}],
    )
    # Memory on the CPU, for which further processes start, is compared with nothing here.
    with mock.patch.object(evaluate, "_resident_growth", lambda *_: None):
        for schedule in ("on the CPU", *schedules):
            device = "cpu" if schedule == "on the CPU" else "cuda"
            section = recipe.teacher.model_copy(update={"streamed": schedule == "streamed"})
            asked = recipe.model_copy(update={"device": device, "teacher": section})
            summary = algorithm.compress(asked, folder / schedule.replace(" ", "-"))
            yield schedule, summary["variants"][0]["velocity_error"]
