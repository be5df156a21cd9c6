"""What lies in the blocks of a stack: feed-forward networks, joint attention, modulation, and what would be dead."""

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Stack, Stream
from ppcl_toolkit.checking.alone import shifted
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.kit.watching import Called, changed, watch
from ppcl_toolkit.plan import Form
from ppcl_toolkit.running.capture import Streams
from ppcl_toolkit.running.fields import LAYERS
from ppcl_toolkit.surgery.narrow import draw

Note = Callable[[str, str], None]


def look_inside(
    transformer: nn.Module, stack: Stack, blocks: Sequence[Called], call: Mapping[str, Any], note: Note
) -> Stack:
    """Return `stack` with what its blocks have; what surgery does not allow is left out, and `note` says why."""
    first = blocks[0]
    inner = watch(first.module, first.arguments)
    given = {stream: first.arguments[stack.argument(stream)] for stream in stack.streams}
    everywhere = set.intersection(*({path for path, _ in call.module.named_modules()} for call in blocks))
    # What the last block has in another place would not follow another block there.
    stack = replace(stack, modulation=tuple(p for p in _modulation(first, stack, inner) if p in everywhere))
    attention = _joint_attention(given, inner)
    if attention is not None:
        stack = replace(stack, joint_attention=attention.path, attention_text=_text_argument(attention, given["text"]))
        query, out = _dead(attention, given)
        stack = replace(stack, text_query=query, text_out=out)
        mask = _text_mask(transformer, stack, first, call)
        stack = replace(stack, text_mask=mask)
    stack = replace(stack, ffn=_networks(given, inner, attention))
    return _allowed(stack, first, note)


def _modulation(block: Called, stack: Stack, inner: Sequence[Called]) -> tuple[str, ...]:
    """Return the linear layers that are fed one vector for each sample, the same whatever the streams are."""
    streams = {stack.argument(stream) for stream in stack.streams}
    other = {n: shifted(v) if n in streams else v for n, v in block.arguments.items()}
    again = {call.path: call for call in watch(block.module, other)}
    return tuple(
        call.path
        for call in inner
        if isinstance(call.module, nn.Linear)
        and (vector := next(iter(call.tensors().values()))).ndim == 2
        and not changed(vector, next(iter(again[call.path].tensors().values())))
    )


def _joint_attention(given: Mapping[Stream, Tensor], inner: Sequence[Called]) -> Called | None:
    """Return the innermost module that is given tokens of image and text apart, and returns both."""
    if "text" not in given:
        return None
    sizes = {value.shape[1] for value in given.values()}
    for call in inner:
        taken = {value.shape[1] for value in call.tensors().values() if value.ndim == 3}
        made = {value.shape[1] for value in call.outputs if isinstance(value, Tensor) and value.ndim == 3}
        if sizes <= taken and sizes <= made and any(isinstance(part, nn.Linear) for part in call.module.modules()):
            return call
    return None


def _text_argument(attention: Called, text: Tensor) -> str:
    return next(name for name, value in attention.tensors().items() if value.shape[:2] == text.shape[:2])


