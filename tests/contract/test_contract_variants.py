"""Plans of depth and of width on every family: saved, opened elsewhere in the real pipeline, run in every way."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import tiny
import torch
from safetensors.torch import load_file

from ppcl_toolkit.artifacts.variant import save_variant
from ppcl_toolkit.plan import FfnSwap, Interval, ModulationSwap, Plan, TextRun
from ppcl_toolkit.running.capture import map_tensors
from ppcl_toolkit.surgery.assemble import reshape

STACK = "transformer_blocks"
DEPTH = (Interval(stack=STACK, first=2, last=3),)  # The last block of SD3 is another one than the rest.
WIDTH = (
    *DEPTH,
    TextRun(stack=STACK, reference=0, last=3),
    FfnSwap(stack=STACK, block=0, streams=("image", "text")),
    FfnSwap(stack=STACK, block=2, streams=("image",)),
)
LIGHT = (ModulationSwap(stack=STACK, rank=3),)
PLANS = {"depth": DEPTH, "width": WIDTH, "light": LIGHT, "all": (*WIDTH, *LIGHT)}
ELSEWHERE = """
import json, sys
import tiny, torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
sys.modules["ppcl_toolkit"] = None  # importing it fails from here on
tiny.small_edits()
place, jobs = sys.argv[1], json.load(sys.stdin)
def run(pipeline, call, image):
    pipeline.set_progress_bar_config(disable=True)
    given = {"image": Image.open(image)} if image else {}
    return pipeline(**call, **given, generator=torch.Generator().manual_seed(7), output_type="latent").images
def opened(folder, opens):
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=opens == "custom")
found = {f"{name} as {opens}": run(opened(folder, opens), *asked) for name, folder, opens, *asked in jobs}
del sys.modules["ppcl_toolkit"]
from ppcl_toolkit import load_compressed
found |= {f"{name} rebuilt": run(load_compressed(folder), *asked) for name, folder, _, *asked in jobs}
save_file({name: latents.contiguous() for name, latents in found.items()}, place)
"""


def student(world, kind):
    """A student with random weights, and its plan."""
    teacher, adapter = world.teacher.transformer, world.adapter
    plan = Plan(family=adapter.family, depths=adapter.depths(teacher), operations=PLANS[kind])
    made = copy.deepcopy(teacher)
    reshape(made, adapter, plan, world.batches()[0])
    return tiny.randomize(made, seed=3), plan


def asked(world):
    """What the pipeline is called with, as JSON, and the file of the image."""
    image = str(world.folder / "edits" / "0.png") if world.edits else None
    return {**world.call, "prompt": "paint it red"}, image


def drawn(world, transformer):
    """The latents that the family's pipeline ends with when `transformer` is its own."""
    pipeline = world.teacher.pipeline
    own = pipeline.transformer
    try:
        pipeline.transformer = transformer
        given = {k: v for k, v in world.asked([0]).items() if k not in ("prompt", "generator", "negative_prompt")}
        call = {**given, **asked(world)[0]}
        return pipeline(**call, generator=torch.Generator().manual_seed(7)).images
    finally:
        pipeline.transformer = own


