"""Which schedule each stage of a run has its teacher by, where the recipe leaves that open."""

from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch

from ppcl_toolkit import processes
from ppcl_toolkit.budget.machine import UNLIMITED, Machine
from ppcl_toolkit.budget.report import Budget
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.placement import fits
from ppcl_toolkit.running.schedule import Runner


@final
class Schedules:
    """Has every stage run as its recipe asks; with `streamed: auto`, as `ppcl plan` says of the present device."""

    def __init__(self, recipe: Recipe, runner: Runner) -> None:
        self._recipe, self._runner = recipe, runner
        self._budget: Budget | None = None
        self._streamed: list[str] = []

    def runner(self, stage: str, plans: Mapping[str, Plan] | None = None) -> Runner:
        """Return the teacher as `stage` shall have it; once targets are chosen, for their `plans`."""
        streamed = self._is_streamed(stage, plans)
        if streamed and self._recipe.teacher.streamed == "auto" and stage not in self._streamed:
            self._streamed.append(stage)
        return replace(self._runner, placement=replace(self._runner.placement, streamed=streamed))

    def said(self) -> list[str]:
        """Return what a user should know of what was not asked for."""
        return [f"teacher.streamed: auto is true for {', '.join(self._streamed)}"] if self._streamed else []

    def _is_streamed(self, stage: str, plans: Mapping[str, Plan] | None) -> bool:
        asked, device = self._recipe.teacher.streamed, self._runner.placement.device
        if asked != "auto" or device.type == "cpu":
            return asked is True
        try:
            if self._budget is None or (plans and dict(plans) != self._budget.plans):
                self._budget = Budget(self._recipe, plans, self._budget.blocks if self._budget else None)
        except PpclError:
            # A teacher whose adapter tells no shapes, or a target that is out of reach of assumed blocks.
            return not fits([self._runner.transformer], device)
        total = torch.cuda.get_device_properties(device).total_memory
        machine = Machine(card=total, host=UNLIMITED, devices=processes.world()[1])
        return self._budget.streamed(stage, machine)
