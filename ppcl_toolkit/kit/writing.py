"""An adapter as the file that a user keeps: what was found, and what was not decided, marked."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack
from ppcl_toolkit.kit.finding import OPEN, Found

_HEAD = '''"""{family}: found by running {source}. What is marked "{open}" was not decided: look at it."""

from ppcl_toolkit import Adapter
from ppcl_toolkit.adapter import {names}
'''


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How a pipeline calls its transformer, where one was run."""

    packs: bool
    guidance: str


def adapter_of(found: Found, family: str, convention: Convention | None) -> Adapter:
    """Return what was found as an adapter."""
    known = {} if convention is None else asdict(convention)
    return Adapter(
        family=family,
        transformer=found.transformer,
        latents=found.latents,
        timestep=found.timestep or "timestep",
        shared=found.shared,
        stacks=tuple(found.stacks),
        tables=found.tables,
        **known,
    )


_TEST = '''"""What {family}.py says holds: on {source}, every kind of plan is made, saved and opened again."""

from ppcl_toolkit import check_adapter


def test_{family}():
    check_adapter("{family}:ADAPTER", pipeline={pipeline!r}, call={call!r})
'''


def write_test(family: str, pipeline: str | None, call: Mapping[str, Any]) -> str:
    """Return a test of the adapter in `<family>.py`, on a pipeline's folder or a small model of its class."""
    source = pipeline or "a small random model"
    return _TEST.format(family=family, source=source, pipeline=pipeline, call=dict(call))


def write(found: Found, family: str, source: str, convention: Convention | None) -> str:
    """Return the source of a module that exports `ADAPTER`."""
    adapter = adapter_of(found, family, convention)
    names = "Stack, TableRows" if found.tables else "Stack"
    lines = [_HEAD.format(family=family, source=source, open=OPEN, names=names)]
    stacks = {stack.path for stack in found.stacks}
    lines += [
        f"# {path}: {said}" if path else f"# {said}"
        for path, notes in found.notes.items()
        if path not in stacks
        for said in notes
    ]
    lines += ["ADAPTER = Adapter("]
    if found.timestep is None:
        lines.append(f"    # {OPEN} no argument of the call has a noise level for each sample: name it as `timestep`")
    if convention is None:
        lines.append(f"    # {OPEN} whether the pipeline packs latents into tokens, by its `_pack_latents`: `packs`")
        lines.append(f"    # {OPEN} the pipeline's argument of classifier-free guidance: `guidance`")
    lines += [f"    {text}," for text in _given(adapter, Adapter, ("stacks",))]
    lines.append("    stacks=(")
    for stack in found.stacks:
        lines += [f"        # {said}" for said in found.notes.get(stack.path, ())]
        lines.append("        Stack(")
        lines += [f"            {text}," for text in _given(stack, Stack, ())]
        lines.append("        ),")
    return "\n".join([*lines, "    ),", ")", ""])


def _given(value: Any, kind: type, without: Sequence[str]) -> list[str]:
    """Return the fields that are not as they are by default, as keyword arguments."""
    return [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in fields(kind)
        if field.name not in without
        and (field.default_factory is not dict or getattr(value, field.name))
        and getattr(value, field.name) != field.default
    ]
