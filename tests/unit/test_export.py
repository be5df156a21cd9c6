"""Exported folders hold the student bit by bit, and open as their users will open them."""

import json

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from runs import DUAL, FLUX, SINGLE, batches, desk, equal
from safetensors.torch import load_file

from ppcl_toolkit.artifacts.pipeline import CALL as CALL_FILE
from ppcl_toolkit.artifacts.variant import load_compressed
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, Plan
from ppcl_toolkit.stages import export as stage
from ppcl_toolkit.stages.export import Variant, export
from ppcl_toolkit.surgery.assemble import reshape

DEPTH = (Interval(stack=DUAL.path, first=0, last=1), Interval(stack=SINGLE.path, first=0, last=1))
CALL = {"height": 8, "width": 8}
WIDTH = (*DEPTH, FfnSwap(stack=DUAL.path, block=2, streams=("image", "text")))


@pytest.fixture(scope="module")
def pipeline():
    return tiny.flux_pipeline(3, 2)


def exported(pipeline, folder, operations, dtype="float32"):
    transformer = pipeline.transformer
    plan = Plan(family="flux", depths=FLUX.depths(transformer)).with_operations(operations)
    student = tiny.flux_transformer(3, 2)
    reshape(student, FLUX, plan, batches()[0])
    tiny.randomize(student, seed=3)
    variant = Variant(name="small", folder=folder / "variants" / "small", plan=plan, step=plan, dtype=dtype, call=CALL)
    seen = []
    export((pipeline, FLUX), student, variant, batches()[0], desk(folder / "record", seen))
    assert [step[:2] for step in seen] == [(1, 2), (2, 2)]
    return student, variant, variant.read(folder / "record")


def test_a_depth_only_variant_is_a_stock_folder_of_the_same_bits(pipeline, tmp_path):
    student, variant, found = exported(pipeline, tmp_path, DEPTH)
    assert {key: found[key] for key in ("name", "path", "opens")} == {
        "name": "small",
        "path": str(variant.folder),
        "opens": "stock",
    }
    assert found["difference"] < 1e-4
    opened = DiffusionPipeline.from_pretrained(variant.folder)
    assert type(opened.transformer).__module__.startswith("diffusers.")
    assert (opened.transformer.config.num_layers, opened.transformer.config.num_single_layers) == (2, 1)
    assert equal(student.state_dict(), opened.transformer.state_dict())
    assert equal(pipeline.vae.state_dict(), opened.vae.state_dict())
    assert Plan.load(variant.folder / "plan.json") == variant.plan
    assert json.loads((variant.folder / CALL_FILE).read_text()) == CALL
    # The teacher's pipeline is what it was.
    assert pipeline.transformer.config.num_layers == 3


def test_a_width_pruned_variant_is_custom_and_opens(pipeline, tmp_path):
    student, variant, found = exported(pipeline, tmp_path, WIDTH)
    assert found["opens"] == "custom"
    opened = load_compressed(variant.folder)
    assert equal(student.state_dict(), opened.transformer.state_dict())
    index = json.loads((variant.folder / "model_index.json").read_text())
    assert index["transformer"][1] != "FluxTransformer2DModel"


def test_weights_take_the_type_of_the_recipe(pipeline, tmp_path):
    student, variant, found = exported(pipeline, tmp_path, DEPTH, "bfloat16")
    written = load_file(variant.folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert equal({n: v.bfloat16() for n, v in student.state_dict().items()}, written)
    texts = load_file(variant.folder / "text_encoder" / "model.safetensors")
    # The other parts stay what they are.
    assert {value.dtype for value in texts.values()} == {torch.float32}
    assert next(pipeline.vae.parameters()).dtype == torch.float32
    assert next(student.parameters()).dtype == torch.float32
    assert found["opens"] == "stock"


def test_what_a_killed_export_left_is_made_again(pipeline, tmp_path):
    folder = tmp_path / "variants" / "small"
    folder.mkdir(parents=True)
    (folder / "half-written").touch()
    _, variant, _ = exported(pipeline, tmp_path, DEPTH)
    assert not (variant.folder / "half-written").exists()


def test_a_variant_that_computes_something_else_is_refused(pipeline, tmp_path, monkeypatch):
    save = stage.save_variant

    def wrong(pipeline, student, *rest, **options):
        with torch.no_grad():
            student.proj_out.weight.mul_(1.5)
        return save(pipeline, student, *rest, **options)

    monkeypatch.setattr(stage, "save_variant", wrong)
    with pytest.raises(PpclError, match=r"small, opened as stock, differs by .*, more than"):
        exported(pipeline, tmp_path, DEPTH)
    assert not (tmp_path / "record" / "variant.json").exists()


def test_a_variant_that_is_gone_is_one_sentence(tmp_path):
    plan = Plan(family="flux", depths={DUAL.path: 3, SINGLE.path: 2})
    variant = Variant(name="small", folder=tmp_path / "small", plan=plan, step=plan, dtype="float32", call=CALL)
    with pytest.raises(PpclError, match=r"small is gone; delete .*record to export it again"):
        variant.read(tmp_path / "record")
