"""Variants of low-rank modulation in a fresh process with plain diffusers, against the teacher changed by numpy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from by_hand import hand_made
from safetensors.torch import load_file, save_file

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.artifacts.variant import load_compressed, save_variant
from ppcl_toolkit.plan import ModulationSwap, Plan
from ppcl_toolkit.surgery.assemble import student_of

FAMILIES = {
    "flux": (tiny.flux_pipeline, tiny.flux_inputs),
    "sd3": (tiny.sd3_pipeline, tiny.sd3_inputs),
    "qwen_image": (tiny.qwen_image_pipeline, tiny.qwen_image_inputs),
    "zero_cond_t": (
        lambda: tiny.qwen_image_edit_plus_pipeline(zero_cond_t=True),
        lambda: tiny.qwen_image_inputs(2),
    ),
}
PLAIN = """
import json, sys
sys.modules["ppcl_toolkit"] = None  # importing it fails
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
folder, place = sys.argv[1:]
kwargs = {**json.load(open(f"{place}/plain.json")), **load_file(f"{place}/given.safetensors"), "return_dict": False}
transformer = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).transformer
found = {}
with torch.no_grad():
    found["opened"] = transformer(**kwargs)[0]
    transformer.save_pretrained(f"{place}/again")
save_file({name: value.contiguous() for name, value in found.items()}, f"{place}/found.safetensors")
"""


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_it_is_the_teacher_that_numpy_changed(name, tmp_path):
    pipeline, inputs = FAMILIES[name][0](), FAMILIES[name][1]()
    transformer = pipeline.transformer
    adapter = load_adapter("qwen_image" if name == "zero_cond_t" else name)
    swaps = [ModulationSwap(stack=stack.path, rank=3) for stack in adapter.stacks]
    plan = Plan(family=adapter.family, depths=adapter.depths(transformer)).with_operations(swaps)
    teacher, bank = hand_made(transformer, inputs, adapter, 3)
    # Other conditioning than the one that was recorded: there low rank makes a difference.
    call = {**inputs, "timestep": inputs["timestep"].flip(0) * 0.3}
    expected, original = teacher(**call)[0], transformer(**call)[0]
    student = student_of(transformer, adapter, plan, bank, inputs)
    assert save_variant(pipeline, student, plan, inputs, tmp_path / "variant") == "custom"
    tensors = {key: value for key, value in call.items() if isinstance(value, torch.Tensor)}
    save_file(tensors, tmp_path / "given.safetensors")
    (tmp_path / "plain.json").write_text(json.dumps({k: v for k, v in call.items() if k not in tensors}))
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "variant"), str(tmp_path)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")
    assert (found["opened"] - expected).abs().max() < 1e-2 * (original - expected).abs().max()
    assert torch.equal(load_compressed(tmp_path / "variant").transformer(**call)[0], found["opened"])
    again = [path.name for path in Path(tmp_path / "again").iterdir()]
    assert any(file.startswith("modeling_narrow") for file in again)


def test_the_modelling_file_says_what_it_is(tmp_path):
    pipeline, inputs = tiny.flux_pipeline(), tiny.flux_inputs()
    adapter = load_adapter("flux")
    swaps = [ModulationSwap(stack=stack.path, rank=3) for stack in adapter.stacks]
    plan = Plan(family="flux", depths=adapter.depths(pipeline.transformer)).with_operations(swaps)
    student = student_of(
        pipeline.transformer, adapter, plan, hand_made(pipeline.transformer, inputs, adapter, 3)[1], inputs
    )
    save_variant(pipeline, student, plan, inputs, tmp_path / "variant")
    (file,) = (tmp_path / "variant").rglob("*.py")
    source = file.read_text()
    assert "factored = (('norm1.linear', 3), ('norm1_context.linear', 3))" in source
    assert "transformer_blocks 0, 1, 2, 3 of the teacher: modulation of rank 3." in source
    # No forward is generated: a block of low rank is called as the stock class is.
    assert "def forward" not in source and len(source.splitlines()) < 130
    assert "Modulation layers of blocks are of low rank" in source
