"""A dry run: what a recipe would remove, need and take, and whether a machine has it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ppcl_toolkit import processes
from ppcl_toolkit.budget.blocks import Blocks
from ppcl_toolkit.budget.disk import disk
from ppcl_toolkit.budget.machine import ROOM, UNLIMITED, Machine
from ppcl_toolkit.budget.memory import Memory, Need
from ppcl_toolkit.budget.model import Model, Size, is_known
from ppcl_toolkit.budget.plans import RANK, are_given, plans
from ppcl_toolkit.budget.reading import RATE, reading_hours
from ppcl_toolkit.budget.whole import Whole
from ppcl_toolkit.budget.work import absent, work
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.placement import RESIDENT, host_bytes
from ppcl_toolkit.selection.joint import ROUNDS

DEVICES = 8
"""Of a node: what several devices need is told for so many (paper: 8)."""
STAGES = (
    "check",
    "samples",
    "modulation",
    "probe",
    "intervals",
    "select",
    "depth",
    "width",
    "velocities",
    "finetune",
    "export",
    "evaluate",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one stage takes of each device, and of the host for all of them."""

    name: str
    device: int
    host: int
    pages: int
    """Beside that, of files that all processes read: where the host has no room for them, they are read again."""
    means: str
    """Schedule, and how fine-tuning is made to fit."""
    fits: bool
    otherwise: str = ""
    """What would fit, where this does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a recipe asks for. Memory and disk are in bytes, time in hours."""

    teacher: Size
    variants: tuple[Size, ...]
    memory: dict[str, dict[str, dict[str, int]]]
    """By schedule and number of devices, and by stage: bytes of a device, of the host for all devices, of its pages."""
    disk: dict[str, int]
    hours: dict[str, float]
    tflops: float
    """TFLOP/s that each device is assumed to sustain."""
    basis: tuple[str, ...]
    stages: tuple[Stage, ...] = ()
    """With a machine: what it has to say to each stage."""
    calling: tuple[str, ...] = ()
    """How it would call the pipeline of the teacher, and of each variant."""
    fits: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


