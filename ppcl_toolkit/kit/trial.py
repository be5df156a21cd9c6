"""`ppcl adapters check`: what an adapter allows, tried on a pipeline or on a small random model of its class."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ppcl_toolkit.adapter import Adapter, adapter_for, load_adapter
from ppcl_toolkit.artifacts.classes import stock_class
from ppcl_toolkit.artifacts.pipeline import load_pipeline, quiet
from ppcl_toolkit.artifacts.variant import save_variant, verify_variant
from ppcl_toolkit.checking.blame import fitting
from ppcl_toolkit.checking.dead import check_dead
from ppcl_toolkit.checking.dropped import check_dropped, intervals
from ppcl_toolkit.checking.forward import check_forward
from ppcl_toolkit.checking.in_place import called_in_place
from ppcl_toolkit.checking.steps import check_run
from ppcl_toolkit.checking.witness import Witness, difference
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.kit.building import small
from ppcl_toolkit.plan import FfnSwap, ModulationSwap, Plan, TextRun
from ppcl_toolkit.running.capture import answer
from ppcl_toolkit.running.conditioning import Layer, vectors
from ppcl_toolkit.running.fields import check_fields
from ppcl_toolkit.running.images import check_call, run_pipeline
from ppcl_toolkit.running.placement import HOST
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.surgery.assemble import reshape
from ppcl_toolkit.surgery.copies import sharing_copy
from ppcl_toolkit.surgery.narrow import modulation_layers

_PROMPT = "a red circle"
_ABSENT = "-"


class Trial(NamedTuple):
    """One thing that was tried."""

    name: str
    result: str
    """What was found: `-` where the adapter names nothing of the kind."""
    works: bool


def check_adapter(name: str, *, pipeline: str | None = None, call: Mapping[str, Any] | None = None) -> list[Trial]:
    """Try all that an adapter allows, for a test of one's own: as `trials`, and raise `PpclError` with what fails.

    `name` is that of a family, or `package.module:NAME`; `pipeline` is the folder of a small one, called with `call`.
    """
    found = list(trials(name, pipeline, call or {}))
    if bad := [f"{each.name}: {each.result}" for each in found if not each.works]:
        raise PpclError("; ".join(bad))
    return found


def trials(name: str, pipeline: str | None, call: Mapping[str, Any]) -> Iterator[Trial]:
    """Yield what the adapter `name` allows, on the pipeline of a folder or on a small random model of its class.

    A pipeline is run for three steps with the arguments `call`, and every kind of plan is saved and opened again in
    fresh processes: a small one is enough. Raises `PpclError` where there is nothing to try it on.
    """
    adapter = load_adapter(name)
    opened, given = None, dict[str, Any]()
    if pipeline is not None:
        opened = load_pipeline(pipeline, torch.float32, adapter=name if ":" in name else "auto")
        adapter_for(type(opened.transformer).__name__, name)
        check_call(opened, call)
        opened.transformer.requires_grad_(False).eval()
        transformer = opened.transformer
    else:
        transformer, given = small(stock_class(adapter))
    yield (fields := _tried("fields", adapter, lambda: check_fields(adapter, transformer)))
    if not fields.works:
        return
    if opened is not None:
        found: dict[str, Any] = {}
        yield (noise := _tried("noise", adapter, partial(_noise, opened, adapter, call, found)))
        if not noise.works:
            return
        given = found
    yield from _tried_on(opened, transformer, adapter, name, {**given, "return_dict": False})


def _tried_on(
    pipeline: Any, transformer: nn.Module, adapter: Adapter, name: str, call: dict[str, Any]
) -> Iterator[Trial]:
    runner = Runner(transformer, adapter)
    seen: list[Witness] = []
    yield (blocks := _tried("blocks", adapter, lambda: _one_by_one(runner, call, seen)))
    if not blocks.works:
        return
    joint = any(stack.joint_attention for stack in adapter.stacks)
    yield _tried("dead text", adapter, (lambda: check_dead(runner, seen[0])) if joint else None)
    family = name if ":" in name else adapter.family
    whole = Plan(family=family, depths=adapter.depths(transformer))
    for what, operations in _plans(adapter, whole.depths).items():
        yield _tried(
            what, adapter, partial(_made, runner, pipeline, whole, operations, seen[0]) if operations else None
        )


def _tried(name: str, adapter: Adapter, attempt: Callable[[], str | None] | None) -> Trial:
    if attempt is None:
        return Trial(name, _ABSENT, works=True)
    try:
        with fitting(adapter):
            return Trial(name, attempt() or "ok", works=True)
    except PpclError as error:
        return Trial(name, str(error), works=False)


def _noise(pipeline: Any, adapter: Adapter, call: Mapping[str, Any], found: dict[str, Any]) -> str:
    def run(prompt: str | None = None, **changed: Any) -> None:
        generators = [torch.Generator().manual_seed(0)]
        run_pipeline(pipeline, [prompt or _PROMPT], generators, {**call, **changed}, "latent")

    noising, own = check_run(pipeline, adapter, run)
    found.update(own)
    if noising.kind == "diffusion":
        return f"diffusion of {len(noising.signal)} levels, told their number"
    offset, scale = (f"{value:g}" for value in (noising.offset, abs(noising.scale)))
    level = "sigma" if scale == "1" else f"{scale} sigma"
    joined = f"{offset} {'-' if noising.scale < 0 else '+'} {level}" if noising.offset else level
    return f"a rectified flow, told {joined}"


def _layers(runner: Runner) -> list[Layer]:
    return [
        Layer(stack.path, index, path)
        for stack in runner.adapter.stacks
        for index, block in enumerate(runner.blocks(stack.path))
        for path in modulation_layers(block, stack)
    ]


def _one_by_one(runner: Runner, call: dict[str, Any], seen: list[Witness]) -> None:
    seen.append(check_forward(runner, call))


def _plans(adapter: Adapter, depths: dict[str, int]) -> dict[str, list[Any]]:
    """Return an example of every kind of plan; an empty one where the adapter allows none."""
    stacks = adapter.stacks
    swaps = [
        FfnSwap(stack=stack.path, block=0, streams=tuple(s for s in stack.streams if s in stack.ffn))
        for stack in stacks
        if stack.ffn
    ]
    runs = [TextRun(stack=s.path, reference=0, last=1) for s in stacks if s.joint_attention and depths[s.path] > 1]
    low = [ModulationSwap(stack=stack.path, rank=1) for stack in stacks if stack.modulation]
    return {"depth": list(intervals(depths))[:1], "FFNs": swaps, "text": runs, "modulation": low}


@torch.no_grad()
def _made(runner: Runner, pipeline: Any, whole: Plan, operations: list[Any], witness: Witness) -> str:
    """Make the student of a plan with the weights that it has before training, and prove it."""
    transformer, adapter, call = runner.transformer, runner.adapter, witness.batch
    plan = whole.with_operations(operations)
    if plan.intervals:
        check_dropped(runner, witness)
    if plan.modulation_swaps:
        vectors(runner, _layers(runner), call, prove=True)
    student = sharing_copy(transformer)
    reshape(student, adapter, plan, call)
    expected = called_in_place(transformer, adapter, plan, student, call, HOST)
    if wrong := difference(answer(student, call), expected, "velocity"):
        raise PpclError(f"the shorter model makes {wrong} than its blocks at their places in the whole one")
    left = sum(p.numel() for p in student.parameters()) / sum(p.numel() for p in transformer.parameters())
    told = f"ok, {100 * left:.1f} % of the parameters are left with {', '.join(map(str, operations))}"
    if pipeline is None:
        return told
    with tempfile.TemporaryDirectory() as place, quiet():
        folder = Path(place) / "variant"
        known = plan.family if ":" in plan.family else "auto"
        opens = save_variant(pipeline, student, plan, call, folder, adapter=known)
        tolerance = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
        verify_variant(folder, opens, call, expected, tolerance, adapter=known)
    return f"{told}; opens as {opens}"
