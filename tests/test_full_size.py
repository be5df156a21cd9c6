"""Full-size architectures without weights: the exact parameter counts of the paper's plans (Eq. 13, 17, 18)."""

import functools
from types import SimpleNamespace

import headers
import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from headers import blocks_of, dry_run

from ppcl_toolkit.adapter import available_adapters, load_adapter
from ppcl_toolkit.budget import HEADER, Machine, check_fits, check_machine, report, side_by_side
from ppcl_toolkit.budget.memory import Memory
from ppcl_toolkit.budget.model import Model, count, is_known
from ppcl_toolkit.budget.whole import Whole
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.recipe_files import shipped_recipes

TEACHERS = {
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "Freepik/flux.1-lite-8B": 8_163_264_064,
    "Qwen/Qwen-Image": 20_430_401_088,
    "Qwen/Qwen-Image-Edit": 20_430_401_088,
    "Qwen/Qwen-Image-Edit-2509": 20_430_401_088,
    "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
    "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
    "black-forest-labs/FLUX.1-Kontext-dev": 11_901_408_320,
    "black-forest-labs/FLUX.1-schnell": 11_891_178_560,
    "Qwen/Qwen-Image-Edit-2511": 20_430_401_088,
    "Qwen/Qwen-Image-2.1": 7_115_124_736,
    "krea/Krea-2-Raw": 12_820_073_036,
    "krea/Krea-2-Turbo": 12_820_073_036,
    "black-forest-labs/FLUX.2-klein-4B": 3_875_544_576,
    "black-forest-labs/FLUX.2-klein-base-4B": 3_875_544_576,
    "black-forest-labs/FLUX.2-klein-9B": 9_078_581_248,
    "black-forest-labs/FLUX.2-klein-base-9B": 9_078_581_248,
    "black-forest-labs/FLUX.2-dev": 32_223_281_152,
    "Tongyi-MAI/Z-Image-Turbo": 6_154_908_736,
    "Tongyi-MAI/Z-Image": 6_154_908_736,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14_288_491_584,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 4_999_787_712,
    "fal/AuraFlow-v0.3": 6_858_605_568,
    "AIDC-AI/Ovis-Image-7B": 7_370_449_728,
    "meituan-longcat/LongCat-Image": 6_270_668_864,
    "zai-org/CogView4-6B": 6_369_118_272,
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": 1_604_462_752,
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": 591_747_872,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": 610_856_096,
    "zai-org/CogVideoX-2b": 1_693_783_872,
    "zai-org/CogVideoX-5b": 5_570_283_072,
    "Lightricks/LTX-Video": 1_923_385_472,
    "hunyuanvideo-community/HunyuanVideo": 12_821_012_544,
    "genmo/mochi-1-preview": 10_027_677_744,
    "Alpha-VLLM/Lumina-Image-2.0": 2_609_769_152,
    "lodestones/Chroma1-HD": 8_899_983_424,
    "lodestones/Chroma1-Base": 8_899_983_424,
    "hunyuanvideo-community/HunyuanImage-2.1-Diffusers": 17_425_795_520,
}
"""Every published model that an adapter lists, to the last parameter."""


@functools.cache
def planned(name):
    return dry_run(Recipe.load(name))


LIGHT = {
    "flux_light": 8_714_982_464,
    "qwen_image_light": 13_718_203_968,
    "sd35_large_light": 5_424_308_544,
}
"""Modulation of rank 32, a projection per layer."""


@pytest.mark.parametrize("name", LIGHT)
def test_modulation_alone(name):
    found = planned(name)
    (variant,) = found.variants
    assert variant.params == LIGHT[name] and variant.bytes == 2 * LIGHT[name]
    assert variant.blocks == found.teacher.blocks
    # The same work for every picture, but for what layers do once for each.
    assert variant.teraflops == pytest.approx(found.teacher.teraflops, rel=0.002)
    for needs in found.memory.values():
        assert list(needs) == ["check", "samples", "modulation", "export", "evaluate"]
    # Beside what is read from files, factors of rank 256 of all layers, and of what is chosen, in fp32.
    layers = (found.teacher.params - variant.params) / (1 - 32 / 2633)
    resident, streamed, _ = (needs["modulation"] for needs in found.memory.values())
    assert resident["device"] > found.teacher.bytes > 2 * streamed["device"]
    others = 2 * sum(load_adapter(name.split("_light")[0].replace("sd35_large", "sd3")).others)
    converted = 0 if resident["pages"] else found.teacher.bytes + others
    assert layers * 256 / 2633 * 4 < resident["host"] - converted < layers * 330 / 1800 * 4
    assert found.hours["modulation"] < 0.25
    assert "states" not in found.disk and "students" not in found.disk


