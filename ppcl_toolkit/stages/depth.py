"""Stage `depth`: non-sequential distillation of intervals (Eq. 6 and 7, Algorithm 1 lines 16-23).

Every interval [u, v] has one student block, which sees the teacher's input to u and learns the teacher's output of v.

    depth: {steps: 6000, batch: 2, learning_rate: 1.0e-4, loss: direction, init: first, inputs: teacher}
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from torch import nn

from ppcl_toolkit import processes
from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.artifacts.storage import Desk, save_tree
from ppcl_toolkit.plan import Form, Plan, trained_forms
from ppcl_toolkit.recipe import Depth
from ppcl_toolkit.running.capture import run_block
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.placement import Homes
from ppcl_toolkit.running.schedule import Reading, Runner
from ppcl_toolkit.statistics.moments import Moments
from ppcl_toolkit.surgery.assemble import standing_in
from ppcl_toolkit.training.distill import finish, shared_out, train_segments
from ppcl_toolkit.training.loop import Optimization
from ppcl_toolkit.training.losses import LOSSES
from ppcl_toolkit.training.segment import Segment
from ppcl_toolkit.training.shelf import Shelf

_INIT_BATCHES = 8


def distill_depth(
    runner: Runner,
    plans: Sequence[Plan],
    batches: Batches,
    section: Depth,
    desk: Desk,
    *,
    starts: Mapping[str, Sequence[int]] | None = None,
) -> list[str]:
    """Train one block per interval of `plans` and bank it; return the segments that stopped early, and why.

    With `starts` nothing is trained: see `bank_starts`.
    """
    if starts:
        bank_starts(runner, plans, starts, desk)
        return []
    forms = [form for form in trained_forms(plans) if form.is_stock]
    keys = [form.key for form in forms]
    sliced, own = shared_out(runner, forms, batches, section)
    segments, shelf = [], Shelf(desk.folder, runner.placement.waiting)
    for form, student in zip(own, initial_students(sliced, own, batches, section.init), strict=True):
        # Masters are fp32: half-precision updates vanish in half-precision weights.
        student = student.float().requires_grad_(True)
        optimization = Optimization(
            form.key, [student], section, exchange=section.split == "samples", device=runner.placement.device
        )
        stack = runner.adapter.stack(form.stack)
        segments.append(Segment(form, stack, student, optimization, LOSSES[section.loss]))
        if runner.placement.streamed:
            segments[-1].wait_on(shelf)
    follow_from = {"teacher": None, "student": 0, "mixed": section.steps // 2}[section.inputs]
    stopped = train_segments(sliced, segments, batches, section, desk, keys=keys, follow_from=follow_from)
    finish(desk.folder, keys)
    return stopped


def bank_starts(runner: Runner, plans: Sequence[Plan], starts: Mapping[str, Sequence[int]], desk: Desk) -> None:
    """Bank what every interval begins with, and train nothing: the block that `starts` has by its key, or their mean.

    Intervals that are not among them begin with their first block.
    """
    for form in (form for form in trained_forms(plans) if form.is_stock and processes.is_main()):
        blocks = runner.blocks(form.stack)
        start = mean_of([blocks[index] for index in starts.get(form.key, (form.first,))])
        block = standing_in(runner.transformer, runner.adapter, form, start)
        save_tree(desk.folder / f"{form.key}.safetensors", dict(block.state_dict()))


def initial_students(runner: Runner, forms: Sequence[Form], batches: Batches, init: str) -> Iterator[nn.Module]:
    """Yield what each interval's student starts from: block u, the best block or the mean, shaped for its place."""
    for form, start in zip(forms, _starts(runner, forms, batches, init), strict=True):
        yield standing_in(runner.transformer, runner.adapter, form, start)


def _starts(runner: Runner, forms: Sequence[Form], batches: Batches, init: str) -> Iterator[nn.Module]:
    runs = [list(runner.blocks(form.stack))[form.first : form.last + 1] for form in forms]
    if init == "average":
        return (mean_of(run) for run in runs)
    if init == "best":
        readers = [_BestBlock(f, runner.adapter.stack(f.stack), run) for f, run in zip(forms, runs, strict=True)]
        for _ in runner.feed(batches(0, _INIT_BATCHES), readers):
            pass
        return (copy.deepcopy(reader.best()) for reader in readers)
    return (copy.deepcopy(run[0]) for run in runs)


@final
class _BestBlock:
    """Which block of an interval comes nearest to the teacher's output behind a least-squares map."""

    reference: tuple[int, int] | None = None

    def __init__(self, form: Form, stack: Stack, run: Sequence[nn.Module]) -> None:
        self.stack, self.first, self.last = stack, form.first, form.last
        self._run = [block for block in run if _alike(block, run[0])]
        self._homes = Homes()
        self._moments: list[dict[str, Moments]] = [{} for _ in self._run]

    def read(self, reading: Reading) -> None:
        for block, moments in zip(self._run, self._moments, strict=True):
            output = run_block(block, self.stack, reading.arguments, reading.inputs)
            for name, y in reading.target.of(self.stack.streams).items():
                x = getattr(output, name)
                sums = moments.setdefault(name, Moments.zeros(x.shape[-1]))
                sums.add(reading.tokens(name, x), reading.tokens(name, y))

    def place(self, device: torch.device) -> None:
        for block in self._run:
            self._homes.carry(block, device)

    def best(self) -> nn.Module:
        def missed(moments: dict[str, Moments]) -> float:
            return sum(m.unexplained(m.solve(bias=True)) * float(m.energy) for m in moments.values())

        return min(zip(self._run, self._moments, strict=True), key=lambda pair: missed(pair[1]))[0]


def mean_of(run: Sequence[nn.Module]) -> nn.Module:
    """Return a copy of the first block with the mean weights of all that are shaped like it."""
    student = copy.deepcopy(run[0])
    states = [block.state_dict() for block in run if _alike(block, run[0])]
    mean = {name: torch.stack([s[name].double() for s in states]).mean(0).to(v.dtype) for name, v in states[0].items()}
    student.load_state_dict(mean)
    return student


def _alike(one: nn.Module, other: nn.Module) -> bool:
    shapes = [{name: value.shape for name, value in block.state_dict().items()} for block in (one, other)]
    return shapes[0] == shapes[1]
