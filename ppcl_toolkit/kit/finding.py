"""The stacks of a transformer as an adapter describes them, found by running it; what is not decided is said.

A stack is a list of blocks that are called once each, in their order, and hand streams on: what a block returns is what
the next one is given. Which stream is the image's is decided by changing the latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ppcl_toolkit.adapter import Stack, Stream, TableRows
from ppcl_toolkit.checking.alone import shifted
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.kit.depths import depends_on_depth, depth_keys, index_keys
from ppcl_toolkit.kit.inside import look_inside
from ppcl_toolkit.kit.tables import tables_of
from ppcl_toolkit.kit.watching import Called, changed, watch
from ppcl_toolkit.running.fields import lists_of

OPEN = "DECIDE:"
"""What marks what a user has to look at."""


@dataclass(kw_only=True)
class Found:
    """What was found of a transformer."""

    transformer: str
    latents: str
    timestep: str | None
    shared: tuple[str, ...]
    stacks: list[Stack] = field(default_factory=list)
    tables: dict[str, TableRows] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    """By stack, or by "" of the whole: what was left open, or left out, and why."""

    def note(self, path: str, said: str) -> None:
        """Keep what a user should read."""
        self.notes.setdefault(path, []).append(said)


def find(transformer: nn.Module, call: Mapping[str, Any]) -> Found:
    """Describe a transformer by a call of it: two samples at least, with other numbers of tokens for image and text.

    Its weights must be random: zero gates would hide what a block does.
    """
    calls = watch(transformer, call)
    latents = next(iter(call))
    rows = len(call[latents])
    shared = [n for n, v in call.items() if isinstance(v, Tensor) and (not v.ndim or len(v) != rows)]
    times = [n for n, v in call.items() if isinstance(v, Tensor) and v.shape == (rows,)]
    named = [name for name in times if name in ("t", "timestep", "timesteps", "time")] or times
    found = Found(
        transformer=type(transformer).__name__,
        latents=latents,
        timestep=named[0] if named else None,
        shared=tuple(shared),
    )
    keys = depth_keys(transformer)
    other = watch(transformer, {**call, latents: shifted(call[latents])})
    before: Stack | None = None
    numbered: dict[str, list[str]] = {}
    for path, blocks in _called_in_order(transformer, calls, found):
        key = _depth_key(path, keys, found)
        streams = _streams(path, blocks, found)
        if key is None or streams is None:
            continue
        again = next(call for call in other if call.path == blocks[0].path).arguments
        moved = {name for name, value in blocks[0].tensors().items() if changed(value, again[name])}
        image, text = _named(streams, moved, before)
        if image is None:
            found.note(path, "left out: its image stream is not to be told by changing the latents")
            continue
        order: list[Stream] = ["image" if name == image else "text" for name in streams if name in (image, text)]
        before = Stack(
            path=path,
            depth_key=key,
            index_keys=index_keys(transformer, path),
            image=image,
            text=text,
            returns=tuple(order),
        )
        _check_tokens(before, blocks[0])
        found.stacks.append(look_inside(transformer, before, blocks, call, found.note))
        numbered[path] = _numbered(before, blocks)
        if others := depends_on_depth(transformer, path, key):
            found.note(path, f"{OPEN} `remap`: where this stack has another depth, so are {others}")
    found.tables = tables_of(transformer, found.stacks, call) if any(numbered.values()) else {}
    told = {part for rows in found.tables.values() for part, _ in rows.parts}
    for path, own in numbered.items():
        if own and path not in told:
            found.note(
                path,
                f"{OPEN} each block is given {', '.join(own)} of its own, by its number, and blocks of a student have "
                "other numbers",
            )
    return found


def _numbered(stack: Stack, blocks: Sequence[Called]) -> list[str]:
    """Return the arguments beside the streams that are not the same for all blocks."""
    streams = {stack.argument(stream) for stream in stack.streams}
    given = {name: value for name, value in blocks[0].tensors().items() if name not in streams}
    return [n for n, value in given.items() if any(changed(value, call.arguments.get(n)) for call in blocks[1:])]


def _check_tokens(stack: Stack, block: Called) -> None:
    sizes = [block.arguments[stack.argument(stream)].shape[1] for stream in stack.streams]
    if len(set(sizes)) < len(sizes):
        raise PpclError(f"image and text have {sizes[0]} tokens each in {stack.path}: take another size of picture")


def _called_in_order(transformer: nn.Module, calls: Sequence[Called], found: Found) -> list[tuple[str, list[Called]]]:
    """Return the lists of blocks that are called once each, one after the other and none between."""
    lists = lists_of(transformer)
    where = {f"{path}.{number}": path for path, blocks in lists.items() for number in range(len(blocks))}
    order = [call for call in calls if call.path in where]
    stacks = []
    for path in dict.fromkeys(where[call.path] for call in order):
        own = [call for call in order if where[call.path] == path]
        first = order.index(own[0])
        if [call.path for call in own] != [f"{path}.{number}" for number in range(len(lists[path]))]:
            found.note(path, "left out: its blocks are not called once each in their order")
        elif order[first : first + len(own)] != own:
            found.note(path, "left out: other blocks run between its own, and streams of both pass by each other")
        elif len(own) > 1:
            stacks.append((path, own))
    return stacks


def _depth_key(path: str, keys: Mapping[str, list[str]], found: Found) -> str | None:
    own = [key for key, paths in keys.items() if path in paths]
    alone = [key for key in own if keys[key] == [path]]
    if not own:
        found.note(path, "left out: no entry of the config changes its depth")
    elif not alone:
        others = ", ".join(other for other in keys[own[0]] if other != path)
        found.note(path, f"left out: {own[0]} is the depth of {others}, too")
    return alone[0] if alone else None


def _streams(path: str, blocks: Sequence[Called], found: Found) -> list[str] | None:
    """Return the arguments of the next block that a block's outputs become, in the order of the outputs."""
    orders = []
    for one, following in zip(blocks, blocks[1:], strict=False):
        given = following.tensors()
        orders.append([next((n for n, v in given.items() if v is out), None) for out in one.outputs])
    first = orders[0]
    if any(order != first for order in orders):
        found.note(path, "left out: blocks hand on their streams in different ways")
    elif None in first:
        found.note(path, "left out: what a block returns is not what the next one is given, code lies between them")
    else:
        return [name for name in first if name is not None]
    return None


def _named(streams: Sequence[str], moved: set[str], before: Stack | None) -> tuple[str | None, str | None]:
    """Return the arguments of the image and of the text; behind another stack both change with the latents."""
    images = [name for name in streams if name in moved]
    if len(images) > 1 and before is not None:
        images = [name for name in images if name == before.image] or images
    if len(streams) > 2 or len(images) != 1:
        return None, None
    texts = [name for name in streams if name != images[0]]
    return images[0], texts[0] if texts else None