@pytest.fixture(scope="session")
def elsewhere(worlds, tmp_path_factory):
    """Latents of every variant in one fresh process, which opens each as its users will."""
    place, jobs = tmp_path_factory.mktemp("elsewhere"), []
    for name, world in worlds.items():
        for kind in PLANS:
            made, plan = student(world, kind)
            folder = world.folder / kind
            opens = save_variant(world.teacher.pipeline, made, plan, world.batches()[0], folder)
            jobs.append([f"{name} {kind}", str(folder), opens, *asked(world)])
    tests = Path(__file__).parent.parent
    environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules"), "PYTHONPATH": str(tests)}
    command = [sys.executable, "-c", ELSEWHERE, str(place / "latents")]
    done = subprocess.run(command, input=json.dumps(jobs), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(place / "latents")


@pytest.mark.parametrize("kind", PLANS)
def test_variants_run_in_the_pipeline_of_a_fresh_process(world, kind, elsewhere):
    expected = drawn(world, student(world, kind)[0])
    found = [latents for name, latents in elsewhere.items() if name.startswith(f"{world.name} {kind} ")]
    assert len(found) == 2
    for latents in found:
        # Loaded weights lie elsewhere in memory: the last bits may differ.
        assert torch.allclose(latents, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert not torch.allclose(expected, drawn(world, world.teacher.transformer), rtol=0.1)


@pytest.mark.parametrize("kind", PLANS)
def test_checkpointing_gives_the_same_gradients(world, kind):
    made, batch = student(world, kind)[0].train(), world.batches()[0]
    made.requires_grad_(True)

    def gradients():
        made.zero_grad()
        made(**batch)[0].square().sum().backward()
        return {name: parameter.grad for name, parameter in made.named_parameters()}

    plain = gradients()
    made.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert sum(value is not None and bool(value.any()) for value in plain.values()) > 0.8 * len(plain)
    for name, value in plain.items():
        assert (value is None and checkpointed[name] is None) or torch.equal(value, checkpointed[name]), name


@pytest.mark.parametrize("kind", PLANS)
@torch.no_grad()
def test_bfloat16(world, kind):
    made, _ = student(world, kind)
    expected = made(**world.batches()[0])[0]
    half = made.to(torch.bfloat16)
    batch = world.batches(dtype=torch.bfloat16)[0]
    found = half(**map_tensors(batch, lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor))[0]
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("kind", ["width", "light"])
@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image", "qwen_image_edit_2511"])
@torch.no_grad()
def test_repeated_blocks_compile(family, kind, worlds):
    world = worlds[family]
    made, _ = student(world, kind)
    batch = world.batches()[0]
    expected = made(**batch)[0]
    torch.compiler.reset()
    if made._repeated_blocks:
        made.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    else:  # diffusers lists none for SD3
        for block in made.transformer_blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    assert torch.allclose(made(**batch)[0], expected, atol=1e-4 * float(expected.abs().max()))


def on_disk(transformer):
    """A device map with all dual-stream blocks but the first on disk."""
    places = {name: "cpu" for name, _ in transformer.named_children() if name != STACK}
    blocks = range(len(transformer.transformer_blocks))
    return places | {f"{STACK}.{index}": "disk" if index else "cpu" for index in blocks}


@pytest.mark.parametrize("kind", PLANS)
@torch.no_grad()
def test_blocks_that_wait_on_disk(world, kind, tmp_path):
    """A device map: modules come and go block by block, by hooks of accelerate."""
    made, batch = student(world, kind)[0], world.batches()[0]
    expected = made(**batch)[0]
    mapped = accelerate.dispatch_model(made, on_disk(made), main_device="cpu", offload_dir=tmp_path)
    assert next(mapped.transformer_blocks[1].parameters()).is_meta
    assert torch.equal(mapped(**batch)[0], expected)


@torch.no_grad()
def test_a_stock_variant_opens_with_a_device_map(world, elsewhere, tmp_path):
    assert elsewhere
    made, batch = student(world, "depth")[0], world.batches()[0]
    places = on_disk(made)
    found = type(made).from_pretrained(world.folder / "depth/transformer", device_map=places, offload_folder=tmp_path)
    assert next(found.transformer_blocks[1].parameters()).is_meta
    expected = made(**batch)[0]
    assert torch.allclose(found(**batch)[0], expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@torch.no_grad()
def test_group_offload(world, kind, level):
    made, batch = student(world, kind)[0], world.batches()[0]
    expected = made(**batch)[0]
    cpu = torch.device("cpu")
    groups = {"num_blocks_per_group": 1} if level == "block_level" else {}
    made.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=level, **groups)
    assert torch.equal(made(**batch)[0], expected)
