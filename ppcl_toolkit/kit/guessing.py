"""What an argument of a transformer may be: by its name, its annotation, and the sizes that the config knows."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

ROWS, SIDE, WORDS = 2, 4, 7
"""Samples of a call, tokens of an image's side, tokens of its text: no two numbers of tokens are the same."""
TIMES = ("t", "time", "timestep", "timesteps")
"""What the argument of a level of noise is called."""
_FRAMES = 3
_TEXTS = ("joint", "text", "caption", "context", "cross", "cap_", "cond", "features")
_WIDTHS = ("dim", "channels", "hidden_size", "width")
_PER_SAMPLE: tuple[tuple[str, Callable[[], Iterable[Any]]], ...] = (
    (r"t|time|.*timesteps?(_.*)?", lambda: (torch.tensor([0.3, 0.7]), torch.tensor([3, 7]))),
    # Of a text with places for an image, each of four of its tokens.
    (r"img_mask", lambda: (torch.tensor([[False] * WORDS + [True] * (SIDE * SIDE // 4)] * ROWS),)),
    (r".*mask.*", lambda: _masks()),
    (r"guidance|.*scale.*", lambda: (torch.tensor([3.5, 4.5]),)),
    (r"num_frames", lambda: (1, _FRAMES)),
    (r"height|width", lambda: (SIDE,)),
    (r".*shapes|shape_list", lambda: ([[(1, SIDE, SIDE)]] * ROWS,)),
    (r".*size.*|.*coords", lambda: (torch.full((ROWS, 2), 8.0 * SIDE),)),
    (r".*lens", lambda: (torch.full((ROWS,), WORDS),)),
    (r".*labels|.*drop", lambda: (torch.ones(ROWS, dtype=torch.long), torch.zeros(ROWS, dtype=torch.bool))),
)
"""What is the same whatever the config says, by patterns of names."""


def guesses(name: str, kind: str, config: Mapping[str, Any], *, first: bool) -> Iterator[Any]:
    """Yield values of the argument `name` with the annotation `kind`, the likeliest first; `first` has the latents."""
    listed = "list" in kind.lower()
    if first:
        yield from _latents(config, listed=listed)
        return
    for pattern, values in _PER_SAMPLE:
        if re.fullmatch(pattern, name):
            yield from values()
            return
    if name.endswith("ids") and "token" not in name and "input" not in name:
        words = "txt" in name or "text" in name
        if name == "position_ids":  # of text and image
            yield torch.cat([torch.zeros(WORDS, 3), *_places(SIDE * SIDE, SIDE, {})][:2])
        yield from _places(WORDS if words else SIDE * SIDE, 1 if words else SIDE, config)
    elif "ensor" in kind or listed or "cond" in name or "feats" in name:
        yield from _vectors(name, config, listed=listed)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _masks() -> Iterator[Tensor]:
    yield torch.ones(ROWS, WORDS, dtype=torch.bool)
    yield torch.ones(ROWS, WORDS)
    yield torch.ones(ROWS, SIDE * SIDE, dtype=torch.bool)


def _latents(config: Mapping[str, Any], *, listed: bool) -> Iterator[Any]:
    numbers = {key: value for key, value in config.items() if type(value) is int}
    given = [v for k, v in numbers.items() if "in_" in k and ("channels" in k or "dim" in k)]
    given += [v for k, v in numbers.items() if "channels" in k or "visual_dim" in k]
    high = 2 * SIDE
    for channels in dict.fromkeys([*given, 4]):
        if listed:
            yield [_noise(channels, 1, high, high) for _ in range(ROWS)]
        yield _noise(ROWS, SIDE * SIDE, channels)
        yield _noise(ROWS, channels, high, high)
        yield _noise(ROWS, channels, 1, high, high)
        yield _noise(ROWS, channels, _FRAMES, high, high)
        yield _noise(ROWS, _FRAMES, channels, high, high)
        yield _noise(ROWS, 1, high, high, channels)
        yield _noise(ROWS, channels, SIDE * SIDE)


def _vectors(name: str, config: Mapping[str, Any], *, listed: bool) -> Iterator[Any]:
    """Yield vectors for each token of a text, or for each sample where the name says so."""
    widths = {
        k: v for k, v in config.items() if type(v) is int and any(w in k for w in _WIDTHS) and "head_dim" not in k
    }
    likely = [v for k, v in widths.items() if any(word in k for word in _TEXTS) and "heads" not in k]
    if "pooled" in name:
        likely = [v for k, v in widths.items() if "pooled" in k] + likely
    for width in dict.fromkeys([*likely, *widths.values()]):
        tokens, vector = _noise(ROWS, WORDS, width), _noise(ROWS, width)
        if listed:
            yield list(tokens)
        if layers := config.get("num_text_layers"):  # of the text's encoder
            yield _noise(ROWS, WORDS, layers, width)
        yield from (vector, tokens) if "pooled" in name else (tokens, vector)
        yield tokens[:, None]
    yield torch.arange(ROWS * WORDS).view(ROWS, WORDS) % 3


def _places(count: int, side: int, config: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield positions of tokens, for all samples together and for each."""
    rotary = [v for k, v in config.items() if ("dim" in k and "rope" in k) or "axes_dim" in k]
    axes = next((len(value) for value in rotary if isinstance(value, list | tuple)), 3)
    ids = torch.stack([torch.arange(count) % side] * axes, dim=-1).float()
    yield ids
    yield ids.expand(ROWS, count, axes).contiguous()
    yield torch.arange(count).expand(ROWS, count).contiguous()
