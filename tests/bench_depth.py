"""Depth distillation against the clock: `bench.py` calls it, and starts it as two processes.

    python -m torch.distributed.run --nproc-per-node=2 tests/bench_depth.py FOLDER

prints, for each process and three times, the seconds of a step in the middle of the stage.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from parts import randomize
from tiny import flux_inputs
from torch import nn

from ppcl_toolkit import processes
from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.plan import Interval, Plan
from ppcl_toolkit.recipe import Depth
from ppcl_toolkit.running.noise import Batches, Sample
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.stages.depth import distill_depth

FLUX = load_adapter("flux")
WIDTH, SIZE, FIRST, LAST = 256, 4, 4, 12
"""Of the teacher, of a batch, and between which steps time is taken: whole chunks of a streamed schedule."""


def teacher(placement: Placement | None = None) -> Runner:
    """A FLUX of 4 and 8 blocks that are wide enough for arithmetic to take the time."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 8, "attention_head_dim": WIDTH // 8, "axes_dims_rope": (8, 12, 12)}
    inputs = {"patch_size": 1, "in_channels": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    transformer = FluxTransformer2DModel(num_layers=4, num_single_layers=8, guidance_embeds=True, **sizes, **inputs)
    return Runner(randomize(transformer).requires_grad_(False), FLUX, placement or Placement())


def plan(runner: Runner) -> Plan:
    """Every second block goes, up to the last: a step needs the whole teacher."""
    stacks = {stack.path: len(stack.blocks(runner.transformer)) for stack in FLUX.stacks}
    pairs = [(path, first) for path, depth in stacks.items() for first in range(0, depth, 2)]
    empty = Plan(family="flux", depths=FLUX.depths(runner.transformer))
    return empty.with_operations([Interval(stack=path, first=first, last=first + 1) for path, first in pairs])


def batches() -> Batches:
    """Noised samples of 196 image and 64 text tokens."""
    samples = []
    for seed in range(4):
        arguments = flux_inputs(1, 196, 64, seed)
        latents = arguments.pop("hidden_states")
        del arguments["timestep"], arguments["return_dict"]
        samples.append(Sample(latents=latents, arguments=arguments))
    return Batches(samples=samples, adapter=FLUX, size=SIZE, seed=1)


def seconds_of_a_step(runner: Runner, folder: Path) -> float:
    """Return what a step takes, between step FIRST and step LAST; several processes share the folder."""
    times: dict[int, float] = {}
    section = Depth(steps=LAST, batch=SIZE, split="segments", checkpoint_every=1000)
    folder.mkdir(exist_ok=True)
    desk = Desk(folder, lambda done, *_: times.setdefault(done, time.perf_counter()))
    distill_depth(runner, [plan(runner)], batches(), section, desk)
    processes.wait()
    return (times[LAST] - times[FIRST]) / (LAST - FIRST)


@torch.no_grad()
def floor(runner: Runner) -> float:
    """Return what a step must take: the teacher's forward and three of each student, whose backward takes two."""
    batch = batches()[0]
    first = [next(iter(stack.blocks(runner.transformer))) for stack in FLUX.stacks]
    calls: dict[nn.Module, tuple] = {}
    handles = [
        block.register_forward_pre_hook(lambda b, *given: calls.__setitem__(b, given), with_kwargs=True)
        for block in first
    ]
    runner.transformer(**batch)
    for handle in handles:
        handle.remove()
    students = sum(
        len(stack.blocks(runner.transformer))
        // 2
        * seconds(lambda block=block: block(*calls[block][0], **calls[block][1]))
        for stack, block in zip(FLUX.stacks, first, strict=True)
    )
    return seconds(lambda: runner.transformer(**batch)) + 3 * students


def seconds(function) -> float:
    """Return the median time of some calls."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes.pick_device("cpu")
    for name in "abc":
        sys.stdout.write(f"{seconds_of_a_step(teacher(), Path(sys.argv[1], name))}\n")
