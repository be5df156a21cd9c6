"""Values that are alike to code which reads no numbers from tensors: what is worked out for one is true of all."""

import types
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor


def likeness(value: Any) -> Hashable:
    """Return what is equal for values that differ in the numbers of their tensors at most.

    Modules are taken by class, attributes and shapes of weights. A `TypeError` says that it cannot be told, as of
    closures and of what cannot be pickled.
    """
    try:
        return _alike(value, {})
    except Exception as error:  # whatever a class raises that is not to be pickled
        raise TypeError(f"what {type(value).__name__} is cannot be told: {error}") from error


def _alike(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    if value is None or isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, types.FunctionType) and value.__closure__ is None:
        return value
    if isinstance(value, (types.FunctionType, types.ModuleType)):
        raise TypeError(f"{value} is not told by what it is made of")
    if type(value) is tuple:
        return tuple(_alike(each, seen) for each in value)
    if id(value) in seen:
        return "again", seen[id(value)][0]
    # Kept with its number: an address that is free is another's soon.
    seen[id(value)] = len(seen), value
    if isinstance(value, Tensor):
        return type(value), value.shape, value.dtype
    if isinstance(value, Mapping):
        return type(value), tuple((_alike(name, seen), _alike(each, seen)) for name, each in value.items())
    if isinstance(value, list):
        return type(value), tuple(_alike(each, seen) for each in value)
    # As it would be pickled: what makes it, of what, and what it then is given.
    reduced = value.__reduce_ex__(2)
    if isinstance(reduced, str):
        return type(value), reduced
    make, given, *state = reduced
    return type(value), make, *(_alike(each, seen) for each in (given, *state))


_PLAIN = (bool, int, float, str, bytes, type, types.BuiltinFunctionType, torch.dtype, torch.device)