@torch.enable_grad()
def _dead(attention: Called, given: Mapping[Stream, Tensor]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the modules of the attention without a part in its image output: those of queries, and of outputs.

    The gradient of the image output is zero for all their weights, exactly.
    """
    weights = list(attention.module.parameters())
    flags = [value.requires_grad for value in weights]
    attention.module.requires_grad_(True)
    try:
        outputs = attention.module(**attention.arguments)
        image = next(out for out in outputs if out.shape[1] == given["image"].shape[1])
        grads = torch.autograd.grad(image.square().sum(), weights, allow_unused=True)
    finally:
        for value, flag in zip(weights, flags, strict=True):
            value.requires_grad_(flag)
    names = [name for name, _ in attention.module.named_parameters()]
    reached = [name for name, grad in zip(names, grads, strict=True) if grad is not None and grad.any()]
    alive = {name.rpartition(".")[0] for name in reached}
    called = {call.path: call for call in watch(attention.module, attention.arguments)}
    text = next(out for out in attention.outputs if out.shape[1] == given["text"].shape[1])
    own = {name.rpartition(".")[0] for name in names}
    dead = [name for name in called if name in own - alive]
    out = [name for name in dead if not changed(called[name].output, text)]
    prefix = f"{attention.path}."
    return tuple(prefix + name for name in dead if name not in out), tuple(prefix + name for name in out)


def _text_mask(transformer: nn.Module, stack: Stack, block: Called, call: Mapping[str, Any]) -> str | None:
    """Return the argument of transformer and block by which text is masked: what it hides changes nothing."""
    assert stack.text is not None
    taken = [set(inspect.signature(type(module).forward).parameters) for module in (transformer, block.module)]
    for name in sorted(taken[0] & taken[1]):
        text = call.get(stack.text)
        if "mask" not in name or not isinstance(text, Tensor):
            continue
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        mask[:, -1] = False
        hidden = torch.cat([text[:, :-1], shifted(text[:, -1:])], dim=1)
        # A mask of another kind is none that a sample can be given alone (Chroma's covers image and text), and where
        # all of the text counts there is none.
        with torch.no_grad(), contextlib.suppress(RuntimeError, TypeError):
            one, other = (transformer(**{**call, stack.text: value, name: mask})[0] for value in (text, hidden))
            transformer(**{**call, name: None})
            if not changed(one, other):
                return name
    return None


def _networks(given: Mapping[Stream, Tensor], inner: Sequence[Called], attention: Called | None) -> dict[Stream, str]:
    """Return the outermost modules of two linear layers, or convolutions, that make tokens of a stream's alone."""
    found: dict[Stream, str] = {}
    # A module ends behind its parts: outermost ones come last.
    for call in reversed(inner):
        taken, made = call.tensors().values(), call.output
        linear = sum(isinstance(part, LAYERS) for part in call.module.modules())
        inside = attention is not None and f"{call.path}.".startswith(f"{attention.path}.")
        if linear < 2 or inside or len(taken) != 1 or "Attention" in type(call.module).__name__:
            continue
        for stream, tokens in given.items():
            given_shape = next(iter(taken)).shape
            if isinstance(made, Tensor) and made.shape == given_shape and _is_of(given_shape, tokens):
                found.setdefault(stream, call.path)
    return {stream: found[stream] for stream in given if stream in found}


def _is_of(shape: torch.Size, tokens: Tensor) -> bool:
    """Whether a shape is that of tokens, or of the same as a picture [B, D, H, W] or a video."""
    rows, count, width = tokens.shape
    return shape == tokens.shape or (shape[:2] == (rows, width) and shape[2:].numel() == count)


def _allowed(stack: Stack, block: Called, note: Note) -> Stack:
    """Try every kind of surgery on the first block; what is refused is left out."""
    streams = Streams(*(block.arguments[stack.argument(stream)] for stream in stack.streams))
    names = {stack.argument(stream) for stream in stack.streams}
    arguments = {name: value for name, value in block.arguments.items() if name not in names}
    wide = Form(stack=stack.path, first=0, last=0)
    kept: dict[Stream, str] = {}
    for stream, path in stack.ffn.items():
        try:
            draw(block.module, stack, replace(wide, ffn=(stream,)), arguments, streams)
            kept[stream] = path
        except PpclError as error:
            note(stack.path, f"ffn: {path} stays as it is: {error}")
    if stack.joint_attention is not None:
        try:
            draw(block.module, stack, replace(wide, text="inside", reference=(0, 0)), arguments, streams)
        except PpclError as error:
            note(stack.path, f"joint_attention: text streams stay as they are: {error}")
            stack = replace(stack, joint_attention=None, text_query=(), text_out=())
    return replace(stack, ffn=kept)
