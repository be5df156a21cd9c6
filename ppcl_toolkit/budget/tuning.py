"""Memory of fine-tuning: by the means that the stage itself would choose on such devices and such a host."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ppcl_toolkit.budget.memory import Memory, Need
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.running.numbers import Numbers
from ppcl_toolkit.surgery.assemble import student_blocks
from ppcl_toolkit.training.means import BYTES, Job, Machine, Means, choose_means, job_of

_FILE = 8 * 2**30
"""Bytes of a state that are on the host while its files are written: one, and the next."""


@dataclass(frozen=True)
class Tuning:
    """What training a whole student takes, beside a teacher that is on the host."""

    memory: Memory
    plan: Plan

    def need(self, means: Means) -> Need:
        """Return what some means take of each device and, for each, of the host."""
        weight, gradient, moments, _ = self._bytes(means.optimizer)
        section, blocks = self.memory.recipe.finetune, self.memory.blocks
        total, inside = self._params, sum(blocks.size(form) for form in self.plan.forms())
        teacher = self.memory.frozen(blocks.teacher)
        written = min(_FILE, (weight + moments) * total)
        if means.offload == "blocks":
            at_rest = (weight + gradient + moments) * (total - inside) + blocks.buffers
            visiting = weight + (moments if means.optimizer != "adamw" else gradient)
            host = (weight + gradient + moments) * inside
            return teacher.beside(int(at_rest + self._at_work(means, visiting=visiting)), int(host + written))
        share = self.memory.devices if section.shard else 1
        # Sharded, two blocks are whole at a time, and gradients of one.
        gathered = 0 if share == 1 else blocks.largest * 2 + blocks.largest // blocks.model.dtype.itemsize * 4
        at_rest = (weight + moments) * total / share + blocks.buffers
        device = at_rest + gathered + self._at_work(means, gradient * total // share)
        return teacher.beside(int(device), int(min(_FILE, (weight + moments) * total / share)))

    def chosen(self, card: int, host: int) -> Means:
        """Return the means that the stage chooses; `PpclError` where none would do."""
        section = self.memory.recipe.finetune
        free = host // self.memory.devices - self.memory.frozen(self.memory.blocks.teacher).host
        machine = Machine(device_bytes=card, host_bytes=free, ranks=self.memory.devices, shard=section.shard)
        return choose_means(self.job, machine, section.optimizer, section.offload)

    @property
    def job(self) -> Job:
        """The job as the stage measures it."""
        section = self.memory.recipe.finetune
        return self.memory.blocks.once(
            ("job", self.plan.operations, section.batch, section.gradient_checkpointing), self._job
        )

    def _job(self) -> Job:
        model, section = self.memory.blocks.model, self.memory.recipe.finetune
        student: Any = model.student(self.plan).requires_grad_(True)
        blocks = [block for block, _ in student_blocks(student, model.adapter, self.plan)]
        call = partial(student, **{name: self._many(name, value) for name, value in model.example.items()})
        return job_of(student, blocks, call, recomputed=section.gradient_checkpointing)

    @cached_property
    def _params(self) -> int:
        blocks = self.memory.blocks
        return blocks.fixed + sum(blocks.size(form) for form in self.plan.forms())

    def _at_work(self, means: Means, gradients: int = 0, visiting: float = 0.0) -> float:
        """Bytes of activations, of gradients that wait, of steps in the backward pass, and of a block that is visiting.

        At their highest: `visiting` is by parameter.
        """
        section, blocks = self.memory.recipe.finetune, self.memory.blocks
        again = section.gradient_checkpointing or means.offload == "blocks"
        work = self._bytes(means.optimizer)[3]
        kept, most, at_end = 0, 0.0, 0
        for form in self.plan.forms():
            learner = blocks.trained(form, section.batch, None, exact=means.optimizer == "adamw")
            at_once = max(learner.step.forward, learner.step.backward - 4 * learner.params)
            # The inputs of this block and of those before it wait for their turn in the backward pass.
            kept += blocks.call(blocks.model.adapter.stack(form.stack), section.batch).flow if again else at_once
            stepping = learner.step.kept + work * learner.widest
            own = max(at_once, stepping) if again else max(0, stepping - at_once)
            most = max(most, kept + own + visiting * learner.params)
            at_end = max(at_end, at_once)
        return max(most, gradients + at_end)

    def _many(self, name: str, value: Any) -> Any:
        adapter, batch = self.memory.blocks.model.adapter, self.memory.recipe.finetune.batch
        if isinstance(value, Numbers):
            return Numbers(torch.cat([value.known] * batch))
        if isinstance(value, Tensor) and name not in adapter.shared:
            return torch.empty((batch, *value.shape[1:]), dtype=value.dtype, device="meta")
        return value * batch if isinstance(value, list) else value

    def _bytes(self, optimizer: str) -> tuple[int, int, float, int]:
        weight, gradient, moments, work = BYTES[optimizer]
        half = self.memory.blocks.model.dtype == torch.bfloat16
        return weight if half else 4, gradient, moments, work
