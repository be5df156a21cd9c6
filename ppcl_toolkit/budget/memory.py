"""Memory of the stages that run a teacher block by block: what is alive at once on a device and on its host.

teacher     at rest on the device (resident), or its blocks on the host and one at a time on the device (streamed);
            for probes and with `split: segments`, every device has a slice of it and what learns there
a learner   fp32 weight and two moments: 12 bytes a parameter; gradients, and lists in the optimizer's step: 8
a probe     sums in fp64: 16 bytes for every pair of features; in training 16 more
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import NamedTuple

from ppcl_toolkit.budget.blocks import Blocks, Trained
from ppcl_toolkit.plan import Form, ModulationSwap, Plan, TextRun, trained_forms
from ppcl_toolkit.recipe import Distillation, Recipe
from ppcl_toolkit.running.passage import Place
from ppcl_toolkit.running.slices import block_costs, slices
from ppcl_toolkit.selection.candidates import ffn_candidates
from ppcl_toolkit.selection.joint import ROUNDS
from ppcl_toolkit.stages.modulation import AT_ONCE, MOST_SHOWN

WEIGHT, LEARNING, STEP = 4, 12, 8
"""Bytes of a parameter that learns: its weight; at rest; and of its gradient and the lists of AdamW's step."""
SUMS, FITTED, TRAINED = 16, 4, 12
"""Bytes of a pair of features: sums of the normal equations, what they come to, and that in training with moments."""
TOGETHER = 16
"""Candidates that `select` measures in one pass, and samples whose chains are followed together."""
_HEATMAP = 8 * 2**30
"""Bytes of outputs that wait for a heatmap."""


class Need(NamedTuple):
    """Bytes of a device and of its host."""

    device: int
    host: int
    pages: int = 0
    """Of files that the host reads from and all processes share: the system drops them where memory is short."""

    def beside(self, device: int, host: int, pages: int = 0) -> "Need":
        """Return this and so many more bytes."""
        return Need(self.device + device, self.host + host, self.pages + pages)