class Budget:
    """The figures of one recipe, measured once."""

    def __init__(
        self,
        recipe: Recipe,
        chosen: Mapping[str, Plan] | None = None,
        blocks: Blocks | None = None,
        *,
        waiting: int | None = None,
    ) -> None:
        self.recipe = recipe
        self.blocks = blocks or Blocks(Model.of(recipe))
        self.model = self.blocks.model
        self.plans = dict(chosen or plans(recipe, self.model))
        self._most = waiting
        self._known: dict[Any, tuple[Need, str]] = {}

    def need(self, stage: str, *, streamed: bool, machine: Machine) -> Need:
        """Return what a stage takes of each device and, for each, of the host."""
        return self._measured(stage, machine, streamed=streamed)[0]

    def _measured(self, stage: str, machine: Machine, *, streamed: bool) -> tuple[Need, str]:
        key = (stage, streamed, machine)
        if key not in self._known:
            waiting = self._waiting(machine)
            memory = Memory(self.recipe, self.blocks, self.plans, streamed, machine.devices, waiting)
            whole = Whole(memory, machine.card, machine.host)
            need: Need = getattr(whole if hasattr(Whole, stage) else memory, stage)()
            means = whole.how(stage) or ("streamed" if streamed else RESIDENT)
            self._known[key] = need.beside(*whole.others), means
        return self._known[key]

    def _waiting(self, machine: Machine) -> int | None:
        given = self.recipe.teacher.waiting_gb
        if self._most is not None:
            return self._most
        if given is None:
            return None if machine.host == UNLIMITED else machine.host // machine.devices // 2
        return int(given * 1e9)

    def streamed(self, name: str, machine: Machine) -> bool:
        """Tell whether a stage has the teacher streamed: as the recipe says, or where a device has no room else."""
        asked = self.recipe.teacher.streamed
        if asked != "auto":
            return asked
        # Pipelines come to any device by themselves, and an export has no teacher on it.
        if name in {"samples", "low_rank", "export", "evaluate", *self.idle}:
            return False
        # What fine-tuning misses of the teacher's answers is recorded there.
        need = self.need("velocities" if name == "finetune" else name, streamed=False, machine=machine)
        return not replace(machine, host=UNLIMITED).has(need)

    def stage(self, name: str, machine: Machine) -> Stage:
        """Judge one stage as the recipe asks for it."""
        own = self.streamed(name, machine)
        need, means = self._measured(name, machine, streamed=own)
        fits = machine.has(need)
        return Stage(
            name=name,
            device=need.device,
            host=need.host * machine.devices,
            pages=need.pages,
            means=means,
            fits=fits,
            otherwise="" if fits else self._otherwise(name, machine, streamed=not own),
        )

    def stages(self, machine: Machine) -> tuple[Stage, ...]:
        """Judge every stage that has something to do."""
        return tuple(self.stage(name, machine) for name in STAGES if name not in self.idle)

    @cached_property
    def idle(self) -> set[str]:
        """Stages with nothing to do."""
        deep = all(form.is_stock for form in Memory(self.recipe, self.blocks, self.plans).forms)
        untuned = set() if self.recipe.answered.steps else {"velocities", "finetune"}
        return absent(self.recipe) | untuned | ({"width"} if deep else set())

    def _otherwise(self, name: str, machine: Machine, *, streamed: bool) -> str:
        """Return what would fit: the other schedule, fewer learners in memory, or several devices."""
        own, other = (self.need(name, streamed=each, machine=machine) for each in (not streamed, streamed))
        change = f"teacher.streamed: {str(streamed).lower()}"
        if machine.has(other):
            return f"{change} would: {_told(other, machine.devices)}"
        if spare := self._spare(name, machine):
            return f"teacher.streamed: true with teacher.waiting_gb: {spare} would: other learners wait on disk"
        told = f"it takes {_told(own, machine.devices)}" + (
            f"; with {change}, {_told(other, machine.devices)}" if other != own else ""
        )
        several = replace(machine, devices=DEVICES)
        if machine.devices < DEVICES and several.has(shared := self.need(name, streamed=False, machine=several)):
            told += f"; on {DEVICES} such devices, {_told(shared, DEVICES)}"
        return told

    def _spare(self, name: str, machine: Machine) -> int:
        """Return the gigabytes that learners may wait in, where the rest would fit; 0 where it would not."""
        if name not in ("depth", "width"):
            return 0
        budget = Budget(self.recipe, self.plans, self.blocks, waiting=0)
        least = budget.need(name, streamed=True, machine=machine)
        return int((ROOM * machine.host / machine.devices - least.host) / 1e9) if machine.has(least) else 0


def dry_run(
    recipe: Recipe, tflops: float = 400.0, machine: Machine | None = None, blocks: Blocks | None = None
) -> DryRun:
    """Work out what `recipe` asks for on devices that sustain `tflops` TFLOP/s each.

    What was measured of the `blocks` of this teacher, called alike, serves again.
    Raises `PpclError` where the teacher's config cannot be had, or a target is out of reach of the intervals given.
    """
    budget = Budget(recipe, blocks=blocks)
    model = budget.model
    teacher = budget.blocks.measured("teacher", model.plan)
    variants = tuple(budget.blocks.measured(target.name, budget.plans[target.name]) for target in recipe.targets)
    memory = Memory(recipe, budget.blocks, budget.plans)
    done = work(recipe, budget.blocks, budget.plans, (teacher, *variants))
    stages = budget.stages(machine) if machine else ()
    hours = {stage: each.hours(tflops, machine.devices if machine else 1) for stage, each in done.items()}
    if machine:
        own = replace(memory, devices=machine.devices)
        for stage in stages:
            if stage.name in hours:
                hours[stage.name] += reading_hours(own, stage, machine)
    return DryRun(
        teacher=teacher,
        variants=variants,
        memory=_table(budget),
        disk=disk(memory),
        hours=hours,
        tflops=tflops,
        basis=_basis(memory, tflops),
        stages=stages,
        calling=_calling(memory, machine, (teacher, *variants)),
        fits=all(stage.fits for stage in stages) if machine else None,
    )


def check_fits(
    recipe: Recipe, device_bytes: int, host_bytes: int, devices: int = 1, chosen: Mapping[str, Plan] | None = None
) -> None:
    """Raise a `PpclError` that names the first stage that does not fit, what it takes, and what would fit.

    Before plans are `chosen`, those are assumed that the recipe lists, or such as the paper published.
    """
    _check_fits(Budget(recipe, chosen), Machine(card=device_bytes, host=host_bytes, devices=devices))


