"""One call of a transformer, watched: what each of its modules is given and returns, by argument and in order."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_toolkit.running.capture import map_tensors, named_arguments


@dataclass(frozen=True, slots=True, eq=False)
class Called:
    """One call of a module."""

    path: str
    module: nn.Module
    arguments: dict[str, Any]
    """By name; an argument that is not given is not there."""
    output: Any

    @property
    def outputs(self) -> tuple[Any, ...]:
        """What it returns, as a tuple."""
        return tuple(self.output) if isinstance(self.output, tuple | list) else (self.output,)

    def tensors(self) -> dict[str, Tensor]:
        """Return the arguments that are tensors."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}


@torch.no_grad()
def watch(root: nn.Module, call: Mapping[str, Any]) -> list[Called]:
    """Return the calls of all modules below `root` in `root(**call)`, in the order in which they end."""
    found: list[Called] = []

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found.append(Called(path, module, named_arguments(module, args, kwargs), output))

        return hook

    handles = [
        module.register_forward_hook(keep(path), with_kwargs=True) for path, module in root.named_modules() if path
    ]
    try:
        root(**call)
    finally:
        for handle in handles:
            handle.remove()
    return found


def changed(one: Any, other: Any) -> bool:
    """Whether two values, tensors or not, differ."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape != other.shape or not torch.equal(one, other)
    return isinstance(one, Tensor) != isinstance(other, Tensor)


@contextlib.contextmanager
def first_call(root: nn.Module) -> Iterator[dict[str, Any]]:
    """Keep the arguments of the first call of a module, by name."""
    found: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update({} if found else map_tensors(named_arguments(module, args, kwargs), Tensor.clone))

    handle = root.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
