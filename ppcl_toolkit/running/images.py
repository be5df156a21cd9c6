"""Images of one pipeline for prompts and seeds, each written whole, with the time of every call of the transformer.

Every image has a generator of its own, so it does not depend on the batch it is made in.
"""

import difflib
import hashlib
import inspect
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from ppcl_toolkit import processes
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.flops import counting
from ppcl_toolkit.trouble import explained
from ppcl_toolkit.values import shortened

CALLS = "calls-*.jsonl"
"""Files, one a process, of `Timed` lines."""


class Timed(BaseModel):
    """What a batch of images took."""

    batch: PositiveInt
    """Images."""
    seconds: Annotated[list[float], Field(min_length=1)]
    """Of each call of the transformer."""
    peak: NonNegativeInt
    """Bytes on the device."""
    flops: NonNegativeInt | None = None
    """Of a call, for each picture in it; known of the first batch."""


_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What pillow raises for files that are cut off, or no images."""
_REFUSED = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError)
"""What pipelines raise for arguments that they cannot use, where the machine is not to blame."""
_SIDE = 2
"""Latents, in height and in width, that make one token of the transformer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """What every pipeline is asked: the same prompts, seeds and arguments."""

    prompts: tuple[str, ...]
    scored: bool
    """Whether the prompts are captions of the embedded world, which has a scorer."""
    seeds: tuple[int, ...] = (0,)
    batch: int = 1
    call: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the pipeline: steps, guidance, height, width, ..."""
    edits: tuple[str, ...] = ()
    """For editing pipelines: the file of the image that each prompt is about; they go one at a time."""

    def call_for(self, index: int) -> dict[str, Any]:
        """Return the keyword arguments by which the images of a batch that starts at prompt `index` are made."""
        image = {"image": read_image(Path(self.edits[index]), "evaluate.edits")} if self.edits else {}
        return {**self.call, **image}


def generate_images(pipeline: Any, exam: Exam, folder: Path, progress: Callable[..., None]) -> None:
    """Write the image of every prompt and seed that is not in `folder` yet; `image_path` says where.

    Several processes share the batches.
    """
    check_call(pipeline, exam.call)
    if exam.edits:
        check_edits(pipeline, "evaluate.edits")
        assert exam.batch == 1, "editing pipelines take one image at a time"
    pipeline.set_progress_bar_config(disable=True)
    done, total = 0, len(exam.seeds) * len(exam.prompts)
    progress(done, total)
    rank, ranks = processes.world()
    pairs = [(seed, start) for seed in exam.seeds for start in range(0, len(exam.prompts), exam.batch)]
    for number, (seed, start) in enumerate(pairs):
        image_path(folder, seed, 0).parent.mkdir(parents=True, exist_ok=True)
        chosen = range(start, min(start + exam.batch, len(exam.prompts)))
        if number % ranks == rank and not all(image_path(folder, seed, i).exists() for i in chosen):
            _generate_batch(pipeline, exam, folder, seed, chosen)
        done += len(chosen)
        progress(done, total, f"seed {seed}")


def run_pipeline(
    pipeline: Any, texts: Sequence[str], generators: list[torch.Generator] | None, call: Mapping[str, Any], kind: str
) -> Any:
    """Return the images (`kind` pil) or final latents (`kind` latent) of a batch of prompts; a video is a strip.

    Raises `PpclError` where an editing pipeline is given no image and cannot do without, and for arguments that the
    pipeline refuses.
    """
    # Pipelines do not repeat a negative prompt by themselves.
    each = {n: [v] * len(texts) for n, v in call.items() if n.startswith("negative_prompt") and isinstance(v, str)}
    asked = {**call, **each, "prompt": list(texts), "generator": generators, "output_type": kind}
    try:
        # Images or frames: whatever a pipeline makes comes first.
        made = pipeline(**asked)[0]
        return [_still(each) for each in made] if kind == "pil" else made
    except PpclError:
        raise
    except Exception as error:
        if call.get("image") is None and _takes_image(pipeline):
            raise PpclError(
                f"{type(pipeline).__name__} edits images, and fails without one ({error}): give samples.edits and "
                "evaluate.edits, folders of images with a .txt instruction each"
            ) from error
        if is_refusal(error):
            given, said = ", ".join(f"{n}={shortened(v)}" for n, v in call.items()), " ".join(str(error).split())
            raise PpclError(
                f"{type(pipeline).__name__} does not take these arguments: {said} (it was given {given or 'none'})"
            ) from error
        raise


def is_refusal(error: Exception) -> bool:
    """Whether an error is about the arguments of a call, and the machine is not to blame."""
    blamed = explained(error) is not None or "device-side assert" in str(error)
    return isinstance(error, _REFUSED) and not blamed


def draw(pipeline: Any, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> Image.Image:
    """Return the images of some prompts side by side, each with a seed of its own: `seed`, the next, ..."""
    check_call(pipeline, call)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    return _still(run_pipeline(pipeline, prompts, generators, call, "pil"))


def _still(made: Image.Image | Sequence[Image.Image]) -> Image.Image:
    """Return several images, as the frames of a video are, side by side as one; an image as it is."""
    if isinstance(made, Image.Image):
        return made
    strip = Image.new("RGB", (sum(image.width for image in made), max(image.height for image in made)))
    for i, image in enumerate(made):
        strip.paste(image, (sum(other.width for other in made[:i]), 0))
    return strip


def check_place(path: Path) -> None:
    """Raise a `PpclError` where no image can be written to `path`: known before one is drawn."""
    Image.init()
    if path.suffix.lower() not in Image.EXTENSION or Image.EXTENSION[path.suffix.lower()] not in Image.SAVE:
        raise PpclError(f"{path}: no format of images is called {path.suffix!r}; name a .png, .jpg or .webp")
    if path.is_dir() or not path.parent.is_dir():
        raise PpclError(f"{path}: " + ("is a folder" if path.is_dir() else f"there is no folder {path.parent}"))


def check_call(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Raise a `PpclError` for an argument that the pipeline does not take, or a picture without a single token."""
    known = [n for n in inspect.signature(type(pipeline).__call__).parameters if n != "self"]
    for name in call:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            choices = f"did you mean {close[0]!r}?" if close else f"it takes: {', '.join(known)}"
            raise PpclError(f"{type(pipeline).__name__} takes no argument {name!r}; {choices}")
    # Pipelines round sizes down to whole tokens.
    smallest = _SIDE * getattr(pipeline, "vae_scale_factor", 1)
    for name in ("height", "width"):
        if (value := call.get(name)) is not None and value < smallest:
            raise PpclError(f"{name} is {value}, and the smallest picture of this pipeline is {smallest} pixels")


