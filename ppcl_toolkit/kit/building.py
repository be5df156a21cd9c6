"""A small random transformer of a class, and one call of it: by the names of its arguments, tried until it runs."""

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.kit.depths import config_of, depth_keys, made

ROWS, SIDE, WORDS = 2, 4, 7
"""Samples of a call, tokens of an image's side, tokens of its text: no two numbers of tokens are the same."""
_HEADS = 2
_DEPTH = 3
_TEXTS = ("joint", "text", "caption", "context", "cross", "cap_")
_WIDE = 64
"""Widths above it become 32 where they are nobody else's."""


def small(kind: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a random transformer of a diffusers class with few blocks and heads, and a call that it takes.

    Raises `PpclError` where the class has arguments without defaults, or no call is found.
    """
    for config in _configs(kind):
        transformer = made(kind, config, "cpu")
        if transformer is None:
            continue
        randomize(transformer)
        for call in _calls(transformer):
            # What a transformer raises for shapes that it does not take is unbounded.
            with contextlib.suppress(Exception), torch.no_grad():
                transformer(**call)
                return transformer, call
    raise PpclError(
        f"no small {kind.__name__} and call of it were found by the names of its arguments; give the folder of a "
        "pipeline, which is run instead"
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
    """Yield configs, the smallest first: the class's own with few blocks and heads, and narrow."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    config = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    whole = made(kind, config)
    if whole is None:
        raise PpclError(f"{kind.__name__} cannot be made of its defaults; give the folder of a pipeline instead")
    few = {**config, **{key: _DEPTH + number for number, key in enumerate(depth_keys(whole))}}
    heads = {key: value for key, value in config.items() if "heads" in key and isinstance(value, int)}
    for key in heads:
        few[key] = _HEADS
    sizes = [value for key, value in config.items() if "head_dim" in key and type(value) is int]
    scaled = {count * size: _HEADS * size for count in heads.values() for size in sizes}
    most = max(heads.values(), default=1)
    for key, value in config.items():
        if type(value) is int and key not in heads:
            own = not sizes and key in ("dim", "hidden_size", "inner_dim", "hidden_dim") and value % most == 0
            few[key] = scaled.get(value, value // most * _HEADS if own else few[key])
    wide = {key: value for key, value in few.items() if "dim" in key and "head" not in key and type(value) is int}
    # An FFN that is narrower than its tokens has nothing to save.
    others = [k for k, value in wide.items() if value > _WIDE and value == config[k] and "ff" not in k]
    yield {**few, **dict.fromkeys(others, 32)}
    yield few


def _calls(transformer: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield calls, as the names of arguments have it."""
    parameters = list(inspect.signature(type(transformer).forward).parameters.values())[1:]
    config = config_of(transformer)
    choices = {p.name: _values(p.name, config, first=p is parameters[0]) for p in parameters}
    needed = {name: found for name, found in choices.items() if found}
    for values in itertools.product(*needed.values()):
        call = dict(zip(needed, values, strict=True))
        yield {**call, "return_dict": False} if "return_dict" in choices else call


def _values(name: str, config: Mapping[str, Any], *, first: bool) -> list[Any]:
    """Return what an argument may be, the likeliest first; nothing for those that may be left out."""
    generator = torch.Generator().manual_seed(len(name))

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    channels = config.get("in_channels", config.get("img_in_dim", 4))
    widths = {key: value for key, value in config.items() if "dim" in key and "head" not in key and type(value) is int}
    widths |= {key: value for key, value in config.items() if key == "caption_channels" and type(value) is int}
    texts = [width for key, width in widths.items() if any(word in key for word in _TEXTS)]
    words = list(dict.fromkeys([*texts, *widths.values()]))
    if first:
        sizes = [(SIDE * SIDE, channels), (channels, 2 * SIDE, 2 * SIDE), (channels, 1, 2 * SIDE, 2 * SIDE)]
        return [noise(ROWS, *size) for size in sizes]
    if name == "encoder_hidden_states":
        return [noise(ROWS, WORDS, width) for width in words]
    if "pooled" in name:
        return [noise(ROWS, width) for key, width in config.items() if "pooled" in key and type(width) is int]
    if name in ("img_ids", "txt_ids"):
        return _places(SIDE * SIDE if name == "img_ids" else WORDS, SIDE if name == "img_ids" else 1, config)
    known: dict[str, list[Any]] = {
        **dict.fromkeys(("t", "timestep", "timesteps"), [torch.tensor([0.3, 0.7])]),
        **dict.fromkeys(("original_size", "target_size", "crop_coords"), [torch.full((ROWS, 2), 8.0 * SIDE)]),
        "guidance": [torch.tensor([3.5, 4.5])] if config.get("guidance_embeds") else [],
        "img_shapes": [[[(1, SIDE, SIDE)]] * ROWS],
        "encoder_attention_mask": [None, torch.ones(ROWS, WORDS, dtype=torch.bool)],
    }
    return known.get(name, [])


def _places(count: int, side: int, config: Mapping[str, Any]) -> list[Tensor]:
    """Return positions of tokens, for all samples together and for each."""
    axes = len(config.get("axes_dims_rope") or config.get("axes_dim_rope") or config.get("axes_dims") or (1, 1, 1))
    ids = torch.stack([torch.arange(count) % side] * axes, dim=-1).float()
    return [ids, ids.expand(ROWS, count, axes).contiguous()]
