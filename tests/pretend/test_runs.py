"""The whole path on the pretended device, resident and streamed: it ends, and its figures are the CPU's.

Every run is a process of its own. In fp32 the device computes with the CPU's kernels, but some operators are made of
others there (attention, normalisation), so the last digits differ, by 1e-7 of a value. Training makes more of that: the
first steps of AdamW follow the signs of gradients, and where one is almost zero a weight may go the other way, by the
learning rate.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import device
import pytest
import tiny
from PIL import Image
from worlds import World, made

from ppcl_toolkit import Recipe, algorithm, compress
from ppcl_toolkit.stages import evaluate

CLOSE = 1e-3
"""Relative, of every loss and velocity error; the largest difference seen in any family is 3e-5."""
MEMORY = 100_000_000
"""Of the device, in bytes."""
STACK = "transformer_blocks"
FAMILIES = ("flux", "qwen_image_edit_2509")
WAYS = {"resident": ["compress", "draw"], "streamed": ["compress", "export"]}
"""Drawing knows of no streaming, and to export from a streamed teacher is the harder way; FLUX goes both."""
WIDTH = {"steps": 3, "batch": 2, "learning_rate": 1e-5}
"""It begins with almost no error, so that rounding decides the signs of gradients: steps are small."""
FOUND = {
    "probe": {"batches": 3, "batch": 4},
    "intervals": {"batches": 2, "batch": 2},
    "select": {"batches": 1, "batch": 2},
    "depth": {"steps": 6, "batch": 2, "checkpoint_every": 3, "inputs": "mixed"},
    "width": {**WIDTH, "ffn_blocks": 2, "text_blocks": 2, "batches": 3, "text_threshold": 0.3},
    "finetune": {"steps": 3, "batch": 2, "features": 0.1},
    "export": {"dtype": "float32"},
    "modulation": {"rank": 3, "batches": 4, "batch": 2, "velocity_batches": 1, "guidance": [1.0, 3.5]},
    "targets": [
        {"name": "large", "params": "85%", "width": False},
        {"name": "small", "params": "65%"},
        {"name": "low", "params": "60%", "modulation": True},
    ],
}
"""What the toolkit finds by itself, in three sizes: all the code of a run."""
GIVEN = {
    **FOUND,
    "intervals": {"batches": 1, "batch": 2, "strategy": "given", "given": [{"stack": STACK, "first": 2, "last": 3}]},
    "width": {
        **WIDTH,
        "batches": 2,
        "given": [
            {"kind": "text_run", "stack": STACK, "reference": 0, "last": 1},
            {"kind": "ffn_swap", "stack": STACK, "block": 0, "streams": ["image", "text"]},
            {"kind": "ffn_swap", "stack": STACK, "block": 2, "streams": ["image"]},
        ],
    },
    "modulation": None,
    "targets": [{"name": "small", "params": "60%"}],
}
"""Small enough to need the interval and width."""


@dataclass
class Prepared:
    """A family's teacher on disk, and what a run on the CPU made of it."""

    world: World
    summary: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.world.folder


@pytest.fixture(scope="module", params=FAMILIES)
def prepared(request, tmp_path_factory) -> Prepared:
    with pytest.MonkeyPatch.context() as patch:
        tiny.small_edits(patch.setattr)
        # Memory on the CPU, for which further processes start, and figures are compared with nothing here.
        patch.setattr(evaluate, "_resident_growth", lambda *_: None)
        patch.setattr(algorithm, "write_report", lambda _: None)
        world = made(request.param, tmp_path_factory.mktemp(request.param))
        world.teacher.pipeline.save_pretrained(world.folder / "teacher")
        recipe = world.recipe(**(FOUND if world.name == "flux" else GIVEN))
        (world.folder / "recipe.yaml").write_text(recipe.dump())
        return Prepared(
            world, compress(Recipe.load(world.folder / "recipe.yaml", ["device=cpu"]), world.folder / "cpu")
        )


