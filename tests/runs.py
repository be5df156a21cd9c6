"""What stages and whole runs work with, tiny: samples without a pipeline, noised batches, a runner, a desk, a job."""

from pathlib import Path

import torch
from tiny import flux_inputs, flux_pipeline, flux_transformer

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.noise import Batches, Sample
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner

FLUX = load_adapter("flux")
DUAL, SINGLE = FLUX.stacks
JOB = """
seed: 1
device: cpu
teacher:
  path: {folder}/teacher
  dtype: float32
  call: {{height: 8, width: 8, num_inference_steps: 2, max_sequence_length: 8}}
samples: {{prompts: {folder}/prompts.txt, count: 6, batch: 2}}
probe: {{batches: 3, batch: 4}}
intervals: {{batches: 2, batch: 2}}
targets: [{{name: large, params: 85%, width: false}}, {{name: small, params: 65%}}]
select: {{batches: 1, batch: 2}}
depth: {{steps: 4, batch: 2}}
width: {{steps: 3, batch: 2, ffn_blocks: 2, batches: 3}}
finetune: {{steps: 2, batch: 2}}
export: {{dtype: float32}}
evaluate: {{prompts: {folder}/prompts.txt, count: 2, seeds: [0], batch: 2, velocity_batches: 1}}
"""
CHECKPOINTED = (
    "depth={steps: 12, batch: 2, checkpoint_every: 3, inputs: mixed}",
    "width={steps: 6, batch: 2, ffn_blocks: 2, text_blocks: 2, batches: 3, text_threshold: 0.3, checkpoint_every: 2}",
    "finetune={steps: 8, batch: 2, features: 0.1, checkpoint_every: 2}",
)
"""For jobs that are killed on the way."""


def job(folder: Path, *overrides: str, name: str = "recipe.yaml", blocks: tuple[int, int] = (5, 3)) -> Path:
    """Write a pipeline, prompts, and the recipe of a whole run of few steps; `overrides` are as of the command line."""
    flux_pipeline(*blocks).save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(6)))
    path = folder / name
    path.write_text(JOB.format(folder=folder))
    path.write_text(Recipe.load(path, overrides).dump())
    return path


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
