"""Every stage that takes memory, as a run calls it."""

from collections.abc import Callable
from types import SimpleNamespace

import called
import disk
import torch
from subjects import Subject, predicted

from ppcl_toolkit.artifacts import passes
from ppcl_toolkit.artifacts.files import write_manifest
from ppcl_toolkit.budget.blocks import Blocks
from ppcl_toolkit.budget.memory import TOGETHER, Memory
from ppcl_toolkit.plan import Interval, ModulationSwap
from ppcl_toolkit.running import conditioning
from ppcl_toolkit.selection.candidates import more_candidates
from ppcl_toolkit.stages import depth, export, finetune, intervals, modulation, probe, select, width
from ppcl_toolkit.surgery.assemble import student_of
from ppcl_toolkit.training.targets import Velocities

_TARGET = '{"dict": {"velocity": {"tensor": "velocity"}, "features": {"dict": {}}}}'


def _probe(subject: Subject) -> None:
    section = subject.recipe.probe
    passes.SECONDS = 0.0  # a state behind every batch
    probe.probe(subject.runner, subject.batches(section.batch), section, subject.desk)


def _intervals(subject: Subject) -> None:
    section = subject.recipe.intervals
    intervals.find_intervals(subject.runner, subject.batches(section.batch), section, _probes(subject), subject.desk)


def _probes(subject: Subject) -> dict[tuple[str, int, str], torch.Tensor]:
    """Weights of every probe, on the host."""
    found = {}
    for stack in subject.adapter.stacks:
        _, streams = subject.model.calls[stack.path]
        for stream, value in streams.of(stack.streams).items():
            for block in range(len(subject.runner.blocks(stack.path))):
                found[stack.path, block, stream] = torch.empty(value.shape[-1], value.shape[-1])
    return found


def _modulation(subject: Subject) -> None:
    section = subject.recipe.modulation
    batches = subject.batches(section.batch)
    # Tensors hold nothing: all layers are fed the same, no velocity differs, and nothing of it is written.
    conditioning._check = lambda *_: None
    modulation.sources = lambda fed: dict.fromkeys(fed, next(iter(fed)))
    modulation._square = lambda _: 1.0
    modulation.save_tree = passes.save_tree = lambda *_: None
    object.__setattr__(batches, "covered", dict)
    subject.desk.folder.mkdir(exist_ok=True)
    modulation.find_modulation(subject.runner, batches, section, subject.desk)


def _select(subject: Subject) -> None:
    section, plan = subject.recipe.select, subject.model.plan
    chosen = [[o for o in own.operations if not isinstance(o, ModulationSwap)] for own in subject.plans.values()]
    candidates = list(dict.fromkeys(operation for own in chosen for operation in own))
    together = section.order == "program"
    # As many as a plan takes there to be, as far as that matters.
    there = Memory(subject.recipe, Blocks(subject.model), subject.plans).candidates
    more = more_candidates(subject.runner, plan, candidates, subject.recipe)
    # Of many, some visit has nothing but intervals.
    intervals_first = sorted(dict.fromkeys([*candidates, *more]), key=lambda each: not isinstance(each, Interval))
    candidates = intervals_first[: min(there, TOGETHER)]
    means = subject.batches(section.batch), section.batches
    for _ in select.measure(subject.runner, plan, candidates, *means):
        pass
    if together:
        select.measure_together(subject.runner, plan, max(chosen, key=len), *means)


def _depth(subject: Subject) -> None:
    section = subject.recipe.depth
    depth.distill_depth(
        subject.runner, list(subject.plans.values()), subject.batches(section.batch), section, subject.desk
    )


def _width(subject: Subject) -> None:
    section = subject.recipe.width
    batches = subject.batches(section.batch)
    width.distill_width(
        subject.runner, list(subject.plans.values()), subject.bank(depth_only=True), batches, section, subject.desk
    )


def _finetune(subject: Subject) -> None:
    section = subject.recipe.finetune
    batches = subject.batches(section.batch)
    recorded = Velocities(subject.desk.folder / "velocities")
    for number in range(section.steps * 8):
        shape = predicted(subject.model, section.batch)
        disk.keep(recorded._file(number), {"velocity": (shape, batches.dtype)}, {"tree": _TARGET})
    finetune.finetune(subject.runner, subject.tuned, subject.bank(), batches, recorded, section, subject.desk)


def _velocities(subject: Subject) -> None:
    section = subject.recipe.finetune
    subject.desk.folder.mkdir(exist_ok=True)
    plans = list(subject.plans.values())
    finetune.record_velocities(subject.runner, plans, subject.batches(section.batch), section, subject.desk)


def _export(subject: Subject) -> None:
    plan, example = subject.largest, subject.batches(subject.recipe.finetune.batch)[0]
    student = student_of(subject.runner.transformer, subject.adapter, plan, subject.bank(), example)
    state = student.state_dict()
    student.load_state_dict({name: torch.empty(v.shape, dtype=v.dtype) for name, v in state.items()}, assign=True)
    del state
    variant = export.Variant(
        name="it",
        folder=subject.desk.folder / "it",
        plan=plan,
        step=plan,
        dtype=subject.recipe.export.dtype,
        call={},
    )
    # What follows writes files, and other processes read them.
    export.save_variant = lambda *_, **__: variant.folder.mkdir() or write_manifest(variant.folder) or "stock"
    export.verify_variant = lambda *_, **__: 0.0
    taught = SimpleNamespace(transformer=subject.runner.transformer), subject.adapter
    export.export(taught, student, variant, example, subject.desk, device=subject.runner.placement.device)


STAGES: dict[str, Callable[[Subject], None]] = {
    "check": called.run_check,
    "samples": called.run_samples,
    "probe": _probe,
    "modulation": _modulation,
    "intervals": _intervals,
    "select": _select,
    "depth": _depth,
    "width": _width,
    "velocities": _velocities,
    "finetune": _finetune,
    "export": _export,
    "evaluate": called.run_evaluate,
}
AWAY = ("export", "finetune")
"""Stages before which the teacher went to the host."""