def run(prepared: Prepared, way: list[str], out: Path, *overrides: str, devices: int = 1) -> None:
    """Go some way on the device, in a process of its own; on several, in a process each."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={devices}", "--standalone"] if devices > 1 else []
    script = [sys.executable, *launcher, str(Path(__file__).with_name("run_family.py"))]
    ends = {**device.environment(devices, memory=MEMORY), "OMP_NUM_THREADS": "1"}
    command = [*script, ",".join(way), str(prepared.folder), str(out), *overrides]
    done = subprocess.run(command, env=ends, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


def figures(out: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """All that a run measured and does not depend on the machine."""
    names = ("params", "opens", "velocity_error")
    rows = {variant["name"]: {name: variant[name] for name in names} for variant in summary["variants"]}
    plans = {name: json.loads((out / "variants" / name / "plan.json").read_text())["operations"] for name in rows}
    losses = {path.parent.relative_to(out): json.loads(path.read_text()) for path in sorted(out.rglob("losses.json"))}
    return {"rows": rows, "plans": plans, "losses": losses}


@pytest.mark.parametrize("schedule", WAYS)
def test_a_run_on_the_device_is_the_one_on_the_cpu(prepared, schedule):
    way = ["compress", "export", "draw"] if prepared.world.name == "flux" else WAYS[schedule]
    if prepared.world.edits:
        way = [part for part in way if part != "draw"]  # the commands take no image to edit
    out = prepared.folder / schedule
    run(prepared, way, out, f"teacher.streamed={json.dumps(schedule == 'streamed')}")
    summary = json.loads((out / "summary.json").read_text())
    agree(out, summary, prepared)
    for row in (summary["teacher"], *summary["variants"]):
        assert row["memory_of"] == "cuda allocations"
        assert 0 < row["memory_bytes"] < MEMORY
    if "export" in way:
        assert (out / "variants" / "85" / "model_index.json").is_file()
    if "draw" in way:
        size = (prepared.world.call["width"], prepared.world.call["height"])
        assert Image.open(out / "picture.png").size == size
        exam = [json.loads(path.read_text()) for path in sorted((out / "exam").glob("*/measurement.json"))]
        assert [row["memory_of"] for row in exam] == ["cuda allocations"] * 2


@pytest.mark.parametrize("prepared", ["flux"], indirect=True)
def test_a_run_on_two_devices_makes_the_blocks_of_one_on_the_cpu(prepared):
    """All that they share; the batches of fine-tuning are twice as large."""
    out = prepared.folder / "two"
    run(prepared, ["compress"], out, "depth.split=segments", "width.split=segments", devices=2)
    summary = json.loads((out / "summary.json").read_text())
    found, wanted = figures(out, summary), figures(prepared.folder / "cpu", prepared.summary)
    assert found["plans"] == wanted["plans"]
    for stage in (Path("depth"), Path("width")):
        assert found["losses"][stage]
        assert max(compared(found["losses"][stage], wanted["losses"][stage])) < CLOSE
    for row, other in zip(summary["variants"], prepared.summary["variants"], strict=True):
        assert (row["params"], row["opens"], row["memory_of"]) == (other["params"], other["opens"], "cuda allocations")


def agree(out: Path, summary: dict[str, Any], prepared: Prepared) -> None:
    """Fail where a run is not the CPU's."""
    found, wanted = figures(out, summary), figures(prepared.folder / "cpu", prepared.summary)
    assert found["plans"] == wanted["plans"]
    assert found["losses"]
    largest = max(compared(found, wanted))
    print(f"{prepared.world.name}, {out.name}: the largest difference is {largest:.1e}")  # noqa: T201 - of a failure
    assert largest < CLOSE
    for row, other in zip(summary["variants"], prepared.summary["variants"], strict=True):
        # Pixels are whole numbers, and one that is almost between two goes either way.
        assert row["rmse"] == pytest.approx(other["rmse"], abs=0.5)


def compared(found: Any, wanted: Any):
    """Yield the relative difference of every number; what is no fraction must be equal."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            yield from compared(found[name], wanted[name])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            yield from compared(one, other)
    elif isinstance(wanted, float):
        yield abs(found - wanted) / max(abs(wanted), 1e-9)
    else:
        assert found == wanted