def check_edits(pipeline: Any, key: str) -> None:
    """Raise a `PpclError` that names the recipe's `key` for a pipeline that does not edit images."""
    if not _takes_image(pipeline):
        raise PpclError(f"{key}: {type(pipeline).__name__} takes no image to edit; give prompts")


def read_pairs(folder: str, key: str) -> list[tuple[str, Path]]:
    """Return the text and the path of every image in `folder`: NAME.png is described by NAME.txt beside it.

    Raises `PpclError`, which names the recipe's `key`, where there is no image or no text.
    """
    if not Path(folder).is_dir():
        raise PpclError(f"{key}: {folder} is no folder")
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    missing = [p.name for p in paths if not p.with_suffix(".txt").exists()]
    if missing or not paths:
        lacks = f"no text (.txt) beside {', '.join(missing[:3])}" if missing else "no image in it"
        raise PpclError(f"{key}: {folder}: {lacks}")
    return [(p.with_suffix(".txt").read_text().strip(), p) for p in paths]


def read_image(path: Path, key: str) -> Image.Image:
    """Open an image in RGB; one that cannot be read is a `PpclError` that names the recipe's `key`."""
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except _UNREADABLE as error:
        raise PpclError(f"{key}: {path} is no image that can be read") from error


def generator(seed: int, index: int) -> torch.Generator:
    """Return the generator of one image, by its seed and the position of its prompt."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))


def image_path(folder: Path, seed: int, index: int) -> Path:
    """Return where `generate_images` keeps the image of a prompt."""
    return folder / "images" / f"seed-{seed}" / f"{index:04d}.png"


def image_rmse(student: Path, reference: Path) -> float:
    """Return the mean over images of the root mean square difference between two folders of one exam, 0 to 255."""
    pairs = [(path, reference / path.relative_to(student)) for path in sorted(student.glob("images/seed-*/*.png"))]
    missing = next((other for _, other in pairs if not other.exists()), None)
    if missing or not pairs:
        raise PpclError(f"{student} and {reference} hold images of different prompts: {missing or 'none'} is missing")
    return statistics.fmean(_rmse(pixels(one), pixels(other)) for one, other in pairs)


def pixels(path: Path) -> np.ndarray:
    """Read an image as uint8 [H, W, 3]."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except _UNREADABLE as error:
        raise PpclError(f"{path} is no image that can be read ({error}); delete it to make it again") from error


