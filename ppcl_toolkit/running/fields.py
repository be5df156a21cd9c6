"""What an adapter says, looked up in the transformer that it is for: what is wrong is named before anything is run."""

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ppcl_toolkit.adapter import Adapter, Stack
from ppcl_toolkit.errors import PpclError

_MOST = 12
"""Names that an error lists."""
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Of which feed-forward networks are made."""


def check_fields(adapter: Adapter, transformer: nn.Module, *, narrow: bool = False) -> None:
    """Raise a `PpclError` with the first field of `adapter` that is wrong for `transformer`, and what is there instead.

    Blocks that are `narrow` already lack modules that the adapter names: nothing in them is looked up.
    """
    try:
        _check_transformer(adapter, transformer)
        for stack in adapter.stacks:
            blocks = _blocks(stack, transformer)
            _check_config(stack, transformer, len(blocks))
            for block in {type(block): block for block in blocks}.values():
                _check_call(stack, block)
            if not narrow:
                _check_inside(stack, blocks)
    except PpclError as error:
        raise PpclError(f"adapter {adapter.family!r}: {error}") from error


def _check_transformer(adapter: Adapter, transformer: nn.Module) -> None:
    if not adapter.stacks:
        raise PpclError(f"stacks is empty; {_lists(transformer)}")
    for key in ("path", "depth_key"):
        values = [getattr(stack, key) for stack in adapter.stacks]
        if twice := next((value for value in values if values.count(value) > 1), None):
            why = "are those of one stack" if key == "path" else "change together: name one of the stacks"
            raise PpclError(f"two stacks have the {key} {twice!r}; its blocks {why}")
    taken, kind = _arguments(transformer), type(transformer).__name__
    buffers = [name for name, _ in transformer.named_buffers()]
    if unknown := [name for name in adapter.tables if name not in buffers]:
        raise PpclError(f"tables: {kind} has no buffer {_near(unknown[0], buffers, 'buffers')}")
    first = adapter.stacks[0]
    if first.text is None and first.text_mask is not None:
        raise PpclError(f"text_mask of {first.path}: its blocks have no text stream, text is None")
    text = () if adapter.padded is None else (("text", adapter.padded[0]), ("text_mask", adapter.padded[1]))
    named = [("latents", adapter.latents), ("timestep", adapter.timestep), *text]
    for field, name in [*named, *(("shared", name) for name in adapter.shared)]:
        if name not in taken:
            raise PpclError(f"{field}: the forward of {kind} has no argument {_near(name, taken)}")
    if twice := next((f"{name!r}, the {field}" for field, name in named if name in adapter.shared), None):
        raise PpclError(f"shared names {twice}: there is one for each sample")


def _blocks(stack: Stack, transformer: nn.Module) -> nn.ModuleList:
    found = _module(transformer, stack.path)
    kind = type(transformer).__name__
    if found is None:
        raise PpclError(f"path: {kind} has no module {_near(stack.path, lists_of(transformer), 'lists of modules')}")
    if not isinstance(found, nn.ModuleList):
        raise PpclError(f"path: {stack.path} is a {type(found).__name__}, not an nn.ModuleList; {_lists(transformer)}")
    if not len(found):
        raise PpclError(f"path: {stack.path} of {kind} has no blocks; {_lists(transformer)}")
    return found


def _check_config(stack: Stack, transformer: nn.Module, depth: int) -> None:
    config: Mapping[str, Any] = dict(getattr(transformer, "config", {}))
    depths = [key for key, value in config.items() if value == depth and isinstance(value, int)]
    if stack.depth_key not in config:
        held = f"; {depth}, the blocks of {stack.path}, is what {_listed(depths)} say" if depths else ""
        raise PpclError(f"depth_key: the config has no {_near(stack.depth_key, config, 'keys')}{held}")
    if config[stack.depth_key] != depth:
        held = f"; {_listed(depths)} say so" if depths else ""
        raise PpclError(
            f"depth_key: {stack.depth_key} is {config[stack.depth_key]!r}, and {stack.path} has {depth} blocks{held}"
        )
    for key in stack.index_keys:
        if key not in config:
            raise PpclError(f"index_keys: the config has no {_near(key, config, 'keys')}")
        value = config[key]
        if not isinstance(value, list | tuple) or not all(isinstance(index, int) for index in value):
            raise PpclError(f"index_keys: {key} is {value!r}, not a list of block numbers")


def _check_call(stack: Stack, block: nn.Module) -> None:
    taken, kind = _arguments(block), type(block).__name__
    for field in ("image", "text", "text_mask"):
        name = getattr(stack, field)
        if name is not None and name not in taken:
            raise PpclError(f"{field} of {stack.path}: the forward of {kind} has no argument {_near(name, taken)}")
    if unknown := [stream for stream in stack.returns if stream not in stack.streams]:
        raise PpclError(f"returns of {stack.path}: {unknown[0]!r} is none of its streams, {_listed(stack.streams)}")
    if "image" not in stack.returns or len(set(stack.returns)) < len(stack.returns):
        raise PpclError(f"returns of {stack.path}: {stack.returns!r} must have the image, and no stream twice")
    written = list(_returned(block))
    if written and not any(_fits(stack, values) for values in written):
        what = " or ".join(", ".join(values) for values in dict.fromkeys(written))
        raise PpclError(f"returns of {stack.path}: {stack.returns!r}, and the forward of {kind} returns {what}")


def _check_inside(stack: Stack, blocks: nn.ModuleList) -> None:
    if stack.joint_attention is not None:
        _check_attention(stack, _inner(stack, blocks, "joint_attention", stack.joint_attention))
    elif named := stack.text_query or stack.text_out:
        raise PpclError(f"joint_attention of {stack.path} is None, and {named[0]!r} is to go with the text's queries")
    for stream, path in stack.ffn.items():
        if stream not in stack.streams:
            raise PpclError(f"ffn of {stack.path}: {stream!r} is none of its streams, {_listed(stack.streams)}")
        _check_network(stack, path, _inner(stack, blocks, "ffn", path))
    for field in ("text_query", "text_out", "modulation"):
        for path in getattr(stack, field):
            if _is_left_out(blocks[0], path):
                continue
            found = _inner(stack, blocks, field, path)
            if field == "modulation" and not isinstance(found, nn.Linear):
                raise PpclError(f"modulation of {stack.path}: {path} is a {type(found).__name__}, not an nn.Linear")


def _check_network(stack: Stack, path: str, network: nn.Module) -> None:
    kind, inside = type(network).__name__, stack.joint_attention
    layers = sum(isinstance(part, LAYERS) for part in network.modules())
    if layers < 2 or "Attention" in kind or (inside is not None and f"{path}.".startswith(f"{inside}.")):
        where = f" in {inside}" if inside is not None and path.startswith(f"{inside}.") else ""
        raise PpclError(
            f"ffn of {stack.path}: {path} is a {kind}{where} with {layers} linear layers, and no feed-forward network, "
            "which has two at least"
        )


def _check_attention(stack: Stack, attention: nn.Module) -> None:
    if stack.text is None or "text" not in stack.returns:
        lack = "have no text stream, text is None" if stack.text is None else "return no text"
        raise PpclError(f"joint_attention of {stack.path}: its blocks {lack}")
    taken = _arguments(attention)
    if stack.attention_text not in taken:
        kind = f"{stack.joint_attention}, a {type(attention).__name__},"
        raise PpclError(
            f"attention_text of {stack.path}: the forward of {kind} has no argument "
            f"{_near(stack.attention_text, taken)}"
        )


def _inner(stack: Stack, blocks: nn.ModuleList, field: str, path: str) -> nn.Module:
    """Return a module of the first block that has it: blocks of one stack may differ."""
    for block in blocks:
        if (found := _module(block, path)) is not None:
            return found
    known = [name for name, _ in blocks[0].named_modules() if name]
    kind = type(blocks[0]).__name__
    raise PpclError(f"{field} of {stack.path}: {kind} has no module {_near(path, known, 'modules')}")


def _is_left_out(block: nn.Module, path: str) -> bool:
    """Whether a block has nothing in a place that its class has: a norm that its config does without."""
    parent, _, name = path.rpartition(".")
    owner = _module(block, parent)
    return owner is not None and name in vars(owner).keys() | owner._modules.keys() and getattr(owner, name) is None


def _module(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _arguments(module: nn.Module) -> list[str]:
    """Return the names of a forward's arguments; what `**kwargs` would take has none."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return [parameter.name for parameter in parameters if parameter.kind not in variadic]


