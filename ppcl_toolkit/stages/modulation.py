"""Stages `modulation` and `low_rank`: modulation layers become maps of low rank, in closed form and without training.

What they are fed is recorded over all timesteps, the empty prompt and several values of guidance; the rank is given,
or the smallest one whose measured velocity error stays below a bound.

    modulation: {rank: 32}
    modulation: {error: 0.02, guidance: [1.0, 3.5, 7.0]}
"""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from ppcl_toolkit import processes
from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.artifacts.files import write_json
from ppcl_toolkit.artifacts.passes import Pass
from ppcl_toolkit.artifacts.storage import Bank, Desk, load_tree, save_tree
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Form, ModulationSwap, Plan, low_rank_forms, trained_forms
from ppcl_toolkit.recipe import Modulation
from ppcl_toolkit.records import read_record
from ppcl_toolkit.running.conditioning import Layer, replaced, sources, vectors
from ppcl_toolkit.running.noise import Calibration
from ppcl_toolkit.running.schedule import Batch, Runner
from ppcl_toolkit.statistics.lowrank import LowRank, Spread, Vectors, reduced_rank
from ppcl_toolkit.surgery.narrow import largest_rank, modulation_layers

_CURVE, _SUMS = "curve.json", "sums/conditioning.safetensors"
AT_ONCE = 256
"""Rank up to which factors of all layers are kept in memory at first: 5 GB for Qwen-Image."""
MOST_SHOWN = 64
"""The curve goes so far at least, where ranks so large save anything."""


