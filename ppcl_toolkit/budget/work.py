"""Time from counted operations: what every stage computes, and which part of it several devices share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ppcl_toolkit.budget.blocks import Blocks
from ppcl_toolkit.budget.memory import TOGETHER, Memory
from ppcl_toolkit.budget.model import Size
from ppcl_toolkit.plan import Form, Plan, trained_forms
from ppcl_toolkit.recipe import Distillation, Recipe

STEPS = 28
"""Denoising steps per picture where the recipe names none."""
_EXACT = 20
"""Operations in half precision that a device makes in the time of one in full: similarities and sums are in fp32."""
_PARTS = 3
"""Products in fp32 of which one in fp64 is put together."""
RANKS = 9
"""Ranks that are measured, and the teacher."""
_BACKWARD = 3
"""A forward pass with its backward pass, in forward passes."""


class Work(NamedTuple):
    """Operations of a stage in units of half precision: those that devices share out, and those of one alone."""

    shared: float
    alone: float = 0.0

    def hours(self, tflops: float, devices: int) -> float:
        """Return how long `devices` take that sustain so many TFLOP/s each."""
        return (self.shared / devices + self.alone) / (tflops * 1e12) / 3600


def work(recipe: Recipe, blocks: Blocks, plans: Mapping[str, Plan], sizes: Sequence[Size]) -> dict[str, Work]:
    """Return the work of every stage; `sizes` begins with the teacher."""
    forward = sizes[0].teraflops * 1e12
    image = int(recipe.teacher.call.get("num_inference_steps", STEPS)) * blocks.model.forwards
    again = _BACKWARD + 1 if recipe.finetune.gradient_checkpointing else _BACKWARD
    students = sum(size.teraflops for size in sizes[1:]) * 1e12
    tuned = [size.teraflops * recipe.tuning(size.name).steps for size in sizes[1:] if size.name in recipe.tuned]
    probed = recipe.probe.batches * recipe.probe.batch, recipe.probe.steps * recipe.probe.batch
    compared = recipe.intervals.batches * recipe.intervals.batch
    forms = trained_forms(plans.values())
    narrow = [form for form in forms if not form.is_stock]
    learning = {True: _share(blocks, [f for f in forms if f.is_stock]), False: _share(blocks, narrow)}
    fitted = recipe.width.batches * recipe.width.batch
    pictures = recipe.evaluate.count * len(recipe.evaluate.seeds)

    def distilled(section: Distillation, *, stock: bool, passes: int = 1) -> float:
        return section.steps * section.batch * forward * (passes + _BACKWARD * learning[stock])

    found = {
        # Three steps of the pipeline, one for another prompt, seven forwards; without blocks, hardly anything.
        "check": Work((4 * blocks.model.forwards + 7) * forward),
        "samples": Work(recipe.samples.count * image * forward),
        "modulation": _factored(recipe, blocks, forward),
        # A step of a probe is three products in fp32, where its sums are two of three parts each.
        "probe": Work(sum(probed) * forward + (probed[0] + probed[1] / 2) * _sums(blocks)),
        "intervals": Work(compared * (forward + _chains(blocks))),
        "select": _selected(Memory(recipe, blocks, plans), forward),
        "depth": Work(distilled(recipe.depth, stock=True) if learning[True] else 0.0),
        # The teacher runs for the least squares and for the training of each wave.
        "width": Work(
            distilled(recipe.width, stock=False, passes=waves(forms))
            + fitted * (waves(forms) * forward + len(narrow) * _summed(blocks))
        ),
        "velocities": Work(recipe.answered.steps * recipe.finetune.batch * forward),
        "finetune": Work(recipe.finetune.batch * again * sum(tuned) * 1e12),
        "evaluate": Work(pictures * image * (forward + students)),
    }
    return {stage: each for stage, each in found.items() if stage not in absent(recipe)}


def absent(recipe: Recipe) -> set[str]:
    """Return the stages that a recipe does not have."""
    found = set() if recipe.modulation else {"modulation"}
    found |= set() if recipe.searches else {"probe", "intervals", "select", "depth", "width"}
    return found | (set() if recipe.tuned else {"velocities", "finetune"})


def _factored(recipe: Recipe, blocks: Blocks, forward: float) -> Work:
    """Return the work of modulation of low rank: two products and two eigensystems a layer, and the curve."""
    if recipe.modulation is None:
        return Work(0.0)
    layers = sum(4 * rows * width**2 + 18 * width**3 for rows, width in blocks.modulation)
    return Work(
        recipe.modulation.velocity_batches * recipe.modulation.batch * RANKS * forward, layers * _PARTS * _EXACT
    )


def waves(forms: Iterable[Form]) -> int:
    """Return in how many waves narrow blocks learn: those that lose their text and their FFN learn that last."""
    return len({form.narrow_text and bool(form.ffn) for form in forms if not form.is_stock})


def _selected(memory: Memory, forward: float) -> Work:
    """Return the work of `select`: each candidate's sums and one run with it; one process measures choices together."""
    pictures = memory.recipe.select.batches * memory.recipe.select.batch
    each = (1 + 1 / TOGETHER) * forward + _summed(memory.blocks)
    return Work(pictures * (2 * forward + memory.candidates * each), pictures * memory.together * forward)


def _summed(blocks: Blocks) -> float:
    """Return the work of one picture's normal equations of one block."""
    return _sums(blocks) / sum(map(len, blocks.params.values()))


def _share(blocks: Blocks, forms: Sequence[Form]) -> float:
    total = sum(map(sum, blocks.params.values()))
    return sum(blocks.size(form) for form in forms) / total


def _sums(blocks: Blocks) -> float:
    """Return the work of one picture's normal equations: two products a stream and block, in fp64."""
    work = 0.0
    for call in blocks.calls(1):
        depth = len(blocks.params[call.stack.path])
        work += sum(4 * s.shape[1] * s.shape[2] ** 2 for s in call.streams if s is not None) * depth
    return work * _PARTS * _EXACT


def _chains(blocks: Blocks) -> float:
    """Return the work of one picture's similarities: chains from every block to every later one, and the heatmap."""
    work = 0.0
    for call in blocks.calls(1):
        depth = len(blocks.params[call.stack.path])
        pairs = depth * (depth - 1) / 2
        for stream in call.streams:
            if stream is not None:
                tokens, features = stream.shape[1:]
                rows = min(tokens, features)
                work += pairs * (2 * rows * features**2 + 1.1 * rows**2 * features) + depth * 2 * tokens * features**2
    return work * _EXACT
