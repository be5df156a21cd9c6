"""Open the pipeline that is to be compressed."""

import contextlib
import importlib.resources
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from ppcl_toolkit import processes
from ppcl_toolkit.adapter import Adapter, adapter_for, adapter_of, load_adapter
from ppcl_toolkit.artifacts.classes import check_source, pipeline_class
from ppcl_toolkit.artifacts.identity import identity
from ppcl_toolkit.artifacts.variant import first_line, load_compressed
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.records import check_configs, read_record
from ppcl_toolkit.running import images
from ppcl_toolkit.running.fields import check_fields
from ppcl_toolkit.values import check_call

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_QUANTISED = "a quantised teacher cannot be distilled; give the unquantised weights"
_ADAPTED = (
    "a teacher with LoRA adapters beside its weights cannot be distilled; fuse them (pipeline.fuse_lora(), then "
    "pipeline.unload_lora_weights()), save the pipeline and give that folder"
)


class _Config(BaseModel):
    """What matters here of a transformer's config."""

    quantization_config: dict[str, Any] | None = None


CALL = "call.json"
"""File of a variant's folder: the arguments of the pipeline that it was compressed for."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A loaded pipeline, the adapter that fits its transformer, and where it came from."""

    pipeline: Any
    adapter: Adapter
    family: str
    """Name by which `load_adapter` finds the adapter again."""
    source: str
    """What `identity` says of it."""
    earlier: Plan | None = None
    """By which this teacher itself was made, where it is a variant."""
    folder: str = ""
    """Where it lies."""

    @property
    def transformer(self) -> nn.Module:
        """The model to compress."""
        transformer: nn.Module = self.pipeline.transformer
        return transformer

    def plan(self) -> Plan:
        """Return the plan that removes nothing."""
        depths = self.adapter.depths(self.transformer)
        return Plan(family=self.family, teacher=self.source, depths=depths)

    def whole(self, plan: Plan) -> Plan:
        """Return what `plan` and all that was done before it come to, in the first teacher's block numbers."""
        return self.earlier.compose(plan) if self.earlier else plan


def load_teacher(recipe: Recipe, *, verify: bool = True, notes: Path | None = None) -> Teacher:
    """Open the recipe's teacher on the host, with its adapter.

    `verify` is for one that is a variant; `notes` is the file of what was hashed of a folder, for the next time.

    Raises `PpclError` for a pipeline that cannot be opened, has no transformer, does not fit the adapter, whichever
    field of it is wrong, does not take the recipe's call, or whose weights are quantised or not fused with their LoRA
    adapters.
    """
    section = recipe.teacher
    folder = located(section.path, section.revision)
    _check_files(section.path, Path(folder) / "transformer")
    pipeline = load_pipeline(folder, getattr(torch, section.dtype), adapter=recipe.adapter, verify=verify)
    transformer = pipeline.transformer
    adapter = adapter_for(type(transformer).__name__, recipe.adapter)
    earlier = Plan.load(Path(folder) / "plan.json") if (Path(folder) / "plan.json").is_file() else None
    check_fields(adapter, transformer, narrow=earlier is not None and not earlier.is_depth_only)
    _check_weights(section.path, transformer)
    images.check_call(pipeline, section.call)
    transformer.requires_grad_(False).eval()
    if earlier:
        # Known now rather than when the first variant is written.
        adapter_of(earlier.family, recipe.adapter)
    if earlier and not earlier.is_depth_only:
        # Blocks are narrowed once: what is left to this teacher is depth, and modulation that is whole.
        low = {swap.stack for swap in earlier.modulation_swaps}
        stacks = tuple(
            replace(s, ffn={}, joint_attention=None, modulation=() if s.path in low else s.modulation)
            for s in adapter.stacks
        )
        adapter = replace(adapter, stacks=stacks)
    family = adapter.family if recipe.adapter == "auto" else recipe.adapter
    source = identity(section.path, folder, notes) if processes.is_main() else ""
    return Teacher(pipeline, adapter, family, processes.agreed(source), earlier, folder)


