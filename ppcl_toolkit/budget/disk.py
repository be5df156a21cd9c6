"""Bytes on disk: what a run leaves, and what it has there for a while."""

from ppcl_toolkit.budget.memory import FITTED, LEARNING, SUMS, Memory
from ppcl_toolkit.budget.whole import Whole

_WEIGHT = 4
"""Bytes of a parameter in the bank."""


def disk(memory: Memory) -> dict[str, int]:
    """Return the bytes of what a run writes, by kind; states are gone when their stage is done."""
    recipe, blocks = memory.recipe, memory.blocks
    whole = Whole(memory, 0, 0)
    banked = sum(memory.blocks.size(form) for form in memory.forms)
    low = {swap.rank for plan in memory.plans.values() for swap in plan.modulation_swaps}
    factors = max(low, default=0) * sum(map(sum, blocks.modulation))
    squares = memory.squares()[0] if recipe.searches else 0
    # Modulation of low rank asks for the empty prompt, too.
    empty = int(recipe.modulation is not None and not recipe.samples.edits and not recipe.samples.images)
    itemsize = blocks.model.dtype.itemsize
    variants = [whole.params(plan) * itemsize + blocks.buffers for plan in memory.plans.values()]
    tuned = [whole.params(memory.plans[name]) for name in recipe.tuned]
    students = max(tuned, default=0) if recipe.answered.steps else 0
    found = {
        "samples": (recipe.samples.count + empty) * blocks.model.forwards * blocks.model.sample_bytes,
        "probes": squares * FITTED,
        "velocities": _answered(memory),
        "bank": (banked + factors) * _WEIGHT,
        "students": sum(tuned) * itemsize,
        "variants": sum(variants) + len(variants) * sum(whole.others),
        # One is whole before the one before it goes.
        "states": 2 * max(squares * SUMS, banked * LEARNING, students * LEARNING),
    }
    return {kind: size for kind, size in found.items() if size}


def _answered(memory: Memory) -> int:
    """Bytes of what the teacher says to every batch of fine-tuning, kept until all students have learned."""
    section, model = memory.recipe.answered, memory.blocks.model
    latents = model.example[model.adapter.latents]
    return section.steps * section.batch * memory.devices * int(latents.nbytes)
