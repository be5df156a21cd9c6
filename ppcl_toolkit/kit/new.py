"""`ppcl adapters new`: an adapter for a class of diffusers, or for the pipeline in a folder, as a commented file."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.artifacts.classes import stock_class
from ppcl_toolkit.artifacts.pipeline import load_pipeline
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.kit.building import small
from ppcl_toolkit.kit.finding import OPEN, Found, find
from ppcl_toolkit.kit.watching import first_call
from ppcl_toolkit.kit.writing import Convention, write
from ppcl_toolkit.running.images import check_call, run_pipeline

_PROMPTS = ("a red circle", "a blue square beside two green ones")


def new(source: str, call: Mapping[str, Any]) -> tuple[str, str]:
    """Return the family's name and the text of an adapter for a class of diffusers, or a folder with a pipeline.

    A pipeline is run for one step of two prompts with the arguments `call`. Raises `PpclError` where neither is found,
    or the transformer is not one that can be described.
    """
    if Path(source).is_dir():
        pipeline = load_pipeline(source, torch.float32)
        found, convention = of_pipeline(pipeline, call)
    else:
        kind = stock_class(Adapter(family=source, transformer=source, stacks=()))
        transformer, given = small(kind)
        found, convention = find(transformer, given), None
        found.note("", _unseen(transformer, given))
    if not found.stacks:
        raise PpclError(f"{source}: no stack of blocks was found: " + "; ".join(_told(found)))
    family = _snake(found.transformer)
    return family, write(found, family, source, convention)


def of_pipeline(pipeline: Any, call: Mapping[str, Any]) -> tuple[Found, Convention]:
    """Describe the transformer of a pipeline by its own first call, and how the pipeline makes it."""
    check_call(pipeline, call)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(_PROMPTS))]
    with first_call(pipeline.transformer) as given:
        run_pipeline(pipeline, _PROMPTS, generators, {**call, "num_inference_steps": 1}, "latent")
    found = find(pipeline.transformer, given)
    packing = getattr(type(pipeline), "_pack_latents", None)
    packs = packing is not None and len(inspect.signature(packing).parameters) == 5
    taken = inspect.signature(type(pipeline).__call__).parameters
    guidance = "true_cfg_scale" if "true_cfg_scale" in taken else "guidance_scale"
    return found, Convention(packs=packs, guidance=guidance)


def _unseen(transformer: nn.Module, given: Mapping[str, Any]) -> str:
    """Say what a call that no pipeline made leaves open."""
    taken = inspect.signature(type(transformer).forward).parameters
    others = [name for name in list(taken)[1:] if name not in given and name != "return_dict"]
    return f"{OPEN} `shared`: what the pipeline passes without a batch dimension; not passed here: {', '.join(others)}"


def _told(found: Found) -> list[str]:
    return [f"{path}: {said}" for path, notes in found.notes.items() for said in notes] or ["it has no list of blocks"]


def _snake(name: str) -> str:
    """Return a family's name: FluxTransformer2DModel is flux."""
    short = re.sub(r"(Transformer)?([23]D)?(Model)?$", "", name) or name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", short).lower()
