"""What the first lines of a shipped recipe say of memory, disk and time: `python tests/headers.py` writes them anew."""

import textwrap
from pathlib import Path
from typing import Any

from ppcl_toolkit.budget import Machine, report
from ppcl_toolkit.budget.blocks import Blocks
from ppcl_toolkit.budget.model import Model
from ppcl_toolkit.budget.report import Budget, DryRun
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.recipe_files import shipped_recipes

RECIPES = Path(__file__).parents[1] / "recipes"
PLANNED = [name for name in shipped_recipes() if not name.startswith("tiny")]
FIRST = "# Takes of a GPU: "
TOLD = {stage: stage for stage in ("samples", "modulation", "select", "depth", "width")} | {"finetune": "fine-tuning"}


def dry_run(recipe: Recipe, **given: Any) -> DryRun:
    """Plan a recipe; its teacher's blocks are measured once for all that call it alike."""
    return report.dry_run(recipe, blocks=blocks_of(recipe), **given)


def blocks_of(recipe: Recipe) -> Blocks:
    """Return the measures of a published teacher's blocks."""
    schedule = {"streamed": "auto", "waiting_gb": None}
    teacher = recipe.teacher.model_copy(update=schedule).model_dump_json()
    key = (teacher, recipe.adapter, recipe.samples.edits is None, recipe.export.dtype)
    if key not in _BLOCKS:
        _BLOCKS[key] = Blocks(Model.of(recipe))
    return _BLOCKS[key]


_BLOCKS: dict[Any, Blocks] = {}


def header(name: str, found: DryRun) -> str:
    """Return the lines of a recipe that quote `ppcl plan`."""
    recipe, schedules = Recipe.load(name), tuple(found.memory.values())

    def sizes(stage: str) -> str:
        device = [round(needs[stage]["device"] / 1e9) for needs in schedules]
        return f"{device[0]} GB, streamed {device[1]}, on each of eight {device[2]}"

    taken = [f"modulation {sizes('modulation')}"] if recipe.modulation else []
    if recipe.searches:
        taken += [f"depth {sizes('depth')}", *([f"width {sizes('width')}"] if found.hours["width"] else [])]
        lean = Budget(recipe, blocks=blocks_of(recipe)).stage("finetune", Machine(card=80 * 10**9, host=256 * 10**9))
        tuned = [round(needs["finetune"]["device"] / 1e9) for needs in schedules]
        taken.append(
            f"fine-tuning {tuned[0]} GB with AdamW, {round(lean.device / 1e9)} where 80 are there ({lean.means}), "
            f"on each of eight {tuned[2]}"
        )
    host = [round(max(need["host"] for need in needs.values()) / 1e9) for needs in schedules]
    hours = {told: found.hours[stage] for stage, told in TOLD.items() if found.hours.get(stage)}
    text = (
        f"{FIRST}{'; '.join(taken)}. Of the host at most {host[0]} GB, streamed {host[1]}, with eight {host[2]}; "
        f"of the disk {round(sum(found.disk.values()) / 1e9)} GB. At 400 TFLOP/s a GPU: "
        f"{', '.join(f'{told} {_duration(spent)}' for told, spent in hours.items())}. "
        f"Estimates: ppcl plan --recipe {name}"
    )
    return textwrap.fill(text, 118, subsequent_indent="# ", break_on_hyphens=False) + "\n"


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 0.05 else f"{max(1, round(60 * hours))} min"


def parts(source: str) -> tuple[str, str, str]:
    """Return a recipe's text before these lines, these lines, and what is behind them."""
    lines = source.splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith((FIRST, "# Asks for depth")))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("#"))
    return "".join(lines[:start]), "".join(lines[start:end]), "".join(lines[end:])


def main() -> None:
    for name in PLANNED:
        path = RECIPES / f"{name}.yaml"
        before, _, after = parts(path.read_text())
        path.write_text(before + header(name, dry_run(Recipe.load(name))) + after)


if __name__ == "__main__":
    main()
