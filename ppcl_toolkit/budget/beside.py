"""Plans side by side: those of one recipe, and what another comes to at as many parameters and at as many FLOPs."""

from collections.abc import Iterator

from ppcl_toolkit.budget.blocks import Blocks
from ppcl_toolkit.budget.model import Model, Size
from ppcl_toolkit.budget.plans import are_given, plans
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Recipe, Target

HEADER = ("plan", "parameters", "of the teacher's", "bytes", "FLOPs of a step", "of the teacher's", "blocks")


def side_by_side(recipe: Recipe, name: str, other: Recipe, others_name: str) -> list[tuple[str, ...]]:
    """Return rows for `HEADER`: the teacher, every plan of `other`, and beneath each those of `recipe` that match it.

    `recipe` has the means of its targets, and sizes of the other's: once at most as many parameters, once at most as
    many FLOPs. Raises `PpclError` where the teachers differ, or a size is out of reach.
    """
    if recipe.teacher.path != other.teacher.path:
        raise PpclError(
            f"--against: {others_name} is of {other.teacher.path}, {name} of {recipe.teacher.path}; "
            "plans of one teacher can be set side by side"
        )
    model = Model.of(recipe)
    blocks = Blocks(model)
    teacher = blocks.measured("teacher", model.plan)
    found = [teacher]
    for target, plan in plans(other, model).items():
        theirs = blocks.measured(_told(others_name, target, other), plan)
        found += [theirs, *_matching(recipe, name, blocks, theirs)]
    return [_row(size, teacher) for size in found]


def _matching(recipe: Recipe, name: str, blocks: Blocks, size: Size) -> Iterator[Size]:
    means = {
        "width": any(target.width for target in recipe.targets),
        "modulation": any(target.modulation for target in recipe.targets),
    }
    for unit, most in (("params", size.params), ("flops", round(size.teraflops * 1e12))):
        asked = Target.model_validate({"name": "equal", unit: str(most), **means})
        (plan,) = plans(recipe.model_copy(update={"targets": (asked,)}), blocks.model).values()
        equal = "parameters" if unit == "params" else "FLOPs"
        yield blocks.measured(_told(name, f"at equal {equal}", recipe), plan)


def _told(name: str, target: str, recipe: Recipe) -> str:
    return f"{name}, {target}" + ("" if are_given(recipe) else " (assumed)")


def _row(size: Size, teacher: Size) -> tuple[str, ...]:
    return (
        size.name,
        f"{size.params:,}",
        f"{size.params / teacher.params:.1%}",
        f"{size.bytes / 1e9:.1f} GB",
        f"{size.teraflops:.1f} T",
        f"{size.teraflops / teacher.teraflops:.1%}",
        " + ".join(map(str, size.blocks.values())),
    )