def _takes_image(pipeline: Any) -> bool:
    return "image" in inspect.signature(type(pipeline).__call__).parameters


def _generate_batch(pipeline: Any, exam: Exam, folder: Path, seed: int, chosen: range) -> None:
    texts = [exam.prompts[i] for i in chosen]
    generators = [generator(seed, i) for i in chosen]
    with _timed(pipeline) as seconds, _first_call(pipeline.transformer) as call:
        images = run_pipeline(pipeline, texts, generators, exam.call_for(chosen[0]), "pil")
    device = pipeline._execution_device
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    first = seed == exam.seeds[0] and chosen[0] == 0
    flops = {"flops": step_flops(pipeline.transformer, call)} if first else {}
    # Before the images: whoever finds them finds their times.
    times = CALLS.replace("*", str(processes.world()[0]))
    with (folder / "images" / times).open("a") as file:
        file.write(json.dumps({"batch": len(texts), "seconds": seconds, "peak": peak, **flops}) + "\n")
    for index, image in zip(chosen, images, strict=True):
        path = image_path(folder, seed, index)
        image.convert("RGB").save(path.with_suffix(".partial"), format="png")
        path.with_suffix(".partial").replace(path)


@torch.no_grad()
def step_flops(transformer: torch.nn.Module, call: Mapping[str, Any]) -> int:
    """Count the floating-point operations of a call of a diffusers transformer, which is made, for each picture."""
    with counting() as counter:
        transformer(**call)
    # The latents are what every one of them takes first.
    return counter.get_total_flops() // len(next(iter(call.values())))


@contextmanager
def _first_call(transformer: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Keep the arguments of the first call."""
    call: dict[str, Any] = {}

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        call.update({} if call else {name: value for name, value in given.items() if name != "self"})

    handle = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield call
    finally:
        handle.remove()


@contextmanager
def _timed(pipeline: Any) -> Iterator[list[float]]:
    seconds: list[float] = []
    transformer, device = pipeline.transformer, pipeline._execution_device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    started: list[float] = []
    handles = [
        transformer.register_forward_pre_hook(lambda *_: started.append(now())),
        transformer.register_forward_hook(lambda *_: seconds.append(now() - started[-1])),
    ]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _rmse(one: np.ndarray, other: np.ndarray) -> float:
    if one.shape != other.shape:
        raise PpclError(f"images of {one.shape[1]}x{one.shape[0]} and {other.shape[1]}x{other.shape[0]} do not compare")
    return float(np.sqrt(np.mean((one.astype(np.float64) - other) ** 2)))
