"""A teacher without weights: its blocks in every form, one call of it, and what they measure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from safetensors import safe_open
from torch import Tensor, nn

from ppcl_toolkit.adapter import Adapter, adapter_for, installed_adapters, load_adapter
from ppcl_toolkit.artifacts.classes import stock_class
from ppcl_toolkit.artifacts.pipeline import default_call, resolve
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.records import check_depths
from ppcl_toolkit.running.numbers import Numbers
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.surgery.assemble import Calls, reshape
from ppcl_toolkit.surgery.copies import meta_copy
from ppcl_toolkit.surgery.costs import Costs

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""As safetensors calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A transformer: what it weighs and what one denoising step of one picture costs."""

    name: str
    params: int
    bytes: int
    teraflops: float
    """Of one forward call with one picture."""
    blocks: dict[str, int] = field(default_factory=dict)
    """Blocks left in each stack."""
    operations: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Model:
    """A teacher without weights, and one call of it with one picture."""

    transformer: nn.Module
    adapter: Adapter
    family: str
    example: dict[str, Any]
    dtype: torch.dtype
    exported: torch.dtype
    """Of variants."""
    forwards: int
    """Of a picture per denoising step: classifier-free guidance makes two, in one call or in two."""
    in_place: bool
    """Weights are stored in the dtype that the recipe asks for: they are read where they lie, from pages of files."""
    others: tuple[int, ...]
    """Bytes of each of the pipeline's other parts: text encoders and autoencoder."""

    @classmethod
    def of(cls, recipe: Recipe) -> "Model":
        """Read a recipe's teacher; `PpclError` where its config cannot be had or its adapter knows no call."""
        family, adapter, config = _config(recipe)
        if adapter.example is None:
            raise PpclError(f"adapter {family!r} has no `example`: a dry run needs the shapes of one call")
        with torch.device("meta"):
            transformer: Any = stock_class(adapter).from_config(dict(config))
        nn.Module.to(transformer, getattr(torch, recipe.teacher.dtype)).requires_grad_(False).eval()
        call = _call(recipe, known=recipe.teacher.path in adapter.models)
        shapes = adapter.example(transformer.config, call, int(recipe.samples.edits is not None))
        example = {name: _empty(shape, transformer.dtype) for name, shape in shapes.items()} | {"return_dict": False}
        # A distilled model is told `guidance_scale`, and not run twice for it.
        told = adapter.guidance == "guidance_scale" and transformer.config.get("guidance_embeds")
        forwards = 2 if (adapter.scale(recipe.teacher.call) or 1) > 1 and not told else 1
        folder = Path(resolve(recipe.teacher.path))
        in_place = (_dtype(folder / "transformer") or adapter.dtype) == recipe.teacher.dtype
        others = _parts(folder) or adapter.others_of(recipe.teacher.path)
        return cls(
            transformer=transformer,
            adapter=adapter,
            family=family,
            example=example,
            dtype=transformer.dtype,
            exported=getattr(torch, recipe.export.dtype),
            forwards=forwards,
            in_place=in_place,
            others=tuple(params * transformer.dtype.itemsize for params in others),
        )

    @property
    def plan(self) -> Plan:
        """The plan that removes nothing."""
        return Plan(family=self.family, depths=self.adapter.depths(self.transformer))

    @property
    def runner(self) -> Runner:
        """This teacher as the stages take it."""
        return Runner(self.transformer, self.adapter)

    @property
    def calls(self) -> Calls:
        """How the first block of each stack is called."""
        return self.costs.calls

    @cached_property
    def costs(self) -> Costs:
        """Costs of students."""
        return Costs(self.transformer, self.adapter, self.example, self.exported)

    @property
    def sample_bytes(self) -> int:
        """Of the latents and the conditioning of one recorded call."""
        return sum(value.nbytes for value in self.example.values() if isinstance(value, Tensor))

    def student(self, plan: Plan) -> nn.Module:
        """Return the student of `plan`."""
        student = meta_copy(self.transformer)
        reshape(student, self.adapter, plan, self.example)
        return student

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of all stacks."""
        return [block for stack in self.adapter.stacks for block in stack.blocks(self.transformer)]


def count(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def is_known(recipe: Recipe) -> bool:
    """Tell whether the teacher is a published model that an adapter lists, with the shapes of its call."""
    return any(adapter.example for adapter in _listed(recipe.teacher.path, recipe.adapter))


def _listed(path: str, wanted: str) -> list[Adapter]:
    """Return the adapters that list a published model, that of the recipe before the installed ones."""
    own = [] if wanted == "auto" else [load_adapter(wanted)]
    return [adapter for adapter in (*own, *installed_adapters().values()) if path in adapter.models]


def _config(recipe: Recipe) -> tuple[str, Adapter, Mapping[str, Any]]:
    path = resolve(recipe.teacher.path)
    known = _listed(path, recipe.adapter)
    config = (
        {**known[0].models[path], "_class_name": known[0].class_name}
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
    check_depths(config, f"{path}/{part}/config.json")
    return config


def _dtype(part: Path) -> str:
    """Return the dtype of the weights in a folder; nothing where there are none."""
    for path in part.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            first = file.get_slice(next(iter(file.keys()))).get_dtype()
            return _DTYPES.get(first, first)
    return ""


def _parts(folder: Path) -> list[int]:
    """Count the parameters of each part of a pipeline's folder but the transformer, by the size of its files."""
    return [
        sum(file.stat().st_size for file in part.glob("*.safetensors")) // getattr(torch, dtype).itemsize
        for part in sorted(folder.iterdir() if folder.is_dir() else ())
        if part.name != "transformer" and (dtype := _dtype(part)) in _DTYPES.values()
    ]


def _call(recipe: Recipe, *, known: bool) -> dict[str, Any]:
    """Arguments of the pipeline, with a size at which a latent is 8x8 pixels, as it is in every known model."""
    call = {**default_call(recipe.teacher.path), **recipe.teacher.call}
    if not known:
        config = _read_config(resolve(recipe.teacher.path), "vae", recipe.teacher.revision)
        pixels = 2 ** (len(config.get("block_out_channels", [0] * 4)) - 1)
        call |= {side: call[side] * 8 // pixels for side in ("height", "width") if side in call}
    return call


def _empty(shape: Any, dtype: torch.dtype) -> Any:
    if isinstance(shape, Tensor):
        return Numbers(shape)
    return torch.empty(shape, device="meta", dtype=dtype) if isinstance(shape, tuple) else shape
