"""Which entries of a config say how many blocks there are, and which blocks are special: by changing them."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ppcl_toolkit.running.fields import lists_of


def depth_keys(transformer: nn.Module) -> dict[str, list[str]]:
    """Return the paths of the lists of blocks that become longer by one with an entry of the config, by entry."""
    config = config_of(transformer)
    before = _lengths(transformer)
    found: dict[str, list[str]] = {}
    for key, value in config.items():
        if type(value) is int and value in before.values():
            after = _lengths(made(type(transformer), {**config, key: value + 1}))
            if paths := [path for path, length in before.items() if after.get(path) == length + 1]:
                found[key] = paths
    return found


def index_keys(transformer: nn.Module, path: str) -> tuple[str, ...]:
    """Return the entries of the config that list blocks of a stack: those listed have other weights than the rest."""
    config, found = config_of(transformer), []
    for key, value in config.items():
        if isinstance(value, list | tuple) and all(isinstance(index, int) for index in value):
            kind = type(value)
            none, last = (_blocks(transformer, {**config, key: kind(listed)}, path) for listed in ((), (1,)))
            if none and last and none[1] != last[1] and none[0] == last[0]:
                found.append(key)
    return tuple(found)


def depends_on_depth(transformer: nn.Module, path: str, key: str) -> str:
    """Return which weights, beside those of the block that is more, are others where a stack is longer by one."""
    config = config_of(transformer)
    longer = made(type(transformer), {**config, key: config[key] + 1})
    if longer is None:
        return ""
    added = f"{path}.{config[key]}."
    own, other = (
        {name: value.shape for name, value in model.state_dict().items() if not name.startswith(added)}
        for model in (transformer, longer)
    )
    return ", ".join(sorted(name for name, _ in own.items() ^ other.items())[:3])


def config_of(transformer: nn.Module) -> dict[str, Any]:
    """Return the entries of a transformer's config by which another one is made."""
    config: Any = transformer.config
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _blocks(transformer: nn.Module, config: Mapping[str, Any], path: str) -> list[dict[str, torch.Size]]:
    """Return the names and shapes of the weights of each block; nothing where the config makes no model."""
    model = made(type(transformer), config)
    blocks = lists_of(model).get(path, nn.ModuleList()) if model is not None else nn.ModuleList()
    return [{name: value.shape for name, value in block.state_dict().items()} for block in blocks]


def _lengths(transformer: nn.Module | None) -> dict[str, int]:
    return {} if transformer is None else {path: len(blocks) for path, blocks in lists_of(transformer).items()}


def made(kind: Any, config: Mapping[str, Any], device: str = "meta") -> nn.Module | None:
    """Return a transformer of a config, without weights by default; None where the config makes none."""
    model: nn.Module | None = None
    # What a constructor makes of a config that is wrong is unbounded.
    with contextlib.suppress(Exception), torch.device(device):
        model = kind.from_config(dict(config))
    return model
