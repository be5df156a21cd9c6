"""Who is measured: a teacher of full size without data, its plans, its batches, and the bank they ask for."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import disk
import torch
from ledger import Ledger
from torch import Tensor, nn

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.artifacts.storage import Bank, Desk
from ppcl_toolkit.budget.model import Model
from ppcl_toolkit.plan import Form, Plan, low_rank_forms, trained_forms
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.units import is_share, parse_size

DEVICE = torch.device("cuda:0")


@dataclass(frozen=True)
class Subject:
    """A recipe and what its stages work on."""

    recipe: Recipe
    model: Model
    plans: Mapping[str, Plan]
    runner: Runner
    desk: Desk
    ledger: Ledger

    @property
    def adapter(self) -> Adapter:
        return self.runner.adapter

    @property
    def largest(self) -> Plan:
        """The plan of the first target: what export takes the most memory for."""
        return next(iter(self.plans.values()))

    @property
    def tuned(self) -> Plan:
        """The plan of the first target that is fine-tuned."""
        return self.plans[next(name for name in self.plans if name in self.recipe.tuned)]

    def batches(self, size: int) -> "Batches":
        return Batches(self.model, size)

    def bank(self, *, depth_only: bool = False) -> Bank:
        """Return a bank that holds everything the plans ask for."""
        folder = self.desk.folder / "bank"
        for form in [form for form in trained_forms(self.plans.values()) if form.is_stock or not depth_only]:
            _keep(folder, form, self.model.costs.block(form).state_dict())
        for form in [] if depth_only else low_rank_forms(self.plans.values()):
            block = self.model.costs.block(form)
            factored = tuple(f"{path}." for path, _ in block.blueprint.factored)
            _keep(folder, form, {name: v for name, v in block.state_dict().items() if name.startswith(factored)})
        return Bank(folder)


def _keep(folder: Path, form: Form, state: Mapping[str, Tensor]) -> None:
    disk.keep(folder / f"{form.key}.safetensors", {name: (v.shape, torch.float32) for name, v in state.items()})


@dataclass(frozen=True)
class Batches:
    """Batches of one shape, on the host, with nothing in them."""

    model: Model
    size: int

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def __call__(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        for number in range(start, stop):
            yield self[number]

    def __getitem__(self, _: int) -> dict[str, Any]:
        return {name: self._of(name, value) for name, value in self.model.example.items()}

    def _of(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            shape = value.shape if name in self.model.adapter.shared else (self.size, *value.shape[1:])
            return torch.empty(shape, dtype=value.dtype)
        return value * self.size if isinstance(value, list) else value


def readable(model: Model) -> Model:
    """Let the adapter know what it would read in a call: fake tensors hold nothing."""
    if model.adapter.noised is None:
        return model
    # Of a picture's own tokens the positions are 0.
    positions = {n: torch.zeros(v.shape) for n, v in model.example.items() if n.endswith("_ids")}
    tokens = model.adapter.noised({**model.example, **positions})
    return dataclasses.replace(model, adapter=dataclasses.replace(model.adapter, noised=lambda _: tokens))


@contextlib.contextmanager
def shallow(recipe: Recipe, blocks: int) -> Iterator[Callable[[Recipe], Recipe]]:
    """Let every stack of a recipe's teacher have at most so many blocks, all for 0; yields what fits targets to it.

    Targets are what they are of the whole teacher: as large a share.
    """
    whole = Model.of(recipe)
    listed: Any = whole.adapter.models
    path, own = recipe.teacher.path, whole.plan.depths
    params = sum(parameter.numel() for parameter in whole.transformer.parameters())
    before = listed[path]

    def share(size: str | None, whole: int = params, unit: str = "params") -> str | None:
        return f"{100 * parse_size(size, 10**15, unit) / whole:.1f}%" if size and not is_share(size) else size

    def smaller(other: Recipe) -> Recipe:
        if not blocks:
            return other
        weight = params * getattr(torch, other.export.dtype).itemsize
        targets = [
            t.model_copy(
                update={"params": share(t.params), "bytes": share(t.bytes, weight, "bytes"), "depth": share(t.depth)}
            )
            for t in other.targets
        ]
        return other.model_copy(update={"targets": targets})

    fewer = {stack.depth_key: min(blocks, own[stack.path]) for stack in whole.adapter.stacks} if blocks else {}
    listed[path] = {**before, **fewer}
    try:
        yield smaller
    finally:
        listed[path] = before


def predicted(model: Model, batch: int) -> torch.Size:
    """Return the shape of what a teacher says to a batch."""
    latents = model.example[model.adapter.latents].shape
    tokens = latents[1:] if model.adapter.noised is None else (model.adapter.noised({}), *latents[2:])
    return torch.Size((batch, *tokens))


def subject(
    ledger: Ledger,
    recipe: Recipe,
    model: Model,
    plans: Mapping[str, Plan],
    *,
    streamed: bool,
    away: bool,
    folder: Path,
) -> Subject:
    """Read the teacher and put it where it rests, or leave it on the host where it is `away`; inside of its ledger."""
    adapter = model.adapter
    with ledger.reading(here=model.in_place):
        transformer: Any = getattr(diffusers, adapter.transformer).from_config(dict(model.transformer.config))
        nn.Module.to(transformer, model.dtype).requires_grad_(False).eval()
    placement = Placement(device=DEVICE, streamed=streamed, chunk=recipe.teacher.chunk)
    runner = Runner(transformer, adapter, placement)
    if not away:
        runner.settle()
    return Subject(recipe, model, plans, runner, Desk(folder, lambda *_: None), ledger)


def shortened(recipe: Recipe, chunk: int | None) -> Recipe:
    """Return a recipe of two steps, or two visits: the second has all that a hundredth has."""
    few = {"steps": max(2, chunk or 0), "checkpoint_every": 1}
    return recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update={"chunk": chunk or recipe.teacher.chunk}),
            "samples": recipe.samples.model_copy(update={"count": 2 * recipe.samples.batch}),
            "probe": recipe.probe.model_copy(update={"batches": 2 * (chunk or 1), "steps": min(2, recipe.probe.steps)}),
            "modulation": recipe.modulation
            and recipe.modulation.model_copy(update={"batches": 2, "velocity_batches": 1}),
            "intervals": recipe.intervals.model_copy(update={"batches": 2}),
            "select": recipe.select.model_copy(update={"batches": min(2, recipe.select.batches)}),
            "depth": recipe.depth.model_copy(update=few),
            "width": recipe.width.model_copy(update={**few, "batches": 2}),
            "finetune": recipe.finetune.model_copy(update=few),
            "evaluate": recipe.evaluate.model_copy(update={"velocity_batches": 1, "count": recipe.evaluate.batch}),
        }
    )
