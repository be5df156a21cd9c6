"""One optimizer step, its schedule and its state on disk: shared by everything that trains.

Weights of segments in training are fp32; under bf16 teachers the forward runs in autocast.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppcl_toolkit.artifacts.storage import load_tree, save_tree
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.processes import average
from ppcl_toolkit.training import optimizers
from ppcl_toolkit.training.optimizers import Masters, make_rule


class Settings(optimizers.Settings, Protocol):
    """What a training needs to know beyond its optimizer: depth, width and fine-tuning sections have it."""

    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def warmup(self) -> int: ...  # noqa: D102


class Optimization:
    """An optimizer over some modules, with linear warm-up and cosine decay, clipping and a guard against NaN.

    With `exchange`, processes average their gradients; without, each trains other modules than the rest.
    A loss or gradient that is not finite stops it: weights stay at the last good step, and `stopped` says why.
    """

    def __init__(
        self,
        name: str,
        modules: Sequence[nn.Module],
        section: Settings,
        *,
        exchange: bool = True,
        optimizer: str = "adamw",
        device: torch.device | None = None,
    ) -> None:
        self.name, self.optimizer = name, optimizer
        self.exchanges = exchange
        self.losses: list[tuple[int, float]] = []
        self.stopped = ""
        self.done = 0
        self._section = section
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.rule = make_rule(optimizer, parameters, section, device or torch.device("cpu"))

    def step(self, loss: Tensor) -> None:
        """Backpropagate `loss` and update, or stop."""
        # All processes stop together: one that waits for the gradients of another would wait for ever.
        value = average(loss.detach()) if self.exchanges else float(loss.detach())
        if not math.isfinite(value):
            self.stop(f"the loss is {value}")
            return
        rate = learning_rate(self.done, self._section)
        broken = self.rule.update(loss, self.done, rate, exchange=self.exchanges)
        if broken:
            self.stop(broken)
            return
        self.done += 1
        self.losses.append((self.done, value))

    def stop(self, why: str) -> None:
        """Take no more steps."""
        self.stopped = f"{self.name} stopped at step {self.done + 1}: {why}; its last good state is kept"

    def place(self, move: Callable[[str, Tensor], Tensor]) -> None:
        """Move the optimizer's moments, each by its name, when a streamed schedule moves the weights."""
        assert isinstance(self.rule, Masters), "what steps in the backward pass keeps its moments beside its weights"
        self.rule.place(move)

    def state(self) -> dict[str, Any]:
        """Return what `load_state` needs to go on exactly here."""
        moments = {str(index): self.rule.state(index) for index in range(len(self.rule.parameters))}
        return {**self.account(), "moments": {index: moment for index, moment in moments.items() if moment}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.done, self.stopped = state["done"], state["stopped"]
        self.losses = [(step, loss) for step, loss in state["losses"]]
        self.rule.load({int(index): moments for index, moments in state["moments"].items()})

    def account(self) -> dict[str, Any]:
        """Return how far it is, without the moments."""
        return {"done": self.done, "stopped": self.stopped, "losses": [list(pair) for pair in self.losses]}


def learning_rate(step: int, section: Settings) -> float:
    """Linear warm-up, then cosine decay to zero at `section.steps`."""
    warmup = min(section.warmup, max(section.steps // 10, 1))
    if step < warmup:
        return section.learning_rate * (step + 1) / warmup
    through = (step - warmup) / max(section.steps - warmup, 1)
    return section.learning_rate * 0.5 * (1 + math.cos(math.pi * min(through, 1.0)))


def save_state(
    path: Path, step: int, parts: Mapping[str, tuple[nn.Module, Optimization]], *, write: bool = True
) -> None:
    """Write modules and their optimizations after `step` steps, by rename; of several processes one shall `write`."""
    states = {
        name: {"weights": dict(module.state_dict()), "optimization": optimization.state()}
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
        module.load_state_dict(saved["parts"][name]["weights"], strict=True)
        optimization.load_state(saved["parts"][name]["optimization"])
    step: int = saved["step"]
    return step


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision where the teacher is in half precision, nothing where it is fp32."""
    # A cache would keep a second copy of all weights until the end of a pass, and each is used once.
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)
