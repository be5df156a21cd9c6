"""Every family from recipe to a stock folder by depth alone, against the teacher in which a test skips the blocks.

Nothing is trained: the first block of an interval stands for all of it, so a smaller model is the teacher without the
rest. It is opened in another process, by diffusers alone.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from pydantic import TypeAdapter
from strangers import STRANGERS

from ppcl_toolkit import algorithm, compress
from ppcl_toolkit.adapter import available_adapters, load_adapter
from ppcl_toolkit.artifacts import variant
from ppcl_toolkit.plan import Operation, Plan
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.stages import evaluate
from ppcl_toolkit.surgery.assemble import count_parameters

OWN = {
    "flux": (tiny.flux_pipeline, {"height": 8, "width": 8, "max_sequence_length": 8}),
    "sd3": (tiny.sd3_pipeline, {"height": 8, "width": 8, "max_sequence_length": 8}),
    "qwen_image": (tiny.qwen_image_pipeline, {"height": 128, "width": 128}),
}
PIPELINES = {**OWN, **STRANGERS}
TEXT_FIRST, IMAGE_FIRST = ("encoder_hidden_states", "hidden_states"), ("hidden_states", "encoder_hidden_states")
ALONE = ("hidden_states",)
DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"
SKIPPED = {
    "flux": {DUAL: ([2, 3], TEXT_FIRST), SINGLE: ([1], TEXT_FIRST)},
    "sd3": {DUAL: ([1], TEXT_FIRST)},
    "qwen_image": {DUAL: ([1, 3], TEXT_FIRST)},
    "aura_flow": {"joint_transformer_blocks": ([1], TEXT_FIRST), SINGLE: ([1], ALONE)},
    "flux2": {DUAL: ([2], TEXT_FIRST), SINGLE: ([1], ALONE)},
    "z_image": {"layers": ([1], ("x",))},
    "wan": {"blocks": ([2], ALONE)},
    "ovis_image": {DUAL: ([1], TEXT_FIRST), SINGLE: ([1], TEXT_FIRST)},
    "longcat_image": {DUAL: ([1], TEXT_FIRST), SINGLE: ([1], TEXT_FIRST)},
    "lumina2": {"layers": ([1, 2], ALONE)},
    "cogview4": {DUAL: ([1], IMAGE_FIRST)},
    "sana": {DUAL: ([2], ALONE)},
    "pixart": {DUAL: ([1], ALONE)},
    "cogvideox": {DUAL: ([2], IMAGE_FIRST)},
    "ltx_video": {DUAL: ([1], ALONE)},
    "hunyuan_video": {DUAL: ([2], IMAGE_FIRST), SINGLE: ([1], IMAGE_FIRST)},
    "mochi": {DUAL: ([1], IMAGE_FIRST)},
    "chroma": {DUAL: ([1], TEXT_FIRST), SINGLE: ([1], ALONE)},
    "bria": {DUAL: ([1], TEXT_FIRST), SINGLE: ([1, 2], TEXT_FIRST)},
    "hunyuan_image": {DUAL: ([2], IMAGE_FIRST), SINGLE: ([1], IMAGE_FIRST)},
    "qwen_image21": {DUAL: ([1, 3], ALONE)},
    "krea2": {DUAL: ([1, 2], ALONE)},
}
"""By stack, the blocks that a test skips, each behind the one that stands for it, and what a block hands on."""

CUSTOM = ("chroma",)
"""Those whose shorter models are none of the stock class: a generated file opens them."""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A process of diffusers alone: its answer to a call, of the transformer in a folder."""
    script = Path(__file__).parent / "oracle.py"
    folder = tmp_path_factory.mktemp("elsewhere")
    # Not beside this package's tests, and not where the package lies.
    child = subprocess.Popen(
        [sys.executable, "-P", str(script)],
        cwd=folder,
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(variant, call, trust=False):
        files = {"call": folder / "call.pt", "answer": folder / "answer.pt"}
        torch.save(call, files["call"])
        asked = {"folder": str(variant), "trust": trust, **{k: str(v) for k, v in files.items()}}
        print(json.dumps(asked), file=child.stdin, flush=True)
        said = json.loads(child.stdout.readline())
        assert not said["error"], said["error"]
        assert said["kind"].startswith("modeling_narrow_" if trust else "diffusers.")
        return torch.load(files["answer"])

    yield ask
    child.stdin.close()
    assert child.wait(60) == 0


def recorded(pipeline, asked):
    """The arguments of the last call of the pipeline's transformer."""
    calls = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    pipeline(prompt="a blue square", output_type="latent", generator=torch.Generator().manual_seed(3), **asked)
    handle.remove()
    args, kwargs = calls[-1]
    call = inspect.signature(pipeline.transformer.forward).bind(*args, **kwargs).arguments
    return {**call, "return_dict": False}


def handing_on(block, names):
    """A forward that returns what it is given under `names`."""
    signature = inspect.signature(block.forward)

    def forward(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        return tuple(given[name] for name in names) if len(names) > 1 else given[names[0]]

    return forward


def by_hand(transformer, skipped, call):
    """The teacher's velocity without the blocks, and how many parameters it has then."""
    params = sum(weight.numel() for weight in transformer.parameters())
    for path, (numbers, names) in skipped.items():
        for number in numbers:
            block = transformer.get_submodule(path)[number]
            params -= sum(weight.numel() for weight in block.parameters())
            block.forward = handing_on(block, names)
    with torch.no_grad():
        made = transformer(**call)[0]
    return torch.stack(made) if isinstance(made, list) else made, params


def only_models(monkeypatch):
    """Leave the report and the memory out of runs: they take time, and are tested elsewhere."""
    monkeypatch.setattr(algorithm, "write_report", lambda _: None)
    monkeypatch.setattr(evaluate, "_resident_growth", lambda *_: None)


def teacher_in(folder, name):
    """Save a family's pipeline and prompts where `recipe_for` has them; return it, and what it is called with."""
    build, asked = PIPELINES[name]
    pipeline = build()
    pipeline.save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("a red circle\nanother\n")
    return pipeline, {**asked, "num_inference_steps": 2}


def left_without(pipeline, asked, name, operations):
    """Count the parameters of a student from which all of the operations have taken theirs."""
    adapter = load_adapter(name)
    gone = TypeAdapter(tuple[Operation, ...]).validate_python(operations)
    plan = Plan(family=name, depths=adapter.depths(pipeline.transformer)).with_operations(gone)
    return count_parameters(pipeline.transformer, adapter, plan, recorded(pipeline, asked))


def recipe_for(folder, asked, given, params, width=()):
    """Nothing is trained, and nothing but the given intervals, and what is given of the width, can go."""
    data = {
        "device": "cpu",
        "teacher": {"path": str(folder / "teacher"), "dtype": "float32", "call": asked},
        "samples": {"prompts": str(folder / "prompts.txt"), "count": 2, "batch": 1},
        "probe": {"batches": 1, "batch": 1},
        "intervals": {"batches": 1, "batch": 1, "strategy": "given", "given": given},
        "targets": [{"name": "small", "params": params, "width": bool(width)}],
        "select": {"batches": 1, "batch": 1},
        "depth": {"steps": 0, "batch": 1},
        "width": {"steps": 0, "batch": 1, "batches": 1, "given": width},
        "finetune": {"steps": 0, "batch": 1},
        "export": {"dtype": "float32"},
        "evaluate": {"prompts": str(folder / "prompts.txt"), "count": 1, "seeds": [0], "velocity_batches": 1},
    }
    return Recipe.model_validate(data)


def intervals_of(skipped):
    """Skipped blocks that follow each other end an interval that begins before them."""
    for path, (numbers, _) in skipped.items():
        for first in (number for number in numbers if number - 1 not in numbers):
            last = next(number for number in range(first, first + 9) if number + 1 not in numbers)
            yield {"stack": path, "first": first - 1, "last": last}


def test_no_family_is_left_out():
    assert set(PIPELINES) == set(SKIPPED) == set(available_adapters())


ONE_RUN = (
    {"kind": "text_run", "stack": DUAL, "reference": 0, "last": 1},
    {"kind": "ffn_swap", "stack": DUAL, "block": 0, "streams": ["image", "text"]},
)
IMAGE_FFN = ({"kind": "ffn_swap", "stack": DUAL, "block": 0, "streams": ["image"]},)
NARROW = {
    **dict.fromkeys(("flux2", "hunyuan_video", "hunyuan_image", "chroma", "bria", "mochi"), ONE_RUN),
    **dict.fromkeys(("sana", "qwen_image21", "krea2"), IMAGE_FFN),
    "z_image": ({"kind": "ffn_swap", "stack": "layers", "block": 2, "streams": ["image"]},),
}
"""What goes of the width, too: text streams, and FFNs, of which Sana's are convolutions and Z-Image's have a norm."""


@pytest.mark.parametrize("name", NARROW)
def test_width_ends_in_a_variant_that_opens(name, tmp_path, monkeypatch):
    """Export compares it, opened in a process of its own, with the trained blocks in the teacher."""
    only_models(monkeypatch)
    pipeline, asked = teacher_in(tmp_path, name)
    params = left_without(pipeline, asked, name, NARROW[name])
    summary = compress(recipe_for(tmp_path, asked, [], params, NARROW[name]), tmp_path / "run")
    (made,) = summary["variants"]
    assert (made["opens"], made["params"]) == ("custom", params)


@pytest.mark.parametrize("name", PIPELINES)
def test_depth_alone_is_the_teacher_without_the_blocks(name, elsewhere, tmp_path, monkeypatch):
    only_models(monkeypatch)

    # What export asks a process of its own, that one answers, too: it has diffusers in memory.
    def given(folder, _, kwargs, *__):
        return {"stock": elsewhere(folder, {**kwargs, "return_dict": False})}

    if name not in CUSTOM:
        monkeypatch.setattr(variant, "_run_elsewhere", given)
    (pipeline, asked), skipped = teacher_in(tmp_path, name), SKIPPED[name]
    call = recorded(pipeline, asked)
    whole, _ = by_hand(pipeline.transformer, {}, call)
    expected, params = by_hand(pipeline.transformer, skipped, call)
    assert not torch.allclose(whole, expected, rtol=1e-2)
    summary = compress(recipe_for(tmp_path, asked, [*intervals_of(skipped)], params), tmp_path / "run")
    (made,) = summary["variants"]
    assert (made["opens"], made["params"]) == ("custom" if name in CUSTOM else "stock", params)
    answered = elsewhere(made["path"], call, name in CUSTOM)
    assert answered.isfinite().all() and answered.std() > 0
    assert torch.equal(answered, expected)
