"""Steps of a real run against each other: what a sample keeps of the first one must hold for all."""

from typing import Any

from torch import Tensor

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.checking.witness import difference
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import map_tensors
from ppcl_toolkit.running.noising import Step
from ppcl_toolkit.running.record import split

_MORE = (
    "known are calls of the prompt and of a negative one. What more there are (skipped layers, perturbed attention) go "
    "by blocks that a shorter model has not: do without them in `teacher.call`"
)


def check_steps(steps: list[Step], other: Step, adapter: Adapter) -> None:
    """Compare the steps of a run, and its first with that of another prompt.

    Raises `PpclError` where an argument beside latents and noise level changes from step to step, where one that is
    `shared` belongs to the prompt, where one that is not has no row for each sample, or where the first call of a step
    has nothing of its prompt.
    """
    family, first = f"adapter {adapter.family}", steps[0].call
    _check_calls(steps, adapter)
    conditions = [name for name in first if name not in (adapter.latents, adapter.timestep, "return_dict")]
    for step in steps[1:]:
        for name in conditions:
            if wrong := _unlike(step.call.get(name), first[name], name):
                raise PpclError(
                    f"{family}: the pipeline passes {wrong} at a later step: samples keep what it was at the first, so "
                    "the transformer would be told two different things"
                )
    for name in adapter.shared:
        one, two = _in_common(_values(first.get(name)), _values(other.call.get(name)))
        if wrong := difference(one, two, f"{name} "):
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
    prompts = [name for name in own if _unlike(other.call.get(name), first[name], name)]
    for call in steps[0].others:
        if all(not _unlike(call.get(name), first[name], name) for name in prompts):
            raise PpclError(
                f"{family}: the second call of a step has the prompt ({', '.join(prompts)}) again, where that of a "
                f"negative one is recorded; {_MORE}"
            )


def _check_calls(steps: list[Step], adapter: Adapter) -> None:
    """Raise a `PpclError` where a step has more calls than those of the prompt and of a negative one."""
    guided = len(steps[0].call[adapter.latents]) > len(steps[0].sample)
    for number, step in enumerate(steps):
        count = 1 + len(step.others)
        if count > (1 if guided else 2):
            raise PpclError(
                f"adapter {adapter.family}: the pipeline calls its transformer {count} times in a step"
                f"{', once for prompt and negative prompt together' if guided else ''}; {_MORE}"
            )
        if len(step.others) > len(steps[0].others):
            raise PpclError(
                f"adapter {adapter.family}: the pipeline calls its transformer {count} times at step {number + 1}, and "
                "less often at the first one, which is what samples keep"
            )


def _in_common(one: list[Any], other: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return the values of two prompts as far as both have them: places of few tokens begin those of many."""
    pairs = list(zip(one, other, strict=False))
    return [_cut(a, b) for a, b in pairs], [_cut(b, a) for a, b in pairs]


def _cut(value: Any, other: Any) -> Any:
    if not isinstance(value, Tensor) or not isinstance(other, Tensor) or value.ndim != other.ndim:
        return value
    return value[tuple(slice(min(sizes)) for sizes in zip(value.shape, other.shape, strict=True))]


def _unlike(found: Any, expected: Any, name: str) -> str:
    return difference(_values(found), _values(expected), f"{name} ")


def _values(value: Any) -> list[Any]:
    """Return the tensors and numbers in a value: what else there is may be made anew at every step."""
    found: list[Any] = []
    map_tensors(value, found.append)
    if isinstance(value, int | float):
        found.append(value)
    return found
