"""One block as a torch.fx graph: traced with example values, and rewritten.

The block is traced on the meta device, whatever its size and wherever it lives, so tracing costs nothing and cannot
read data. Attention, plain norms and feed-forward networks are single nodes; everything between them is recorded. Each
rewrite checks what it assumes: every check stands for a real architecture where it would silently give a wrong block.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node, map_arg
from torch.fx.proxy import GraphAppendingTracer

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import map_tensors
from ppcl_toolkit.surgery.copies import meta_copy

_CASTS = ("to", "float", "type_as", "contiguous")


@dataclass
class Trace:
    """The forward of one block as a graph over its submodules, and what was taken for granted on the way."""

    block: nn.Module
    """The block without weights."""
    graph: fx.Graph
    guards: list[tuple[Node, bool]]
    """Conditions on shapes and types that Python asked for, with the answer."""
    baked: dict[str, Any]
    """Arguments whose value became part of the graph."""
    added: dict[str, int] = field(default_factory=dict)
    """Linear maps D -> D that the graph calls and the block lacks."""
    shrunk: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    """Linear layers of which some output chunks are read: those chunks, and how many there were."""

    def calls(self, path: str) -> list[Node]:
        """Return the calls of the submodule at `path`."""
        return self.graph.find_nodes(op="call_module", target=path)

    def used(self) -> set[str]:
        """Return the paths of the submodules and bare parameters that are used."""
        return {str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")}

    def module(self, node: Node) -> nn.Module | None:
        """Return the submodule of the block that `node` calls, if it calls one."""
        known = node.op == "call_module" and node.target not in self.added
        return self.block.get_submodule(str(node.target)) if known else None

    def refused_types(self) -> list[torch.dtype]:
        """Return the types for which the block takes another path; `PpclError` where the traced one is special."""
        refused = set()
        for node, answer in self.guards:
            for dtype in (argument for argument in node.args if isinstance(argument, torch.dtype)):
                if answer == (node.target is operator.eq):
                    raise PpclError(f"it takes a path of its own in {dtype}: narrow it in another type")
                refused.add(dtype)
        return sorted(refused, key=str)

    def outputs(self) -> list[Any]:
        """Return the nodes of the streams that the block returns; None stands for a stream that ends here."""
        returned: Any = self.graph.output_node().args[0]
        return list(returned)

    def give(self, position: int, value: Node) -> None:
        """Return another node in this place."""
        outputs = self.outputs()
        outputs[position] = value
        self.graph.output_node().args = (tuple(outputs),)


class _Proxy(fx.Proxy):
    """A proxy that knows its value in the example call: Python's questions are answered by the value."""

    def __getattr__(self, name: str) -> Any:
        if callable(getattr(self.node.meta["value"], name)):
            return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __bool__(self) -> bool:
        return self.tracer.answer(self.node, bool)  # type: ignore[attr-defined]

    def __index__(self) -> int:
        return self.tracer.answer(self.node, operator.index)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        if isinstance(self.node.meta["value"], Tensor):
            raise PpclError("its path depends on the size of a tensor")
        return len(self.node.meta["value"])

    def __iter__(self) -> Any:
        return iter([operator.getitem(self, index) for index in range(len(self))])


