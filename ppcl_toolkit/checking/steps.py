"""Steps of a real run against each other: what a sample keeps of the first one must hold for all."""

from typing import Any

from torch import Tensor

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.checking.witness import difference
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import map_tensors
from ppcl_toolkit.running.noising import Step
from ppcl_toolkit.running.record import split


def check_steps(steps: list[Step], other: Step, adapter: Adapter) -> None:
    """Compare the steps of a run, and its first with that of another prompt.

    Raises `PpclError` where an argument beside latents and noise level changes from step to step, where one that is
    `shared` belongs to the prompt, where one that is not has no row for each sample, or where the first call of a step
    has nothing of its prompt.
    """
    family, first = f"adapter {adapter.family}", steps[0].call
    conditions = [name for name in first if name not in (adapter.latents, adapter.timestep, "return_dict")]
    for step in steps[1:]:
        for name in conditions:
            if wrong := _unlike(step.call.get(name), first[name], name):
                raise PpclError(
                    f"{family}: the pipeline passes {wrong} at a later step: samples keep what it was at the first, so "
                    "the transformer would be told two different things"
                )
    for name in adapter.shared:
        one, two = _values(first.get(name)), _values(other.call.get(name))
        if [_shape(v) for v in one] == [_shape(v) for v in two] and (wrong := difference(one, two, f"{name} ")):
            raise PpclError(
                f"{family}: shared names {name!r}, and two prompts have different ones ({wrong}): it belongs to a "
                "sample, and a batch would give all of them that of the first"
            )
    split(adapter, first, steps[0].sample)
    own = [name for name in conditions if name not in adapter.shared and _values(first[name])]
    if own and not any(_unlike(other.call.get(name), first[name], name) for name in own):
        raise PpclError(
            f"{family}: the first call of a step is the same for two prompts ({', '.join(own)}): it is that of the "
            "negative prompt, and the first one is recorded as the prompt's"
        )


def _unlike(found: Any, expected: Any, name: str) -> str:
    return difference(_values(found), _values(expected), f"{name} ")


def _values(value: Any) -> list[Any]:
    """Return the tensors and numbers in a value: what else there is may be made anew at every step."""
    found: list[Any] = []
    map_tensors(value, found.append)
    if isinstance(value, int | float):
        found.append(value)
    return found


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None
