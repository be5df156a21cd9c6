"""What recoveries take, in block passes, and how many steps of them a budget buys.

A block forward on a sample is 1, forward and backward 3; the teacher's passes count wherever a method looks at it, also
where another run has left its answers. Optimizer steps, least squares and what is outside of blocks are left out.
"""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.plan import Form, Plan, trained_forms
from ppcl_toolkit.recipe import Depth
from ppcl_toolkit.rules.method import Ground, Method, Pick, Unreachable

Sections = dict[str, tuple[Any, float]]
"""By stage: its section of the recipe, and what a step of it takes."""


def planned(ground: Ground, method: Method, pick: Pick, *, before: int) -> tuple[Sections, dict[str, int]]:
    """Return the sections of a run's stages with the steps that its budget buys at its rates, and what each takes.

    `before` is what went into the search and the lever. A stage of no steps stays one, the closed form alone. Raises
    `Unreachable` where nothing is left for another.
    """
    sections = _sections(ground, method, pick)
    left = ground.passes - before
    shares = _shares(method, sections)
    found: Sections = {}
    taken: dict[str, int] = {}
    for stage, (section, cost) in sections.items():
        steps = int(left * shares[stage] / cost)
        if steps < 1 and shares[stage] > 0:
            raise Unreachable(
                f"passes: {ground.passes:,} block passes are too few for {method.name}: its search takes {before:,}, "
                f"and a step of {stage} {cost:,.0f}"
            )
        every = max(1, min(section.checkpoint_every, steps))
        rate = section.learning_rate * ground.factor
        update = {"steps": steps, "checkpoint_every": every, "learning_rate": rate}
        found[stage] = (section.model_copy(update=update), cost)
        taken[stage] = int(steps * cost)
    return found, taken


def _shares(method: Method, sections: Sections) -> dict[str, float]:
    """Return which share of what is left each stage has: those that the method gives, or in proportion to the job's."""
    asked = {"depth": method.segments, "width": method.widths, "finetune": method.whole}
    given = {stage: getattr(asked[stage], "share", None) for stage in sections}
    weights: dict[str, float] = {}
    for stage, (section, cost) in sections.items():
        share = given[stage]
        weights[stage] = section.steps * cost if share is None else share
    total = sum(weights.values()) or 1.0
    return {stage: weight / total for stage, weight in weights.items()}


def _sections(ground: Ground, method: Method, pick: Pick) -> Sections:
    job, plan = ground.job, pick.plan
    found: Sections = {}
    forms = trained_forms([plan])
    deep, narrow = [f for f in forms if f.is_stock], [f for f in forms if not f.is_stock]
    if method.segments and deep:
        given = {"inputs": method.segments.inputs, "loss": method.segments.loss, "init": method.segments.init}
        section = job.depth.model_copy(update={key: value for key, value in given.items() if value is not None})
        found["depth"] = (section, section.batch * _segment_passes(plan, deep, section))
    if method.widths and narrow:
        found["width"] = (job.width, job.width.batch * (_reach(plan, narrow) + 3 * len(narrow)))
    if method.whole:
        update = {"features": method.whole.features, "feature_loss": method.whole.feature_loss}
        tuning = job.finetune.model_copy(update=update)
        blocks, kept = sum(plan.depths.values()), len(list(plan.forms()))
        found["finetune"] = (tuning, tuning.batch * (blocks + pick.frozen + 3 * (kept - pick.frozen)))
    return found


def _segment_passes(plan: Plan, forms: list[Form], section: Depth) -> float:
    """Return what a sample takes: the teacher up to the last interval, and 3 for every student.

    Along the student's own path, every block of it before the last interval runs, too, and each student once more.
    """
    reach, own = _reach(plan, forms), 3.0 * len(forms)
    path = len(_until(plan, forms))
    follows = {"teacher": 0.0, "student": 1.0, "mixed": 0.5}[section.inputs]
    return reach + own + follows * path


def _reach(plan: Plan, forms: list[Form]) -> int:
    """Return how many of the teacher's blocks run until the last of these forms has read its target."""
    before, reach = 0, 0
    for stack, depth in plan.depths.items():
        ends = [form.last + 1 for form in forms if form.stack == stack]
        reach = before + max(ends) if ends else reach
        before += depth
    return reach


def _until(plan: Plan, forms: list[Form]) -> list[Form]:
    """Return the student's blocks up to the last of these forms."""
    own = list(plan.forms())
    last = max(i for i, f in enumerate(own) if any((f.stack, f.first) == (g.stack, g.first) for g in forms))
    return own[: last + 1]


def lever_passes(ground: Ground, curve: Mapping[int, float]) -> int:
    """Return what finding the rank of modulation takes, in b: each rank is measured once, and the teacher."""
    section = ground.job.modulation
    if section is None or not ground.lever:
        return 0
    return (len(curve) + 1) * section.velocity_batches * section.batch * sum(ground.plan.depths.values())
