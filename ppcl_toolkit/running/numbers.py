"""Tensors on the meta device that keep their numbers: some transformers look at those of a mask."""

from typing import Any, final

import torch
from torch import Tensor

from ppcl_toolkit.running.capture import map_tensors

META, HOST = torch.device("meta"), torch.device("cpu")


@final
class Numbers(Tensor):
    """A tensor without data, for all that is computed with others; with data, for what is asked of it alone."""

    known: Tensor

    @staticmethod
    def __new__(cls, known: Tensor) -> "Numbers":
        """Keep `known`, which is on the host."""
        made: Numbers = Tensor._make_wrapper_subclass(
            cls,
            known.shape,
            strides=known.stride(),
            storage_offset=known.storage_offset(),
            dtype=known.dtype,
            device=META,
        )
        made.known = known
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        """Show the numbers."""
        return f"Numbers({self.known!r})"

    def tolist(self) -> Any:
        """Return the numbers."""
        return self.known.tolist()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Choose between two numbers by those of a mask: `torch.where` makes them tensors without data, before."""
        if func is torch.where and len(args) == 3 and not any(isinstance(value, Tensor) for value in args[1:]):
            return cls(torch.where(args[0].known, *args[1:]))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute with the numbers where every operand has them, and without where one has none."""
        del types
        given, named = list(args), dict(kwargs or {})
        operands: list[Tensor] = []
        map_tensors([given, named], operands.append)
        if not all(isinstance(operand, Numbers) for operand in operands):
            return func(*map_tensors(given, _empty), **map_tensors(named, _empty))
        named = {name: HOST if value == META else value for name, value in named.items()}
        made = func(*map_tensors(given, lambda t: t.known), **map_tensors(named, lambda t: t.known))
        return map_tensors(made, Numbers)


def emptied(values: Any) -> Any:
    """Return nested tensors on the meta device: whole numbers and masks keep what they hold."""
    return map_tensors(values, lambda t: t.to(META) if t.is_floating_point() else Numbers(t.detach().to(HOST)))


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor.known, device=META) if isinstance(tensor, Numbers) else tensor