def test_a_rank_that_is_to_be_found_is_assumed():
    recipe = Recipe.load("flux_light", ["modulation.rank=null", "modulation.error=0.02"])
    found = dry_run(recipe)
    assert found.variants[0].params == LIGHT["flux_light"]
    assert "modulation of rank 32, assumed" in found.basis[0]


def test_what_is_not_fine_tuned_takes_no_memory_of_it():
    target, light = "{name: a, params: 8B, modulation: true}", "{name: light, modulation: true, finetune: false}"
    alone, beside = (
        dry_run(Recipe.load("flux_8b", ["modulation={rank: 32}", f"targets=[{targets}]"]))
        for targets in (target, f"{light}, {target}")
    )
    for one, other in zip(alone.memory.values(), beside.memory.values(), strict=True):
        assert one["finetune"]["device"] == other["finetune"]["device"]


def test_modulation_before_blocks():
    """8B is 0.7B below what modulation leaves: fewer blocks go than without it."""
    changes = ["modulation={rank: 32}", "targets=[{name: a, params: 8B}, {name: b, params: 8B, modulation: true}]"]
    plain, low = dry_run(Recipe.load("flux_8b", changes)).variants
    assert low.params <= 8e9 and sum(low.blocks.values()) > sum(plain.blocks.values()) + 5


CARDS = {
    ("flux_light", "light"): 24,
    ("flux_16gb", "24gb"): 24,
    ("flux_16gb", "16gb"): 16,
    ("flux_lite_12gb", "16gb"): 16,
    ("flux_lite_12gb", "12gb"): 12,
    ("qwen_image_10b", "10b"): 24,
    ("qwen_image_edit_13b", "24gb"): 24,
    ("qwen_image_edit_2509_13b", "24gb"): 24,
    ("sd35_large_5b", "5b"): 12,
    ("z_image_4_6b", "4.6b"): 12,
}
"""Models that are made for a card, and its gigabytes."""


@pytest.mark.parametrize(("name", "target"), CARDS)
def test_what_is_made_for_a_card_is_not_called_block_by_block_there(name, target):
    card = CARDS[name, target] * 10**9
    (variant,) = (variant for variant in planned(name).variants if variant.name == target)
    recipe = Recipe.load(name)
    memory = Memory(recipe, blocks_of(recipe), {})
    means = Whole(memory, card, 10**12).calling(variant.bytes)
    assert means in ("parts in turn", "one part at a time")
    # Half a gigabyte less of a card, and it would not be: the target is no smaller than it has to be.
    if not Recipe.load(name).tuned or target in Recipe.load(name).tuned:
        assert variant.bytes > 0.9 * 0.85 * card or name in ("z_image_4_6b", "flux_light")


def test_plans_are_set_side_by_side_at_equal_parameters_and_at_equal_flops():
    flux, published = Recipe.load("flux_8b"), Recipe.load("paper_flux")
    rows = side_by_side(flux, "flux_8b", published, "paper_flux")
    assert rows[0][:2] == ("teacher", "11,901,408,320") and len({len(row) for row in (HEADER, *rows)}) == 1
    params = [int(row[1].replace(",", "")) for row in rows]
    flops = [float(row[4].split()[0]) for row in rows]
    assert [row[0] for row in rows[1:4]] == [
        "paper_flux, 8b",
        "flux_8b, at equal parameters (assumed)",
        "flux_8b, at equal FLOPs (assumed)",
    ]
    assert params[4] == 6_520_810_048 and len(rows) == 7
    for theirs in (1, 4):
        assert 0.97 * params[theirs] < params[theirs + 1] <= params[theirs] and flops[theirs + 1] > flops[theirs]
        assert 0.97 * flops[theirs] < flops[theirs + 2] <= flops[theirs] and params[theirs + 2] < params[theirs]
    with pytest.raises(PpclError, match="--against: paper_qwen_image is of Qwen/Qwen-Image, flux_8b of black-forest-"):
        side_by_side(flux, "flux_8b", Recipe.load("paper_qwen_image"), "paper_qwen_image")


