"""What stages work with, tiny: samples without a pipeline, noised batches, a runner and a desk."""

import torch
from tiny import flux_inputs, flux_transformer

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.running.noise import Batches, Sample
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner

FLUX = load_adapter("flux")
DUAL, SINGLE = FLUX.stacks


def sample(seed: int = 0, side: int = 3, text_tokens: int = 5) -> Sample:
    """One sample of `flux_transformer`."""
    arguments = flux_inputs(1, side * side, text_tokens, seed)
    latents = arguments.pop("hidden_states")
    del arguments["timestep"], arguments["return_dict"]
    return Sample(latents=latents, arguments=arguments)


def batches(size: int = 2, seed: int = 7, count: int = 6, **options) -> Batches:
    """Noised batches of `count` samples."""
    return Batches(samples=[sample(i) for i in range(count)], adapter=FLUX, size=size, seed=seed, **options)


def runner(dual: int = 4, single: int = 3, placement: Placement | None = None) -> Runner:
    """A teacher that does not learn, as `load_teacher` leaves it."""
    transformer = flux_transformer(dual, single).requires_grad_(False)
    return Runner(transformer, FLUX, placement or Placement())


def plan_of(run: Runner, *operations) -> Plan:
    """A plan for a runner's teacher."""
    plan = Plan(family="flux", depths=FLUX.depths(run.transformer))
    return plan.with_operations(operations)


def desk(folder, seen: list | None = None) -> Desk:
    """A desk in `folder`, which is made; what is reported goes to `seen`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Desk(folder, lambda *progress, note="": None if seen is None else seen.append((*progress, note)))


@torch.no_grad()
def identity(block: torch.nn.Module) -> None:
    """Make a FLUX block hand on its streams: its gates are zero whatever the timestep."""
    for name in ("norm", "norm1", "norm1_context"):
        norm = dict(block.named_children()).get(name)
        if norm is not None:
            rows = norm.linear.weight.shape[0] // norm.linear.in_features
            for gate in (2, 5):
                if gate < rows:
                    for value in (norm.linear.weight, norm.linear.bias):
                        value.unflatten(0, (rows, -1))[gate] = 0


def equal(one: dict, other: dict) -> bool:
    """Whether two state dicts hold the same bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
