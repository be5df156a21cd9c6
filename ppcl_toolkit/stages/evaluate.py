"""Stage `evaluate`: what a pipeline costs and what its images are worth, beside the teacher's at equal seeds.

Images lie in `<folder>/images/seed-<s>/<prompt>.png`, figures in `<folder>/measurement.json`. What is there and of the
same exam is kept, so a killed run goes on. Run as a module, this file is the fresh process whose memory is measured.

    evaluate: {prompts: shapes, count: 70, seeds: [0, 1, 2], batch: 35}
    evaluate: {edits: folder}   # editing pipelines: NAME.png is edited as NAME.txt says
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppcl_toolkit import processes
from ppcl_toolkit.adapter import Adapter, home_of, import_beside
from ppcl_toolkit.artifacts.files import write_json
from ppcl_toolkit.artifacts.pipeline import Teacher, default_call, load_pipeline, located
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Evaluate, Recipe
from ppcl_toolkit.records import parse_record, read_record
from ppcl_toolkit.running.capture import predict
from ppcl_toolkit.running.images import (
    CALLS,
    Exam,
    Timed,
    generate_images,
    image_path,
    image_rmse,
    pixels,
    read_pairs,
    run_pipeline,
)
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.placement import HOST, callable_on, moved
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.shapes import scenes, score

_EXAM, _MEASUREMENT = "exam.json", "measurement.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One pipeline's results; the last three are set by `compare`."""

    params: int
    """Of the transformer."""
    bytes: int
    """Of those parameters: of a run's variants as exported, of others as loaded."""
    flops: int | None = None
    """Counted in the first call of the transformer, for each picture; None where an earlier version measured."""
    latency_ms: float
    """Median over the calls of the transformer with a whole batch."""
    latency_batch: int
    memory_bytes: int | None
    """Peak of loading the folder and making one batch; None where it cannot be known."""
    memory_of: str
    """Whose peak: `cuda allocations` or `resident set growth of a fresh process`."""
    score: float | None
    """Share of images that show what their prompt says, mean over seeds; None without a scorer."""
    score_std: float | None
    """Standard deviation over seeds."""
    categories: Mapping[str, Sequence[float]]
    """Mean and standard deviation over seeds of each category."""
    chance: float | None
    """Score of every prompt against the images of other prompts of its category; None where there are no others."""
    rmse: float | None = None
    """Same-seed root mean square difference to the teacher's images, 0 to 255, mean over images."""
    velocity_error: float | None = None
    """||v_s - v_t|| / ||v_t|| over the same inputs; None where that is not finite."""
    drop_percent: float | None = None
    """R of the paper: 100 (1 - score / teacher's score)."""


def examine(section: Evaluate, call: Mapping[str, Any]) -> Exam:
    """Return the exam that a recipe asks for."""
    if section.edits:
        pairs = read_pairs(section.edits, "evaluate.edits")[: section.count]
        texts, edits = tuple(text for text, _ in pairs), tuple(str(path) for _, path in pairs)
        return Exam(prompts=texts, scored=False, seeds=section.seeds, call=dict(call), edits=edits)
    scored = section.prompts == "shapes"
    prompts = _captions(section.count) if scored else _lines(Path(section.prompts))[: section.count]
    return Exam(prompts=tuple(prompts), scored=scored, seeds=section.seeds, batch=section.batch, call=dict(call))


class Source(NamedTuple):
    """Where a fresh process finds a pipeline, and the recipe's adapter for it."""

    path: str
    adapter: str = "auto"


def measure(
    pipeline: Any, exam: Exam, folder: Path, *, source: Source | None = None, progress: Callable[..., None]
) -> Measurement:
    """Make the images of `exam` in `folder`, score them, and measure what they cost.

    `source` is where a fresh process finds this pipeline to measure its memory (CPU only). A measurement of the same
    exam and weights that is already in `folder` is returned as it is; anything else there is made again. Several
    processes, which call this together, share the images.
    """
    asked = {**json.loads(json.dumps(dataclasses.asdict(exam))), "weights": _fingerprint(pipeline.transformer)}
    if processes.is_main() and _read_json(folder / _EXAM) != asked:
        shutil.rmtree(folder / "images", ignore_errors=True)
        (folder / _MEASUREMENT).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _EXAM, asked)
    processes.wait()
    if not (folder / _MEASUREMENT).exists():
        generate_images(pipeline, exam, folder, progress)
        processes.wait()
        if processes.is_main():
            save_measurement(_measured(pipeline, exam, folder, source), folder)
    processes.wait()
    return load_measurement(folder)


def _measured(pipeline: Any, exam: Exam, folder: Path, source: Source | None) -> Measurement:
    parameters = list(pipeline.transformer.parameters())
    return Measurement(
        params=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        **_cost(folder / "images", exam, source, parameters[0].dtype),
        **_scores(folder, exam),
    )


