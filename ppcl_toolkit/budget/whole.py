"""Memory of the stages that run whole models: recording, fine-tuning, export, evaluation."""

import contextlib
from dataclasses import dataclass, replace
from functools import cached_property

from ppcl_toolkit.budget.memory import Memory, Need
from ppcl_toolkit.budget.tuning import Tuning
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.running.placement import ALONE, BY_BLOCKS, IN_TURN, RESIDENT, ROOM, calling_means
from ppcl_toolkit.training.means import Means


@dataclass(frozen=True)
class Whole:
    """What calling pipelines and training whole students take, on devices of `card` bytes."""

    memory: Memory
    card: int
    host: int

    def how(self, stage: str) -> str:
        """Return by what means a stage that decides on them itself is made to fit; nothing of the others."""
        if stage == "finetune":
            return f"{self.means.optimizer}, offload {self.means.offload}"
        if stage == "samples":
            return self.calling(self._teacher, streamed=self.memory.streamed)
        if stage == "evaluate":
            both = self.calling(self._teacher, streamed=self.memory.streamed), self.calling(self._student)
            return max(both, key=(RESIDENT, IN_TURN, ALONE, BY_BLOCKS).index)
        if stage == "export":
            return RESIDENT if self._has(self._student) else BY_BLOCKS
        return ""

    def check(self) -> Need:
        """The pipeline for one prompt, and the teacher's forward of it; what went through its blocks is on the host.

        One process does it.
        """
        blocks = self.memory.blocks
        flow, beside = blocks.flow(1), blocks.beside(1)
        forward = self.memory.resting().device + blocks.forward(1) + 3 * flow + beside
        depth = sum(map(len, blocks.params.values()))
        device = max(self._called(self._teacher, 1, streamed=self.memory.streamed), forward)
        return self._teachers.beside(device, -(-depth * (2 * flow + beside) // self.memory.devices))

    def samples(self) -> Need:
        """Recording: the pipeline of the teacher, with as many of its parts on the device as it has room for."""
        batch, model = self.memory.recipe.samples.batch, self.memory.blocks.model
        # On the host are the calls of a step, those of the pictures before, and a copy of one on its way there.
        streamed = self.memory.streamed
        host = batch * model.sample_bytes * (2 * model.forwards + 1) + self._pinned(streamed=streamed)
        return self._teachers.beside(self._called(self._teacher, batch, streamed=streamed), host)

    def velocities(self) -> Need:
        """The teacher's answers to the batches of fine-tuning."""
        batch, memory = self.memory.recipe.finetune.batch, self.memory
        blocks, resting = memory.blocks, memory.resting()
        # Nothing but the streams is on its way, and blocks differ in what they weigh and in what they take.
        device = (
            resting.device - blocks.largest + blocks.visit(batch, cast=True) + blocks.flow(batch) + blocks.beside(batch)
        )
        # On the host is one batch; what is said to it, which is less, takes its place.
        return resting._replace(device=device).beside(0, batch * blocks.model.sample_bytes)

    def finetune(self) -> Need:
        """Fine-tuning of the largest student, with the teacher on the host."""
        return self.tuning.need(self.means)

    @cached_property
    def tuning(self) -> Tuning:
        """Fine-tuning of the largest student that is fine-tuned."""
        tuned = [plan for name, plan in self.memory.plans.items() if name in self.memory.recipe.tuned]
        return Tuning(self.memory, max(tuned, key=self.params, default=self._largest))

    @cached_property
    def means(self) -> Means:
        """How fine-tuning would be made to fit: where nothing does, the leanest that may be asked for."""
        with contextlib.suppress(PpclError):
            return self.tuning.chosen(self.card, self.host)
        section, spread = self.memory.recipe.finetune, self.memory.devices > 1 and self.memory.recipe.finetune.shard
        leanest = ("adamw8bit", "none") if spread else ("adafactor", "blocks")
        optimizer = leanest[0] if section.optimizer == "auto" else section.optimizer
        return Means(optimizer, leanest[1] if section.offload == "auto" else section.offload)

    def export(self) -> Need:
        """Assembling a variant beside the teacher, which is on the host by now, and running it once."""
        memory, batch = self.memory, self.memory.recipe.finetune.batch
        own = self._student
        # Of a teacher's block the bank has the modulation alone; of another one's modulation, only factors are read.
        forms = [form for form in self._largest.forms() if not replace(form, modulation=0).is_teacher]
        banked = sum(memory.blocks.size(form) for form in forms) * self._itemsize
        device = own if self._has(own) else memory.blocks.outside + 2 * memory.blocks.largest
        # Devices share the variants: no more of them are made at once than there are.
        made = min(memory.devices, len(memory.plans))
        return self._teachers.beside(device + self._running(batch), (banked + own) * made // memory.devices)

    def evaluate(self) -> Need:
        """Pictures of the teacher, then of each variant, which comes with text encoders of its own."""
        recipe, model = self.memory.recipe, self.memory.blocks.model
        batch = recipe.evaluate.batch
        call = recipe.teacher.call
        pixels = batch * int(call.get("height", 1024)) * int(call.get("width", 1024))
        decoding = model.adapter.decoding * self._itemsize // 2 * pixels
        # Variants come as there is room for them, whatever is asked for the teacher.
        streamed = self.memory.streamed
        taught = self._called(self._teacher, batch, decoding, streamed=streamed)
        device = max(taught, self._called(self._student, batch, decoding))
        # Pictures, and batches with what both say to them, in fp32.
        latents = model.example[model.adapter.latents].numel()
        held_out = recipe.evaluate.velocity_batches * recipe.samples.batch * (model.sample_bytes + 8 * latents)
        # What this run wrote is read in place.
        host = 12 * pixels + held_out + self._pinned(streamed=streamed)
        return self._teachers.beside(device, host, self._student + sum(self._others))

    @property
    def others(self) -> Need:
        """Bytes of text encoders and autoencoder, which are on the host in every stage."""
        return self.memory.frozen(sum(self._others))

    @property
    def _others(self) -> list[int]:
        return list(self.memory.blocks.model.others)

    @property
    def _itemsize(self) -> int:
        return self.memory.blocks.model.dtype.itemsize

    @property
    def _teacher(self) -> int:
        return self.memory.blocks.teacher

    @property
    def _teachers(self) -> Need:
        return self.memory.frozen(self._teacher)

    @property
    def _largest(self) -> Plan:
        """The plan of the largest target."""
        return max(self.memory.plans.values(), key=self.params)

    @property
    def _student(self) -> int:
        """Bytes of the largest student."""
        return self.params(self._largest) * self._itemsize + self.memory.blocks.buffers

    def params(self, plan: Plan) -> int:
        """Count the parameters of the student of `plan`."""
        blocks = self.memory.blocks
        return blocks.fixed + sum(blocks.size(form) for form in plan.forms())

    def _running(self, batch: int) -> int:
        """Bytes beside the weights while a model runs: of its streams there is what a block is given."""
        blocks = self.memory.blocks
        return blocks.forward(batch) + blocks.flow(batch) + blocks.beside(batch)

    def _has(self, weights: int) -> bool:
        return weights <= ROOM * self.card

    def calling(self, transformer: int, *, streamed: bool = False) -> str:
        """Return how a pipeline is called whose transformer weighs so many bytes."""
        return calling_means(transformer, self._others, self._has, streamed=streamed)

    def _pinned(self, *, streamed: bool) -> int:
        """Bytes of the host from which a block comes to a device while another one runs there."""
        return self.memory.blocks.largest if self.calling(self._teacher, streamed=streamed) == BY_BLOCKS else 0

    def _called(self, transformer: int, batch: int, decoding: int = 0, *, streamed: bool = False) -> int:
        """Bytes of a device on which a pipeline is called."""
        means, others, blocks = self.calling(transformer, streamed=streamed), self._others, self.memory.blocks
        running, largest = self._running(batch * blocks.model.forwards), max(others, default=0)
        if means == RESIDENT:
            return transformer + sum(others) + max(running, decoding)
        if means == IN_TURN:
            return transformer + max(largest, running, decoding)
        if means == ALONE:
            return max(transformer + running, largest + decoding)
        return max(blocks.outside + 2 * blocks.largest + running, blocks.outside + max(largest, decoding))
