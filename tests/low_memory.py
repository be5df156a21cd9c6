"""Do lean optimizers train as well? Students of the embedded teacher, side by side: `python tests/low_memory.py`.

The teacher computes in bf16, as at full size; every student starts from the same blocks, untrained, and sees the same
batches. What is printed is the loss, a mean over several steps, and in the end the error on batches that nobody saw.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ppcl_toolkit.artifacts.pipeline import load_teacher
from ppcl_toolkit.artifacts.storage import Bank, Desk
from ppcl_toolkit.plan import Interval
from ppcl_toolkit.processes import pick_device
from ppcl_toolkit.recipe import Depth, Finetune, Recipe
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.stages.depth import distill_depth
from ppcl_toolkit.stages.finetune import finetune, load_weights, record_velocities
from ppcl_toolkit.stages.samples import load_samples, record_samples
from ppcl_toolkit.surgery.assemble import student_of
from ppcl_toolkit.training.targets import Velocities

WAYS = {
    "adamw, fp32 masters": {"optimizer": "adamw"},
    "adamw8bit, bf16": {"optimizer": "adamw8bit"},
    "adafactor, bf16": {"optimizer": "adafactor"},
    "adamw8bit, bf16, offload blocks": {"optimizer": "adamw8bit", "offload": "blocks"},
}
UNTRAINED = "untrained"
HELD_OUT = 4
_SIZE = {"height": 32, "width": 32, "max_sequence_length": 16}


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _desk(folder: Path) -> Desk:
    folder.mkdir(parents=True, exist_ok=True)
    return Desk(folder, lambda *_, **__: None)


def measured(steps: int, ways: Mapping[str, Mapping[str, str]] = WAYS, *, rate: float = 1e-4) -> dict[str, dict]:
    """Train one student each way; return its losses and its relative error on batches that it never saw."""
    pick_device("cpu")
    recipe = Recipe.model_validate(
        {
            "teacher": {"path": "shapes", "dtype": "bfloat16", "call": {**_SIZE, "num_inference_steps": 4}},
            "samples": {"count": 32, "batch": 8},
            "targets": [{"name": "one", "params": "90%"}],
        }
    )
    teacher = load_teacher(recipe)
    runner = Runner(teacher.transformer, teacher.adapter, Placement())
    plan = teacher.plan()
    path, depth = max(plan.depths.items(), key=lambda item: item[1])
    plan = plan.with_operations([Interval(stack=path, first=depth // 2, last=depth // 2 + 3)])
    with _folder() as folder:
        record_samples(runner, teacher, recipe, _desk(folder / "samples"))
        noised = Batches(
            samples=load_samples(folder / "samples"), adapter=teacher.adapter, size=4, seed=1, dtype=torch.bfloat16
        )
        distill_depth(runner, [plan], noised, Depth(steps=0), _desk(folder / "bank"))
        bank, velocities = Bank(folder / "bank"), Velocities(folder / "velocities")
        section = Finetune(steps=steps, learning_rate=rate, weight_decay=0.0)
        record_velocities(runner, [plan], noised, section, _desk(velocities.folder))
        start = student_of(runner.transformer, runner.adapter, plan, bank, noised[0])
        found = {UNTRAINED: {"losses": [], "error": _error(runner, start, noised, steps)}}
        for number, (name, way) in enumerate(ways.items()):
            own = section.model_copy(update=dict(way))
            assert not finetune(runner, plan, bank, noised, velocities, own, _desk(folder / str(number)))
            losses = [loss for _, loss in json.loads((folder / str(number) / "losses.json").read_text())]
            student = student_of(runner.transformer, runner.adapter, plan, bank, noised[0])
            student.load_state_dict(load_weights(folder / str(number)), assign=True)
            found[name] = {"losses": losses, "error": _error(runner, student, noised, steps)}
    return found


@torch.no_grad()
def _error(runner: Runner, student: torch.nn.Module, noised: Batches, after: int) -> float:
    missed = total = 0.0
    for batch in noised(after + 1000, after + 1000 + HELD_OUT):
        wanted = runner.velocity(batch).float()
        missed += float((student(**batch)[0].float() - wanted).square().sum())
        total += float(wanted.square().sum())
    return (missed / total) ** 0.5


def table(found: Mapping[str, Mapping], steps: int) -> str:
    """Return a markdown table of losses along the way and errors at the end."""
    ends = [steps * part // 5 for part in range(1, 6)]
    lines = [
        f"| way | {' | '.join(f'loss to {end}' for end in ends)} | velocity error |",
        f"|---|{'---|' * (len(ends) + 1)}",
    ]
    for name, result in found.items():
        parts = [result["losses"][end - steps // 5 : end] for end in ends]
        means = [f"{sum(part) / len(part):.5f}" if part else "" for part in parts]
        lines.append(f"| {name} | {' | '.join(means)} | {result['error']:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(measured(40), 40))  # noqa: T201
