"""A small random transformer of a class: its own defaults with few blocks, few heads and short tables, and narrow.

What is equal by default stays equal: heads and their sizes, whose product is the width of the tokens, and whatever else
has that width.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.kit.calling import call_of
from ppcl_toolkit.kit.depths import depth_keys, made
from ppcl_toolkit.kit.guessing import SIDE, WORDS

_HEADS = 2
_DEPTH = 3
_NARROW, _WIDE = 32, 64
"""Widths above the second become the first where they are nobody else's."""
_LARGEST = 60_000_000
"""Parameters of what is still small."""
_BLOCKS = ("layers", "blocks", "depth")
_TOKENS = ("dim", "hidden_size", "inner_dim", "hidden_dim", "model_dim")
"""What the width of tokens is called where no size of a head is given."""
_GIVEN = {"channels": 4, "patch_size": 2, "dim": _NARROW, "ada_norm": 1000, "sample_size": 2 * SIDE}
"""What an entry without a default is, by what its name ends in."""


def small(kind: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a random transformer of a diffusers class with few blocks and heads, and a call that it takes.

    Raises `PpclError` where no config makes one, or no call is found: with what ended the call that came furthest.
    """
    ended = ""
    for config in _configs(kind):
        empty = made(kind, config)
        if empty is None or sum(p.numel() for p in empty.parameters()) > _LARGEST:
            continue
        transformer = made(kind, config, "cpu")
        if transformer is None:
            continue
        randomize(transformer)
        call, error = call_of(transformer)
        if not error:
            return transformer, call
        ended = f": the call that came furthest ended with {error}"
    raise PpclError(
        f"no small {kind.__name__} and call of it were found by the names of its arguments{ended}; give the folder "
        "of a pipeline, which is run instead"
    )


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Give every weight a value that matters: zero gates would hide what lies behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            scale = 0.3 if value.ndim < 2 else 0.3 * value.shape[-1] ** -0.5
            value.copy_(scale * torch.randn(value.shape, generator=generator) + (1.0 if value.ndim == 1 else 0.0))
    module.eval().requires_grad_(False)


def _configs(kind: Any) -> Iterator[dict[str, Any]]:
    """Yield configs, the smallest first."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    config = {p.name: None if p.default is inspect.Parameter.empty else p.default for p in parameters}
    shallow, whole = _shallow(kind, config)
    few = {**shallow, **{key: _DEPTH + number for number, key in enumerate(depth_keys(whole))}}
    for key, value in few.items():
        if isinstance(value, list | tuple) and "layer" in key and all(type(index) is int for index in value):
            few[key] = type(value)(index for index in value if index < _DEPTH)
    few |= _heads(shallow)
    short = {**few, **_short(few)}
    wide = {key: value for key, value in short.items() if type(value) is int and "dim" in key and "head" not in key}
    # An FFN that is narrower than its tokens has nothing to save.
    others = [k for k, value in wide.items() if value > _WIDE and value == config[k] and "ff" not in k]
    yield {**short, **dict.fromkeys(others, _NARROW)}
    yield short
    yield {**few, **dict.fromkeys(others, _NARROW)}
    yield few


def _shallow(kind: Any, config: dict[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    """Return a config with few blocks where their number is called so, and its model without weights."""
    named = [k for k, v in config.items() if type(v) is int and v > _DEPTH and k.endswith(_BLOCKS)]
    missing = [k for k, v in config.items() if v is None and any(k.endswith(end) for end in _GIVEN)]
    given = {key: next(v for end, v in _GIVEN.items() if key.endswith(end)) for key in missing}
    for depths in ({**dict.fromkeys(named, _DEPTH)}, {}):
        for filled in ({}, {k: v for k, v in given.items() if "dim" not in k and "caption" not in k}, given):
            candidate = {**config, **depths, **filled}
            if (model := made(kind, candidate)) is not None:
                return candidate, model
    raise PpclError(f"{kind.__name__} cannot be made of its defaults; give the folder of a pipeline instead")


def _heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return two heads for all, the same size for those that had the same width, and what else had that width."""
    heads = {k: v for k, v in config.items() if "heads" in k and type(v) is int}
    sizes = {k: v for k, v in config.items() if "head_dim" in k and type(v) is int}
    found: dict[str, Any] = dict.fromkeys(heads, _HEADS)
    widths: dict[int, int] = {}
    for key, size in sizes.items():
        own = [count for name, count in heads.items() if _words(name) == _words(key)] or list(heads.values())
        for count in own:
            width = widths.setdefault(count * size, _HEADS * size)
            if count == own[0]:
                found[key] = width // _HEADS
    most = max(heads.values(), default=1)
    axes = next((sum(v) for k, v in config.items() if "axes" in k and isinstance(v, list | tuple) and "dim" in k), 0)
    for key, value in config.items():
        if type(value) is not int or key in found:
            continue
        if value in widths:
            found[key] = widths[value]
        elif not sizes and key in _TOKENS and not value % most:
            found[key] = value // most * _HEADS if heads else _HEADS * axes or value
    return found


def _words(key: str) -> set[str]:
    return set(key.split("_")) - {"num", "n", "heads", "head", "dim"}


def _short(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return shorter tables of positions: as long as the text and as wide as the picture of a call."""
    sizes = {}
    for key, value in config.items():
        if type(value) is int and value > SIDE:
            if "text" in key and ("length" in key or "_len" in key):
                sizes[key] = WORDS
            elif key in ("sample_size", "sample_width", "sample_height"):
                sizes[key] = 2 * SIDE
    return sizes