@pytest.mark.parametrize("rank", [2634, 3072, 5000])
def test_a_rank_beyond_the_width_is_refused_by_the_plan(rank):
    with pytest.raises(
        PpclError, match=rf"modulation.rank: {rank} saves nothing, layers are 3072 wide; from 1 to 2303"
    ):
        dry_run(Recipe.load("flux_light", [f"modulation.rank={rank}"]))


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if not n.startswith("tiny") and n not in LIGHT])
def test_every_recipe_starts_from_its_teacher_and_asks_for_less(name):
    found = planned(name)
    assert found.teacher.params == TEACHERS[Recipe.load(name).teacher.path]
    sizes = [found.teacher.params, *(variant.params for variant in found.variants)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    resident, streamed, eight = (needs["depth"] for needs in found.memory.values())
    assert streamed["device"] < eight["device"] < resident["device"] and resident["host"] < streamed["host"]
    assert all(size > 0 for size in found.disk.values()) and all(hours >= 0 for hours in found.hours.values())


def test_flux_with_all_of_the_papers_intervals():
    smallest = planned("paper_flux").variants[-1]
    assert smallest.params == 6_520_810_048
    assert smallest.blocks == {"transformer_blocks": 19 - 10, "single_transformer_blocks": 38 - 14}


def test_qwen_image_from_20b_to_10b():
    found = {variant.name: variant for variant in planned("paper_qwen_image").variants}
    assert found["12b"].params == 11_934_618_688
    assert found["12b"].blocks == {"transformer_blocks": 60 - 25}
    # 10,603,653,184 with the dead text queries and text out-projections that the published weights still carry.
    assert found["10b"].params == 10_452_608_064


def test_the_smallest_qwen_image_is_reached_by_depth_and_then_by_width():
    """As in the paper: 12B by depth alone, the rest by text streams and FFNs."""
    targets = "targets=[{name: 12b, params: 12B, width: false}, {name: 10b, params: 10.5B, depth: 12B}]"
    asked = Recipe.load("qwen_image_10b", ["modulation=null", "select.order=paper", targets])
    deep, small = dry_run(asked).variants
    assert [o for o in small.operations if "text" not in o and "ffn" not in o] == list(deep.operations)
    assert len(small.operations) > len(deep.operations)
    assert deep.params <= 12e9 and small.params <= 10.5e9


def test_flops_are_those_of_the_matrices():
    """A linear layer of FLUX costs two operations per weight and token; attention comes on top."""
    found = planned("flux_8b")
    tokens, width, blocks = 4096 + 512, 3072, 19 + 38
    # Per token, both kinds of block: queries, keys, values, the output projection, and the FFN of four times the width.
    linear = blocks * 2 * (3 + 1 + 8) * width**2 * tokens
    attention = blocks * 2 * 2 * tokens**2 * width
    assert found.teacher.teraflops * 1e12 == pytest.approx(linear + attention, rel=0.01)


def test_a_target_in_flops():
    """Blocks of either stack cost the same: 60 % of 57 are 34, embedders and the last layer aside."""
    changes = ["modulation=null", "targets=[{name: fast, flops: 60%, width: false}]"]
    found = dry_run(Recipe.load("flux_twice_as_fast", changes))
    (fast,) = found.variants
    assert sum(fast.blocks.values()) == 34
    tokens, width = 4096 + 512, 3072
    block = 2 * 12 * width**2 * tokens + 4 * tokens**2 * width
    # What is once a picture or outside of blocks is a hundredth.
    assert fast.teraflops * 1e12 == pytest.approx(34 * block, rel=0.01)
    assert fast.teraflops <= 0.6 * found.teacher.teraflops
    # The same in numbers, and in bytes: whatever is asked for last has to hold.
    limit = int(0.6 * found.teacher.teraflops * 1e12)
    several = [changes[0], f"targets=[{{name: it, flops: {limit}, bytes: 13GB, params: 90%, width: false}}]"]
    (variant,) = dry_run(Recipe.load("flux_twice_as_fast", several)).variants
    assert variant.bytes == 2 * variant.params <= 13e9 and variant.teraflops * 1e12 <= limit


def test_modulation_does_not_serve_a_target_in_flops():
    """Whatever its rank, as many blocks go."""
    targets = "targets=[{name: a, flops: 70%, modulation: true, width: false}, {name: b, flops: 70%, width: false}]"
    low, plain = dry_run(Recipe.load("flux_8b", ["modulation={rank: 32}", targets])).variants
    assert low.blocks == plain.blocks and low.params < 0.8 * plain.params
    assert low.teraflops == pytest.approx(plain.teraflops, rel=0.002)


def test_guidance_runs_every_picture_twice():
    recipe = Recipe.load("sd35_medium_twice_as_fast")
    call = {**recipe.teacher.call, "guidance_scale": 1.0}
    plain = dry_run(recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"call": call})}))
    guided = planned("sd35_medium_twice_as_fast")
    assert guided.disk["samples"] == 2 * plain.disk["samples"]
    assert guided.hours["samples"] == pytest.approx(2 * plain.hours["samples"])
    assert guided.hours["depth"] == plain.hours["depth"]


