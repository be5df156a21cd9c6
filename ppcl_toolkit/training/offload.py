"""Blocks in training that rest on the host and come to the device one at a time, in forward and again in backward.

A block's forward keeps its inputs alone (gradient checkpointing). When its gradient comes, the block comes with its
moments, computes again, takes its step while its gradients are there, and goes home with what it has learned. So the
device holds one block, whatever the number of them. An optimizer that steps after the backward finds weights and
gradients at home, and steps there.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppcl_toolkit.running.placement import HOST
from ppcl_toolkit.training.lowbit import packed, unpacked
from ppcl_toolkit.training.optimizers import InBackward, Rule

_CHUNK = 1024**3
"""Bytes of pinned memory that are asked for at a time: torch rounds each request up to a power of two."""


@final
class Offload:
    """Lets `blocks` of a module, whose parameters `rule` trains, live on the host; the rest of it moves to `device`."""

    def __init__(self, module: nn.Module, blocks: Iterable[nn.Module], rule: Rule, device: torch.device) -> None:
        self._rule, self._device = rule, device
        self._host = _Host(pinned=device.type == "cuda")
        self._number = {parameter: index for index, parameter in enumerate(rule.parameters)}
        self._homes: dict[nn.Parameter, Tensor] = {}
        self._moments: dict[tuple[int, str], Mapping[str, Tensor]] = {}
        self._present: nn.Module | None = None
        self._learning = False
        for block in blocks:
            for parameter in block.parameters():
                parameter.data = self._homes[parameter] = self._host.copy(parameter.data)
            for buffer in block.buffers():
                buffer.data = buffer.data.to(device)
            # On the instance: hooks and names of the block stay as they are.
            vars(block)["forward"] = self._visited(block, block.forward)
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor not in self._homes:
                tensor.data = tensor.data.to(device)

    def _visited(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def visit(*args: Any, **kwargs: Any) -> Any:
            times = itertools.count()

            def run(*args: Any, **kwargs: Any) -> Any:
                # Once forward; once more when the backward pass has come here.
                self._bring(block, learning=next(times) > 0)
                return forward(*args, **kwargs)

            # A block leaves when another comes; nobody comes after the first one, whose input has its gradient then.
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.requires_grad), None)
            if given is not None and torch.is_grad_enabled():
                given.register_hook(lambda _: self._leave() if self._present is block else None)
            return checkpoint(run, *args, use_reentrant=False, **kwargs)

        return visit

    def _bring(self, block: nn.Module, *, learning: bool) -> None:
        if self._present is not block:
            self._leave()
            for parameter in block.parameters():
                parameter.data = self._homes[parameter].to(self._device, non_blocking=True)
            self._present = block
        self._learning = learning
        if learning and isinstance(self._rule, InBackward):
            for parameter in block.parameters():
                if parameter in self._number:  # the others are frozen
                    self._bring_moments(self._number[parameter])

    def _leave(self) -> None:
        block, self._present = self._present, None
        for parameter in block.parameters() if block is not None else ():
            home, gradient, parameter.grad = self._homes[parameter], parameter.grad, None
            if parameter in self._number and self._learning and isinstance(self._rule, InBackward):
                home.copy_(parameter.data)
                self._leave_moments(self._number[parameter])
            parameter.data = home
            parameter.grad = None if gradient is None else gradient.to(HOST)
        self._learning = False

    def _bring_moments(self, number: int) -> None:
        state = self._rule.state(number)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                there = {kind: part.to(self._device, non_blocking=True) for kind, part in packed(value).items()}
                state[key] = unpacked(there)

    def _leave_moments(self, number: int) -> None:
        state = self._rule.state(number)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                parts = packed(value)
                if (number, key) not in self._moments:
                    self._moments[number, key] = {kind: self._host.copy(part) for kind, part in parts.items()}
                homes = self._moments[number, key]
                for kind, part in parts.items():
                    homes[kind].copy_(part)
                state[key] = unpacked(homes)


@final
class _Host:
    """Memory of the host that the device reads without a detour, where there is such a device."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor in this memory."""
        if not self._pinned:
            return tensor.to(HOST, copy=True)
        if self._used + tensor.nbytes > len(self._chunk):
            size = max(_CHUNK, 1 << (tensor.nbytes - 1).bit_length())
            self._chunk, self._used = torch.empty(size, dtype=torch.uint8, pin_memory=True), 0
        place = self._chunk[self._used : self._used + tensor.nbytes]
        self._used += -(-tensor.nbytes // 64) * 64
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
