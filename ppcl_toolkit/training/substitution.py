"""What a candidate costs: the error of the whole teacher with it alone in place, by least squares and untrained."""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.plan import FfnSwap, Form, Interval, Plan, TextRun
from ppcl_toolkit.running.capture import bind, passing, rerouted, run_block
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.placement import Homes, Placement
from ppcl_toolkit.running.schedule import Reading, Runner
from ppcl_toolkit.statistics.moments import Moments
from ppcl_toolkit.surgery.assemble import Calls, example_calls
from ppcl_toolkit.surgery.narrow import narrow
from ppcl_toolkit.training.segment import LinearFit
from ppcl_toolkit.units import Cost

Candidate = Interval | TextRun | FfnSwap
_TOGETHER = 16
"""Candidates that share a pass of the teacher: the sums of each take 150 MB of the host per stream of 3072 features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A candidate, what it costs and what it saves."""

    operation: Candidate
    error: float
    """Relative velocity error |v - v_teacher| / |v_teacher| with this candidate alone, untrained."""
    saves: Cost
    """Of the teacher's, alone."""

    def price(self, missing: Mapping[str, int]) -> float:
        """Return the error per share saved of what is missing, by unit: of one unit, per parameter, byte or FLOP."""
        # The shares, on the common denominator: exact.
        saved = sum(self.saves.of(unit) * math.prod(missing[o] for o in missing if o != unit) for unit in missing)
        return self.error / max(saved, 1)


def measure(
    runner: Runner, plan: Plan, candidates: Sequence[Candidate], batches: Batches, count: int
) -> Iterator[tuple[Candidate, float]]:
    """Yield every candidate with its substitution error over `count` batches; as many others set its linear maps."""
    if not candidates:
        return
    held_out = list(batches(0, count))
    example = example_calls(runner.transformer, runner.adapter, held_out[0])
    velocities = [runner.velocity(batch) for batch in held_out]
    for start in range(0, len(candidates), _TOGETHER):
        group = candidates[start : start + _TOGETHER]
        stands = [_substitute(runner, plan, candidate, example) for candidate in group]
        for _ in runner.feed(batches(count, 2 * count), [reader for stand in stands for reader in stand.readers]):
            pass
        for candidate, stand in zip(group, stands, strict=True):
            stand.solve()
            with stand.installed(runner.placement):
                pairs = zip(held_out, velocities, strict=True)
                errors = [_relative(runner.velocity(batch), velocity) for batch, velocity in pairs]
            yield candidate, sum(errors) / len(errors)


def measure_together(
    runner: Runner, plan: Plan, operations: Sequence[Candidate], batches: Batches, count: int
) -> tuple[float, list[float]]:
    """Return the error with all of `operations` in place, and that without each of them, as `measure` has them.

    Each keeps the linear maps that it has alone. Text runs reach over other operations and are left out: without one of
    them, the error is that with all.
    """
    held_out = list(batches(0, count))
    example = example_calls(runner.transformer, runner.adapter, held_out[0])
    velocities = [runner.velocity(batch) for batch in held_out]
    stands: dict[Candidate, _Stand] = {}
    placed: list[Candidate] = [operation for operation in operations if not isinstance(operation, TextRun)]
    for start in range(0, len(placed), _TOGETHER):
        group = {
            operation: _substitute(runner, plan, operation, example) for operation in placed[start : start + _TOGETHER]
        }
        for _ in runner.feed(
            batches(count, 2 * count), [reader for stand in group.values() for reader in stand.readers]
        ):
            pass
        for stand in group.values():
            stand.solve()
        stands |= group

    def error(present: Sequence[_Stand]) -> float:
        with contextlib.ExitStack() as stack:
            # Of a block that stands for an interval and has linear FFNs, the map of the interval is behind those.
            for stand in sorted(present, key=lambda stand: stand.affine is not None):
                stack.enter_context(stand.installed(runner.placement))
            pairs = zip(held_out, velocities, strict=True)
            return sum(_relative(runner.velocity(batch), velocity) for batch, velocity in pairs) / count

    every = error([*stands.values()])
    without = {one: error([stand for other, stand in stands.items() if other != one]) for one in stands}
    return every, [without.get(operation, every) for operation in operations]


