"""Copies of modules: without weights, or with those of the original."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (NoneType, bool, int, float, str)


def meta_copy(block: nn.Module) -> nn.Module:
    """Copy a module to the meta device without touching its weights."""
    return _copy(block, lambda tensor: torch.empty_like(tensor, device="meta"))


def sharing_copy(module: nn.Module) -> nn.Module:
    """Copy a module whose weights are the very memory of the original's, until one of them is moved or assigned."""
    return _copy(module, Tensor.detach)


def _copy(module: nn.Module, each: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy a module as `copy.deepcopy` does, in less time; of tensors, `each` makes new ones."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        new = each(tensor)
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    parts = list(module.modules())
    if any(hasattr(part, "__deepcopy__") for part in parts):
        return copy.deepcopy(module, memo)
    for part in parts:
        memo[id(part)] = type(part).__new__(type(part))
    for part in parts:
        vars(memo[id(part)]).update({name: _copied(value, memo) for name, value in vars(part).items()})
    made: nn.Module = memo[id(module)]
    return made


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    # Most of what a module has: its kind of hooks, of which there are none, flags and numbers.
    if type(value) not in (dict, OrderedDict):
        return value if isinstance(value, _PLAIN) else copy.deepcopy(value, memo)
    made = memo[id(value)] = type(value)()
    for name, each in value.items():
        made[name] = memo[id(each)] if id(each) in memo else copy.deepcopy(each, memo)
    return made
