"""A teacher opens with its adapter and its history, or the reason why not is one line."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import strangers
import tiny
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from runs import DUAL, FLUX, SINGLE, batches, equal
from safetensors.torch import load_file, save_file

from ppcl_toolkit.artifacts.pipeline import load_pipeline, load_teacher, resolve
from ppcl_toolkit.artifacts.variant import save_variant
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, Plan
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.surgery.assemble import reshape

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def load(path, **recipe):
    teacher = {"path": str(path), "dtype": "float32"}
    return load_teacher(
        Recipe.model_validate({"teacher": teacher, "targets": [{"name": "a", "params": "50%"}], **recipe})
    )


def refusal(path, **recipe):
    with pytest.raises(PpclError) as caught:
        load(path, **recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved_variant(folder, *operations):
    pipeline = tiny.flux_pipeline(3, 2)
    plan = Plan(family="flux", depths=FLUX.depths(pipeline.transformer), teacher="the first").with_operations(
        operations
    )
    reshape(pipeline.transformer, FLUX, plan, batches()[0])
    save_variant(pipeline, pipeline.transformer, plan, batches()[0], folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "flux"
    tiny.flux_pipeline(2, 1).save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory is mapped")
@pytest.mark.parametrize(("dtype", "read"), [("float32", True), ("bfloat16", False)])
def test_weights_lie_in_their_files_unless_they_are_converted(saved, dtype, read):
    pipeline = load_teacher(
        Recipe.model_validate(
            {"teacher": {"path": str(saved), "dtype": dtype}, "targets": [{"name": "a", "params": "50%"}]}
        )
    ).pipeline
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in lines if line[-1].endswith(".safetensors")]
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        weights = list(getattr(pipeline, name).parameters())
        mapped = [any(start <= w.data_ptr() < end for start, end in spans) for w in weights]
        assert sum(mapped) > 0.9 * len(mapped) if read else not any(mapped), name


@pytest.fixture
def broken(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "flux")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_teacher_comes_with_its_adapter_and_a_fingerprint(saved, broken):
    teacher = load(saved)
    assert teacher.adapter is FLUX
    assert teacher.source.startswith(f"{saved}#")
    assert not any(parameter.requires_grad for parameter in teacher.transformer.parameters())
    assert not teacher.transformer.training
    plan = teacher.plan()
    assert (plan.family, plan.depths, plan.history) == ("flux", {DUAL.path: 2, SINGLE.path: 1}, ())
    assert load(saved).source == teacher.source
    copied = load(broken).source
    assert copied.split("#")[1] == teacher.source.split("#")[1]
    assert load(saved, adapter="flux").adapter is FLUX


def test_pickled_weights_are_not_read(broken):
    torch.save(load_file(broken / WEIGHTS), broken / "transformer" / "diffusion_pytorch_model.bin")
    (broken / WEIGHTS).unlink()
    assert "safetensors" in refusal(broken)


def test_the_embedded_teacher_is_named_shapes():
    assert resolve("shapes").endswith("teacher")
    assert resolve("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"


def test_loading_says_nothing(saved, capsys):
    load_pipeline(str(saved))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Loading" not in captured.err


def test_a_pipeline_without_a_transformer_is_refused(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    assert "is a DDPMPipeline without a transformer: nothing here to compress" in refusal(tmp_path / "ddpm")


def test_a_folder_whose_transformer_is_missing_is_refused(broken):
    shutil.rmtree(broken / "transformer")
    assert str(broken) in refusal(broken)


def test_a_pipeline_that_names_no_transformer_is_refused(broken):
    index = json.loads((broken / "model_index.json").read_text())
    index["transformer"] = [None, None]
    (broken / "model_index.json").write_text(json.dumps(index))
    assert str(broken) in refusal(broken)


@pytest.mark.parametrize("made", ["empty", "file", "transformer alone", "nothing"])
def test_what_is_no_pipeline_is_refused(saved, tmp_path, made):
    path = tmp_path / "thing"
    if made == "empty":
        path.mkdir()
    elif made == "file":
        path.write_text("not a folder")
    elif made == "transformer alone":
        shutil.copytree(saved / "transformer", path)
    message = refusal(path)
    assert str(path) in message
    assert "cannot be opened as a pipeline" in message if made == "nothing" else "is no diffusers pipeline" in message


@pytest.mark.parametrize("name", [WEIGHTS, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_truncated_weights_are_refused(broken, name):
    cut(broken / name)
    message = refusal(broken)
    assert str(broken) in message
    assert "damaged or truncated" in message


def test_corrupt_weights_are_refused(broken):
    content = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(b"\xff" * 64 + content[64:])
    assert "cannot be opened as a pipeline" in refusal(broken)


def test_a_config_of_other_weights_is_refused(broken):
    config = broken / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 4}))
    assert "the transformer's files lack" in refusal(broken)


def test_a_wrong_adapter_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "other_family.py").write_text(
        "from ppcl_toolkit.adapter import Adapter\nOTHER = Adapter(family='other', transformer='Other', stacks=())\n"
    )
    message = refusal(saved, adapter="other_family:OTHER")
    assert message == "adapter 'other_family:OTHER' is for Other, the teacher has a FluxTransformer2DModel"
    assert "unknown adapter 'fluxx'; available: " in refusal(saved, adapter="fluxx")


def test_the_plan_of_a_teacher_names_no_code_before_anything_is_made(broken):
    depths = {"transformer_blocks": 3, "single_transformer_blocks": 2}
    Plan(family="stranger:ADAPTER", depths=depths).save(broken / "plan.json")
    assert "'stranger:ADAPTER', which is code" in refusal(broken)


def test_a_quantised_teacher_is_refused(saved, monkeypatch):
    import ppcl_toolkit.artifacts.pipeline as module

    pipeline = load_pipeline(str(saved))
    pipeline.transformer.is_quantized = True
    monkeypatch.setattr(module, "load_pipeline", lambda *_, **__: pipeline)
    assert "a quantised teacher cannot be distilled" in refusal(saved)


def test_quantised_weights_are_refused_before_they_are_loaded(broken):
    config = broken / "transformer" / "config.json"
    quantised = {**json.loads(config.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}}
    config.write_text(json.dumps(quantised))
    assert "a quantised teacher cannot be distilled" in refusal(broken)
    assert "config says bitsandbytes" in refusal(broken)


def test_weights_of_other_types_are_refused(saved, monkeypatch):
    import ppcl_toolkit.artifacts.pipeline as module

    pipeline = load_pipeline(str(saved))
    pipeline.transformer.proj_out.to(torch.float8_e4m3fn)
    monkeypatch.setattr(module, "load_pipeline", lambda *_, **__: pipeline)
    assert "proj_out.weight is a Tensor of torch.float8_e4m3fn" in refusal(saved)


def test_lora_adapters_are_refused_with_what_to_do(broken):
    state = load_file(broken / WEIGHTS)
    name = "transformer_blocks.0.attn.to_q"
    state[f"{name}.base_layer.weight"] = state.pop(f"{name}.weight")
    state[f"{name}.lora_A.default.weight"] = torch.zeros(4, 32)
    save_file(state, broken / WEIGHTS, metadata={"format": "pt"})
    message = refusal(broken)
    assert "LoRA adapters beside its weights" in message
    assert "pipeline.fuse_lora()" in message
    assert f"{name}.lora_A.default.weight" in message


def test_lora_adapters_in_memory_are_refused(saved, monkeypatch):
    import ppcl_toolkit.artifacts.pipeline as module

    pipeline = load_pipeline(str(saved))
    pipeline.transformer.proj_out.add_module("lora_A", torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2)}))
    monkeypatch.setattr(module, "load_pipeline", lambda *_, **__: pipeline)
    assert "the transformer has proj_out.lora_A.default.weight" in refusal(saved)


def test_a_depth_only_variant_is_a_teacher_with_a_history(tmp_path):
    folder = saved_variant(tmp_path / "small", Interval(stack=DUAL.path, first=0, last=1))
    teacher = load(folder)
    assert teacher.plan().depths == {DUAL.path: 2, SINGLE.path: 2}
    later = teacher.plan().with_operations([Interval(stack=SINGLE.path, first=0, last=1)])
    whole = teacher.whole(later)
    assert [entry["teacher"] for entry in whole.history] == ["the first", teacher.source]
    assert {str(o) for o in whole.operations} == {f"{DUAL.path}[0,1]", f"{SINGLE.path}[0,1]"}
    assert equal(load_pipeline(str(folder)).transformer.state_dict(), teacher.transformer.state_dict())
    cut(folder / WEIGHTS)
    assert "diffusion_pytorch_model.safetensors" in refusal(folder)
    (folder / "manifest.json").unlink()
    (folder / "plan.json").write_text('{"family": 3}')
    assert "plan.json is not a plan" in refusal(folder)


def test_a_narrow_variant_is_a_teacher_of_which_depth_can_go(tmp_path):
    folder = saved_variant(tmp_path / "narrow", FfnSwap(stack=DUAL.path, block=0, streams=("image", "text")))
    teacher = load(folder)
    assert not any(stack.ffn or stack.joint_attention for stack in teacher.adapter.stacks)
    assert [stack.path for stack in teacher.adapter.stacks] == [DUAL.path, SINGLE.path]
    assert not teacher.whole(teacher.plan()).is_depth_only


def test_a_pipeline_of_two_transformers_is_refused(tmp_path):
    """Wan 2.2 A14B: one of them would learn at levels of noise that it is never given."""
    pipeline = strangers.wan_pipeline()
    pipeline.register_modules(transformer_2=pipeline.transformer)
    pipeline.save_pretrained(tmp_path)
    assert "is a WanPipeline with two transformers" in refusal(tmp_path)
