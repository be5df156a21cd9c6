"""Narrow forms of a block: text streams or feed-forward networks become linear maps, modulation one of low rank.

What stays keeps its module names, so a narrow block loads what remains of a wider block's weights.
"""

import functools
import linecache
import math
import zlib
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Form
from ppcl_toolkit.running.capture import Arguments, Streams
from ppcl_toolkit.running.meta import without_data
from ppcl_toolkit.surgery import graph
from ppcl_toolkit.surgery.copies import meta_copy
from ppcl_toolkit.surgery.likeness import likeness
from ppcl_toolkit.surgery.source import write_forward


@dataclass(frozen=True)
class Blueprint:
    """How a stock block becomes narrow: plain data, the same for every block of one form."""

    source: str
    """Its forward, as Python that needs torch only; empty where the stock class's own does."""
    removed: tuple[str, ...]
    """Submodules that go."""
    bypassed: tuple[str, ...]
    """Submodules inside the attention that are called but no longer matter."""
    shrunk: tuple[tuple[str, tuple[int, ...], int], ...]
    """Linear layers that keep some of their output rows: path, chunks kept, number of chunks."""
    added: tuple[tuple[str, int], ...]
    """New linear maps and their width D."""
    factored: tuple[tuple[str, int], ...] = ()
    """Linear layers that become two, D -> rank -> rows: path, rank."""


class NarrowBlock(nn.Module):
    """What every narrow block is an instance of, beside its stock class."""

    blueprint: ClassVar[Blueprint]

    def __reduce__(self) -> Any:
        """Pickle and copy by stock class and blueprint: the class itself exists only at run time."""
        return _empty, (type(self).__bases__[0], self.blueprint), self.__getstate__()


def narrow(block: nn.Module, stack: Stack, form: Form, arguments: Arguments, streams: Streams) -> None:
    """Give an unmodified stock block of `stack` the shape of `form`, in place; a stock form changes nothing.

    `arguments` and `streams` are an example of its call in the teacher. New linear maps are zero, so until they are
    fitted or trained a narrow FFN returns the post-attention residual g itself: run the block to record g (Eq. 9).
    The modulation of a narrow block may be made one of low rank, too.
    """
    if form.is_stock:
        return
    if form.text != "own" or form.ffn:
        assert not isinstance(block, NarrowBlock), "narrow forms are made from stock blocks"
        blueprint = draw(block, stack, form, arguments, streams)
        reshape_block(block, blueprint.removed, blueprint.bypassed, blueprint.shrunk, blueprint.added, ())
        _become(block, blueprint)
    if form.modulation:
        low_rank(block, _factored(block, stack, form.modulation))


def low_rank(block: nn.Module, factored: tuple[tuple[str, int], ...]) -> None:
    """Make two maps of weight zero, D -> rank -> rows, of the linear layers at these paths, in place."""
    reshape_block(block, (), (), (), (), factored)
    _become(block, replace(block.blueprint if isinstance(block, NarrowBlock) else _STOCK, factored=factored))


def _become(block: nn.Module, blueprint: Blueprint) -> None:
    stock: type = type(block).__bases__[0] if isinstance(block, NarrowBlock) else type(block)
    block.__class__ = narrow_class(stock, blueprint)


def draw(block: nn.Module, stack: Stack, form: Form, arguments: Arguments, streams: Streams) -> Blueprint:
    """Work out the blueprint by which `block` takes the text and FFN of `form`; the block may have no weights.

    Blocks that are alike have one, which is worked out once. Raises `PpclError` where the architecture does not allow
    it.
    """
    given = streams.of(stack.streams)
    call = arguments | {stack.argument(name): given[name] for name in stack.streams}
    try:
        key = likeness((block, stack, form.text, form.ffn, call))
    except TypeError:
        return _drawn(block, stack, form, call, streams.image.dtype)
    if key not in _DRAWN:
        _DRAWN[key] = _drawn(block, stack, form, call, streams.image.dtype)
    return _DRAWN[key]


_DRAWN: dict[Hashable, Blueprint] = {}


