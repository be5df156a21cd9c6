"""Steps of a real run against each other: what a sample keeps of the first one must hold for all."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.checking.witness import difference
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import map_tensors
from ppcl_toolkit.running.noising import Noising, Step, check_negatives, noising_of, observed
from ppcl_toolkit.running.record import split

_OTHER = "nothing that anybody asked for"
"""A prompt."""
_FEW = 2
"""Steps."""
_MORE = (
    "known are calls of the prompt and of a negative one. What more there are (skipped layers, perturbed attention) go "
    "by blocks that a shorter model has not: do without them in `teacher.call`"
)


def check_run(pipeline: Any, adapter: Adapter, run: Callable[..., Any]) -> tuple[Noising, dict[str, Any]]:
    """Check an adapter on the first steps of `run()`, which calls `pipeline`; return how it noises, and a call.

    `run(prompt)` calls it with another prompt, `run(None, name=value)` with another argument.

    Raises `PpclError` with what would go wrong: see `check_steps`, and also where the pipeline does not pack as the
    adapter says, or is guided by another argument, or steps by other tokens.
    """
    if adapter.packs and not callable(getattr(pipeline, "_pack_latents", None)):
        raise PpclError(f"adapter {adapter.family}: packs is True, and {type(pipeline).__name__} has no _pack_latents")
    steps = observed(pipeline, adapter, run)
    (other,) = observed(pipeline, adapter, lambda: run(_OTHER), 1)
    check_negatives(steps[0], other, adapter)
    # Two levels lie on a line whatever the transformer is told; a run of few steps is not told enough of them.
    told = steps
    if len(steps) <= _FEW and "num_inference_steps" in inspect.signature(type(pipeline).__call__).parameters:
        told = observed(pipeline, adapter, partial(run, None, num_inference_steps=4))
    noising = noising_of(pipeline.scheduler, adapter, told)
    check_steps(steps, other, adapter)
    plain = _unguided(pipeline, adapter, run) if _is_guided(steps[0], adapter) else steps[0]
    if plain is not None:
        _check_velocity(plain, adapter)
    return noising, {**steps[-1].call, "return_dict": False}


def _is_guided(step: Step, adapter: Adapter) -> bool:
    """Whether every picture is run twice, in two calls or in one."""
    return bool(step.others) or len(step.call[adapter.latents]) > len(step.sample)


def _unguided(pipeline: Any, adapter: Adapter, run: Callable[..., Any]) -> Step | None:
    """Return a step without guidance; None where a pipeline is told its guidance when it is built.

    Raises `PpclError` where it is not the adapter's `guidance` that has the pipeline run every picture twice.
    """
    family, name = f"adapter {adapter.family}: guidance names {adapter.guidance!r}", type(pipeline).__name__
    if adapter.guidance not in inspect.signature(type(pipeline).__call__).parameters:
        if hasattr(pipeline, "guider"):
            return None
        raise PpclError(f"{family}, and {name} takes no such argument, though it runs every picture twice")
    off, on = adapter.unguided, adapter.unguided + 0.5
    step, above = (
        observed(pipeline, adapter, partial(run, None, **{adapter.guidance: value}), 1)[0] for value in (off, on)
    )
    if _is_guided(step, adapter):
        raise PpclError(
            f"{family}, and where that is {off:g}, {name} runs every picture twice as before: it is guided by "
            "something else, or `unguided` at another value"
        )
    if not _is_guided(above, adapter):
        raise PpclError(f"{family}, unguided at {off:g}, and where it is {on:g}, {name} runs no picture twice, either")
    return step


def _check_velocity(step: Step, adapter: Adapter) -> None:
    """Raise a `PpclError` where a pipeline steps by other tokens of what its transformer makes than the adapter has."""
    if adapter.noised is None or step.velocity is None or step.made.shape == step.velocity.shape:
        return
    own, velocity = adapter.noised_of(step.call, step.made).float(), step.velocity.float()
    if not any(torch.allclose(sign * own, velocity, rtol=1e-2, atol=1e-2) for sign in (1, -1)):
        raise PpclError(
            f"adapter {adapter.family}: noised_last is {adapter.noised_last}, and of the {step.made.shape[1]} tokens "
            f"that the transformer makes, the scheduler is given {velocity.shape[1]} others"
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
                    "the transformer would be told two different things; what turns that off belongs in `teacher.call`"
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
    """Return the tensors in a value, or numbers and words: what else there is may be made anew at every step."""
    found: list[Any] = []
    map_tensors(value, found.append)
    if isinstance(value, int | float | str):
        found.append(value)
    return found
