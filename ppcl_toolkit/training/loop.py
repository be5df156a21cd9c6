"""One optimizer step, its schedule and its state on disk: shared by everything that trains.

Weights in training are fp32; under bf16 teachers the forward runs in autocast.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ppcl_toolkit.artifacts.storage import load_tree, save_tree
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.processes import average, world


class Settings(Protocol):
    """What a training needs to know: the recipe's depth, width and fine-tuning sections have it."""

    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def learning_rate(self) -> float: ...  # noqa: D102
    @property
    def warmup(self) -> int: ...  # noqa: D102
    @property
    def betas(self) -> tuple[float, float]: ...  # noqa: D102
    @property
    def weight_decay(self) -> float: ...  # noqa: D102
    @property
    def clip(self) -> float | None: ...  # noqa: D102


class Optimization:
    """AdamW over some modules, with linear warm-up and cosine decay, gradient clipping and a guard against NaN.

    With `exchange`, processes average their gradients; without, each trains other modules than the rest.
    A loss or gradient that is not finite stops it: weights stay at the last good step, and `stopped` says why.
    """

    def __init__(self, name: str, modules: Sequence[nn.Module], section: Settings, *, exchange: bool = True) -> None:
        self.name = name
        self.exchanges = exchange
        self.losses: list[tuple[int, float]] = []
        self.stopped = ""
        self.done = 0
        self._section = section
        self._parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=section.learning_rate, betas=section.betas, weight_decay=section.weight_decay
        )

    def step(self, loss: Tensor) -> None:
        """Backpropagate `loss` and update, or stop."""
        # All processes stop together: one that waits for the gradients of another would wait for ever.
        value = average(loss.detach()) if self.exchanges else float(loss.detach())
        if not math.isfinite(value):
            self.stop(f"the loss is {value}")
            return
        loss.backward()
        if self.exchanges:
            average_gradients(self._parameters)
        norm = whole(torch.nn.utils.clip_grad_norm_(self._parameters, self._section.clip or math.inf))
        if not bool(torch.isfinite(norm)):
            self._optimizer.zero_grad(set_to_none=True)
            self.stop(f"the gradient is {float(norm)}")
            return
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self._section)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self.losses.append((self.done, value))

    def stop(self, why: str) -> None:
        """Take no more steps."""
        self.stopped = f"{self.name} stopped at step {self.done + 1}: {why}; its last good state is kept"

    def to(self, device: torch.device) -> None:
        """Move the optimizer's moments, when a streamed schedule moves the weights."""
        for state in self._optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    state[key] = value.to(device)

    def state(self) -> dict[str, Any]:
        """Return what `load_state` needs to go on exactly here."""
        moments = self._optimizer.state_dict()["state"]
        return {
            "done": self.done,
            "stopped": self.stopped,
            "losses": [list(pair) for pair in self.losses],
            "moments": {str(i): {n: whole(value) for n, value in values.items()} for i, values in moments.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.done, self.stopped = state["done"], state["stopped"]
        self.losses = [(step, loss) for step, loss in state["losses"]]
        groups = self._optimizer.state_dict()["param_groups"]
        moments = {
            int(index): {name: spread(value, self._parameters[int(index)]) for name, value in values.items()}
            for index, values in state["moments"].items()
        }
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


def learning_rate(step: int, section: Settings) -> float:
    """Linear warm-up, then cosine decay to zero at `section.steps`."""
    warmup = min(section.warmup, max(section.steps // 10, 1))
    if step < warmup:
        return section.learning_rate * (step + 1) / warmup
    through = (step - warmup) / max(section.steps - warmup, 1)
    return section.learning_rate * 0.5 * (1 + math.cos(math.pi * min(through, 1.0)))


def shard(module: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Spread weights, and with them gradients and moments, over the processes, block by block (FSDP2), in place."""
    _, count = world()
    if count > 1:
        mesh = init_device_mesh(device.type, (count,))
        for each in [*blocks, module]:
            fully_shard(each, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which this process may hold a part; all processes ask together."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor, as it has one of `like`."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def save_state(
    path: Path, step: int, parts: Mapping[str, tuple[nn.Module, Optimization]], *, write: bool = True
) -> None:
    """Write modules and their optimizations after `step` steps, by rename.

    Where they are spread over processes, all call this and one of them writes.
    """
    states = {
        name: {"weights": {n: whole(v) for n, v in module.state_dict().items()}, "optimization": optimization.state()}
        for name, (module, optimization) in parts.items()
    }
    if write:
        save_tree(path, {"step": step, "parts": states})


def load_state(path: Path, parts: Mapping[str, tuple[nn.Module, Optimization]]) -> int:
    """Restore what `save_state` wrote; return the steps done, 0 where there is no such file."""
    if not path.exists():
        return 0
    saved = load_tree(path)
    if saved["parts"].keys() != parts.keys():
        raise PpclError(f"{path} holds other segments than this run trains; delete it")
    for name, (module, optimization) in parts.items():
        own = module.state_dict()
        weights = {n: spread(v, own[n]) if n in own else v for n, v in saved["parts"][name]["weights"].items()}
        module.load_state_dict(weights, strict=True)
        optimization.load_state(saved["parts"][name]["optimization"])
    step: int = saved["step"]
    return step


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision where the teacher is in half precision, nothing where it is fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over the processes: every process trained on other samples."""
    _, count = world()
    if count > 1:
        for parameter in parameters:
            # Gradients of weights that are spread over the processes are means already.
            if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= count
