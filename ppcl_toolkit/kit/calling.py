"""A call that a transformer takes, searched for: whatever lets its forward run further is tried first.

How far a forward came is how many of its modules have returned, and then the lines at which it stopped.
"""

import heapq
import inspect
import itertools
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, final

import torch
from torch import nn

from ppcl_toolkit.kit.depths import config_of
from ppcl_toolkit.kit.guessing import TIMES, guesses

_MOST = 240
"""Calls that are tried."""
_MAIN = (*TIMES, "encoder_hidden_states", "img_ids", "txt_ids", "num_frames", "height", "width")
"""Given where they may be left out, too."""
_SKIPPED = ("return_dict", "kv_cache", "kv_caches", "kv_cache_mode", "cache")


class Attempt(NamedTuple):
    """What became of the best of the calls that were tried."""

    call: dict[str, Any]
    error: str
    """Empty where the transformer took it."""


@torch.no_grad()
def call_of(transformer: nn.Module) -> Attempt:
    """Return the first call found that a transformer takes; or the one that came furthest, and where it ended."""
    parameters = list(inspect.signature(type(transformer).forward).parameters.values())[1:]
    config = config_of(transformer)
    options = {p.name: list(_options(p, config, first=p is parameters[0])) for p in parameters}
    options = {name: values for name, values in options.items() if values}
    fixed = {"return_dict": False} if any(p.name == "return_dict" for p in parameters) else {}
    seen: set[tuple[int, ...]] = set()
    queue: list[tuple[tuple[float, ...], int, tuple[int, ...]]] = []
    order = itertools.count()
    best: tuple[tuple[float, ...], Attempt] | None = None

    def attempt(choice: tuple[int, ...]) -> Attempt:
        nonlocal best
        seen.add(choice)
        pairs = zip(options.items(), choice, strict=True)
        chosen = {name: values[number] for (name, values), number in pairs}
        call = {name: value for name, value in chosen.items() if not isinstance(value, _Absent)} | fixed
        reached, error = _run(transformer, call)
        found = Attempt(call, error)
        heapq.heappush(queue, (tuple(-value for value in reached), next(order), choice))
        if best is None or reached > best[0]:
            best = reached, found
        return found

    found = attempt(tuple(0 for _ in options))
    while queue and found.error and len(seen) < _MOST:
        _, _, choice = heapq.heappop(queue)
        for other in _neighbours(choice, [len(values) for values in options.values()]):
            if found.error and other not in seen:
                found = attempt(other)
    assert best is not None
    return found if not found.error else best[1]


def _neighbours(choice: tuple[int, ...], sizes: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield the choices that differ in one argument."""
    for position, size in enumerate(sizes):
        for number in range(size):
            if number != choice[position]:
                yield (*choice[:position], number, *choice[position + 1 :])


def _run(transformer: nn.Module, call: Mapping[str, Any]) -> tuple[tuple[float, ...], str]:
    """Return how far a call came, and what ended it."""
    returned = [0]

    def count(*_: Any) -> None:
        returned[0] += 1

    handles = [module.register_forward_hook(count) for module in transformer.modules()]
    try:
        transformer(**call)
    # What a transformer raises for what it does not take is unbounded.
    except Exception as error:
        return (
            returned[0],
            *_lines(transformer, error),
        ), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        for handle in handles:
            handle.remove()
    return (float("inf"),), ""


def _lines(transformer: nn.Module, error: Exception) -> list[int]:
    """Return the line of the transformer's own forward where a call ended, and those of what it had called."""
    code = inspect.unwrap(type(transformer).forward).__code__
    frames = list(traceback.walk_tb(error.__traceback__))
    start = next((at for at, (frame, _) in enumerate(frames) if frame.f_code is code), len(frames))
    return [line for _, line in frames[start:]]


@final
class _Absent:
    """An argument that is left out."""


def _options(parameter: inspect.Parameter, config: Mapping[str, Any], *, first: bool) -> Iterator[Any]:
    """Yield what an argument may be, the likeliest first."""
    name, optional = parameter.name, parameter.default is not inspect.Parameter.empty
    if name in _SKIPPED or parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
        return
    values = list(guesses(name, str(parameter.annotation), config, first=first))
    main = first or name in _MAIN
    if optional and not main:
        yield _Absent()
    yield from values
    if not values and not optional:
        yield None
    if optional and main:
        yield _Absent()