@pytest.mark.parametrize("path", sorted(path for name in available_adapters() for path in load_adapter(name).models))
def test_every_listed_model_can_be_planned_without_a_download(path):
    """Its weights are counted, and one call of it runs, on the meta device."""
    recipe = Recipe.model_validate({"teacher": {"path": path}, "targets": [{"name": "a", "params": "75%"}]})
    model = blocks_of(recipe).model
    assert count(model.transformer) == TEACHERS[path]
    assert len(model.others) > 1 and model.costs(model.plan).flops > 1e12
    assert is_known(recipe)


def test_every_shipped_family_lists_models_or_has_none_that_is_open():
    assert [family for family in available_adapters() if not load_adapter(family).models] == ["bria"]


def test_a_model_that_is_told_its_guidance_runs_every_picture_once():
    call = {"guidance_scale": 4.0}
    for path, forwards in (("black-forest-labs/FLUX.2-dev", 1), ("black-forest-labs/FLUX.2-klein-base-4B", 2)):
        data = {"teacher": {"path": path, "call": call}, "targets": [{"name": "a", "params": "75%"}]}
        assert Model.of(Recipe.model_validate(data)).forwards == forwards


def test_a_folder_with_a_config_is_enough(tmp_path):
    FluxTransformer2DModel.from_config({"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1}).save_config(
        tmp_path / "transformer"
    )
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"block_out_channels": [8, 8]}')
    data = {"teacher": {"path": str(tmp_path)}, "targets": [{"name": "half", "params": "70%"}]}
    call = {"height": 64, "width": 32}
    small, large = (
        dry_run(Recipe.model_validate({**data, "teacher": {**data["teacher"], "call": {**call, "width": width}}}))
        for width in (32, 64)
    )
    assert small.teacher.blocks == {"transformer_blocks": 1, "single_transformer_blocks": 2}
    assert "hidden_states [1, 128, 64]" in small.basis[1]  # 2x2 latents of 2x2 pixels a token
    assert small.teacher.teraflops < large.teacher.teraflops


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": {"path": "nobody/nothing"}}, "transformer/config.json cannot be read"),
        ({"adapter": "sd3"}, "has a FluxTransformer2DModel"),
        ({"targets": [{"name": "x", "params": "1%"}]}, "the candidates reach"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(change, message):
    recipe = Recipe.load("paper_flux")
    with pytest.raises(PpclError, match=message):
        dry_run(Recipe.model_validate({**recipe.model_dump(), **change}))


@pytest.mark.parametrize("name", headers.PLANNED)
def test_a_recipe_says_what_its_plan_says(name):
    """`python tests/headers.py` writes these lines."""
    _, said, _ = headers.parts((headers.RECIPES / f"{name}.yaml").read_text())
    assert said == headers.header(name, planned(name))


@pytest.mark.parametrize(
    ("recipe", "card", "host", "devices", "stages"),
    [
        ("flux_8b", 80, 512, 1, "all"),
        ("flux_8b", 24, 64, 1, "all"),
        ("qwen_image_10b", 80, 128, 1, "all"),
        ("qwen_image_10b", 24, 64, 1, ("probe", "intervals", "select", "depth", "width")),
        ("qwen_image_10b", 24, 80, 1, "all"),
        ("qwen_image_10b", 80, 256, 8, "all"),
        ("qwen_image_10b", 48, 256, 8, "all"),
    ],
)
def test_jobs_fit_machines_that_people_have(recipe, card, host, devices, stages):
    machine = Machine(card=card * 10**9, host=host * 10**9, devices=devices)
    found = {stage.name: stage for stage in dry_run(Recipe.load(recipe), machine=machine).stages}
    for stage in found if stages == "all" else stages:
        assert found[stage].fits, found[stage]
    if card == 24:
        assert found["depth"].means == "streamed" and found["depth"].device < 16e9
        assert found["samples"].means == found["evaluate"].means == "transformer by blocks"
    if (recipe, card) == ("flux_8b", 80):
        assert not any(stage.means == "streamed" for stage in found.values())


@pytest.mark.parametrize("recipe", ["sd35_large_5b", "flux2_klein_3b", "z_image_4_6b", "qwen_image21_5b", "wan_1b"])
def test_variants_of_any_family_draw_on_a_card_that_people_have(recipe):
    """Those of FLUX and Qwen-Image are above."""
    machine = Machine(card=24 * 10**9, host=64 * 10**9)
    found = report.Budget(Recipe.load(recipe), blocks=blocks_of(Recipe.load(recipe))).stage("evaluate", machine)
    assert found.fits, found


@pytest.mark.parametrize(
    ("recipe", "card", "samples", "evaluate", "export"),
    [
        # 16.1 GB of transformer, 9.5 of T5, 1.4 and .2 of CLIP, .2 of autoencoder; .85 of a card for weights.
        ("sd35_large_light", 40, "resident", "resident", "resident"),
        ("sd35_large_light", 31, "parts in turn", "parts in turn", "resident"),
        ("sd35_large_light", 28, "one part at a time", "one part at a time", "resident"),
        ("sd35_large_light", 18, "transformer by blocks", "transformer by blocks", "resident"),
        # 10.8 GB of the smaller transformer.
        ("sd35_large_light", 12, "transformer by blocks", "transformer by blocks", "transformer by blocks"),
    ],
)
def test_a_plan_says_by_what_means_pipelines_are_called(recipe, card, samples, evaluate, export):
    machine = Machine(card=card * 10**9, host=256 * 10**9)
    found = {stage.name: stage.means for stage in dry_run(Recipe.load(recipe), machine=machine).stages}
    assert (found["samples"], found["evaluate"], found["export"]) == (samples, evaluate, export)
    if samples == "resident":
        asked = dry_run(Recipe.load(recipe, ["teacher.streamed=true"]), machine=machine).stages
        means = {stage.name: stage.means for stage in asked}
        assert (means["samples"], means["modulation"], means["export"]) == (
            "transformer by blocks",
            "streamed",
            "resident",
        )


def test_weights_in_another_dtype_than_their_files_are_memory(tmp_path):
    """SD3.5 is published in fp16; a run in that leaves the weights in their files."""
    recipe = Recipe.load("sd35_medium_twice_as_fast")
    half = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"dtype": "float16"})})
    converted, read = (dry_run(each).memory["streamed, 1 device"]["velocities"] for each in (recipe, half))
    weights = sum(load_adapter("sd3").others) * 2 + blocks_of(recipe).teacher
    assert converted["host"] - read["host"] == weights == read["pages"]
    assert converted["pages"] == 0
    # Of a folder that is here, the files themselves say it.
    tiny.flux_pipeline(1, 1).to(torch.float16).save_pretrained(tmp_path)
    for dtype in ("float16", "bfloat16"):
        recipe = Recipe.model_validate(
            {
                "teacher": {"path": str(tmp_path), "dtype": dtype, "call": {"height": 8, "width": 8}},
                "targets": [{"name": "x", "params": "99%"}],
            }
        )
        assert Model.of(recipe).in_place == (dtype == "float16")