def evaluate(
    runner: Runner,
    teacher: Teacher,
    recipe: Recipe,
    variants: Sequence[Mapping[str, Any]],
    batches: Batches,
    desk: Desk,
    *,
    verify: bool = True,
) -> None:
    """Run the stage: measure the teacher, then each variant with the device to itself; `verify` its files first."""
    exam = examine(recipe.evaluate, recipe.teacher.call)
    held_out = list(batches(0, recipe.evaluate.velocity_batches))
    adapter, device, dtype = runner.adapter, runner.placement.device, getattr(torch, recipe.teacher.dtype)
    names = ["teacher", *(variant["name"] for variant in variants)]

    def reported(name: str) -> Callable[..., None]:
        return functools.partial(_part_of, desk.progress, names.index(name), len(names), name)

    with runner.calling(teacher.pipeline):
        measure(
            teacher.pipeline,
            exam,
            desk.folder / "teacher",
            source=Source(teacher.folder or recipe.teacher.path, recipe.adapter),
            progress=reported("teacher"),
        )
        wanted = velocities(teacher.transformer, adapter, held_out, device)
    runner.leave()
    for variant in variants:
        name, path = variant["name"], variant["path"]
        pipeline = load_pipeline(path, dtype, adapter=recipe.adapter, verify=verify)
        with callable_on(pipeline, device):
            measure(pipeline, exam, desk.folder / name, source=Source(path, recipe.adapter), progress=reported(name))
            error = relative_error(velocities(pipeline.transformer, adapter, held_out, device), wanted)
        del pipeline
        if processes.is_main():
            stored = getattr(torch, recipe.export.dtype).itemsize
            compare(desk.folder / name, desk.folder / "teacher", velocity_error=error, itemsize=stored)