def _returned(block: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yield what the return statements of a forward name, as far as they are plain; nothing where one is not."""
    try:
        source = inspect.getsource(inspect.unwrap(type(block).forward))
        (function,) = ast.parse(textwrap.dedent(source)).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return
    taken, found = _arguments(block), []
    for node in _own_returns(function):
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        # One name may stand for several values, unless it is that of a stream.
        alone = len(values) == 1 and not (isinstance(values[0], ast.Name) and values[0].id in taken)
        if alone or any(value is None or isinstance(value, ast.Starred) for value in values):
            return
        found.append(tuple(ast.unparse(value) for value in values if value is not None))
    yield from found


def _own_returns(function: ast.AST) -> Iterator[ast.Return]:
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.Return):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield from _own_returns(node)


def _fits(stack: Stack, values: Sequence[str]) -> bool:
    """Whether returned values can be the streams of `returns`: where one is called as a stream is, it is that one."""
    own = {stack.argument(stream): stream for stream in stack.streams}
    pairs = zip(values, stack.returns, strict=False)
    return len(values) == len(stack.returns) and all(own.get(value, stream) == stream for value, stream in pairs)


def lists_of(transformer: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of modules that lie in no other."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in transformer.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(tuple(f"{outer}." for outer in found)):
            found[path] = module
    return found


def _lists(transformer: nn.Module) -> str:
    kinds = [
        f"{path} ({len(blocks)} of {type(blocks[0]).__name__})"
        for path, blocks in lists_of(transformer).items()
        if len(blocks)
    ]
    return f"lists of modules of {type(transformer).__name__}: {_listed(kinds)}"


def _near(name: str, known: Iterable[str], what: str = "arguments") -> str:
    known = list(known)
    # Dotted paths that end alike are what was meant, however they begin.
    ends = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.7) or ends[:2]
    return f"{name!r}" + (
        f", did you mean {' or '.join(map(repr, close))}?" if close else f"; {what}: {_listed(known)}"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return (", ".join(names[:_MOST]) or "none") + more
