"""Every family's tiny pipeline through a run on the pretended device, in a process that has it: the CPU's figures."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_stock import (
    NARROW,
    ONE_RUN,
    PIPELINES,
    SKIPPED,
    intervals_of,
    left_without,
    only_models,
    recipe_for,
    teacher_in,
)

from ppcl_toolkit import compress
from ppcl_toolkit.artifacts import variant
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running import placement
from ppcl_toolkit.running.images import run_pipeline

WAYS = {"cpu": ("cpu", False), "resident": ("auto", False), "streamed": ("auto", True)}
DUAL_RUN = dict.fromkeys(("flux", "sd3", "qwen_image"), ONE_RUN)
WIDTH = {**dict.fromkeys(PIPELINES, ()), **DUAL_RUN, **NARROW}
"""What is given of the width; where that is nothing, intervals are."""
STEPS = {"steps": 2, "learning_rate": 1e-6}
"""So small that signs of gradients, which rounding decides where width begins without error, tell in no digit."""


@pytest.mark.parametrize("name", PIPELINES)
def test_a_run_on_the_device_is_the_one_on_the_cpu(name, tmp_path, monkeypatch):
    only_models(monkeypatch)
    # Another test opens what is exported; here it takes a process for each.
    monkeypatch.setattr(variant, "_run_elsewhere", lambda *_: {})
    pipeline, asked = teacher_in(tmp_path, name)
    width, given = WIDTH[name], [] if WIDTH[name] else [*intervals_of(SKIPPED[name])]
    params = left_without(pipeline, asked, name, [*width, *({"kind": "interval", **each} for each in given)])
    data = recipe_for(tmp_path, asked, given, params, width).model_dump()
    for stage in ("depth", "width", "finetune"):
        data[stage] |= STEPS
    made = {}
    for way, (device, streamed) in WAYS.items():
        data["device"], data["teacher"]["streamed"] = device, streamed
        (row,) = compress(Recipe.model_validate(data), tmp_path / way)["variants"]
        assert way == "cpu" or row["memory_of"] == "cuda allocations"
        files = {path.parent.name: path for path in sorted((tmp_path / way).rglob("losses.json"))}
        losses = {stage: json.loads(path.read_text()) for stage, path in files.items()}
        made[way] = [*numbers([row["velocity_error"], losses])]
        assert row["params"] == params and (row["memory_of"] == "cuda allocations") == (device == "auto")
    for way in ("resident", "streamed"):
        assert made[way] == pytest.approx(made["cpu"], rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_draws_the_same_where_its_parts_take_turns(name, monkeypatch):
    """On a card for all of them, for the transformer and another one, and for one."""
    build, asked = PIPELINES[name]
    pipeline, asked = build(), {**asked, "num_inference_steps": 2}
    generators = [torch.Generator().manual_seed(0)]
    expected = run_pipeline(pipeline, ["a circle"], generators, asked, "latent")
    for means in (placement.RESIDENT, placement.IN_TURN, placement.ALONE):
        monkeypatch.setattr(placement, "calling_means", lambda *_, means=means, **__: means)
        generators = [torch.Generator().manual_seed(0)]
        with placement.callable_on(pipeline, torch.device("cuda", 0)):
            found = run_pipeline(pipeline, ["a circle"], generators, asked, "latent")
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


def numbers(data):
    """Yield the numbers of plain data, in order."""
    if isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            yield from numbers(value)
    else:
        yield data
