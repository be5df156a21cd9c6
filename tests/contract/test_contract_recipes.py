"""Every shipped recipe, on a tiny random pipeline of its family: all of its keys, with sizes and steps cut down."""

from types import SimpleNamespace

import pytest
import tiny
import yaml
from strangers import STRANGERS
from worlds import FAMILIES

from ppcl_toolkit import algorithm, compress
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.recipe_files import find_recipe, shipped_recipes
from ppcl_toolkit.stages import evaluate
from ppcl_toolkit.units import UNITS

TEACHERS = {
    "black-forest-labs/FLUX.1-dev": "flux",
    "Freepik/flux.1-lite-8B": "flux",
    "Qwen/Qwen-Image": "qwen_image",
    "Qwen/Qwen-Image-Edit": "qwen_image_edit",
    "Qwen/Qwen-Image-Edit-2509": "qwen_image_edit_2509",
    "stabilityai/stable-diffusion-3.5-large": "sd3",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
}
OTHERS = {
    "black-forest-labs/FLUX.2-klein-4B": "flux2",
    "Tongyi-MAI/Z-Image-Turbo": "z_image",
    "Qwen/Qwen-Image-2.1": "qwen_image21",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan",
    "lodestones/Chroma1-HD": "chroma",
}
CUSTOM = ("lodestones/Chroma1-HD",)
"""Whose shorter models are none of the stock class."""
FULL_DEPTH = {
    "paper_flux": lambda: tiny.flux_pipeline(19, 38),
    "paper_qwen_image": lambda: tiny.qwen_image_pipeline(60),
}
"""Published intervals need the published depth."""
CUT = {
    "probe": {"batches": 2, "steps": 1},
    "intervals": {"batches": 1},
    "select": {"batches": 1, "batch": 1},
    "depth": {"steps": 1},
    "width": {"steps": 1, "batches": 2, "text_threshold": 0.0},
    "finetune": {"steps": 1, "batch": 1},
    "export": {"dtype": "float32"},
}


def cut_down(name, world):
    """The recipe's own data, on a tiny teacher."""
    data = yaml.safe_load(find_recipe(name).read_text())
    for section, changes in CUT.items():
        data.setdefault(section, {}).update(changes)
    if "modulation" in data:
        data["modulation"] |= {"rank": 3, "batches": 3, "batch": 1, "velocity_batches": 1}
        data["modulation"].pop("error", None)
    if name.endswith("_light"):
        data["finetune"]["steps"] = 0
    call = {key: world.call.get(key, value) for key, value in data["teacher"]["call"].items()} | world.call
    data["teacher"].update(path=str(world.folder / f"teacher_{name}"), dtype="float32", call=call)
    source = {"edits": str(world.folder / "edits")} if world.edits else {"prompts": str(world.folder / "prompts.txt")}
    data["samples"].update(source, count=2)
    data["evaluate"].update(source, count=1, velocity_batches=1)
    # What tiny models can reach: much of them is not in blocks.
    for target, share in zip(data["targets"], (90, 85, 80) if name in FULL_DEPTH else (99, 98, 97), strict=False):
        target |= {unit: f"{share}%" for unit in UNITS if unit in target}
        if "depth" in target:
            target["depth"] = f"{share + 1}%"
    return data


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not name.startswith("tiny")])
def test_a_shipped_recipe_runs(name, worlds, tmp_path, monkeypatch):
    monkeypatch.setattr(algorithm, "write_report", lambda _: None)
    monkeypatch.setattr(evaluate, "_resident_growth", lambda *_: None)
    path = Recipe.load(name).teacher.path
    if path in OTHERS:
        build, call = STRANGERS[OTHERS[path]]
        (tmp_path / "prompts.txt").write_text("a red circle\nanother one\n")
        world = SimpleNamespace(call={**call, "num_inference_steps": 2}, folder=tmp_path, edits=False)
    else:
        world = worlds[TEACHERS[path]]
        build = FULL_DEPTH.get(name, FAMILIES[world.name][0])
    data = cut_down(name, world)
    pipeline = build()
    pipeline.save_pretrained(data["teacher"]["path"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    summary = compress(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "run")
    assert [variant["name"] for variant in summary["variants"]] == [target["name"] for target in data["targets"]]
    for variant, target in zip(summary["variants"], data["targets"], strict=True):
        assert variant["params"] < summary["teacher"]["params"]
        for unit in UNITS:
            most = float(target.get(unit, "100%").rstrip("%")) / 100 * summary["teacher"][unit]
            assert variant[unit] <= most, unit
        assert target.get("width", True) or variant["opens"] == ("custom" if path in CUSTOM else "stock")
