"""The whole path for families that are not shipped: an adapter, a recipe, and a variant that plain diffusers opens."""

import pytest
import torch
from diffusers import DiffusionPipeline
from strangers import STRANGERS

from ppcl_toolkit import Recipe, compress
from ppcl_toolkit.stages import evaluate

PROMPTS = "a red circle\nanother one\n"


@pytest.mark.parametrize("name", STRANGERS)
def test_blocks_go_and_the_rest_is_the_teachers(name, tmp_path, monkeypatch):
    """Weights by hand: those behind the interval move up by one, and nothing but its block has learned."""
    monkeypatch.setattr(evaluate, "_resident_growth", lambda *_: None)
    build, adapter, call = STRANGERS[name]
    path, key = adapter.stacks[0].path, adapter.stacks[0].depth_key
    pipeline = build()
    pipeline.save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    asked = {n: list(value) if isinstance(value, tuple) else value for n, value in call.items()}
    asked |= {"num_inference_steps": 2, "max_sequence_length": 16}
    calibration = {"batches": 1, "batch": 2}
    recipe = {
        "adapter": f"strangers:{name.upper()}",
        "device": "cpu",
        "teacher": {"path": str(tmp_path / "teacher"), "dtype": "float32", "call": asked},
        "samples": {"prompts": str(tmp_path / "prompts.txt"), "count": 2, "batch": 2},
        "probe": calibration,
        "intervals": {**calibration, "strategy": "given", "given": [{"stack": path, "first": 0, "last": 1}]},
        "targets": [{"name": "small", "params": "97%", "width": False, "finetune": False}],
        "select": calibration,
        "depth": {"steps": 1, "batch": 2},
        "export": {"dtype": "float32"},
        "evaluate": {"prompts": str(tmp_path / "prompts.txt"), "count": 1, "seeds": [0], "velocity_batches": 1},
    }
    (variant,) = compress(Recipe.model_validate(recipe), tmp_path / "run")["variants"]
    assert variant["opens"] == "stock"
    opened = DiffusionPipeline.from_pretrained(variant["path"]).transformer
    assert type(opened) is type(pipeline.transformer)
    assert opened.config[key] == pipeline.transformer.config[key] - 1
    teacher, student = pipeline.transformer.state_dict(), opened.state_dict()
    learned = {name for name in student if name.startswith(f"{path}.0.")}
    for weight in student.keys() - learned:
        assert torch.equal(student[weight], teacher[moved(weight, path)]), weight
    assert any(not torch.equal(student[weight], teacher[weight]) for weight in learned)


def moved(weight, path):
    """The teacher's name of a weight of the student."""
    if not weight.startswith(f"{path}."):
        return weight
    number, _, rest = weight.removeprefix(f"{path}.").partition(".")
    return f"{path}.{int(number) + 1}.{rest}"