@dataclass(slots=True)
class _Stand:
    """What takes the place of a candidate's blocks while it is measured."""

    blocks: list[tuple[nn.Module, Any]]
    """Blocks and the forwards that run instead."""
    readers: list[Any]
    thin: list[nn.Module] = field(default_factory=list)
    """Narrow blocks among them: what they have of their own is brought to the device when they run."""
    affine: "_Affine | None" = None

    def solve(self) -> None:
        for reader in self.readers:
            reader.solve(1e-6)

    @contextlib.contextmanager
    def installed(self, placement: Placement) -> Iterator[None]:
        if self.affine is not None:
            self.affine.stands_on = self.blocks[0][0].forward
        with contextlib.ExitStack() as stack:
            stack.enter_context(placement.visiting(*self.thin))
            for block, forward in self.blocks:
                stack.enter_context(rerouted(block, forward))
            yield


def _substitute(runner: Runner, plan: Plan, candidate: Candidate, example: Calls) -> _Stand:
    stack = runner.adapter.stack(candidate.stack)
    blocks = runner.blocks(candidate.stack)
    if isinstance(candidate, Interval):
        run = list(blocks)[candidate.first : candidate.last + 1]
        affine = _Affine(stack, candidate, run[0])
        forwards = [(run[0], affine.forward), *((block, passing(block, stack)) for block in run[1:])]
        return _Stand(forwards, [affine], affine=affine)
    forwards, readers, thin_blocks = [], [], []
    for form in plan.with_operations([candidate]).forms():
        if form.stack == candidate.stack and not form.is_stock:
            block = blocks[form.first]
            thin = _thinned(block, stack, form, example[form.stack])
            forwards.append((block, thin.__call__))
            thin_blocks.append(thin)
            if not form.is_teacher:
                readers.append(LinearFit(form, stack, thin, block))
    return _Stand(forwards, readers, thin_blocks)


@final
class _Affine:
    """An interval's first block with a least-squares map behind it, per stream."""

    reference: tuple[int, int] | None = None

    def __init__(self, stack: Stack, interval: Interval, block: nn.Module) -> None:
        self.stack, self.first, self.last = stack, interval.first, interval.last
        self._block = block
        self.stands_on = block.forward
        """What the map is behind."""
        self._homes = Homes()
        self._moments: dict[str, Moments] = {}
        self._maps: dict[str, Tensor] = {}

    def read(self, reading: Reading) -> None:
        output = run_block(self._block, self.stack, reading.arguments, reading.inputs)
        for name, y in reading.target.of(self.stack.streams).items():
            x = getattr(output, name)
            sums = self._moments.setdefault(name, Moments.zeros(x.shape[-1]))
            sums.add(reading.tokens(name, x), reading.tokens(name, y))

    def place(self, device: torch.device) -> None:
        self._homes.carry(self._block, device)

    def solve(self, ridge: float) -> None:
        self._maps = {name: m.solve(ridge, bias=True) for name, m in self._moments.items()}
        self._moments = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments, streams = bind(self._block, self.stack, args, kwargs)
        given = {self.stack.argument(name): value for name, value in streams.of(self.stack.streams).items()}
        output = self.stands_on(**arguments, **given)
        values = output if isinstance(output, tuple) else (output,)
        mapped = [self._map(name, value) for name, value in zip(self.stack.returns, values, strict=True)]
        return tuple(mapped) if isinstance(output, tuple) else mapped[0]

    def _map(self, name: str, x: Tensor) -> Tensor:
        if name not in self._maps:  # Nobody reads the text behind SD3's last block.
            return x
        weight = self._maps[name].to(x)
        return x + x @ weight[:, :-1].T + weight[:, -1]


def _thinned(block: nn.Module, stack: Stack, form: Form, example: tuple[Any, Any]) -> nn.Module:
    """Return a narrow copy that shares what it keeps with `block`."""
    thin = copy.deepcopy(block, {id(p): p for p in block.parameters()})
    narrow(thin, stack, form, *example)
    return thin


def _relative(velocity: Tensor, teacher: Tensor) -> float:
    return float((velocity - teacher).norm() / teacher.norm())
