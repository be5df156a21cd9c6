"""How weights follow their gradients: AdamW over fp32 masters, or optimizers that need a fraction of its memory.

    adamw       fp32 weights, gradients and two moments; gradients clipped by their common norm     16 bytes a parameter
    adamw8bit   weights in the teacher's dtype, 8-bit moments (torchao), step inside the backward  4.1
    adafactor   the same with factored second moments and no first (transformers)                  2.0

An update of 1e-5 is lost in a bf16 weight unless it is rounded stochastically: up or down, right on the average.
"""

import contextlib
import importlib.util
import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.optimization import Adafactor

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.processes import average, world
from ppcl_toolkit.training.lowbit import round_stochastically
from ppcl_toolkit.training.shards import local, spread

_TOGETHER = 16 * 1024**2
"""Values of gradients that processes exchange at a time."""

State = dict[str, Any]
"""What an optimizer remembers of one parameter: moments and the number of steps."""


class Settings(Protocol):
    """What an optimizer needs to know of a section."""

    @property
    def learning_rate(self) -> float: ...  # noqa: D102
    @property
    def betas(self) -> tuple[float, float]: ...  # noqa: D102
    @property
    def weight_decay(self) -> float: ...  # noqa: D102
    @property
    def clip(self) -> float | None: ...  # noqa: D102


class Rule(Protocol):
    """One way from a loss to new weights."""

    parameters: Sequence[nn.Parameter]

    def update(self, loss: Tensor, step: int, rate: float, *, exchange: bool) -> str:
        """Backpropagate and take step number `step`; return why that cannot be done, or nothing."""

    def state(self, index: int) -> State:
        """Return what is remembered of a parameter, to be changed in place; nothing before the first step."""

    def load(self, states: Mapping[int, State]) -> None:
        """Go on from what was remembered."""


def make_rule(kind: str, parameters: Sequence[nn.Parameter], section: Settings, device: torch.device) -> Rule:
    """Return the optimizer of that name over `parameters`, which take their steps on `device`."""
    if kind == "adamw":
        return Masters(parameters, section, device)
    return InBackward(kind, parameters, section)


@final
class Masters:
    """AdamW over all parameters at once; a gradient that is not finite leaves every weight as it was."""

    def __init__(self, parameters: Sequence[nn.Parameter], section: Settings, device: torch.device) -> None:
        self.parameters = parameters
        self._clip = section.clip or math.inf
        # Lists of intermediate values, the default on CUDA, take four more bytes a parameter.
        self._fused = True if device.type == "cuda" else None
        self._optimizer = torch.optim.AdamW(
            parameters,
            lr=section.learning_rate,
            betas=section.betas,
            weight_decay=section.weight_decay,
            fused=self._fused,
            foreach=None if self._fused else False,
        )

    def update(self, loss: Tensor, step: int, rate: float, *, exchange: bool) -> str:  # noqa: ARG002 - of a Rule
        """Backpropagate and take a step."""
        loss.backward()
        if exchange:
            average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = bool(torch.isfinite(norm))
        if finite:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return "" if finite else f"the gradient is {float(norm)}"

    def state(self, index: int) -> State:
        """Return the moments of a parameter."""
        return self._optimizer.state.get(self.parameters[index], {})

    def load(self, states: Mapping[int, State]) -> None:
        """Go on from these moments."""
        groups = self._optimizer.state_dict()["param_groups"]
        shares = {i: {n: spread(v, self.parameters[i]) for n, v in state.items()} for i, state in states.items()}
        self._optimizer.load_state_dict({"state": shares, "param_groups": groups})

    def place(self, move: Callable[[str, Tensor], Tensor]) -> None:
        """Move the moments, when a streamed schedule moves the weights."""
        for index, parameter in enumerate(self.parameters):
            state = self._optimizer.state.get(parameter, {})
            for key, value in state.items():
                # The count of steps lives on the CPU, but for the fused kernel.
                if isinstance(value, Tensor) and (value.ndim or self._fused):
                    state[key] = move(f"{index} {key}", value)


