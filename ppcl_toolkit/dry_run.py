"""A dry run: what a recipe would remove, need and take, from the teacher's config alone, without its weights.

Where a recipe lists its intervals the figures are exact. Where the run is to find them, only the sizes asked for are
known, and one student per removed block is assumed, which is the most there can be.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import AutoModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ppcl_toolkit.adapter import Adapter, adapter_for, available_adapters, load_adapter
from ppcl_toolkit.artifacts.pipeline import default_call, resolve
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Operation, Plan, trained_forms
from ppcl_toolkit.recipe import Recipe, Target
from ppcl_toolkit.running.capture import run_block
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.stages.select import Measured, Sizes, choose, parse_size
from ppcl_toolkit.surgery.assemble import Calls, example_calls, reshape
from ppcl_toolkit.surgery.graph import meta_copy

TRAINED_BYTES = 16
"""Per parameter in training: fp32 weight and gradient, and AdamW's two moments."""
DEVICES = 8
"""Of a node: what several devices need is told for so many (paper: 8)."""
STEPS = 28
"""Denoising steps per picture where the recipe names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A transformer: what it weighs and what one denoising step of one picture costs."""

    name: str
    params: int
    bytes: int
    teraflops: float
    """Of one forward call with one picture."""
    blocks: dict[str, int] = field(default_factory=dict)
    """Blocks left in each stack; empty where the run decides."""
    operations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a recipe asks for. Memory is in bytes per device, time in hours."""

    teacher: Size
    variants: tuple[Size, ...]
    memory: dict[str, dict[str, int]]
    """By schedule and stage."""
    disk: int
    """Bytes of recorded samples."""
    hours: dict[str, float]
    basis: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def dry_run(recipe: Recipe, tflops: float = 400.0) -> DryRun:
    """Work out what `recipe` asks for on devices that sustain `tflops` TFLOP/s each.

    Raises `PpclError` where the teacher's config cannot be had, or a target is out of reach of the intervals given.
    """
    model = _Model.of(recipe)
    plans = _plans(recipe, model)
    teacher = model.size("teacher", model.plan)
    variants = tuple(
        model.size(target.name, plans[target.name]) if plans else _wanted(target, teacher, model)
        for target in recipe.targets
    )
    smallest = min(variants, key=lambda variant: variant.params)
    students = _students(model, plans, teacher, smallest)
    return DryRun(
        teacher=teacher,
        variants=variants,
        memory=_memory(recipe, model, teacher, smallest, students),
        disk=recipe.samples.count * _forwards(recipe, model) * model.sample_bytes,
        hours={
            stage: work / tflops / 3600 for stage, work in _work(recipe, model, students, (teacher, *variants)).items()
        },
        basis=_basis(recipe, model, plans, tflops),
    )


@dataclass(frozen=True, slots=True)
class _Model:
    """A teacher without weights, and one call of it."""

    transformer: nn.Module
    adapter: Adapter
    family: str
    example: dict[str, Any]
    dtype: torch.dtype

    @classmethod
    def of(cls, recipe: Recipe) -> "_Model":
        family, adapter, config = _config(recipe)
        if adapter.example is None:
            raise PpclError(f"adapter {family!r} has no `example`: a dry run needs the shapes of one call")
        with torch.device("meta"):
            transformer: Any = getattr(diffusers, adapter.transformer).from_config(dict(config))
        nn.Module.to(transformer, getattr(torch, recipe.teacher.dtype)).requires_grad_(False).eval()
        call = _call(recipe, known=recipe.teacher.path in adapter.models)
        shapes = adapter.example(transformer.config, call, int(recipe.samples.edits is not None))
        example = {name: _empty(shape, transformer.dtype) for name, shape in shapes.items()} | {"return_dict": False}
        return cls(transformer, adapter, family, example, transformer.dtype)

    @property
    def plan(self) -> Plan:
        return Plan(family=self.family, depths=self.adapter.depths(self.transformer))

    @property
    def sample_bytes(self) -> int:
        """Of the latents and the conditioning of one recorded call."""
        return sum(value.nbytes for value in self.example.values() if isinstance(value, Tensor))

    def size(self, name: str, plan: Plan) -> Size:
        student = meta_copy(self.transformer)
        reshape(student, self.adapter, plan, self.example)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            student(**self.example)
        params = _count(student)
        return Size(
            name=name,
            params=params,
            bytes=params * self.dtype.itemsize,
            teraflops=counter.get_total_flops() / 1e12,
            blocks=self.adapter.depths(student),
            operations=tuple(str(operation) for operation in plan.operations),
        )

    def blocks(self) -> list[nn.Module]:
        return [block for stack in self.adapter.stacks for block in stack.blocks(self.transformer)]

    def calls(self) -> Calls:
        with torch.no_grad():
            return example_calls(self.transformer, self.adapter, self.example)

    def activations(self) -> int:
        """Bytes that the largest block keeps for its backward, for one picture."""
        most = 0
        for path, (arguments, streams) in self.calls().items():
            stack = self.adapter.stack(path)
            block = meta_copy(stack.blocks(self.transformer)[0]).requires_grad_(True)
            own = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
            kept: dict[int, int] = {}

            def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
                return tensor

            with saved_tensors_hooks(keep, lambda tensor: tensor):
                output = run_block(block, stack, arguments, streams)
            most = max(most, sum(size for key, size in kept.items() if key not in own))
            del output
        return most


@dataclass(frozen=True, slots=True)
class _Students:
    """What trains in depth and width: parameters of all, of the largest, and their share of the teacher's blocks."""

    params: int
    largest: int
    share: float
    candidates: int
    """What `select` measures."""


