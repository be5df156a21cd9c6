"""Images of a benchmark, where its official scorer looks for them.

Image n of every prompt has the seed `seed + n`. Finished images are kept, so a killed run goes on; several processes
(`accelerate launch`) share the prompts.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ppcl_toolkit.artifacts.files import write_json, write_text
from ppcl_toolkit.artifacts.pipeline import default_call, load_pipeline
from ppcl_toolkit.benchmarks.suites import Prompt, Suite
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.processes import is_main, pick_device, wait, world
from ppcl_toolkit.records import read_record
from ppcl_toolkit.running.images import check_call, run_pipeline
from ppcl_toolkit.running.placement import callable_on


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What every pipeline is asked to draw, and where to."""

    suite: Suite
    prompts: Path
    """The benchmark's own file."""
    out: Path
    count: int | None = None
    """Prompts; all of them by default."""
    seed: int = 42
    batch: int = 1
    """Images per call, of one prompt."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the pipeline."""
    verify: bool = True
    """Whether the files of variants are hashed first."""


def draw_suite(models: Sequence[str], asked: Drawing, progress: Callable[..., None]) -> list[Path]:
    """Draw the images of `asked` with each pipeline; return the folders for the scorer.

    Raises `PpclError` for a prompt file of another format, and where images of other settings lie.
    """
    part, prompts = asked.suite.read(asked.prompts)
    prompts = prompts[: asked.count]
    asked = replace(asked, call={**default_call(models[0]), **asked.call})
    if not prompts:
        raise PpclError(f"{asked.prompts} holds no prompts")
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        raise PpclError(f"pipelines are told apart by their last name, and these are {', '.join(names)}")
    root = asked.out / asked.suite.name / part
    root.mkdir(parents=True, exist_ok=True)
    device, (rank, number) = pick_device("auto"), world()
    for model, name in zip(models, names, strict=True):
        record, settings = root / f".{name}.json", _settings(model, asked)
        _check_settings(record, settings)
        pipeline = load_pipeline(model, verify=asked.verify)
        check_call(pipeline, asked.call)
        if is_main():
            write_json(record, settings)
        mine = prompts[rank::number]
        with callable_on(pipeline, device):
            for done, prompt in enumerate(mine):
                progress(name, done, len(mine))
                _draw_prompt(pipeline, asked, prompt, name, root)
        progress(name, len(mine), len(mine))
        del pipeline
    wait()
    return [root / name for name in names] if all((root / name).is_dir() for name in names) else [root]


def _draw_prompt(pipeline: Any, asked: Drawing, prompt: Prompt, model: str, root: Path) -> None:
    suite = asked.suite
    if suite.metadata is not None:
        note = root / suite.metadata(prompt, model)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, prompt.metadata)
    paths = [root / suite.place(prompt, number, model) for number in range(suite.images)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    drawn = []
    for start in range(0, len(missing), asked.batch):
        chosen = missing[start : start + asked.batch]
        images = _draw(pipeline, asked, prompt, chosen)
        if suite.grid:
            drawn += images
        else:
            for number, image in zip(chosen, images, strict=True):
                _save(image, paths[number], root)
    if drawn:
        _save(_square(drawn), paths[0], root)


def _draw(pipeline: Any, asked: Drawing, prompt: Prompt, numbers: Sequence[int]) -> list[Image.Image]:
    generators = [torch.Generator("cpu").manual_seed(asked.seed + number) for number in numbers]
    images = run_pipeline(pipeline, [prompt.text] * len(numbers), generators, asked.call, "pil")
    return [image.convert("RGB") for image in images]


def _square(images: Sequence[Image.Image]) -> Image.Image:
    """Put images of one size in a square, row by row."""
    side = round(len(images) ** 0.5)
    width, height = images[0].size
    square = Image.new("RGB", (side * width, side * height))
    for position, image in enumerate(images):
        square.paste(image, (position % side * width, position // side * height))
    return square


def _save(image: Image.Image, path: Path, root: Path) -> None:
    # Scorers read every file beside the images, so an unfinished one lies elsewhere.
    partial = root / f".{world()[0]}.partial"
    image.save(partial, format=path.suffix[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(path)


def _settings(model: str, asked: Drawing) -> dict[str, Any]:
    texts = sorted(asked.prompts.glob("*.txt")) if asked.prompts.is_dir() else [asked.prompts]
    digest = hashlib.sha256(b"".join(text.read_bytes() for text in texts)).hexdigest()
    return {"model": model, "prompts": digest, "seed": asked.seed, "call": dict(asked.call)}


def _check_settings(record: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with images that were asked for otherwise."""
    earlier = read_record(record, dict[str, Any]) if record.is_file() else settings
    if differ := [key for key in settings if earlier.get(key) != settings[key]]:
        raise PpclError(
            f"{record.parent} holds images of {record.stem[1:]} with another {', '.join(differ)}; give another --out"
        )