@final
class InBackward:
    """Every parameter takes its step as soon as its gradient is there, and the gradient is dropped.

    Then there is no common norm: `clip` bounds the gradient of each parameter alone. A gradient that is not finite
    leaves its parameter, and all that would have come after it, as they were.
    """

    def __init__(self, kind: str, parameters: Sequence[nn.Parameter], section: Settings) -> None:
        self.parameters = parameters
        self._one = [_OneParameter(kind, index, p, section) for index, p in enumerate(parameters)]
        self._now: tuple[int, float, bool] | None = None
        self._broken = ""
        for index, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._arrived(index))

    def update(self, loss: Tensor, step: int, rate: float, *, exchange: bool) -> str:
        """Backpropagate and take a step on the way."""
        self._now, self._broken = (step, rate, exchange), ""
        loss.backward()
        self._now = None
        broken = torch.tensor(float(bool(self._broken)), device=loss.device)
        if exchange and average(broken) > 0:
            return self._broken or "the gradient of another process is not finite"
        return self._broken

    def state(self, index: int) -> State:
        """Return the moments of a parameter."""
        return self._one[index].state

    def load(self, states: Mapping[int, State]) -> None:
        """Go on from these moments."""
        for index, state in states.items():
            self._one[index].load(state)

    def _arrived(self, index: int) -> None:
        assert self._now is not None, "a backward pass that no step asked for"
        step, rate, exchange = self._now
        parameter = self.parameters[index]
        if exchange:
            average_gradients([parameter])
        if not self._broken:
            self._broken = self._one[index].step(step, rate)
        parameter.grad = None


@final
class _OneParameter:
    """A stock optimizer in fp32 over one parameter at a time; the result is rounded into the parameter."""

    def __init__(self, kind: str, index: int, parameter: nn.Parameter, section: Settings) -> None:
        self._index, self._parameter, self._clip = index, parameter, section.clip or math.inf
        # The optimizer's moments belong to this one; its values are there during a step alone.
        self._exact = nn.Parameter(torch.empty(0))
        self._optimizer = _STOCK[kind](self._exact, section)

    @property
    def state(self) -> State:
        return self._optimizer.state.get(self._exact, {})

    def load(self, state: State) -> None:
        device = local(self._parameter).device
        self._optimizer.state[self._exact] = {
            # torchao reads its count of steps on the CPU.
            name: value.to(device) if isinstance(value, Tensor) and value.ndim else value
            for name, value in state.items()
        }

    @torch.no_grad()
    def step(self, step: int, rate: float) -> str:
        weight, gradient = local(self._parameter), self._parameter.grad
        assert gradient is not None
        gradient = local(gradient).float()
        norm = torch.nn.utils.get_total_norm([gradient])
        if not bool(torch.isfinite(norm)):
            return f"the gradient is {float(norm)}"
        gradient *= (self._clip / (norm + 1e-6)).clamp(max=1.0)
        self._exact.data, self._exact.grad = weight.detach().float(), gradient
        set_rate(self._optimizer, rate)
        with _uncompiled(weight.device):
            self._optimizer.step()
        if weight.dtype == torch.bfloat16:
            # By step and parameter, so that nothing has to be remembered; shares of a weight differ by process.
            share = world()[0] if isinstance(self._parameter, DTensor) else 0
            # The host's generator reads 32 bits of a seed.
            seed = zlib.crc32(f"{step} {share} {self._index}".encode())
            generator = torch.Generator(weight.device).manual_seed(seed)
            weight.copy_(round_stochastically(self._exact.data, generator))
        self._exact.data, self._exact.grad = torch.empty(0), None
        return ""


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, in place where the optimizer keeps it as a tensor, as torchao's do."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over the processes, in fp32 and many at a time: every process trained on other samples."""
    _, count = world()
    # Gradients of weights that are spread over the processes are means already.
    own = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    while count > 1 and own:
        size = itertools.accumulate(gradient.numel() for gradient in own)
        together = max(1, sum(total <= _TOGETHER for total in size))
        bucket, own = own[:together], own[together:]
        flat = torch.cat([gradient.flatten().float() for gradient in bucket])
        torch.distributed.all_reduce(flat)
        flat /= count
        for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _adamw8bit(parameter: nn.Parameter, section: Settings) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise PpclError(
            "optimizer adamw8bit needs the package torchao: pip install 'ppcl-toolkit[lowmem]', or choose adafactor"
        ) from error
    return AdamW8bit([parameter], lr=section.learning_rate, betas=section.betas, weight_decay=section.weight_decay)


def _adafactor(parameter: nn.Parameter, section: Settings) -> torch.optim.Optimizer:
    # The rate is absolute, as it is for the others, and not relative to the size of the weights.
    return Adafactor(
        [parameter],
        lr=section.learning_rate,
        weight_decay=section.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )


_STOCK = {"adamw8bit": _adamw8bit, "adafactor": _adafactor}


def _uncompiled(device: torch.device) -> AbstractContextManager[Any]:
    """Let torchao compile its step where that pays, on a GPU with triton, and need no compiler anywhere else."""
    pays = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return contextlib.nullcontext() if pays else torch.compiler.set_stance("force_eager")