def _check_fits(budget: Budget, machine: Machine) -> None:
    for stage in budget.stages(machine):
        if not stage.fits:
            there = f"{machine.card / 1e9:.1f}" + (
                f" GB and a host of {machine.host / 1e9:.1f}" if machine.host < UNLIMITED else ""
            )
            raise PpclError(
                f"{stage.name} does not fit a device of {there} GB, of which a tenth is spare: {stage.otherwise}"
            )


def check_machine(recipe: Recipe, device: torch.device) -> None:
    """Raise a `PpclError` where a machine is too small for a recipe, before anything is loaded.

    It looks at published models alone, whose config needs no download. The host is asked for fine-tuning alone: what
    does not learn are pages of files there, and what learns before that may wait in files, too.
    """
    if device.type == "cuda" and is_known(recipe):
        total = torch.cuda.get_device_properties(device).total_memory
        try:
            budget = Budget(recipe)
        except PpclError:
            return  # what is out of reach of the blocks that a plan assumes may be in reach of those that a run finds
        devices = processes.world()[1]
        _check_fits(budget, Machine(card=total, host=UNLIMITED, devices=devices))
        if "finetune" not in budget.idle:
            memory = Memory(recipe, budget.blocks, budget.plans, devices=devices)
            Whole(memory, total, UNLIMITED).tuning.chosen(total, host_bytes() * devices)


def _table(budget: Budget) -> dict[str, dict[str, dict[str, int]]]:
    table: dict[str, dict[str, dict[str, int]]] = {}
    for label, streamed, devices in (
        ("resident, 1 device", False, 1),
        ("streamed, 1 device", True, 1),
        (f"resident, {DEVICES} devices", False, DEVICES),
    ):
        machine = Machine(devices=devices)
        asked = [stage for stage in STAGES if stage not in absent(budget.recipe)]
        needs = {stage: budget.need(stage, streamed=streamed, machine=machine) for stage in asked}
        table[label] = {
            stage: {"device": need.device, "host": need.host * devices, "pages": need.pages}
            for stage, need in needs.items()
        }
    return table


def _calling(memory: Memory, machine: Machine | None, sizes: Sequence[Size]) -> tuple[str, ...]:
    return tuple(Whole(memory, machine.card, machine.host).calling(size.bytes) for size in sizes) if machine else ()


def _told(need: Need, devices: int) -> str:
    host = need.host * devices / 1e9
    return f"{need.device / 1e9:.1f} GB of a device" + (f" and {host:.1f} GB of the host" if host >= 0.05 else "")


def _basis(memory: Memory, tflops: float) -> tuple[str, ...]:
    recipe, model = memory.recipe, memory.blocks.model
    tokens = {name: tuple(v.shape) for name, v in model.example.items() if isinstance(v, Tensor) and v.ndim > 1}
    assumed = (
        "assumed, runs of two and three blocks in turn as in the paper's, in all stacks, and text streams and FFNs in "
        "turn with them, as far as they may go: the run finds its own"
    )
    found = "the recipe's operations, in its order" if are_given(recipe) or not recipe.searches else assumed
    if recipe.modulation is not None and recipe.modulation.rank is None:
        found += f"; modulation of rank {RANK}, assumed"
    if recipe.searches and memory.together:
        found += (
            f"; `select` takes about {memory.candidates} candidates for it, and measures what it has chosen together, "
            f"with and without each, {ROUNDS} times a target at most"
        )
    return (
        f"plans: {found}",
        f"one call: {', '.join(f'{name} {list(shape)}' for name, shape in tokens.items())}",
        "memory: held to counts of the real code on tensors without data; kernels' workspaces and fragments are not "
        f"in it; text encoders and autoencoder ({sum(model.others) / 1e9:.1f} GB) are",
        "files: weights read where they lie, by all processes together; without room on the host, they are read again, "
        f"at {RATE / 1e9:g} GB/s, an assumption; what comes to a device from memory is not timed",
        f"time: counted operations at {tflops:g} TFLOP/s a device, an assumption (--tflops)",
    )