def _config(recipe: Recipe) -> tuple[str, Adapter, Mapping[str, Any]]:
    path = resolve(recipe.teacher.path)
    known = [adapter for adapter in map(load_adapter, available_adapters()) if path in adapter.models]
    config = (
        {**known[0].models[path], "_class_name": known[0].transformer}
        if known
        else _read_config(path, "transformer", recipe.teacher.revision)
    )
    adapter = adapter_for(str(config.get("_class_name")), recipe.adapter)
    return adapter.family if recipe.adapter == "auto" else recipe.adapter, adapter, config


def _read_config(path: str, part: str, revision: str | None) -> dict[str, Any]:
    try:
        config: dict[str, Any] = AutoModel.load_config(path, subfolder=part, revision=revision)
    except Exception as error:  # the hub's client raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PpclError(f"{path}: its {part}/config.json cannot be read: {reason}") from error
    return config


def _call(recipe: Recipe, *, known: bool) -> dict[str, Any]:
    """Arguments of the pipeline, with a size at which a latent is 8x8 pixels, as it is in every known model."""
    call = {**default_call(recipe.teacher.path), **recipe.teacher.call}
    if not known:
        config = _read_config(resolve(recipe.teacher.path), "vae", recipe.teacher.revision)
        pixels = 2 ** (len(config.get("block_out_channels", [0] * 4)) - 1)
        call |= {side: call[side] * 8 // pixels for side in ("height", "width") if side in call}
    return call


def _empty(shape: Any, dtype: torch.dtype) -> Any:
    return torch.empty(shape, device="meta", dtype=dtype) if isinstance(shape, tuple) else shape


def _plans(recipe: Recipe, model: _Model) -> dict[str, Plan]:
    """Return the plan of every target where the recipe gives the operations; they are taken in the order given."""
    given: list[Operation] = list(recipe.intervals.given) if recipe.intervals.strategy == "given" else []
    if not given:
        return {}
    given += recipe.width.given
    sizes = Sizes(Runner(model.transformer, model.adapter), model.calls())
    measured = [Measured(operation=each, error=float(rank), saves=1) for rank, each in enumerate(given)]
    return choose(model.plan, measured, recipe.targets, sizes, recipe.width).plans


def _wanted(target: Target, teacher: Size, model: _Model) -> Size:
    """A size that the run is to reach: FLOPs shrink as the parameters of the blocks do."""
    params = parse_size(target.params, teacher.params)
    blocks = sum(_count(block) for block in model.blocks())
    share = 1 - (teacher.params - params) / blocks
    return Size(
        name=target.name,
        params=params,
        bytes=params * model.dtype.itemsize,
        teraflops=teacher.teraflops * share,
    )


def _students(model: _Model, plans: Mapping[str, Plan], teacher: Size, smallest: Size) -> _Students:
    blocks = model.blocks()
    total = sum(_count(block) for block in blocks)
    largest = max(_count(block) for block in blocks)
    removed = teacher.params - smallest.params
    if plans:
        stacks = {stack.path: stack.blocks(model.transformer) for stack in model.adapter.stacks}
        trained = sum(_count(stacks[form.stack][form.first]) for form in trained_forms(plans.values()))
        candidates = max(len(plan.operations) for plan in plans.values())
    else:
        trained = min(removed, total - removed)
        candidates = len(blocks)  # at most half as many intervals, and about as many FFNs and text streams
    return _Students(trained, largest, trained / total, candidates)


def _memory(
    recipe: Recipe, model: _Model, teacher: Size, smallest: Size, students: _Students
) -> dict[str, dict[str, int]]:
    block = students.largest * model.dtype.itemsize
    activations = model.activations()
    depth = activations * recipe.depth.batch
    streams = max(
        sum(value.nbytes for value in given.of(("image", "text")).values()) for _, given in model.calls().values()
    )
    each = streams if recipe.finetune.gradient_checkpointing else activations
    tuning = (each * len(model.blocks()) + activations) * recipe.finetune.batch
    tuned = TRAINED_BYTES * smallest.params
    split = max(students.params // DEVICES, students.largest) if recipe.depth.split == "segments" else students.params
    spread = tuned // DEVICES if recipe.finetune.shard else tuned
    return {
        "resident": {
            "depth, 1 device": teacher.bytes + TRAINED_BYTES * students.params + depth,
            f"depth, {DEVICES} devices": teacher.bytes + TRAINED_BYTES * split + depth,
            "finetune, 1 device": teacher.bytes + tuned + tuning,
            f"finetune, {DEVICES} devices": teacher.bytes + spread + tuning,
        },
        "streamed": {
            "depth, 1 device": block + TRAINED_BYTES * students.largest + depth,
            "finetune, 1 device": block + tuned + tuning,
            f"finetune, {DEVICES} devices": block + spread + tuning,
        },
    }


def _forwards(recipe: Recipe, model: _Model) -> int:
    """Forwards of a picture per denoising step: classifier-free guidance makes two, in one call or in two."""
    return 2 if float(recipe.teacher.call.get(model.adapter.guidance, 1) or 1) > 1 else 1


def _work(recipe: Recipe, model: _Model, students: _Students, sizes: tuple[Size, ...]) -> dict[str, float]:
    """TFLOP of every stage; `sizes` begins with the teacher."""

    def samples(section: Any, batches: int) -> int:
        return batches * int(section.batch)

    forward = sizes[0].teraflops
    image = recipe.teacher.call.get("num_inference_steps", STEPS) * _forwards(recipe, model)
    segments = forward + 3 * students.share * forward
    again = 4 if recipe.finetune.gradient_checkpointing else 3
    width = any(target.width for target in recipe.targets)
    return {
        "samples": recipe.samples.count * image * forward,
        "probe": samples(recipe.probe, recipe.probe.batches + recipe.probe.steps) * forward,
        "intervals": samples(recipe.intervals, recipe.intervals.batches) * forward,
        "select": samples(recipe.select, recipe.select.batches) * (2 + students.candidates) * forward,
        "depth": samples(recipe.depth, recipe.depth.steps) * segments,
        "width": samples(recipe.width, recipe.width.steps) * segments if width else 0.0,
        "finetune": samples(recipe.finetune, recipe.finetune.steps)
        * sum(forward + again * variant.teraflops for variant in sizes[1:]),
        "evaluate": recipe.evaluate.count * len(recipe.evaluate.seeds) * image * sum(size.teraflops for size in sizes),
    }


def _basis(recipe: Recipe, model: _Model, plans: Mapping[str, Plan], tflops: float) -> tuple[str, ...]:
    tokens = {name: tuple(v.shape) for name, v in model.example.items() if isinstance(v, Tensor) and v.ndim > 1}
    found = "the recipe's operations, in its order" if plans else "sizes only: the run finds the intervals itself"
    return (
        f"plans: {found}",
        f"one call: {', '.join(f'{name} {list(shape)}' for name, shape in tokens.items())}",
        f"memory: {TRAINED_BYTES} bytes per trained parameter, the teacher in {recipe.teacher.dtype}, what one block "
        "keeps for its backward; text encoders, the VAE and fragmentation are not in it",
        f"time: counted FLOPs at {tflops:g} TFLOP/s a device, an assumption (--tflops); every device takes whole steps",
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
