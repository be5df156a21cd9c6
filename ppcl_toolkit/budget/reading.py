"""Time that weights take which are read from their files again: the host had no room to keep them."""

from collections.abc import Callable
from math import ceil
from typing import Protocol

from ppcl_toolkit.budget.machine import ROOM, Machine
from ppcl_toolkit.budget.memory import TOGETHER, Memory
from ppcl_toolkit.budget.work import RANKS, STEPS, waves
from ppcl_toolkit.running.placement import BY_BLOCKS


class Stage(Protocol):
    """What a plan says of a stage."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def means(self) -> str: ...  # noqa: D102
    @property
    def host(self) -> int: ...  # noqa: D102


RATE = 2e9
"""Bytes a second at which files are read: an assumption."""


def reading_hours(memory: Memory, stage: Stage, machine: Machine) -> float:
    """Return how long a stage waits for weights that it reads again.

    Blocks come in turn, so that a host without room for all of them has let go of each before it is wanted again.
    Processes are in step: what one reads is there for the others.
    """
    blocks = memory.blocks
    if stage.means not in ("streamed", BY_BLOCKS) or not blocks.model.in_place:
        return 0.0
    if blocks.teacher + stage.host <= ROOM * machine.host:
        return 0.0
    return passes(memory, stage.name) * blocks.teacher / RATE / 3600


def passes(memory: Memory, stage: str) -> float:
    """Return how many times all blocks of the teacher come to a device in turn, when `stage` is streamed."""
    recipe, devices, chunk = memory.recipe, memory.devices, memory.recipe.teacher.chunk
    shown, low, tuned = recipe.evaluate, recipe.modulation, recipe.answered.steps
    steps = int(recipe.teacher.call.get("num_inference_steps", STEPS)) * memory.blocks.model.forwards
    candidates = ceil(memory.candidates / devices)

    def fed(batches: int) -> int:
        return ceil(batches / chunk)

    def students() -> float:
        return sum(memory.blocks.measured(name, plan).bytes for name, plan in memory.plans.items())

    found: dict[str, Callable[[], float]] = {
        "samples": lambda: ceil(recipe.samples.count / recipe.samples.batch / devices) * steps,
        # Of its batches it takes the block that shows what all are fed; once it looks at all layers, once it solves.
        "modulation": lambda: 2 + ceil((low.velocity_batches if low else 0) / devices) * RANKS,
        "probe": lambda: fed(recipe.probe.batches) + fed(recipe.probe.steps),
        "intervals": lambda: fed(ceil(recipe.intervals.batches / devices)),
        # Errors are those of whole calls, a batch at a time.
        "select": lambda: (
            (1 + candidates + memory.together) * recipe.select.batches
            + ceil(candidates / TOGETHER) * fed(recipe.select.batches)
        ),
        "depth": lambda: fed(recipe.depth.steps),
        "width": lambda: waves(memory.forms) * (fed(recipe.width.batches) + fed(recipe.width.steps)),
        "velocities": lambda: tuned,
        "evaluate": lambda: (
            ceil(shown.count / shown.batch / devices)
            * len(shown.seeds)
            * steps
            * (1 + students() / memory.blocks.teacher)
        ),
    }
    return found[stage]() if stage in found else 0.0
