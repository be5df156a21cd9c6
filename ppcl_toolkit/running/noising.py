"""How a pipeline noises, seen from a few steps of a real run: what levels there are, and how a transformer is told.

Two kinds of process are known. A rectified flow has x = (1 - s) x_0 + s n, of noise n and a level s from 0 to 1; the
transformer is told an affine map of s (SD3: 1000 s, Lumina: 1 - s). A diffusion process (DDPM) has T levels,
x = a_k x_0 + (1 - a_k^2)^1/2 n, and the transformer is told k.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import map_tensors
from ppcl_toolkit.running.rows import as_given, stacked, unlike_rows

_TOLD = ((0.0, 1.0), (0.0, 1000.0), (1.0, -1.0), (1000.0, -1000.0))
"""Offset and scale of the maps that pipelines are known to use."""
_PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Noising(BaseModel):
    """The levels of noise of a process, from 0 to 1, and what its transformer is told of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["flow", "diffusion"] = "flow"
    offset: float = 0.0
    """What a flow's transformer is told of level 0."""
    scale: float = 1.0
    """What it is told of level 1, less that."""
    signal: tuple[float, ...] = ()
    """Of a diffusion process: a_k^2 for every k."""

    def noised(self, clean: Tensor, noise: Tensor, levels_B: Tensor) -> Tensor:
        """Return x of clean latents and noise [B, ...] at the levels [B]."""
        shape = (-1, *[1] * (clean.ndim - 1))
        if self.kind == "flow":
            level = levels_B.view(shape)
            return (1 - level) * clean + level * noise
        signal = torch.tensor(self.signal)[self._numbers(levels_B)].view(shape)
        return signal.sqrt() * clean + (1 - signal).sqrt() * noise

    def told(self, levels_B: Tensor) -> Tensor:
        """Return what the transformer is told of the levels [B]."""
        if self.kind == "diffusion":
            return self._numbers(levels_B).to(levels_B)
        return self.offset + self.scale * levels_B if self.offset else self.scale * levels_B

    def level(self, told_B: Tensor) -> Tensor:
        """Return the levels [B] of what a transformer is told."""
        if self.kind == "diffusion":
            return told_B / (len(self.signal) - 1)
        return (told_B - self.offset) / self.scale

    def _numbers(self, levels_B: Tensor) -> Tensor:
        return (levels_B * (len(self.signal) - 1)).round().long()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a real run; all tensors are on the host."""

    call: dict[str, Any]
    """Arguments of the transformer, of its first call if there are more."""
    others: tuple[dict[str, Any], ...] = ()
    """Those of the calls behind the first."""
    timestep: float
    """What the scheduler is told."""
    sample: Tensor
    """The latents that it is given."""
    made: Tensor
    """What the transformer made of its first call."""
    velocity: Tensor | None = None
    """What the scheduler is given for it."""


class _Enough(BaseException):
    """Enough steps have been seen: nobody on the way may take it for an error."""


@contextlib.contextmanager
def stepping(scheduler: Any, after: Any) -> Iterator[None]:
    """Call `after(given, result)` behind each step of a scheduler, of its arguments by name; samples are [B, ...]."""
    own = scheduler.step
    signature = inspect.signature(own)

    # Pipelines look at the signature: what is not in it (`generator`, `eta`) they do not pass.
    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        result = own(*args, **kwargs)
        after(given, result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def observed(pipeline: Any, adapter: Adapter, run: Any, count: int = 3) -> list[Step]:
    """Return the first steps of `run()`, which calls the pipeline; it is cut short behind them.

    Raises `PpclError` where the pipeline does not step its scheduler, or its transformer is called without one of the
    adapter's arguments.
    """
    name = type(pipeline).__name__
    if getattr(pipeline, "scheduler", None) is None:
        raise PpclError(f"{name} has no scheduler: how its latents are noised cannot be known")
    signature = inspect.signature(type(pipeline.transformer).forward)
    calls: list[dict[str, Any]] = []
    made: list[Tensor] = []
    steps: list[Step] = []

    def called(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = dict(signature.bind(module, *args, **kwargs).arguments)
        bound.pop("self")
        calls.append(map_tensors(bound, _copied))

    def answered(_module: Any, _args: Any, output: Any) -> None:
        made.append(_copied(stacked(output[0])))

    def stepped(given: Mapping[str, Any], _: Tensor) -> None:
        if calls:
            (first, *others), level = calls, float(given["timestep"])
            own, velocity = (map_tensors(given.get(name), _copied) for name in ("sample", "model_output"))
            found = {"timestep": level, "sample": own, "made": made[0], "velocity": velocity}
            steps.append(Step(call=first, others=tuple(others), **found))
            calls.clear()
            made.clear()
        if len(steps) == count:
            raise _Enough

    with stepping(pipeline.scheduler, stepped), contextlib.suppress(_Enough), contextlib.ExitStack() as hooks:
        hooks.callback(pipeline.transformer.register_forward_pre_hook(called, with_kwargs=True).remove)
        hooks.callback(pipeline.transformer.register_forward_hook(answered).remove)
        run()
    if not steps:
        raise PpclError(f"{name} takes no step of its scheduler with its transformer: such a run cannot be recorded")
    for argument in (adapter.latents, adapter.timestep):
        if argument not in steps[0].call:
            raise PpclError(
                f"adapter {adapter.family}: {name} calls its transformer without {argument!r}, but with "
                f"{', '.join(steps[0].call)}"
            )
    return steps


def noising_of(scheduler: Any, adapter: Adapter, steps: list[Step]) -> Noising:
    """Return the process that a scheduler follows, and how the steps of a run tell the transformer of it.

    Raises `PpclError`, which names the scheduler, for processes of other kinds, and where what the transformer is told
    is no affine map of the level, or what it is given are not the scheduler's latents.
    """
    name, config = type(scheduler).__name__, scheduler.config
    told = [_told(step.call[adapter.timestep], adapter) for step in steps]
    for step in steps:
        _check_latents(step, adapter)
    prediction = config.get("prediction_type")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or prediction == "flow_prediction":
        return _flow(scheduler, told, [_level(scheduler, step.timestep) for step in steps], steps[0].call)
    signal = getattr(scheduler, "alphas_cumprod", None)
    plain = float(getattr(scheduler, "init_noise_sigma", 1.0)) == 1.0
    if not isinstance(signal, Tensor) or not plain or prediction not in _PREDICTIONS:
        raise PpclError(
            f"{name} (prediction_type {prediction!r}) cannot be noised for: known are rectified flows, and diffusion "
            f"processes of unit variance with one of {', '.join(_PREDICTIONS)}"
        )
    if wrong := [pair for pair in zip(told, [step.timestep for step in steps], strict=True) if pair[0] != pair[1]]:
        raise PpclError(f"the transformer is told {wrong[0][0]:g} where {name} is at step {wrong[0][1]:g}")
    return Noising(kind="diffusion", signal=tuple(signal.double().tolist()))


def check_negatives(step: Step, other: Step, adapter: Adapter) -> None:
    """Compare the calls of two prompts: the rows of negatives are those that they share.

    Raises `PpclError` where they are not where the adapter has them.
    """
    given, count = step.call[adapter.latents], len(step.sample)
    one, two = ({n: v for n, v in each.call.items() if n not in adapter.shared} for each in (step, other))
    rows = unlike_rows(one, two, len(given), listed=isinstance(given, list))
    expected = list(range(count)) if adapter.negatives_last else list(range(len(given) - count, len(given)))
    if len(given) > count and rows and rows != expected:
        raise PpclError(
            f"adapter {adapter.family}: of {len(given)} rows of a call, {rows} belong to the prompts, and "
            f"negatives_last is {adapter.negatives_last}"
        )


def _flow(scheduler: Any, told: list[float], levels: list[float], call: Mapping[str, Any]) -> Noising:
    # Pipelines tell it in the type of their weights.
    dtypes = [v.dtype for v in call.values() if isinstance(v, Tensor) and v.is_floating_point()]
    precision = 4 * max(torch.finfo(dtype).eps for dtype in dtypes)
    if not scheduler.timesteps.is_floating_point():
        # Some solvers tell whole thousandths.
        precision = max(precision, 1.1e-3)
    maps = list(_TOLD)
    if len(levels) > 1 and levels[0] != levels[-1]:
        scale = (told[0] - told[-1]) / (levels[0] - levels[-1])
        maps.append((_plain(told[0] - scale * levels[0]), _plain(scale)))
    for offset, scale in maps:
        bound = precision * max(abs(offset), abs(scale))
        if scale and all(abs(offset + scale * s - t) <= bound for t, s in zip(told, levels, strict=True)):
            return Noising(offset=offset, scale=scale)
    pairs = ", ".join(f"{t:g} at {s:.4g}" for t, s in zip(told, levels, strict=True))
    raise PpclError(
        f"what the transformer is told is no affine map of the level of noise of {type(scheduler).__name__}: {pairs}; "
        "such a teacher cannot be noised for"
    )


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _plain(value: float) -> float:
    """Round to four digits: what is left is rounding on the way to the transformer."""
    return 0.0 if abs(value) < 1e-4 else round(value, 3 - math.floor(math.log10(abs(value))))


def _level(scheduler: Any, timestep: float) -> float:
    numbers = (scheduler.timesteps.double().cpu() - timestep).abs()
    sigma = float(scheduler.sigmas[int(numbers.argmin())])
    # Mochi's count what is left of the picture.
    return 1 - sigma if scheduler.config.get("invert_sigmas") else sigma


def _told(value: Any, adapter: Adapter) -> float:
    found = torch.as_tensor(value).double().flatten()
    if len(found.unique()) != 1:
        raise PpclError(
            f"adapter {adapter.family}: {adapter.timestep!r} differs within one call of the transformer "
            f"({found.unique().tolist()[:3]}): one level of noise for all latents can be learned from"
        )
    return float(found[0])


def _check_latents(step: Step, adapter: Adapter) -> None:
    """Refuse pipelines that give the transformer other latents than their scheduler steps."""
    given = stacked(step.call[adapter.latents])
    own = as_given(step.sample, given, adapter)
    # Rows are repeated for guidance; references are beside the noised tokens.
    first = given.shape[1] - own.shape[1] if adapter.noised_last else 0
    seen = given[: len(own), first : first + own.shape[1]]
    if adapter.noised is not None and (counted := adapter.noised(step.call)) != own.shape[1]:
        raise PpclError(
            f"adapter {adapter.family}: noised counts {counted} tokens of a call, and the scheduler steps "
            f"{own.shape[1]} of them"
        )
    if adapter.noised is None and own.ndim == 3 and own.shape[1] < step.made.shape[1]:
        raise PpclError(
            f"adapter {adapter.family}: noised is None, and the transformer makes {step.made.shape[1]} tokens where "
            f"the scheduler steps {own.shape[1]}: nobody reads the velocity of the others, those of reference images"
        )
    if not torch.allclose(seen.float(), own.to(seen.dtype).float(), rtol=1e-2, atol=1e-2):
        raise PpclError(
            f"the transformer's {adapter.latents!r} {list(given.shape)} are not the latents that the scheduler steps "
            f"{list(own.shape)}: they are scaled or changed on the way, and samples of them cannot be noised"
        )
