"""Teachers at full size without a download: random weights made on the device, and calls of the shapes they take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from ppcl_toolkit.adapter import Adapter, load_adapter
from ppcl_toolkit.plan import Operation, Plan
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.noise import Batches, Sample
from ppcl_toolkit.surgery.assemble import count_parameters, reshape

HALF = torch.bfloat16
_SLIM = {"in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 32}
_AXES = {"axes_dims_rope": (4, 4, 8)}
SMALL: Mapping[str, Mapping[str, Any]] = {
    "flux": {**_SLIM, **_AXES, "num_layers": 6, "num_single_layers": 2, "pooled_projection_dim": 32},
    "qwen_image": {**_SLIM, **_AXES, "num_layers": 5, "out_channels": 1},
    "sd3": {**_SLIM, "num_layers": 2, "pooled_projection_dim": 32, "caption_projection_dim": 32},
}
"""What makes a teacher small enough to try all this without a card."""


@dataclass(frozen=True)
class Giant:
    """A teacher on the device, and one call of it for one picture."""

    transformer: Any
    adapter: Adapter
    samples: Sequence[Sample]

    @property
    def plan(self) -> Plan:
        return Plan(family=self.adapter.family, depths=self.adapter.depths(self.transformer))

    def call(self, size: int = 1) -> dict[str, Any]:
        batches = Batches(samples=self.samples, adapter=self.adapter, size=size, seed=1, dtype=HALF)
        return {name: moved(value, self.transformer.device) for name, value in batches[0].items()}

    def reduced(self, recipe: Recipe, share: float) -> None:
        """Make it the student of at most `share` of its parameters, by a recipe's own operations in their order."""
        given = operations(recipe, self.plan.depths)
        most = share * sum(parameter.numel() for parameter in self.transformer.parameters())
        example = self.call()
        few, many = 0, len(given)
        while few < many:
            middle = (few + many) // 2
            plan = self.plan.with_operations(given[:middle])
            fits = count_parameters(self.transformer, self.adapter, plan, example) <= most
            few, many = (few, middle) if fits else (middle + 1, many)
        reshape(self.transformer, self.adapter, self.plan.with_operations(given[:few]), example)
        self.transformer.to(self.transformer.device)


def operations(recipe: Recipe, depths: Mapping[str, int]) -> list[Operation]:
    """Return what a recipe lists, as far as a teacher has the blocks."""
    given: list[Operation] = [*recipe.intervals.given, *recipe.width.given]
    return [each for each in given if getattr(each, "last", getattr(each, "block", 0)) < depths[each.stack]]


def moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def giant(path: str, *, tiny: bool, samples: int = 1, device: str = "cuda") -> Giant:
    """Build the teacher of a hub id, in bf16; `tiny` has its blocks, very narrow ones."""
    adapter = next(a for a in map(load_adapter, SMALL) if path in a.models)
    config = {**adapter.models[path], **(SMALL[adapter.family] if tiny else {})}
    with init_empty_weights():
        transformer = getattr(diffusers, adapter.transformer).from_config(config)
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, filled(name, parameter, torch.device(device)))
    nn.Module.to(transformer, torch.device(device), HALF).eval()
    call = {"height": 64, "width": 64, "max_sequence_length": 8} if tiny else {}
    assert adapter.example is not None
    shapes = adapter.example(transformer.config, call, 0)
    return Giant(transformer, adapter, [sample(adapter, shapes, seed) for seed in range(samples)])


def filled(name: str, parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return a parameter of random values, which neither vanish nor grow on their way through the blocks."""
    value = torch.empty(parameter.shape, dtype=HALF, device=device)
    if parameter.ndim > 1:
        value.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
    else:
        value.fill_(float(name == "weight"))
    return nn.Parameter(value, requires_grad=False)


def sample(adapter: Adapter, shapes: Mapping[str, Any], seed: int) -> Sample:
    """Return noise in the shapes of one call."""
    generator = torch.Generator().manual_seed(seed)

    def value(name: str, shape: Any) -> Any:
        if not isinstance(shape, tuple):
            return shape
        if name.endswith("_ids"):
            return torch.zeros(shape)
        return torch.full(shape, 3.5) if name == "guidance" else torch.randn(shape, generator=generator).to(HALF)

    arguments = {name: value(name, shape) for name, shape in shapes.items() if name != adapter.timestep}
    return Sample(latents=arguments.pop(adapter.latents), arguments=arguments)
