"""The model card of a variant: what was done to the teacher, how it opens, what its modulation was calibrated on."""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.plan import Plan


def write_card(name: str, plan: Plan, covered: Mapping[str, Any], *, stock: bool) -> str:
    """Return the card as Markdown; `covered` is what `Calibration.covered` says, empty without low-rank modulation.

    A `stock` variant opens without code of its own.
    """
    opens = "" if stock else ", trust_remote_code=True"
    lines = [
        f"# {name}",
        "",
        f"Compressed by ppcl-toolkit (PPCL, arXiv 2511.16156) from `{plan.teacher or plan.family}`.",
        "",
        "```python",
        f"DiffusionPipeline.from_pretrained(folder{opens})",
        "```",
        "",
        "What was done, in the teacher's block numbers (`plan.json`):",
        "",
        *(f"- {operation}" for operation in plan.operations),
    ]
    if covered:
        lines += ["", "## What its modulation is made for", "", _calibrated(covered)]
    return "\n".join(lines) + "\n"


def _calibrated(covered: Mapping[str, Any]) -> str:
    low, high = covered["noise_levels"]
    told = ", ".join(f"{value:g}" for value in covered["guidance"])
    negative = covered["negative_prompt"]
    parts = [
        f"{covered['samples']} recorded calls of the teacher at noise levels from {low} to {high}",
        f"guidance {told}" if told else "no guidance that the model is told",
        "the empty prompt" if covered["empty_prompt"] else "not the empty prompt",
        "no negative prompt" if negative is None else f"the negative prompt {negative!r}",
    ]
    return (
        "Modulation layers are of low rank, the nearest to the teacher's on what was recorded: "
        + "; ".join(parts)
        + ". Other conditioning is further from the teacher. LoRA weights for these layers have to be merged into the "
        "teacher before it is compressed."
    )