def test_a_machine_that_is_too_small_is_told_what_would_do():
    recipe = Recipe.load("flux_8b", ["teacher.streamed=false"])
    large, small = Machine(card=80 * 10**9, host=256 * 10**9), Machine(card=24 * 10**9, host=256 * 10**9)
    assert dry_run(recipe, machine=large).fits
    found = {stage.name: stage for stage in dry_run(recipe, machine=small).stages}
    assert not found["depth"].fits and "teacher.streamed: true would" in found["depth"].otherwise
    check_fits(recipe, large.card, large.host)
    with pytest.raises(PpclError, match=r"check does not fit a device of 4.0 GB and a host of 256.0 GB"):
        check_fits(recipe, 4 * 10**9, small.host)


def test_a_host_that_no_fine_tuning_fits_is_refused_before_anything_is_loaded(monkeypatch):
    """Hours of recording and distillation would come first."""
    card = SimpleNamespace(total_memory=24 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    recipe, device = Recipe.load("qwen_image_10b"), torch.device("cuda", 0)
    monkeypatch.setattr(report, "host_bytes", lambda: 16 * 10**9)
    with pytest.raises(PpclError, match=r"fine-tuning fits in no way: .* 16.0 GB of the host, and it takes at least"):
        check_machine(recipe, device)
    check_machine(Recipe.load("qwen_image_10b", ["finetune.steps=0"]), device)
    monkeypatch.setattr(report, "host_bytes", lambda: 96 * 10**9)
    check_machine(recipe, device)
