"""Open the pipeline that is to be compressed."""

import contextlib
import hashlib
import importlib.resources
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from ppcl_toolkit.adapter import Adapter, adapter_for, load_adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.variant import load_compressed

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
    """Hub id and revision, or path and fingerprint."""
    history: tuple[dict[str, Any], ...] = ()
    """Plans by which this teacher was made."""

    @property
    def transformer(self) -> nn.Module:
        """The model to compress."""
        transformer: nn.Module = self.pipeline.transformer
        return transformer

    def plan(self) -> Plan:
        """Return the plan that removes nothing."""
        depths = self.adapter.depths(self.transformer)
        return Plan(family=self.family, teacher=self.source, depths=depths, history=self.history)


def load_teacher(recipe: Recipe, device: torch.device) -> Teacher:
    """Open the recipe's teacher on `device`, with its adapter.

    Raises `PpclError` for a pipeline that cannot be opened, has no transformer, or does not fit the adapter.
    """
    section = recipe.teacher
    folder = resolve(section.path)
    pipeline = load_pipeline(folder, getattr(torch, section.dtype), section.revision).to(device)
    transformer = pipeline.transformer
    name = type(transformer).__name__
    adapter = adapter_for(name) if recipe.adapter == "auto" else load_adapter(recipe.adapter)
    if adapter.transformer != name:
        raise PpclError(f"adapter {adapter.family!r} is for {adapter.transformer}, the teacher has a {name}")
    if getattr(pipeline, "hf_quantizer", None) or getattr(transformer, "is_quantized", False):
        raise PpclError(f"{section.path}: a quantised teacher cannot be distilled; give the unquantised weights")
    transformer.requires_grad_(False).eval()
    history: tuple[dict[str, Any], ...] = ()
    if (Path(folder) / "plan.json").is_file():
        earlier = Plan.load(Path(folder) / "plan.json")
        if not earlier.is_depth_only:
            raise PpclError(f"{section.path}: its blocks are already narrow; give a depth-only variant as the teacher")
        history = (*earlier.history, earlier.model_dump(mode="json", exclude={"history"}))
    family = adapter.family if recipe.adapter == "auto" else recipe.adapter
    return Teacher(pipeline, adapter, family, _identity(section.path, folder, section.revision), history)


def load_pipeline(path: str, dtype: torch.dtype | None = None, revision: str | None = None) -> Any:
    """Open a pipeline: `shapes` (the embedded teacher), a folder, a variant of this toolkit, or a hub id.

    Without a `dtype` all parts are fp32, or bf16 where there is a GPU.
    """
    path = resolve(path)
    settings: dict[str, Any] = {"dtype": dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)}
    pipeline: Any
    with quiet():
        if (Path(path) / "plan.json").is_file():
            pipeline = load_compressed(Path(path), **settings)
        else:
            pipeline = _from_pretrained(path, revision, settings)
    if getattr(pipeline, "transformer", None) is None:
        raise PpclError(f"{path} is a {type(pipeline).__name__} without a transformer: nothing here to compress")
    if missing := [name for name, value in pipeline.transformer.named_parameters() if value.is_meta]:
        raise PpclError(f"{path}: the transformer's files lack {len(missing)} of its weights: {', '.join(missing[:3])}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def resolve(path: str) -> str:
    """Return the folder of the embedded teacher for `shapes`, anything else as it is."""
    return str(importlib.resources.files("ppcl_toolkit.shapes") / "teacher") if path == "shapes" else path


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
    call: dict[str, Any] = json.loads(stored.read_text()) if stored.is_file() else {}
    return call


def _from_pretrained(path: str, revision: str | None, settings: dict[str, Any]) -> Any:
    if Path(path).exists() and not (Path(path) / "model_index.json").is_file():
        raise PpclError(f"{path} is no diffusers pipeline: it has no model_index.json")
    try:
        return DiffusionPipeline.from_pretrained(path, revision=revision, **settings)
    except Exception as error:  # diffusers raises whatever its parts raise
        raise PpclError(f"{path} cannot be opened as a pipeline: {_first_line(error)}{_advice(path)}") from error


def _advice(path: str) -> str:
    if Path(path).exists():
        return " (a damaged or truncated file? copy the folder again)"
    return " (a gated model? accept its licence on the hub and run `hf auth login`; offline? give a local folder)"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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


def _identity(path: str, folder: str, revision: str | None) -> str:
    """Name the weights without reading tens of gigabytes: sizes, and the headers that list every tensor."""
    if not Path(folder).is_dir():
        return f"{path}@{revision or 'main'}"
    digest = hashlib.sha256()
    for file in sorted((Path(folder) / "transformer").rglob("*")):
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(1 << 20))
    return f"{path}#{digest.hexdigest()[:16]}"
