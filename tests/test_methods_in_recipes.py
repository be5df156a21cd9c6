"""A method of `ppcl compare` in a recipe: `ppcl compress` goes its whole way, and refuses what a recipe cannot have."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from runs import job

from ppcl_toolkit.algorithm import compress, export_target
from ppcl_toolkit.artifacts.storage import Bank
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.recipe import Recipe

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"
FEW = ("targets=[{name: small, params: 70%, width: false}]", "finetune={steps: 8, batch: 2}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    job(folder, *FEW)
    return folder


def made(world, out, method, *overrides):
    recipe = Recipe.load(world / "recipe.yaml", [f"select.method={method}", *overrides])
    return compress(recipe, out)["variants"][0]


def test_uniform_is_the_teacher_without_evenly_spread_blocks(world, tmp_path):
    """No step is taken, so the stock variant has the teacher's own blocks: read by diffusers alone."""
    found = made(world, tmp_path / "run", "uniform", "finetune.steps=0")
    assert found["opens"] == "stock"
    teacher = FluxTransformer2DModel.from_pretrained(world / "teacher", subfolder="transformer")
    whole = sum(parameter.numel() for parameter in teacher.parameters())
    student = FluxTransformer2DModel.from_pretrained(tmp_path / "run/variants/small", subfolder="transformer")
    assert 0.6 * whole <= sum(parameter.numel() for parameter in student.parameters()) <= 0.7 * whole
    for path, depth in ((DUAL, 5), (SINGLE, 3)):
        ours, theirs = getattr(student, path), getattr(teacher, path)
        places = [
            next(
                (
                    number
                    for number, block in enumerate(theirs)
                    if all(
                        torch.equal(value, own)
                        for value, own in zip(block.state_dict().values(), mine.state_dict().values(), strict=True)
                    )
                ),
                None,
            )
            for mine in ours
        ]
        assert None not in places and places == sorted(set(places)) and len(places) < depth
        # The middle one goes first.
        assert depth // 2 not in places
    # A finished run is only read, and serves its own targets alone.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    made(world, tmp_path / "run", "uniform", "finetune.steps=0")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")} == before
    with pytest.raises(PpclError, match="targets of select.method uniform do not nest"):
        export_target(tmp_path / "run", "80%")
    with pytest.raises(PpclError, match="select"):
        made(world, tmp_path / "run", "velocity", "finetune.steps=0")


@pytest.mark.parametrize("method", ["velocity", "block_influence", "tinyfusion", "hierarchical_prune_text"])
def test_copies_learn_as_a_whole(world, tmp_path, method):
    found = made(world, tmp_path / "run", method)
    assert found["opens"] == "stock" and found["params"] > 0
    before = Bank(tmp_path / "run/depth")
    # What stands for others begins as one of the teacher's blocks: no interval was trained by itself.
    assert json.loads((tmp_path / "run/depth/made_from.json").read_text())["settings"]["steps"] == 0
    student = FluxTransformer2DModel.from_pretrained(tmp_path / "run/variants/small", subfolder="transformer")
    teacher = FluxTransformer2DModel.from_pretrained(world / "teacher", subfolder="transformer")
    begun = json.loads((tmp_path / "run/select/begun.json").read_text())
    assert begun["starts"]
    for key, (block,) in begun["starts"].items():
        stack = key.rpartition(".")[0]
        theirs = getattr(teacher, stack)[block].state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in before[key].items())
    learned = [
        not torch.equal(value, dict(teacher.named_parameters())[name])
        for name, value in student.named_parameters()
        if name.startswith("proj_out")
    ]
    assert learned and all(learned)
    frozen = begun["frozen"]["small"]
    assert (frozen > 0) == (method == "hierarchical_prune_text")
    for number in range(min(frozen, len(student.transformer_blocks))):
        # Blocks before the first that went are the teacher's, to the bit.
        mine, theirs = (each.transformer_blocks[number].state_dict() for each in (student, teacher))
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_method_with_segments_trains_them_as_it_says(world, tmp_path):
    made(world, tmp_path / "run", "amber_image")
    record = json.loads((tmp_path / "run/depth/made_from.json").read_text())["settings"]
    assert (record["steps"], record["init"], record["loss"]) == (4, "average", "relative_mse")
    assert json.loads((tmp_path / "run/depth/losses.json").read_text())
    # A row of Table 2 has no fine-tuning.
    made(world, tmp_path / "row", "table2_baseline")
    record = json.loads((tmp_path / "row/depth/made_from.json").read_text())["settings"]
    assert (record["inputs"], record["init"]) == ("student", "first")
    assert not (tmp_path / "row/finetune").exists()


def test_low_rank_lies_beneath_a_method(world, tmp_path):
    low = "modulation={rank: 3, batches: 4, batch: 4, velocity_batches: 1, guidance: [1.0, 3.5]}"
    both = "targets=[{name: light, modulation: true, finetune: false}, {name: small, params: 55%, modulation: true}]"
    recipe = Recipe.load(world / "recipe.yaml", ["select.method=velocity", low, both])
    variants = {each["name"]: each for each in compress(recipe, tmp_path / "run")["variants"]}
    plan = Plan.load(tmp_path / "run/variants/small/plan.json")
    assert len(plan.modulation_swaps) == 2 and plan.intervals
    assert variants["small"]["params"] < variants["light"]["params"]
    assert not Plan.load(tmp_path / "run/variants/light/plan.json").intervals


@pytest.mark.parametrize(
    ("method", "override", "said"),
    [
        ("velocty", "seed=1", "select.method: no method 'velocty'; did you mean 'velocity'"),
        ("random", "seed=1", "random is the file of several; name one: random_1, random_2"),
        ("dense2moe", "seed=1", "dense2moe makes no plan: its FFNs become a mixture of experts"),
        ("uniform", "targets=[{name: a, params: 70%, flops: 80%}]", "gives params, flops: uniform goes by one size"),
        ("uniform", "targets=[{name: a, params: 70%, depth: 80%}]", "gives params, depth: uniform goes by one size"),
        ("uniform", "teacher.streamed=true", "scores blocks in the whole teacher"),
    ],
)
def test_what_a_recipe_cannot_have_is_refused_before_anything_runs(world, tmp_path, method, override, said):
    with pytest.raises(PpclError, match=said):
        made(world, tmp_path / "run", method, override)
    assert not (tmp_path / "run").exists()


def test_sizes_that_no_pick_has_name_the_nearest(world, tmp_path):
    with pytest.raises(PpclError, match=r"params is 5%, uniform comes to [\d,]+ \(\d+"):
        made(world, tmp_path / "run", "uniform", "targets=[{name: a, params: 5%, width: false}]")