def _drawn(block: nn.Module, stack: Stack, form: Form, call: Arguments, dtype: torch.dtype) -> Blueprint:
    attention = () if stack.joint_attention is None else (stack.joint_attention,)
    weightless = meta_copy(block).to(dtype)
    with without_data():
        trace = graph.trace(weightless, call, {*stack.ffn.values(), *attention})
    before = trace.used()
    try:
        if form.text != "own":
            _rewrite_text(trace, stack, form)
        for stream in form.ffn:
            if stream not in stack.ffn:
                raise PpclError(f"the adapter names no {stream} FFN; it has: {', '.join(stack.ffn) or 'none'}")
            graph.replace_ffn(trace, stack.ffn[stream], f"linear_ffn_{stream}")
        graph.shrink(trace)
        blueprint = Blueprint(
            source=write_forward(trace, stack.image),
            removed=_outermost(before - trace.used(), trace.used()),
            bypassed=_bypassed(trace.block, stack) if form.narrow_text else (),
            shrunk=tuple((path, *chunks) for path, chunks in sorted(trace.shrunk.items())),
            added=tuple(sorted(trace.added.items())),
        )
        _check_saving(trace.block, blueprint)
    except PpclError as error:
        raise PpclError(f"{type(block).__name__} cannot become {form.key}: {error}") from error
    return blueprint


_STOCK = Blueprint(source="", removed=(), bypassed=(), shrunk=(), added=())


@functools.cache
def narrow_class(base: type, blueprint: Blueprint) -> type[NarrowBlock]:
    """Make the class of the blocks of one blueprint: one code object for all of them, so they compile once.

    It carries the name of the stock class, by which diffusers knows blocks that must not be split or compile alike.
    """
    filename = f"<narrow {base.__name__} {zlib.crc32(blueprint.source.encode()):08x}>"
    linecache.cache[filename] = (len(blueprint.source), None, blueprint.source.splitlines(True), filename)
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(blueprint.source, filename, "exec"), namespace)
    attributes: dict[str, Any] = {"blueprint": blueprint, "__module__": base.__module__}
    if blueprint.source:
        attributes["forward"] = namespace["forward"]
    return type(base.__name__, (base, NarrowBlock), attributes)


# The next three are also copied into generated modelling files: torch only, and nothing from this package.


def bypass(value: Tensor, width: int | None = None) -> Tensor:
    """Stand in for a layer of `width` that nobody reads: a function, since LoRA loaders stumble over `nn.Identity`."""
    return value if width in (None, value.shape[-1]) else value[..., :1].expand(*value.shape[:-1], width)


def reshape_block(
    block: nn.Module,
    removed: Iterable[str],
    bypassed: Iterable[str],
    shrunk: Iterable[tuple[str, tuple[int, ...], int]],
    added: Iterable[tuple[str, int]],
    factored: Iterable[tuple[str, int]],
) -> None:
    """Remove, bypass and shrink submodules of a stock block, add linear maps of weight zero, factor others likewise."""
    like = next(block.parameters())
    for path in dict.fromkeys([*removed, *bypassed]):
        parent, _, name = path.rpartition(".")
        owner, width = block.get_submodule(parent), getattr(block.get_submodule(path), "out_features", None)
        delattr(owner, name)
        if path in bypassed:
            setattr(owner, name, partial(bypass, width=width))
    for path, chunks, parts in shrunk:
        linear = block.get_submodule(path)
        for name, value in list(linear.named_parameters(recurse=False)):
            rows = value.detach().unflatten(0, (parts, -1))[list(chunks)].flatten(0, 1)
            setattr(linear, name, nn.Parameter(rows, value.requires_grad))
        vars(linear)["out_features"] = next(linear.parameters()).shape[0]
    for name, width in added:
        linear = nn.utils.skip_init(nn.Linear, width, width, device=like.device, dtype=like.dtype)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        block.add_module(name, linear)
    for path, rank in factored:
        parent, _, name = path.rpartition(".")
        whole = block.get_submodule(path)
        where = {"device": whole.weight.device, "dtype": whole.weight.dtype}
        down = nn.utils.skip_init(nn.Linear, whole.in_features, rank, bias=False, **where)
        up = nn.utils.skip_init(nn.Linear, rank, whole.out_features, **where)
        for value in (down.weight, up.weight, up.bias):
            nn.init.zeros_(value)
        setattr(block.get_submodule(parent), name, nn.Sequential(down, up))


def keep_tables(transformer: nn.Module, paths: Iterable[str]) -> None:
    """Have buffers among the weights that are saved and loaded."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        owner = transformer.get_submodule(parent)
        owner.register_buffer(name, getattr(owner, name))


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Load into a narrow block what it shares with a wider form of it; linear maps that `source` lacks stay.

    Raises `PpclError` when `source` lacks anything else.
    """
    state = source.state_dict()
    wider = _blueprint_chunks(source)
    for path, kept in _blueprint_chunks(target).items():
        for name in (f"{path}.weight", f"{path}.bias"):
            if name in state:
                state[name] = _select(state[name], wider.get(path, ((0,), 1)), kept)
    new = {name for name, _ in type(target).blueprint.added} if isinstance(target, NarrowBlock) else set()
    missing = [name for name in target.state_dict() if name not in state]
    if any(name.split(".")[0] not in new for name in missing):
        raise PpclError(f"{type(source).__name__} lacks weights of its narrow form: {', '.join(missing)}")
    shared = {name: state[name] for name in target.state_dict() if name in state}
    target.load_state_dict(shared, strict=False)