def summarise(variants: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """Return the figures of a finished stage, those of each variant behind what is known of it."""
    return {
        "teacher": dataclasses.asdict(load_measurement(folder / "teacher")),
        "variants": [
            {**variant, **dataclasses.asdict(load_measurement(folder / variant["name"]))} for variant in variants
        ],
    }


def evaluate_folders(
    paths: Sequence[str],
    section: Evaluate,
    call: Mapping[str, Any],
    out: Path,
    progress: Callable[..., None],
    *,
    verify: bool = True,
) -> list[dict[str, Any]]:
    """Measure pipelines side by side in `out`, the first as the reference; return a row for each.

    Files of variants are hashed to `verify` them.
    """
    exam = examine(section, {**default_call(paths[0]), **call})
    folders = [out / f"{number}-{Path(path).name}" for number, path in enumerate(paths)]
    device = processes.pick_device("auto")
    for path, folder in zip(paths, folders, strict=True):
        pipeline = load_pipeline(path, verify=verify)
        with callable_on(pipeline, device):
            measure(pipeline, exam, folder, source=Source(path), progress=functools.partial(progress, path))
        del pipeline
    if processes.is_main():
        for folder in folders:
            compare(folder, folders[0])
    processes.wait()
    return [dataclasses.asdict(load_measurement(folder)) for folder in folders]


def compare(
    student: Path, reference: Path, *, velocity_error: float | None = None, itemsize: int | None = None
) -> Measurement:
    """Complete the measurement in the folder `student` by what sets it against the one in `reference`.

    `itemsize` are the bytes of a parameter on disk, where they are known.
    """
    own, teacher = load_measurement(student), load_measurement(reference)
    drop = None
    if own.score is not None and teacher.score:
        drop = 100 * (1 - own.score / teacher.score)
    # JSON has no NaN.
    error = velocity_error if velocity_error is not None and math.isfinite(velocity_error) else None
    size = own.bytes if itemsize is None else own.params * itemsize
    compared = dataclasses.replace(
        own, bytes=size, rmse=image_rmse(student, reference), drop_percent=drop, velocity_error=error
    )
    save_measurement(compared, student)
    return compared


def velocities(
    transformer: torch.nn.Module,
    adapter: Adapter,
    batches: Iterable[Mapping[str, Any]],
    device: torch.device = HOST,
) -> list[Tensor]:
    """Return what `transformer`, callable on `device`, predicts for each batch of arguments, on the CPU in fp32."""
    with torch.no_grad():
        return [predict(transformer, adapter, moved(dict(batch), device)).float().cpu() for batch in batches]


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return ||found - wanted|| / ||wanted|| over all elements of all batches."""
    error = sum(float((f - w).double().square().sum()) for f, w in zip(found, wanted, strict=True))
    return (error / sum(float(w.double().square().sum()) for w in wanted)) ** 0.5


def load_measurement(folder: Path) -> Measurement:
    """Read the measurement in `folder`; a missing or foreign one is a `PpclError`."""
    found: Measurement = read_record(folder / _MEASUREMENT, Measurement)
    return found


def save_measurement(measurement: Measurement, folder: Path) -> None:
    """Write a measurement into `folder`."""
    write_json(folder / _MEASUREMENT, dataclasses.asdict(measurement))


def _cost(images: Path, exam: Exam, source: Source | None, dtype: torch.dtype) -> dict[str, Any]:
    calls = [call for times in sorted(images.glob(CALLS)) for call in _calls(times)]
    if not calls:
        raise PpclError(f"{images} has no {CALLS}: nothing says how long its images took; delete it to make them again")
    whole = max(call.batch for call in calls)
    seconds = [s for call in calls if call.batch == whole for s in call.seconds]
    peak, whose = max(call.peak for call in calls) or None, "cuda allocations"
    if peak is None:
        whose = "resident set growth of a fresh process"
        peak = _resident_growth(source, exam, dtype) if source else None
    latency = 1000 * statistics.median(seconds)
    flops = next((call.flops for call in calls if call.flops is not None), None)
    return {"flops": flops, "latency_ms": latency, "latency_batch": whole, "memory_bytes": peak, "memory_of": whose}


def _calls(times: Path) -> Iterator[Timed]:
    for number, line in enumerate(times.read_text(errors="replace").splitlines(), start=1):
        yield parse_record(line, Timed, f"{times}, line {number},")


def _scores(folder: Path, exam: Exam) -> dict[str, Any]:
    if not exam.scored:
        return {"score": None, "score_std": None, "categories": {}, "chance": None}
    images = {seed: [pixels(image_path(folder, seed, i)) for i in range(len(exam.prompts))] for seed in exam.seeds}
    size = images[exam.seeds[0]][0].shape
    if size != (scenes.SIZE, scenes.SIZE, 3):
        raise PpclError(
            f"the scorer of the shapes prompts reads images of {scenes.SIZE}x{scenes.SIZE}, this pipeline makes "
            f"{size[1]}x{size[0]}: set height and width in its call, or give a file of prompts"
        )
    by_seed = [score.score_by_category(exam.prompts, images[seed]) for seed in exam.seeds]
    spread = {name: _mean_and_deviation([scores[name] for scores in by_seed]) for name in by_seed[0]}
    mean, deviation = spread.pop("overall")
    chances = [score.chance(exam.prompts, images[seed]).get("overall") for seed in exam.seeds]
    known = [chance for chance in chances if chance is not None]
    chance = statistics.fmean(known) if known else None
    return {"score": mean, "score_std": deviation, "categories": spread, "chance": chance}


def _part_of(progress: Callable[..., None], number: int, count: int, name: str, done: int, total: int, *_: str) -> None:
    progress(number * total + done, count * total, name)


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _fingerprint(transformer: torch.nn.Module) -> str:
    """Tell pipelines apart by a few values of every parameter: hashing all of 20B would take minutes."""
    digest = hashlib.sha256()
    for name, parameter in transformer.named_parameters():
        values = parameter.detach().flatten()[:32].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + values.tobytes())
    return digest.hexdigest()


def _captions(count: int) -> list[str]:
    per_category = -(-count // len(scenes.CATEGORIES))
    prompts = scenes.evaluation_prompts(per_category)
    # In turns, so that a count that is no multiple of the categories still has all of them.
    return [prompt for i in range(per_category) for prompt in prompts[i::per_category]][:count]


def _lines(path: Path) -> list[str]:
    try:
        found = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PpclError(
            f"prompts: cannot read {str(path)!r}; give a text file, one prompt a line, or shapes"
        ) from error
    if not found:
        raise PpclError(f"prompts: {str(path)!r} has no prompt")
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _resident_growth(source: Source, exam: Exam, dtype: torch.dtype) -> int | None:
    """Return the bytes by which a fresh process grows that opens `source` and makes one batch; None where unknown."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    first = dataclasses.replace(exam, prompts=exam.prompts[: exam.batch], edits=exam.edits[: exam.batch])
    request = {"source": [*source], "dtype": str(dtype).removeprefix("torch."), "exam": dataclasses.asdict(first)}
    request["home"] = home_of(source.adapter)
    command = [sys.executable, "-m", "ppcl_toolkit.stages.evaluate"]
    done = subprocess.run(command, input=json.dumps(request), text=True, capture_output=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise PpclError(f"{source.path}: a fresh process could not make one batch to measure its memory: {reason}")
    return int(done.stdout.splitlines()[-1])


def _measure_own_growth() -> None:
    request = json.load(sys.stdin)
    exam = Exam(**request["exam"])
    path, adapter = request["source"]
    import_beside(adapter, request["home"])
    index = json.loads((Path(located(path)) / "model_index.json").read_text())
    # Code is no part of the model: import it before the growth is counted.
    parts = [part for part in index.values() if isinstance(part, list)]
    for library, name in [*parts, ("diffusers", index["_class_name"])]:
        if library in ("diffusers", "transformers"):
            getattr(importlib.import_module(library), name, None)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    # Who asks has verified its files.
    pipeline = load_pipeline(path, getattr(torch, request["dtype"]), adapter=adapter, verify=False)
    # One step is enough: every further one reuses the memory of the first.
    call = {**{k: v for k, v in exam.call_for(0).items() if k != "sigmas"}, "num_inference_steps": 1}
    generators = [torch.Generator().manual_seed(i) for i in range(len(exam.prompts))]
    run_pipeline(pipeline, exam.prompts, generators, call, "pil")
    sys.stdout.write(f"\n{_status('VmHWM') - before}\n")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    _measure_own_growth()