class _Found(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    rank: PositiveInt
    curve: dict[int, float]
    covered: dict[str, Any]
    swaps: tuple[ModulationSwap, ...]


@final
@dataclass(frozen=True, slots=True)
class LowRankChoice:
    """What stage `modulation` found."""

    rank: int
    curve: Mapping[int, float]
    """Relative velocity error of the teacher with all its modulation of a rank."""
    covered: Mapping[str, Any]
    """What the calibration covered, for the model card."""
    swaps: tuple[ModulationSwap, ...]
    """All stacks at that rank."""
    sums: Path

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what the stage wrote."""
        found: _Found = read_record(folder / _CURVE, _Found)
        return cls(found.rank, found.curve, found.covered, found.swaps, folder / _SUMS)


def swaps(adapter: Adapter, rank: int) -> tuple[ModulationSwap, ...]:
    """Return all modulation of a family at one rank."""
    return tuple(ModulationSwap(stack=stack.path, rank=rank) for stack in adapter.stacks if stack.modulation)


def check_modulation(runner: Runner, section: Modulation, *, call: Mapping[str, Any] | None = None) -> int:
    """Return the largest rank that saves parameters in every layer.

    Raises `PpclError` where the family has no modulation of its own, where the adapter names what is no linear layer,
    where the recipe's rank is larger, or where its values of guidance are not those of `call`, the recipe's call of the
    pipeline: all of it known before anything is recorded.
    """
    _check_guidance(runner, section, call or {})
    layers = list(_layers(runner))
    if not layers:
        raise PpclError(
            f"modulation: the blocks of {runner.adapter.family} have none of their own that is whole: it is shared or "
            "tabled by design, or of low rank already"
        )
    for stack in runner.adapter.stacks:
        named = {layer.path for layer, _ in layers if layer.stack == stack.path}
        if unknown := sorted(set(stack.modulation) - named):
            raise PpclError(f"modulation: no block of {stack.path} has {', '.join(unknown)}, which the adapter names")
    limit = min(largest_rank(module.weight) for _, module in layers)
    if section.rank is not None and section.rank > limit:
        width = max(module.in_features for _, module in layers)
        raise PpclError(
            f"modulation.rank: {section.rank} saves nothing, layers are {width} wide; from 1 to {limit} is possible"
        )
    return limit


def _check_guidance(runner: Runner, section: Modulation, call: Mapping[str, Any]) -> None:
    if not section.guidance:
        return
    transformer, told = runner.transformer, runner.adapter.distilled
    takes = told in inspect.signature(transformer.forward).parameters
    config: Any = transformer.config
    if not config.get("guidance_embeds", takes):
        raise PpclError(
            f"modulation.guidance: a teacher of this config is not told its guidance by {told!r}; leave the values out"
        )
    asked, least, most = call.get("guidance_scale"), min(section.guidance), max(section.guidance)
    if asked is not None and not least <= asked <= most:
        raise PpclError(
            f"modulation.guidance: {least:g} to {most:g} does not cover teacher.call.guidance_scale {asked:g}, at "
            "which pictures are made; name a value on its other side"
        )


def find_modulation(runner: Runner, batches: Calibration, section: Modulation, desk: Desk) -> None:
    """Run stage `modulation`: record what layers are fed, choose the rank, and bank the teacher's own layers of it.

    Several processes share the batches. What a killed run has recorded and measured is kept. Raises `PpclError` for an
    error that no rank keeps below.
    """
    limit = check_modulation(runner, section)
    origin = sources(vectors(runner, [layer for layer, _ in _layers(runner)], batches[0], prove=True))
    sums = _record(runner, batches, origin, section, desk)
    factors = _Factors(runner, origin, sums)
    held_out = list(batches(section.batches, section.batches + section.velocity_batches))
    curve = _Curve(runner, factors, held_out, desk)
    rank = _chosen(curve, section, limit)
    states = factors.at(rank)
    for form in _shared_out(Form(stack, block, block, modulation=rank) for stack, block in _blocks(runner)):
        own = {layer.path: state for layer, state in states.items() if layer[:2] == (form.stack, form.first)}
        if own:
            save_tree(desk.folder / f"{form.key}.safetensors", _joined(own))
    if processes.is_main():
        tree = {"sums": {str(layer): sums[layer].state() for layer in sums}}
        (desk.folder / _SUMS).parent.mkdir(exist_ok=True)
        save_tree(desk.folder / _SUMS, {**tree, "origin": {str(layer): str(one) for layer, one in origin.items()}})
        found = {
            "rank": rank,
            "swaps": [swap.model_dump(mode="json") for swap in swaps(runner.adapter, rank)],
            "covered": batches.covered(),
        }
        write_json(desk.folder / _CURVE, {**found, "curve": curve.known})
    processes.wait()
    if processes.is_main():
        for state in desk.folder.glob("state-*.tmp"):
            state.unlink()


def bank_low_rank(runner: Runner, plans: Sequence[Plan], bank: Bank, low: LowRankChoice, desk: Desk) -> None:
    """Run stage `low_rank`: bank the modulation of every trained block that `plans` have of low rank.

    The closed form for the weights that training left, on the conditioning that the teacher's block was fed.
    """
    saved = load_tree(low.sums)
    spreads = {name: _spread(sums, runner) for name, sums in saved["sums"].items()}
    trained = {form.key for form in trained_forms(plans)}
    wanted = [form for form in low_rank_forms(plans) if form.previous and form.previous.key in trained]
    for number, form in enumerate(_shared_out(wanted), start=1):
        path = desk.folder / f"{form.key}.safetensors"
        if not path.exists():
            assert form.previous is not None
            weights, states = bank[form.previous.key], {}
            for name in runner.adapter.stack(form.stack).modulation:
                weight = weights.get(f"{name}.weight")
                if weight is not None and form.modulation <= largest_rank(weight):
                    spread = spreads[saved["origin"][str(Layer(form.stack, form.first, name))]]
                    found = reduced_rank(weight.to(runner.placement.device), spread, form.modulation)
                    states[name] = found.at(form.modulation, weights.get(f"{name}.bias"))
            save_tree(path, _joined(states))
        desk.progress(number, len(wanted), form.key)
    processes.wait()


def _layers(runner: Runner) -> Iterator[tuple[Layer, nn.Linear]]:
    for stack in runner.adapter.stacks:
        for index, block in enumerate(runner.blocks(stack.path)):
            for path, module in modulation_layers(block, stack).items():
                yield Layer(stack.path, index, path), module


def _blocks(runner: Runner) -> list[tuple[str, int]]:
    return list(dict.fromkeys(layer[:2] for layer, _ in _layers(runner)))


def _shared_out(forms: Any) -> list[Form]:
    rank, ranks = processes.world()
    return list(forms)[rank::ranks]


def _joined(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{path}.{name}": value for path, state in states.items() for name, value in state.items()}


def _spread(sums: Mapping[str, Tensor], runner: Runner) -> Spread:
    vectors = Vectors(len(sums["sum_D"]))
    vectors.load_state(sums)
    return vectors.spread(runner.placement.device)


def _record(
    runner: Runner, batches: Calibration, origin: Mapping[Layer, Layer], section: Modulation, desk: Desk
) -> dict[Layer, Vectors]:
    modules = dict(_layers(runner))
    sums = {layer: Vectors(modules[layer].in_features) for layer in dict.fromkeys(origin.values())}
    whole = Pass("vectors", desk.folder, range(section.batches), {str(layer): own for layer, own in sums.items()})

    def fed() -> Iterator[int]:
        for number, batch in enumerate(whole.of(batches), start=1):
            for layer, given in vectors(runner, list(sums), batch).items():
                sums[layer].add(given)
            yield number

    for done in whole.kept(fed()):
        desk.progress(done, section.batches, "conditioning")
    # Measuring may be killed, too.
    whole.save()
    whole.add_up(runner.placement.device)
    return sums


@final
class _Factors:
    """The closed form of every layer of the teacher, for all ranks up to one."""

    def __init__(self, runner: Runner, origin: Mapping[Layer, Layer], sums: Mapping[Layer, Vectors]) -> None:
        self._runner, self._origin = runner, origin
        self._spreads = {layer: own.spread(runner.placement.device) for layer, own in sums.items()}
        self._found: dict[Layer, LowRank] = {}
        self._most = 0

    def at(self, rank: int) -> dict[Layer, dict[str, Tensor]]:
        """Return the state dicts of the pairs of this rank."""
        modules = dict(_layers(self._runner))
        if rank > self._most:
            # Powers of two come one after another: each of them would begin anew.
            limit = min(largest_rank(module.weight) for module in modules.values())
            self._most = min(AT_ONCE, limit) if rank <= AT_ONCE else limit
            self._found = {layer: self._factored(layer, module) for layer, module in modules.items()}
        return {layer: found.at(rank, modules[layer].bias) for layer, found in self._found.items()}

    def _factored(self, layer: Layer, module: nn.Linear) -> LowRank:
        weight = module.weight.to(self._runner.placement.device)
        found = reduced_rank(weight, self._spreads[self._origin[layer]], self._most)
        return LowRank(*(value.float().cpu() for value in found))


@final
class _Curve:
    """Relative velocity errors of the teacher at ranks, each measured once."""

    def __init__(self, runner: Runner, factors: _Factors, batches: Sequence[Batch], desk: Desk) -> None:
        self._runner, self._factors, self._batches, self._desk = runner, factors, batches, desk
        self._path = desk.folder / "measured.json"
        found = read_record(self._path, dict[int, float]) if self._path.exists() else {}
        self.known: dict[int, float] = processes.agreed(found)
        self._own = list(range(len(batches)))[processes.world()[0] :: processes.world()[1]]
        self._wanted: dict[int, Tensor] = {}

    def error(self, rank: int) -> float:
        """Return |v - v_teacher| / |v_teacher| over all batches with all modulation of this rank."""
        if rank not in self.known:
            if not self._wanted:
                self._wanted = {number: self._velocity(number) for number in self._own}
            with replaced(self._runner, self._factors.at(rank)):
                found = {number: self._velocity(number) for number in self._own}
            said = [json.dumps([n, _square(found[n] - v), _square(v)]) for n, v in self._wanted.items()]
            parts = sorted(map(json.loads, processes.gathered(said)))
            self.known[rank] = float((sum(p[1] for p in parts) / sum(p[2] for p in parts)) ** 0.5)
            if processes.is_main():
                write_json(self._path, self.known)
        self._desk.progress(len(self.known), len(self.known), f"rank {rank}: {self.known[rank]:.4f}")
        return self.known[rank]

    def _velocity(self, number: int) -> Tensor:
        return self._runner.velocity(self._batches[number]).float().cpu()


def _chosen(curve: _Curve, section: Modulation, limit: int) -> int:
    """Measure ranks, and return the one that is wanted: powers of two, and then between two of them."""
    powers = [2**power for power in range(limit.bit_length()) if 2**power <= limit]
    if section.rank is not None:
        for rank in [*(power for power in powers if power <= max(section.rank, MOST_SHOWN)), section.rank]:
            curve.error(rank)
        return section.rank
    assert section.error is not None
    above = 0
    for rank in dict.fromkeys([*powers, limit]):
        if curve.error(rank) <= section.error:
            return _between(curve, above, rank, section.error)
        above = rank
    raise PpclError(
        f"modulation.error: {section.error:g} is out of reach: rank {limit}, the largest that saves anything, costs "
        f"{curve.error(limit):.3g}"
    )


def _between(curve: _Curve, above: int, within: int, error: float) -> int:
    """Halve the ranks between one that costs more than `error` and one that does not."""
    while within - above > 1:
        middle = (above + within) // 2
        if curve.error(middle) <= error:
            within = middle
        else:
            above = middle
    return within


def _square(value: Tensor) -> float:
    return float(value.double().square().sum())