def load_pipeline(
    path: str,
    dtype: torch.dtype | None = None,
    *,
    adapter: str = "auto",
    verify: bool = True,
) -> Any:
    """Open a pipeline: `shapes` (the embedded teacher), a folder, a variant of this toolkit, or a hub id.

    Without a `dtype` all parts are fp32, or bf16 where there is a GPU. `adapter` is that of a recipe: what a variant
    itself names must be installed. `verify` is that of `load_compressed`.
    """
    path = located(path)
    settings: dict[str, Any] = {"dtype": dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)}
    pipeline: Any
    known = None if adapter == "auto" else load_adapter(adapter)
    with quiet():
        if (Path(path) / "plan.json").is_file():
            pipeline = load_compressed(Path(path), adapter=known, verify=verify, **settings)
        else:
            pipeline = _from_pretrained(path, settings, known)
    if getattr(pipeline, "transformer", None) is None:
        raise PpclError(f"{path} is a {type(pipeline).__name__} without a transformer: nothing here to compress")
    if getattr(pipeline, "transformer_2", None) is not None:
        raise PpclError(
            f"{path} is a {type(pipeline).__name__} with two transformers, each for its own levels of noise: one alone "
            "would learn at levels that it never sees"
        )
    if missing := [name for name, value in pipeline.transformer.named_parameters() if value.is_meta]:
        raise PpclError(f"{path}: the transformer's files lack {len(missing)} of its weights: {', '.join(missing[:3])}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def resolve(path: str) -> str:
    """Return the folder of the embedded teacher for `shapes`, anything else as it is."""
    return str(importlib.resources.files("ppcl_toolkit.shapes") / "teacher") if path == "shapes" else path


def located(path: str, revision: str | None = None) -> str:
    """Return the folder of a pipeline; of a hub id the snapshot of one commit, which is fetched where it is missing.

    Pickled weights are never fetched. Raises `PpclError` for an id that the hub, or its local cache, does not have.
    """
    path = resolve(path)
    if Path(path).exists():
        return path
    try:
        with quiet():
            return str(DiffusionPipeline.download(path, revision=revision, use_safetensors=True))
    except Exception as error:  # the hub's client raises many kinds
        raise PpclError(f"{path} cannot be opened as a pipeline: {first_line(error)}{_advice(path)}") from error


def default_call(path: str) -> dict[str, Any]:
    """Return the arguments that a pipeline of this package was made for; none for others."""
    if path == "shapes":
        from ppcl_toolkit.shapes import scenes, teacher

        return {
            "height": scenes.SIZE,
            "width": scenes.SIZE,
            "num_inference_steps": teacher.STEPS,
            "guidance_scale": teacher.GUIDANCE,
            "max_sequence_length": teacher.TEXT_TOKENS,
        }
    stored = Path(path) / CALL
    if not stored.is_file():
        return {}
    call: dict[str, Any] = read_record(stored, dict[str, Any])
    try:
        check_call(call)
    except ValueError as error:
        raise PpclError(f"{stored}: {error}") from error
    return call


def _check_files(path: str, folder: Path) -> None:
    """Refuse weights of which loading would make something else, or nothing at all."""
    stored = folder / "config.json"
    config = read_record(stored, _Config) if stored.is_file() else _Config()
    if method := (config.quantization_config or {}).get("quant_method"):
        raise PpclError(f"{path}: {_QUANTISED} (its transformer's config says {method})")
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, framework="pt") as opened:
            if name := next((name for name in opened.keys() if ".lora_" in name), None):  # noqa: SIM118 - not a dict
                raise PpclError(f"{path}: {_ADAPTED} ({file.name} has {name})")


def _check_weights(path: str, transformer: nn.Module) -> None:
    if name := next((name for name, _ in transformer.named_parameters() if ".lora_" in name), None):
        raise PpclError(f"{path}: {_ADAPTED} (the transformer has {name})")
    if getattr(transformer, "is_quantized", False):
        raise PpclError(f"{path}: {_QUANTISED}")
    for name, parameter in transformer.named_parameters():
        kind = type(parameter.data)
        if kind is not torch.Tensor or parameter.dtype not in _DTYPES:
            raise PpclError(f"{path}: {_QUANTISED} ({name} is a {kind.__name__} of {parameter.dtype})")


def _from_pretrained(path: str, settings: dict[str, Any], adapter: Adapter | None) -> Any:
    index, kind = Path(path) / "model_index.json", pipeline_class(adapter)
    if not index.is_file():
        raise PpclError(f"{path} is no diffusers pipeline: it has no model_index.json")
    check_configs(Path(path))
    check_source(index, read_record(index, dict[str, Any]).get("transformer"), adapter)
    try:
        return kind.from_pretrained(path, use_safetensors=True, **settings)
    except Exception as error:  # diffusers raises whatever its parts raise
        raise PpclError(f"{path} cannot be opened as a pipeline: {first_line(error)}{_advice(path)}") from error


def _advice(path: str) -> str:
    if Path(path).exists():
        return " (a damaged or truncated file? copy the folder again)"
    return " (a gated model? accept its licence on the hub and run `hf auth login`; offline? give a local folder)"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the notices and bars of diffusers and transformers: this package reports by itself."""
    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()
