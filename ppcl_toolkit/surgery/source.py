"""A graph as Python source that people read: it ends up in the modelling files of width-pruned variants."""

import inspect
import operator
from typing import Any

import torch
from torch import nn

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.surgery.graph import Node, Trace, is_read_once

_OPERATORS = {
    operator.add: "{} + {}",
    operator.sub: "{} - {}",
    operator.mul: "{} * {}",
    operator.truediv: "{} / {}",
    operator.floordiv: "{} // {}",
    operator.mod: "{} % {}",
    operator.pow: "{} ** {}",
    operator.matmul: "{} @ {}",
    operator.neg: "-{}",
    operator.eq: "{} == {}",
    operator.ne: "{} != {}",
    operator.lt: "{} < {}",
    operator.le: "{} <= {}",
    operator.gt: "{} > {}",
    operator.ge: "{} >= {}",
}
_INLINE = 50
"""Longest expression, in characters, that is written where it is used."""

Texts = dict[Node, str]


def write_forward(trace: Trace, checked: str) -> str:
    """Write the graph as the source of a `forward` with the block's own signature; it needs `torch` only.

    The code refuses what the trace took for granted: other values of fixed arguments, and a data type of the argument
    `checked` for which the block takes a path of its own (FLUX clips in float16).
    """
    signature = inspect.signature(type(trace.block).forward)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    signature = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
    lines = [f"def forward{signature}:", *(f"    {line}" for line in _refusals(trace, checked))]
    texts: Texts = {}
    for node in trace.graph.nodes:
        if node.op == "output":
            values = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            lines.append(f"    return {', '.join(_text(value, texts) for value in values)}")
        elif node.op in ("placeholder", "get_attr"):
            texts[node] = node.target if node.op == "placeholder" else f"self.{_dotted(node.target)}"
        else:
            expression = _expression(node, texts)
            if node.op != "call_module" and len(expression) < _INLINE and is_read_once(node):
                texts[node] = expression
            else:
                texts[node] = node.name
                lines.append(f"    {node.name} = {expression}")
    return "\n".join(lines) + "\n"


def _refusals(trace: Trace, checked: str) -> list[str]:
    lines = []
    for name, value in trace.baked.items():
        # Pipelines pass None and {} for "nothing" alike.
        absent = value is None or value == {}
        condition = f"{name} is not None and {name} != {{}}" if absent else f"{name} != {value!r}"
        message = f"this block was narrowed for {name}={value!r}"
        lines += [f"if {condition}:", f"    raise NotImplementedError({message!r})"]
    for dtype in trace.refused_types():
        message = f"this block was narrowed for other types than {dtype}"
        lines += [f"if {checked}.dtype == {dtype}:", f"    raise NotImplementedError({message!r})"]
    return lines


def _expression(node: Node, texts: Texts) -> str:
    if node.target is operator.getitem:
        return f"{_operand(node.args[0], texts)}[{_index(node.args[1], texts)}]"
    if node.target is getattr:
        return f"{_operand(node.args[0], texts)}.{node.args[1]}"
    if node.target in _OPERATORS:
        return _OPERATORS[node.target].format(*(_operand(argument, texts) for argument in node.args))
    arguments = [_text(argument, texts) for argument in node.args]
    named = [f"{key}={_text(value, texts)}" for key, value in node.kwargs.items()]
    if node.op == "call_module":
        return f"self.{_dotted(str(node.target))}({', '.join(arguments + named)})"
    if node.op == "call_method":
        return f"{_operand(node.args[0], texts)}.{node.target}({', '.join(arguments[1:] + named)})"
    return f"{_qualified(node.target)}({', '.join(arguments + named)})"


def _qualified(function: Any) -> str:
    name = function.__name__
    for path, module in (("torch", torch), ("torch.nn.functional", nn.functional)):
        if vars(module).get(name) is function:
            return f"{path}.{name}"
    raise PpclError(f"it calls {name}, which is no public function of torch")


def _dotted(path: str) -> str:
    """Spell a module path as Python: `img_mod.1` is `img_mod[1]`."""
    head, *parts = path.split(".")
    return head + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)


def _operand(value: Any, texts: Texts) -> str:
    inlined = isinstance(value, Node) and value.target in _OPERATORS and texts[value] != value.name
    return f"({_text(value, texts)})" if inlined else _text(value, texts)


def _text(value: Any, texts: Texts) -> str:
    if isinstance(value, Node):
        return texts[value]
    if isinstance(value, (tuple, list)):
        items = ", ".join(_text(item, texts) for item in value)
        return f"[{items}]" if isinstance(value, list) else f"({items},)" if len(value) == 1 else f"({items})"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    raise PpclError(f"its path contains the constant {value!r}")


def _index(value: Any, texts: Texts) -> str:
    if isinstance(value, tuple):
        return ", ".join(_index(item, texts) for item in value)
    if isinstance(value, slice):
        parts = [value.start, value.stop] + ([] if value.step is None else [value.step])
        return ":".join("" if part is None else _text(part, texts) for part in parts)
    return "..." if value is Ellipsis else _text(value, texts)
