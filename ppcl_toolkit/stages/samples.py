"""Stage `samples`: the teacher's own pipeline, recorded.

A hook on the transformer records the arguments of a real denoising run, and the run ends with the clean latents; for
image-caption pairs the run is cut short at its first call, and the latents come from the pipeline's VAE. So a new
family needs no data code.

    samples: {prompts: prompts.txt, count: 160, batch: 4}
"""

import contextlib
import difflib
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.mechanics.capture import map_tensors
from ppcl_toolkit.mechanics.images import run_pipeline
from ppcl_toolkit.mechanics.noise import Sample
from ppcl_toolkit.mechanics.storage import Desk, load_tree, save_tree
from ppcl_toolkit.pipeline import Teacher
from ppcl_toolkit.recipe import Recipe, Samples


class _Recorded(Exception):
    """The first call is recorded, and the rest of the run is not wanted."""


def record_samples(teacher: Teacher, recipe: Recipe, desk: Desk) -> None:
    """Write one file per call of the pipeline; files that are there already are kept."""
    pipeline, adapter = teacher.pipeline, teacher.adapter
    section, call, seed = recipe.samples, recipe.teacher.call, recipe.seed
    known = inspect.signature(type(pipeline).__call__).parameters
    if unknown := sorted(call.keys() - known.keys()):
        raise PpclError(
            f"teacher.call: {type(pipeline).__name__} takes no {', '.join(unknown)}; {_nearest(unknown, known)}"
        )
    items = _pairs(Path(section.images)) if section.images else [(p, None) for p in prompts(section, seed)]
    items = items[: section.count]
    for start in range(0, len(items), section.batch):
        path = desk.folder / f"{start:06d}.safetensors"
        if not path.exists():
            chunk = items[start : start + section.batch]
            if chunk[0][1] is None:
                samples = _denoised(pipeline, adapter, [prompt for prompt, _ in chunk], call, seed + start)
            else:
                samples = [_encoded(pipeline, adapter, prompt, image, call) for prompt, image in chunk]
            save_tree(path, [{name: getattr(s, name) for name in Sample.__slots__} for s in samples])
        desk.progress(min(start + section.batch, len(items)), len(items))


def load_samples(folder: Path) -> list[Sample]:
    """Read what `record_samples` wrote."""
    return [Sample(**sample) for path in sorted(folder.glob("*.safetensors")) for sample in load_tree(path)]


def prompts(section: Samples, seed: int) -> list[str]:
    """Return the prompts of a section: lines of a file, or captions of the embedded world."""
    if section.prompts == "shapes":
        from ppcl_toolkit.shapes import scenes

        rng = np.random.default_rng(seed)
        return [scenes.sample(rng)[0] for _ in range(section.count)]
    try:
        lines = Path(section.prompts).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise PpclError(f"samples.prompts: cannot read {section.prompts!r}: {reason}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise PpclError(f"samples.prompts: {section.prompts!r} has no prompt")
    return found


def _denoised(pipeline: Any, adapter: Adapter, texts: list[str], call: dict[str, Any], seed: int) -> list[Sample]:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
    with _recording(pipeline.transformer, adapter) as calls:
        latents = run_pipeline(pipeline, texts, generators, call, "latent")
    return [sample for arguments in calls for sample in _split(adapter, arguments, latents.cpu(), len(texts))]


def _encoded(pipeline: Any, adapter: Adapter, text: str, image: Path, call: dict[str, Any]) -> Sample:
    height, width = call.get("height"), call.get("width")
    try:
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise PpclError(f"samples.images: {image} is no image that can be read") from error
    if height and width:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    call = {**call, "height": picture.height, "width": picture.width}
    pixels = pipeline.image_processor.preprocess(picture).to(pipeline.vae.device, pipeline.vae.dtype)
    with torch.no_grad():
        latents = _normalised(pipeline.vae, pipeline.vae.encode(pixels).latent_dist.mode())
    if adapter.packs:
        latents = pipeline._pack_latents(latents, *latents.shape)
    with _recording(pipeline.transformer, adapter, first_only=True) as calls, contextlib.suppress(_Recorded):
        pipeline([text], **{**call, "output_type": "latent"})
    return _split(adapter, calls[0], latents.cpu(), 1)[0]


def _normalised(vae: Any, latents: Tensor) -> Tensor:
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * vae.config.scaling_factor


def _split(adapter: Adapter, arguments: dict[str, Any], latents: Tensor, count: int) -> list[Sample]:
    arguments = dict(arguments)
    tokens = arguments.pop(adapter.latents)
    arguments.pop(adapter.timestep)
    arguments.pop("return_dict", None)
    for name, value in arguments.items():
        if name not in adapter.shared and isinstance(value, Tensor | list) and len(value) != count:
            raise PpclError(f"the pipeline passes {len(value)} of {name} for {count} prompts; use samples.batch: 1")
    reference = tokens[:, latents.shape[1] :] if tokens.shape[1] > latents.shape[1] else None
    return [
        Sample(
            latents=latents[i : i + 1],
            arguments={name: _one(value, i, name in adapter.shared) for name, value in arguments.items()},
            reference=None if reference is None else reference[i : i + 1],
        )
        for i in range(count)
    ]


def _nearest(unknown: list[str], known: Iterable[str]) -> str:
    close = difflib.get_close_matches(unknown[0], list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"it takes: {', '.join(known)}"


def _one(value: Any, index: int, shared: bool) -> Any:
    return value[index : index + 1] if isinstance(value, Tensor | list) and not shared else value


@contextlib.contextmanager
def _recording(transformer: Any, adapter: Adapter, *, first_only: bool = False) -> Iterator[list[dict[str, Any]]]:
    """Collect the arguments of the calls of the first denoising step: two under classifier-free guidance."""
    signature = inspect.signature(type(transformer).forward)
    calls: list[dict[str, Any]] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = dict(signature.bind(module, *args, **kwargs).arguments)
        bound.pop("self")
        if not calls or torch.equal(bound[adapter.timestep].cpu(), calls[0][adapter.timestep]):
            calls.append({name: _resting(value) for name, value in bound.items()})
        if first_only:
            raise _Recorded

    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _resting(value: Any) -> Any:
    return map_tensors(value, lambda tensor: tensor.detach().cpu().clone())


def _pairs(folder: Path) -> list[tuple[str, Path]]:
    if not folder.is_dir():
        raise PpclError(f"samples.images: {folder} is no folder")
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    missing = [p.name for p in images if not p.with_suffix(".txt").exists()]
    if missing or not images:
        lacks = f"no caption (.txt) beside {', '.join(missing[:3])}" if missing else "no image in it"
        raise PpclError(f"samples.images: {folder}: {lacks}")
    return [(p.with_suffix(".txt").read_text().strip(), p) for p in images]
