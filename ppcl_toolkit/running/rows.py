"""Rows of a recorded call: what of an argument belongs to one sample of a batch, and samples as a batch again.

A tensor has its samples along its first dimension, a list of plain values one item for each. Tuples, lists and dicts of
tensors are taken apart tensor by tensor; where the latents come as a list of samples (Z-Image), so do other lists.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import map_tensors


def unlike_rows(one: Mapping[str, Any], other: Mapping[str, Any], rows: int, *, listed: bool = False) -> list[int]:
    """Return which of the `rows` of two calls differ in any of their tensors, as far as both reach.

    A negative prompt is padded to the length of the prompt beside it.
    """

    def told(call: Mapping[str, Any], index: int) -> list[Tensor]:
        found: list[Tensor] = []
        for value in call.values():
            with contextlib.suppress(Uneven):
                map_tensors(row(value, index, rows, listed=listed), found.append)
        return found

    def same(index: int) -> bool:
        pairs = list(zip(told(one, index), told(other, index), strict=False))
        return all(torch.equal(*_in_common(a, b)) for a, b in pairs)

    return [index for index in range(rows) if not same(index)]


def _in_common(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    both = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
    return one[both], other[both]


class Uneven(Exception):
    """What has no row for each sample, `args[0]` of them."""


def stacked(latents: Tensor | list[Tensor]) -> Tensor:
    """Return latents [B, ...], also where they come as a list of samples."""
    return torch.stack(latents) if isinstance(latents, list) else latents


def as_given(latents: Tensor, tokens: Tensor, adapter: Adapter) -> Tensor:
    """Return the pipeline's latents in the shape in which the transformer is given them: frames of one may be added."""
    if [size for size in latents.shape[1:] if size > 1] == [size for size in tokens.shape[1:] if size > 1]:
        return latents.reshape(len(latents), *tokens.shape[1:])
    whole, given = list(latents.shape), list(tokens.shape)
    if len(whole) != len(given) or whole[2:] != given[2:] or whole[1] > given[1]:
        raise PpclError(
            f"clean latents are {whole}, and the pipeline passes {adapter.latents} of {given}: as the transformer sees "
            "them, they cannot be noised; finished images need an adapter that `packs`, prompts do not"
        )
    return latents


def row(value: Any, index: int, rows: int, *, listed: bool = False) -> Any:
    """Return the part of `value` that belongs to sample `index` of `rows`, with a batch dimension of one.

    `listed` says that latents are a list of samples. Raises `Uneven` where there are not as many parts as samples.
    """
    if isinstance(value, Tensor) or _is_per_sample(value, listed):
        if isinstance(value, Tensor) and not value.ndim:
            raise Uneven("a single number")
        if len(value) != rows:
            raise Uneven(len(value))
        return value[index : index + 1]
    if isinstance(value, list | tuple):
        return type(value)(row(item, index, rows, listed=listed) for item in value)
    if isinstance(value, dict):
        return {key: row(item, index, rows, listed=listed) for key, item in value.items()}
    return value


def joined(values: Sequence[Any], name: str, *, listed: bool = False) -> Any:
    """Return the rows of several samples as the argument `name` of one call: the reverse of `row`.

    Raises `PpclError` where they differ in what has no rows.
    """
    first, kinds = values[0], {type(value) for value in values}
    sizes = {len(value) for value in values if isinstance(value, list | tuple | dict)}
    if len(kinds) == 1 and isinstance(first, Tensor):
        return torch.cat(list(values))
    if len(kinds) == 1 and _is_per_sample(first, listed):
        return [item for items in values for item in items]
    if len(kinds) == len(sizes) == 1 and isinstance(first, list | tuple):
        return type(first)(joined(items, name, listed=listed) for items in zip(*values, strict=True))
    if isinstance(first, dict) and all(isinstance(value, dict) and value.keys() == first.keys() for value in values):
        return {key: joined([value[key] for value in values], name, listed=listed) for key in first}
    if len(kinds) > 1 or _has_tensors(first):
        raise PpclError(f"samples of one batch differ in {name}: {_told(first)} and others; use batch: 1")
    return common(values, name)


def common(values: Sequence[Any], name: str) -> Any:
    """Return what an argument without a batch dimension is in all of several calls.

    Of tensors it is the first call's; plain values that differ are a `PpclError`.
    """
    first = values[0]
    if not _has_tensors(first) and any(_has_tensors(other) or other != first for other in values):
        raise PpclError(f"samples of one batch differ in {name}: {_told(first)} and others; use batch: 1")
    return first


def _is_per_sample(value: Any, listed: bool) -> bool:
    return isinstance(value, list) and (listed or not value or not all(_is_of_tensors(item) for item in value))


def _is_of_tensors(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_of_tensors, value))
    return isinstance(value, Tensor)


def _told(value: Any) -> str:
    return f"tensors in a {type(value).__name__}" if _has_tensors(value) else repr(value)


def _has_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return any(map(_has_tensors, value)) if isinstance(value, list | tuple) else isinstance(value, Tensor)
