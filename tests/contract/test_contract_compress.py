"""The whole path on every family, from a recipe: record, probe, choose, distil, fine-tune, export, evaluate."""

import json

import pytest
import torch
from PIL import Image

from ppcl_toolkit import algorithm, compress, load_compressed
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.stages import evaluate

STACK = "transformer_blocks"
STEPS = {
    "probe": {"batches": 2, "batch": 2},
    # SD3's last block is another one than the rest, and an interval ends with it.
    "intervals": {"batches": 1, "batch": 2, "strategy": "given", "given": [{"stack": STACK, "first": 2, "last": 3}]},
    "select": {"batches": 1, "batch": 2},
    "depth": {"steps": 3, "batch": 2, "init": "best"},
    "width": {
        "steps": 3,
        "batch": 2,
        "batches": 2,
        "given": [
            {"kind": "text_run", "stack": STACK, "reference": 0, "last": 1},
            {"kind": "ffn_swap", "stack": STACK, "block": 0, "streams": ["image", "text"]},
            {"kind": "ffn_swap", "stack": STACK, "block": 2, "streams": ["image"]},
        ],
    },
    "finetune": {"steps": 3, "batch": 2, "features": 0.1},
    "export": {"dtype": "float32"},
}


@pytest.fixture
def summary(world, monkeypatch):
    """The result of a run; only one family pays for the processes in which memory is measured, and none for figures."""
    monkeypatch.setattr(algorithm, "write_report", lambda _: None)
    if world.name != "flux_kontext":
        monkeypatch.setattr(evaluate, "_resident_growth", lambda *_: None)
    world.teacher.pipeline.save_pretrained(world.folder / "teacher")
    path = world.folder / "recipe.yaml"
    # Neither the interval nor all the rest are enough.
    share = "72%" if "flux" in world.name else "60%"
    path.write_text(world.recipe(**STEPS, targets=[{"name": "small", "params": share}]).dump())
    recipe = Recipe.load(path)
    assert recipe.adapter == "auto"
    return compress(recipe, world.folder / "run")


def test_compress(world, summary):
    (variant,) = summary["variants"]
    assert variant["opens"] == "custom"
    assert summary["teacher"]["params"] > variant["params"]
    assert (summary["teacher"]["memory_bytes"] is not None) == (world.name == "flux_kontext")
    plan = json.loads((world.folder / "run/variants/small/plan.json").read_text())
    assert plan["family"] == world.adapter.family
    assert "interval" in {operation["kind"] for operation in plan["operations"]}
    losses = json.loads((world.folder / "run/depth/losses.json").read_text())
    assert [step for step, _ in losses[f"{STACK}.2-3"]] == [1, 2, 3]
    assert torch.tensor([variant["velocity_error"], variant["rmse"]]).isfinite().all()
    pipeline = load_compressed(variant["path"])
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(**{**world.asked(world.chunks[0]), "output_type": "pil"}).images
    made = Image.open(next((world.folder / "run/evaluate/small/images").glob("*/*.png")))
    assert images[0].size == made.size == (world.call["width"], world.call["height"])