class _Tracer(GraphAppendingTracer):
    def __init__(self) -> None:
        super().__init__(fx.Graph())
        self.guards: list[tuple[Node, bool]] = []
        self.forwards: dict[str, Callable[..., Any]] = {}

    def proxy(self, node: Node) -> _Proxy:
        return _Proxy(node, self)

    def place(self, op: str, target: str, value: Any) -> _Proxy:
        """Add an input of the graph."""
        node = self.graph.create_node(op, target)
        node.meta["value"] = value
        return _Proxy(node, self)

    def answer(self, node: Node, question: Callable[[Any], Any]) -> Any:
        value = node.meta["value"]
        if isinstance(value, Tensor):
            raise PpclError("its path depends on the data in a tensor")
        if _is_size(node):
            raise PpclError("its path depends on the size of a tensor")
        self.guards.append((node, question(value)))
        return question(value)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **names: Any) -> Any:
        """Record one operation, and run it on the example values."""
        if kind == "call_method" and target.endswith("_") and not target.endswith("__"):
            raise PpclError(f"it changes a tensor in place ({target})")
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **names)
        node = proxy.node
        values: Any = map_arg(node.args, lambda n: n.meta["value"])
        named: Any = map_arg(node.kwargs, lambda n: n.meta["value"])
        if kind == "call_method":
            value = getattr(values[0], target)(*values[1:], **named)
        else:
            value = (self.forwards[target] if kind == "call_module" else target)(*values, **named)
        node.meta["value"] = value
        if isinstance(value, bool):
            return self.answer(node, bool)
        return value if value is None or isinstance(value, str) else proxy

    def attach(self, module: nn.Module, leaves: Collection[str], prefix: str = "") -> None:
        """Let the leaves and the bare parameters of `module` record themselves."""
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            delattr(module, name)
            vars(module)[name] = self.place("get_attr", prefix + name, value)
        for name, child in module.named_children():
            path = prefix + name
            if path in leaves or _is_leaf(child):
                self.forwards[path] = child.forward
                child.forward = functools.partial(self._call, path)
            else:
                self.attach(child, leaves, f"{path}.")

    def _call(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return self.create_proxy("call_module", path, args, kwargs)


def trace(block: nn.Module, call: Mapping[str, Any], leaves: Collection[str]) -> Trace:
    """Trace `block` as it is called with `call`; the submodules at `leaves` stay whole.

    An argument that is None in the example stays an argument where the block merely hands it on (a mask).
    Raises `PpclError` where the block cannot be traced, or where its path depends on data.
    """
    bound = inspect.signature(type(block).forward).bind(block, **call)
    bound.apply_defaults()
    values = {name: value for name, value in list(bound.arguments.items())[1:] if name not in _variadic(block)}
    try:
        fixed = _record(block, values, leaves, ())
        absent = [name for name, value in values.items() if value is None]
        return _record(block, values, leaves, [n for n in absent if _hands_on(block, values, leaves, n, fixed)])
    except Exception as error:
        raise PpclError(f"{type(block).__name__} cannot be traced: {error}") from error


def replace_ffn(trace: Trace, path: str, name: str) -> None:
    """Let a linear map on the post-attention residual g stand in for the FFN at `path`: h = g + W g (Eq. 9)."""
    calls = trace.calls(path)
    if len(calls) != 1:
        raise PpclError(f"{path} is called {len(calls)} times: streams share it, so it cannot become linear")
    add, residual = _residual(calls[0])
    whole = {node for node in trace.graph.nodes if _is_attention(trace, node)}
    attentions = whole & _ancestors(calls[0])
    if not attentions or not attentions <= _ancestors(residual):
        raise PpclError(f"{path} runs in parallel to the attention: a linear map would delete the attention")
    add.replace_all_uses_with(_plus_linear(trace, residual, name, before=add))
    _sweep(trace.graph)
    if whole - set(trace.graph.nodes):
        raise PpclError(f"{path} is followed by an attention before it is added: a linear map would delete that")
    if trace.calls(path):
        raise PpclError(f"{path} also serves another stream, so it cannot become linear")


def entering_text(trace: Trace, attention: str, argument: str) -> Node:
    """Return what enters `attention` as its text: z of Eq. 8."""
    (call,) = trace.calls(attention)
    names = list(inspect.signature(type(trace.block.get_submodule(attention)).forward).parameters)[1:]
    return cast(Node, {**dict(zip(names, call.args, strict=False)), **call.kwargs}[argument])


def hand_on_text(trace: Trace, z: Node, position: int) -> None:
    """Return z behind the text tokens: the returned text is [h, z], [B, 2N, D]."""
    text = trace.outputs()[position]
    if text is None or text.meta["value"].shape != z.meta["value"].shape:
        raise PpclError("the text that enters the attention has another shape than the text that is returned")
    with trace.graph.inserting_before(trace.graph.output_node()):
        trace.give(position, trace.graph.call_function(torch.cat, ([text, z],), {"dim": 1}))


def replace_text(trace: Trace, z: Node, argument: str, position: int, *, end: bool) -> None:
    """Read [h_r, z_r] from the text argument, attend to z = z_r + W_z z_r, and return h = h_r + W_h h_r at the end."""
    (text,) = (node for node in trace.graph.find_nodes(op="placeholder") if node.target == argument)
    if text.meta["value"].shape != z.meta["value"].shape:
        raise PpclError("the text that enters the attention has another shape than the text stream")
    first = next(node for node in trace.graph.nodes if node.op != "placeholder")
    with trace.graph.inserting_before(first):
        halves = trace.graph.create_node("call_method", "chunk", (text, 2), {"dim": 1}, "reference")
        h_reference = trace.graph.create_node("call_function", operator.getitem, (halves, 0), name="h_reference")
        z_reference = trace.graph.create_node("call_function", operator.getitem, (halves, 1), name="z_reference")
    h_reference.meta["value"] = z_reference.meta["value"] = text.meta["value"]
    mapped = _plus_linear(trace, z_reference, "linear_text_z", before=first)
    for attention in [user for user in z.users if _is_attention(trace, user)]:
        attention.replace_input_with(z, mapped)
    if trace.outputs()[position] is not None:
        trace.give(position, _plus_linear(trace, h_reference, "linear_text_h") if end else text)
    _sweep(trace.graph)
    if not set(text.users) <= {halves, trace.graph.output_node()}:
        raise PpclError(f"{argument} is read outside the text's own path, so it cannot become linear")


def read_outputs(trace: Trace, path: str) -> int:
    """Count the outputs of the submodule at `path` that are read."""
    (call,) = trace.calls(path)
    return len({user.args[1] if user.target is operator.getitem else None for user in call.users})


def shrink(trace: Trace) -> None:
    """Keep of every `Linear -> chunk` the chunks that are read: the modulation rows that are still needed."""
    while chunk := next((node for node in trace.graph.nodes if _is_wasteful(trace, node)), None):
        source, parts = chunk.args
        used = sorted({user.args[1] for user in chunk.users})
        # A chunk of a chunk is met only where a single outer chunk is left, and has become the layer itself.
        outer, outer_parts = trace.shrunk.get(source.target, ((0,), 1))
        trace.shrunk[source.target] = (tuple(outer[0] * parts + part for part in used), outer_parts * parts)
        for user in list(chunk.users):
            if len(used) == 1:
                user.replace_all_uses_with(source)
            else:
                user.update_arg(1, used.index(user.args[1]))
        chunk.update_arg(1, len(used))
        _sweep(trace.graph)
    trace.graph.lint()


def is_read_once(node: Node) -> bool:
    """Whether the result of `node` is an operand exactly once."""
    readers: list[Node] = []
    for user in node.users:
        map_arg((user.args, user.kwargs), readers.append)
    return readers.count(node) == 1


def _record(block: nn.Module, values: Mapping[str, Any], leaves: Collection[str], absent: Collection[str]) -> Trace:
    tracer, without_weights = _Tracer(), meta_copy(block)
    symbolic = {name for name, value in values.items() if name in absent or _is_symbolic(value)}
    given = {
        name: tracer.place("placeholder", name, map_tensors(value, lambda t: t.to("meta")))
        if name in symbolic
        else value
        for name, value in values.items()
    }
    tracer.attach(without_weights, leaves)
    with torch.no_grad():
        output = type(block).forward(without_weights, **given)
    tracer.graph.output(tracer.create_arg(output))
    _sweep(tracer.graph)
    baked = {name: value for name, value in values.items() if name not in symbolic}
    baked |= {str(node.target): answer for node, answer in tracer.guards if node.op == "placeholder"}
    return Trace(meta_copy(block), tracer.graph, tracer.guards, baked)


def _sweep(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _hands_on(block: nn.Module, values: Mapping[str, Any], leaves: Collection[str], name: str, fixed: Trace) -> bool:
    """Whether the block is the same when the absent argument `name` is a proxy: no `if` has looked at it."""
    try:
        free = _record(block, values, leaves, (name,))
    except Exception:  # What code does to a proxy where it expects None is unbounded.
        return False
    asked = any(node.target == name for node, _ in free.guards)
    read = any(node.target == name and node.users for node in free.graph.nodes)
    return read and not asked and _outline(free, name) == _outline(fixed, name)


def _outline(trace: Trace, absent: str) -> list[tuple[Any, ...]]:
    def plain(value: Any) -> Any:
        return map_arg(value, lambda n: None if n.target == absent else n.name)

    nodes = (node for node in trace.graph.nodes if node.target != absent)
    return [(node.op, node.target, plain(node.args), plain(node.kwargs)) for node in nodes]


def _variadic(block: nn.Module) -> set[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(type(block).forward).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind in kinds}


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_symbolic(item) for item in value)
    if isinstance(value, (Tensor, int, float)):
        return not isinstance(value, bool)
    if value is None or isinstance(value, (bool, str)) or value == {}:
        return False
    raise PpclError(f"an argument is a {type(value).__name__}, neither a tensor nor plain data")


def _is_leaf(module: nn.Module) -> bool:
    whole = isinstance(module, nn.Linear) or "Attention" in type(module).__name__
    return whole or not any(isinstance(part, nn.Linear) for part in module.modules())


def _is_attention(trace: Trace, node: Node) -> bool:
    return "Attention" in type(trace.module(node)).__name__


def _is_wasteful(trace: Trace, node: Node) -> bool:
    """Whether `node` cuts the output features of a linear layer into chunks, and not all of them are read."""
    if node.target not in ("chunk", torch.chunk) or not isinstance(node.args[0], Node):
        return False
    source = node.args[0]
    if not isinstance(trace.module(source), nn.Linear) or len(trace.calls(str(source.target))) > 1:
        return False
    if len(source.users) > 1 or any(user.target is not operator.getitem for user in node.users):
        return False
    cuts_features = node.meta["value"][0].shape[:-1] == source.meta["value"].shape[:-1]
    return cuts_features and {user.args[1] for user in node.users} != set(range(cast(int, node.args[1])))


def _is_size(node: Node) -> bool:
    """Whether a number or an answer comes from the length of a dimension: ranks and types are fixed, sizes are not."""
    if node.target in ("size", "numel") or isinstance(node.meta["value"], torch.Size):
        return True
    return any(not isinstance(n.meta["value"], Tensor) and _is_size(n) for n in node.all_input_nodes)


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    queue = [node]
    for reached in queue:
        new = [n for n in reached.all_input_nodes if n not in found]
        found.update(new)
        queue.extend(new)
    return found


def _residual(ffn: Node) -> tuple[Node, Node]:
    """Find the nearest addition after `ffn` whose other operand, g, also leads to `ffn`."""
    before, queue = _ancestors(ffn), [ffn]
    for node in queue:
        for user in node.users:
            if user.target in (operator.add, torch.add, "add") and len(user.all_input_nodes) == 2:
                (other,) = (n for n in user.all_input_nodes if n is not node)
                while other.op == "call_method" and other.target in _CASTS:
                    other = other.args[0]  # type: ignore[assignment]
                if other in before and other.meta["value"].shape == user.meta["value"].shape:
                    return user, other
            if user not in queue:
                queue.append(user)
    raise PpclError(f"no residual connection follows {ffn.target}")


def _plus_linear(trace: Trace, value: Node, name: str, before: Node | None = None) -> Node:
    trace.added[name] = value.meta["value"].shape[-1]
    with trace.graph.inserting_before(before or trace.graph.output_node()):
        mapped = trace.graph.create_node("call_module", name, (value,))
        total = trace.graph.call_function(operator.add, (value, mapped))
    total.meta["value"] = mapped.meta["value"] = value.meta["value"]
    return total
