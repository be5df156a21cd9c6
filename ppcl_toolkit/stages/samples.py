"""Stage `samples`: the teacher's own pipeline, recorded.

A hook on the transformer records the arguments of a real denoising run, and the run ends with the clean latents; for
image-caption pairs the run is cut short at its first call, and the latents come from the pipeline's VAE. So a new
family needs no data code.

    samples: {prompts: prompts.txt, count: 160, batch: 4}
    samples: {edits: folder, count: 160}    # editing pipelines: NAME.png is edited as NAME.txt says
    samples: {images: folder, count: 160}   # finished images: NAME.png shows what NAME.txt says
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppcl_toolkit import processes
from ppcl_toolkit.artifacts.pipeline import Teacher
from ppcl_toolkit.artifacts.record import checked
from ppcl_toolkit.artifacts.storage import Desk, load_tree, save_tree
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Recipe, Samples
from ppcl_toolkit.running.encoding import Encoder
from ppcl_toolkit.running.images import check_call, check_edits, read_image, read_pairs, run_pipeline
from ppcl_toolkit.running.noise import Recorded, Sample
from ppcl_toolkit.running.record import denoised
from ppcl_toolkit.running.schedule import Runner

EMPTY = "empty"
"""Name of the file of the empty prompt."""
Item = tuple[str, Path | None]
"""A prompt, and the image that belongs to it."""


def record_samples(runner: Runner, teacher: Teacher, recipe: Recipe, desk: Desk) -> None:
    """Write one file per call of the pipeline; files that are there already are kept, several processes share them."""
    pipeline, section, call, seed = teacher.pipeline, recipe.samples, recipe.teacher.call, recipe.seed
    check_call(pipeline, call)
    if section.edits:
        check_edits(pipeline, "samples.edits")
    items = sources(section, seed)
    rank, ranks = processes.world()
    decode = partial(rehearse, teacher, recipe, kind="pil", num_inference_steps=2)
    record = partial(_record, teacher, recipe, cache(lambda: Encoder(pipeline, teacher.adapter, decode)))
    with runner.calling(pipeline):
        for start in range(rank * section.batch, len(items), ranks * section.batch):
            path = desk.folder / f"{start:06d}.safetensors"
            if not path.exists():
                samples = record(items[start : start + section.batch], seed + start)
                save_tree(path, [{name: getattr(s, name) for name in Sample.__slots__} for s in samples])
            desk.progress(min(start + section.batch, len(items)), len(items))
        path = desk.folder / f"{EMPTY}.safetensors"
        alone = recipe.modulation is not None and not section.edits and not section.images
        if alone and processes.is_main() and not path.exists():
            samples = record([("", None)], seed + len(items))
            save_tree(path, [{name: getattr(s, name) for name in Sample.__slots__} for s in samples])


def rehearse(
    teacher: Teacher, recipe: Recipe, prompt: str | None = None, *, kind: str = "latent", **changed: Any
) -> None:
    """Run the pipeline for the first source, or another prompt in its place, and keep nothing of it.

    `changed` are arguments of the call in place of the recipe's, and `kind` is what it makes.
    """
    (text, path), *_ = sources(recipe.samples, recipe.seed)
    image = {"image": read_image(path, "samples.edits")} if recipe.samples.edits and path is not None else {}
    generators = [torch.Generator().manual_seed(recipe.seed)]
    call = {**recipe.teacher.call, **image, **changed}
    run_pipeline(teacher.pipeline, [text if prompt is None else prompt], generators, call, kind)


def load_samples(folder: Path, name: str = "*") -> Recorded:
    """Return what `record_samples` wrote; a sample is read when it is asked for. `PpclError` for a damaged file.

    Where modulation becomes one of low rank, `EMPTY` is the name of what is recorded of the empty prompt.
    """
    return Recorded(sorted(folder.glob(f"{name}.safetensors")), _read, checked(folder))


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


def sources(section: Samples, seed: int) -> Sequence[Item]:
    """Return what is to be recorded; files that are missing or empty are a `PpclError`."""
    if section.edits:
        return read_pairs(section.edits, "samples.edits")[: section.count]
    if section.images:
        return read_pairs(section.images, "samples.images")[: section.count]
    return [(prompt, None) for prompt in prompts(section, seed)][: section.count]


def _read(path: Path, rows: slice) -> list[Sample]:
    return [Sample(**sample) for sample in load_tree(path, rows)]


def _record(
    teacher: Teacher, recipe: Recipe, encoder: Callable[[], Encoder], items: Sequence[Item], seed: int
) -> list[Sample]:
    pipeline, adapter, call = teacher.pipeline, teacher.adapter, recipe.teacher.call
    if not recipe.samples.edits and not recipe.samples.images:
        return denoised(pipeline, adapter, [prompt for prompt, _ in items], call, seed)
    samples = []
    for number, (text, path) in enumerate(items):
        assert path is not None
        if recipe.samples.edits:
            given = {**call, "image": read_image(path, "samples.edits")}
            samples += denoised(pipeline, adapter, [text], given, seed + number)
        else:
            samples.append(encoder().sample(text, read_image(path, "samples.images"), call))
    return samples
