"""Tables with rows for every block, which a class makes of its depth: whose they are, by spoiling one at a time."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ppcl_toolkit.adapter import Adapter, Stack, TableRows
from ppcl_toolkit.checking.witness import difference
from ppcl_toolkit.kit.depths import config_of, made
from ppcl_toolkit.running.capture import Arguments, map_tensors, stack_calls

Owner = tuple[str, int] | None
"""The block that a row belongs to, if any does."""


@torch.no_grad()
def tables_of(transformer: nn.Module, stacks: Sequence[Stack], call: Mapping[str, Any]) -> dict[str, TableRows]:
    """Return the rows of every buffer that grows with the stacks; those in no order that can be told are left out."""
    found = {}
    adapter = Adapter(family="", transformer="", stacks=tuple(stacks))
    depths = adapter.depths(transformer)
    own = _arguments(transformer, adapter, call)
    for name in _growing(transformer, stacks):
        owners: list[Owner] = []
        for row in range(len(transformer.get_buffer(name))):
            with _spoiled(transformer.get_buffer(name), row):
                other = _arguments(transformer, adapter, call)
            read = [block for block in own if difference(other[block], own[block])]
            if len(read) > 1:
                break
            owners.append(read[0] if read else None)
        else:
            parts = _parts(owners, depths)
            if parts is not None and any(path for path, _ in parts):
                found[name] = TableRows(parts)
    return found


def _growing(transformer: nn.Module, stacks: Sequence[Stack]) -> list[str]:
    """Return the buffers outside of blocks that are in no file of weights, and have more rows in a deeper model."""
    config, saved = config_of(transformer), transformer.state_dict()
    inside = tuple(f"{stack.path}." for stack in stacks)
    found: dict[str, None] = {}
    for stack in stacks:
        deeper = made(type(transformer), {**config, stack.depth_key: config[stack.depth_key] + 1})
        more = dict(deeper.named_buffers()) if deeper is not None else {}
        for name, value in transformer.named_buffers():
            if name in saved or name.startswith(inside) or not value.is_floating_point() or name not in more:
                continue
            if value.shape[1:] == more[name].shape[1:] and len(value) < len(more[name]):
                found[name] = None
    return list(found)


def _arguments(transformer: nn.Module, adapter: Adapter, call: Mapping[str, Any]) -> dict[tuple[str, int], Arguments]:
    """Return what each block is given beside its streams; none is run."""
    # Copies: a row may be handed on as it lies in its table.
    return {
        (stack.path, index): map_tensors(arguments, torch.Tensor.clone)
        for stack in adapter.stacks
        for index, arguments in enumerate(stack_calls(transformer, adapter, stack.path, call).arguments)
    }


@contextlib.contextmanager
def _spoiled(table: torch.Tensor, row: int) -> Iterator[None]:
    before = table[row].clone()
    table[row] = float("nan")
    try:
        yield
    finally:
        table[row] = before


def _parts(owners: Sequence[Owner], depths: Mapping[str, int]) -> tuple[tuple[str | None, int], ...] | None:
    """Return the parts of a table: of each, every block of a stack has as many rows in its turn. None where not so."""
    runs = [(owner, len(list(rows))) for owner, rows in groupby(owners)]
    parts: list[tuple[str | None, int]] = []
    while runs:
        owner, count = runs[0]
        depth = 1 if owner is None else depths[owner[0]]
        expected = [(None if owner is None else (owner[0], block), count) for block in range(depth)]
        if runs[:depth] != expected:
            return None
        parts.append((None if owner is None else owner[0], count))
        runs = runs[depth:]
    return tuple(parts)