def modulation_layers(block: nn.Module, stack: Stack) -> dict[str, nn.Linear]:
    """Return the modulation layers of a block that are whole, by path; blocks of one stack may have different ones.

    Raises `PpclError` where the adapter names something else.
    """
    found: dict[str, nn.Linear] = {}
    modules = dict(block.named_modules())
    low = {path for path, _ in block.blueprint.factored} if isinstance(block, NarrowBlock) else set()
    for path in stack.modulation:
        if path in modules and path not in low:
            layer = modules[path]
            if not isinstance(layer, nn.Linear):
                raise PpclError(f"{stack.path}: {path} is a {type(layer).__name__}, modulation is a Linear")
            found[path] = layer
    return found


def largest_rank(weight: Tensor) -> int:
    """Return the largest rank at which two maps are smaller than the one of this weight."""
    return (weight.numel() - 1) // sum(weight.shape)


def _factored(block: nn.Module, stack: Stack, rank: int) -> tuple[tuple[str, int], ...]:
    """Return the modulation layers that `rank` makes smaller, each with it: what few rows are left of may stay whole.

    Raises `PpclError` where that is none.
    """
    layers = modulation_layers(block, stack)
    if not layers:
        raise PpclError(f"{type(block).__name__} has no modulation of its own that could become one of low rank")
    smaller = {path for path, layer in layers.items() if rank <= largest_rank(layer.weight)}
    if not smaller:
        width = max(layer.in_features for layer in layers.values())
        raise PpclError(f"modulation of rank {rank} saves nothing: {stack.path} is {width} wide")
    return tuple((path, rank) for path in layers if path in smaller)


def _rewrite_text(trace: graph.Trace, stack: Stack, form: Form) -> None:
    if stack.joint_attention is None or stack.text is None or "text" not in stack.returns:
        raise PpclError("the adapter names no attention with a text stream of its own")
    z = graph.entering_text(trace, stack.joint_attention, stack.attention_text)
    position = stack.returns.index("text")
    if form.text == "tap":
        graph.hand_on_text(trace, z, position)
        return
    graph.replace_text(trace, z, stack.text, position, end=form.text == "end")
    if graph.read_outputs(trace, stack.joint_attention) > 1:
        raise PpclError(f"the text's output of {stack.joint_attention} is still read")


def _outermost(dead: Collection[str], alive: Collection[str]) -> tuple[str, ...]:
    """Reduce paths of dead submodules to the outermost parents without a living part."""
    found = set()
    for path in dead:
        parts = path.split(".")
        heads = (".".join(parts[: length + 1]) for length in range(len(parts)))
        found.add(next(head for head in heads if not any(f"{name}.".startswith(f"{head}.") for name in alive)))
    return tuple(sorted(found))


def _bypassed(block: nn.Module, stack: Stack) -> tuple[str, ...]:
    modules = dict(block.named_modules())
    # Blocks of one stack may differ: the last one of SD3 has no text projection.
    return tuple(path for path in (*stack.text_query, *stack.text_out) if path in modules)


def _check_saving(block: nn.Module, blueprint: Blueprint) -> None:
    narrow = meta_copy(block)
    reshape_block(narrow, blueprint.removed, blueprint.bypassed, blueprint.shrunk, blueprint.added, ())
    before, after = (sum(p.numel() for p in module.parameters()) for module in (block, narrow))
    if blueprint.added and after >= before:
        raise PpclError(f"it would grow from {before} to {after} parameters: its streams share their weights")


def _blueprint_chunks(block: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    shrunk = type(block).blueprint.shrunk if isinstance(block, NarrowBlock) else ()
    return {path: (chunks, parts) for path, chunks, parts in shrunk}


def _select(rows: Tensor, have: tuple[tuple[int, ...], int], want: tuple[tuple[int, ...], int]) -> Tensor:
    """Pick the chunks `want` from rows that are the chunks `have` of the stock layer."""
    parts = math.lcm(have[1], want[1])
    fine_have, fine_want = (
        [chunk * (parts // count) + part for chunk in chunks for part in range(parts // count)]
        for chunks, count in (have, want)
    )
    return rows.unflatten(0, (len(fine_have), -1))[[fine_have.index(chunk) for chunk in fine_want]].flatten(0, 1)


def _empty(base: type, blueprint: Blueprint) -> nn.Module:
    made = narrow_class(base, blueprint)
    return made.__new__(made)