@dataclass(frozen=True)
class Memory:
    """What the stages of one recipe take of each of `devices`, and of the host for each."""

    recipe: Recipe
    blocks: Blocks
    plans: Mapping[str, Plan]
    streamed: bool = False
    devices: int = 1
    waiting: int | None = None
    """Bytes of the host in which learners wait, when streamed; more of them wait in files."""

    def probe(self) -> Need:
        """Linear probes: sums of a slice's blocks on the host, and their probes in training."""
        section = self.recipe.probe
        squares, most = self.squares()
        passing, waiting = self.passing(section.batch)
        # While a block runs, of the streams there is what it is given.
        flow = 2 * self.blocks.flow(section.batch)
        at_work = self._at_work(section.batch, self._added_up(section.batch) + flow) + passing - flow
        visiting = 2 * most * (SUMS if self.streamed else TRAINED)
        each = SUMS + FITTED + (TRAINED if section.steps else 0)
        needs, places = [], [Place(s, b, b) for s, own in self.blocks.params.items() for b in range(len(own))]
        for held, read in self._slices(places):
            pairs = sum(sum(self._pairs[places[number].stack]) for number in read)
            # No batch waits any more when the equations are solved, unless probes are trained then.
            solved = pairs * each + (waiting if section.steps else 6 * 8 * most)
            # The first process writes the probes of all.
            host = max(pairs * SUMS + waiting, solved, squares * FITTED)
            needs.append(self.resting(held).beside(at_work + visiting, host))
        return largest(needs)

    def modulation(self) -> Need:
        """Modulation of low rank: one layer at a time in fp64, all factors on the host, and whole forwards."""
        section = self.recipe.modulation
        if section is None:
            return self.resting()
        shapes = self.blocks.modulation
        resting, own = self.resting(), self.blocks.largest if self.streamed else 0
        # The weight, its product with the root of the covariance, and five squares on the way.
        exact = resting.device - own + 8 * max(2 * R * D + 5 * D * D for R, D in shapes)
        most = min(AT_ONCE, *(R * D // (R + D) for R, D in shapes))
        measured = min(most, max(section.rank or most, MOST_SHOWN))
        # All factors in fp32, copies of as many rows as are measured, and the sums of one source.
        host = 4 * sum(most * (R + D) + measured * R for R, D in shapes) + 8 * max(D * D for _, D in shapes)
        batch = section.batch
        whole = resting.device + self.blocks.forward(batch) + self.blocks.flow(batch) + self.blocks.beside(batch)
        return Need(max(exact, whole), resting.host + host)

    def intervals(self) -> Need:
        """Similarities: chains of some samples, one after another; outputs of all blocks for the heatmap."""
        section = self.recipe.intervals
        squares, _ = self.squares()
        device, host = 0, squares * FITTED
        for call in self.blocks.calls(section.batch):
            depth = len(self.blocks.params[call.stack.path])
            chains = [self._chains(*stream.shape) for stream in call.streams if stream is not None]
            outputs = [stream.nbytes for stream in call.streams if stream is not None]
            compared = max(depth * own // section.batch for own in outputs)
            device = max(device, sum(chains), compared)
            together = self.recipe.teacher.chunk if self.streamed else 1
            waiting = [min(together, -(-_HEATMAP // (depth * own))) * depth * own for own in outputs]
            host = max(host, squares * FITTED + sum(waiting))
        if not self.streamed:
            device, host = device + squares * FITTED, host
        at_work = self._at_work(section.batch, device)
        return self.resting().beside(at_work, host).beside(*self.passing(section.batch))

    def select(self) -> Need:
        """Substitution errors: maps of some candidates at a time, whose sums are on the host."""
        section = self.recipe.select
        _, most = self.squares()
        host = min(-(-self.candidates // self.devices), TOGETHER) * 2 * SUMS * most
        if section.order == "program":
            host = max(host, *map(self._together, self.plans.values()))
        host += 7 * 8 * most
        at_work = self._at_work(section.batch, self._added_up(section.batch))
        # The first blocks of the intervals that end at a block come for its readings.
        firsts = section.longest - 1 if section.order == "program" else 1
        at_work += firsts * self.blocks.largest if self.streamed else 0
        return self.resting().beside(at_work, host).beside(*self.passing(section.batch))

    def _together(self, plan: Plan) -> int:
        """Bytes of the maps of what is measured together, in fp64, and of the sums that the last of them come from."""
        placed = [each for each in plan.operations if not isinstance(each, TextRun | ModulationSwap)]
        sums = [SUMS * sum(self._pairs[operation.stack]) for operation in placed]
        starts = range(0, len(sums), TOGETHER)
        return max((sum(sums[:s]) // 2 + sum(sums[s : s + TOGETHER]) for s in starts), default=0)

    @cached_property
    def candidates(self) -> int:
        """About how many operations `select` measures: as many as there are blocks, where the recipe gives none.

        For a program, all intervals up to `longest`, and with width every FFN, with and without the text's, and the
        parts of one run of text of as many blocks as may go.
        """
        section, width = self.recipe.select, self.recipe.width
        found = {str(operation) for plan in self.plans.values() for operation in plan.operations}
        if self.recipe.intervals.strategy == "given":
            return len(found)
        if section.order != "program":
            # At most half as many intervals as blocks, and about as many FFNs and text streams.
            return max(len(found), sum(map(len, self.blocks.params.values())))
        depths = {s: len(own) - self.recipe.intervals.first_block.get(s, 0) for s, own in self.blocks.params.items()}
        count = sum(max(0, left - n) for left in depths.values() for n in range(1, section.longest))
        if any(target.width for target in self.recipe.targets) and not width.given:
            count += sum(len(swap.streams) for swap in ffn_candidates(self.blocks.model.runner, width))
            count += width.text_blocks * (width.text_blocks + 1) // 2
        return max(len(found), count)

    @cached_property
    def together(self) -> int:
        """How many times, at most, `select` runs the teacher with a choice in place, or all but one of it."""
        if self.recipe.select.order != "program":
            return 0
        placed = [sum(not isinstance(o, TextRun | ModulationSwap) for o in p.operations) for p in self.plans.values()]
        return sum(ROUNDS * (2 + count + ceil(count / TOGETHER)) for count in placed if count)

    def depth(self) -> Need:
        """Distillation of intervals: all students at once, or one on the device at a time."""
        section = self.recipe.depth
        forms = [form for form in self.forms if form.is_stock]
        return self._distilled(forms, [self.blocks.trained(form, section.batch) for form in forms], section)

    def width(self) -> Need:
        """Linear text streams and FFNs, in two waves."""
        section = self.recipe.width
        narrow = [form for form in self.forms if not form.is_stock]
        needs = [self.resting()]
        for wave in ([f for f in narrow if not _both(f)], [f for f in narrow if _both(f)]):
            learners = [self.blocks.trained(form, section.batch, section.alignment) for form in wave]
            needs.append(self._distilled(wave, learners, section))
        return largest(needs)

    @cached_property
    def forms(self) -> list[Form]:
        """Everything that is trained for the bank."""
        return trained_forms(self.plans.values())

    def resting(self, held: int | None = None) -> Need:
        """Bytes of the teacher, of whose blocks `held` bytes are needed here, all of them by default."""
        blocks = self.blocks
        inside = blocks.teacher - blocks.outside
        held = blocks.largest if self.streamed else inside if held is None else held
        return self.frozen(blocks.teacher).beside(blocks.outside + held, 0)

    def frozen(self, size: int) -> Need:
        """Bytes of published weights that do not learn, as the host has them: read in place, or in another dtype."""
        return Need(0, 0, size) if self.blocks.model.in_place else Need(0, size)

    def passing(self, batch: int) -> tuple[int, int]:
        """Bytes of batches on their way on the device, and of those that wait on the host."""
        flow, beside = self.blocks.flow(batch), self.blocks.beside(batch)
        # What a block is given, what it returns, and where the interval around it began.
        return 3 * flow + beside, (2 * flow + beside) * self.recipe.teacher.chunk if self.streamed else 0

    def _distilled(self, forms: Sequence[Form], learners: Sequence[Trained], section: Distillation) -> Need:
        if not learners:
            return self.resting()
        if self.devices == 1 or section.split == "samples":
            return self._trained(self.resting(), learners, section)
        known = dict(zip([form.key for form in forms], learners, strict=True))
        needs = [
            self._trained(self.resting(held), [known[forms[number].key] for number in own], section)
            for held, own in self._slices(forms)
        ]
        return largest(needs)

    def _trained(self, resting: Need, learners: Sequence[Trained], section: Distillation) -> Need:
        """Add what learns on one device."""
        forward = self.blocks.forward(section.batch)
        at_work = max([max(e.step.forward, e.step.backward, e.params * STEP) for e in learners], default=forward)
        own = [each.params * LEARNING + each.wider for each in learners]
        passing, waiting = self.passing(section.batch)
        if self.streamed:
            placed = sum(own) if self.waiting is None else min(sum(own), self.waiting)
            # All narrow blocks are made before the first finds its place.
            made = sum(own) * WEIGHT // LEARNING if section is self.recipe.width else 0
            return resting.beside(max(own, default=0) + at_work + passing, max(placed, made) + waiting)
        # A state is written learner by learner.
        saved = max((each.params * LEARNING for each in learners), default=0)
        return resting.beside(sum(own) + at_work + passing, saved)

    def _slices(self, places: Sequence[Place | Form]) -> list[tuple[int, list[int]]]:
        """Return for each device the bytes of the blocks that it holds, and which of `places` are read there."""
        model = self.blocks.model
        flat = [params for own in self.blocks.params.values() for params in own]
        offsets, before = {}, 0
        for stack, own in self.blocks.params.items():
            offsets[stack], before = before, before + len(own)
        spans = [(offsets[place.stack] + place.first, offsets[place.stack] + place.last) for place in places]
        found = []
        costs = self.blocks.once("costs", lambda: block_costs(model.transformer, model.adapter, model.example))
        for part in slices(costs, spans, self.devices):
            held = {*part.blocks, *(block for first, last in part.spans for block in range(first, last + 1))}
            mine = [number for number, span in enumerate(spans) if span in part.spans]
            found.append((sum(flat[block] for block in held) * model.dtype.itemsize, mine))
        return found

    def squares(self) -> tuple[int, int]:
        """Return the pairs of features of all blocks' streams, and those of the widest stream."""
        total = sum(sum(own) * len(self.blocks.params[stack]) for stack, own in self._pairs.items())
        return total, max(map(max, self._pairs.values()))

    @cached_property
    def _pairs(self) -> dict[str, list[int]]:
        """Pairs of features of each stream, by stack."""
        return {
            call.stack.path: [stream.shape[-1] ** 2 for stream in call.streams if stream is not None]
            for call in self.blocks.calls(1)
        }

    def _at_work(self, batch: int, reading: int) -> int:
        """Bytes beside a teacher at rest: what running a block takes, or `reading` what it was given and returned."""
        # At rest, the largest block is there, and it may be another one that takes the most.
        running = self.blocks.visit(batch) - self.blocks.largest if self.streamed else self.blocks.forward(batch)
        return max(running, reading)

    def _added_up(self, batch: int) -> int:
        """Bytes that adding one batch to normal equations takes: inputs and updates in fp64, and two products."""
        sides = [s for call in self.blocks.calls(batch) for s in call.streams if s is not None]
        return max(24 * stream.numel() + SUMS * stream.shape[-1] ** 2 for stream in sides)

    def _chains(self, batch: int, tokens: int, features: int) -> int:
        """Bytes of chains that are followed together: reduced rows, and Gram matrices up to their diagonal."""
        rows = min(tokens, features)
        kept, gram = 4 * rows * features, int(4 * 0.5625 * rows**2)
        centred = 3 * 4 * batch * tokens * features
        return TOGETHER * (kept + gram) + max(batch * (3 * kept + 2 * gram), centred)


def largest(needs: Iterable[Need]) -> Need:
    """Return the most of each kind."""
    return Need(*map(max, zip(*needs, strict=True)))


def _both(form: Form) -> bool:
    return form.narrow_text and bool(form.ffn)
