"""Adapters found by running models: those that are shipped are what is found of their own pipelines, field by field."""

import runpy
import sys
from dataclasses import fields, replace

import diffusers
import odd
import pytest
import strangers
import tiny
from families import FLUX, QWEN_IMAGE, SD3

from ppcl_toolkit.adapter import Adapter, TableRows, available_adapters, load_adapter
from ppcl_toolkit.cli import main
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.kit.building import small
from ppcl_toolkit.kit.depths import depth_keys, index_keys
from ppcl_toolkit.kit.finding import find
from ppcl_toolkit.kit.new import new, of_pipeline
from ppcl_toolkit.kit.writing import adapter_of, write

CALL = {"height": 8, "width": 8, "max_sequence_length": 9}
PIPELINES = {
    "flux": (tiny.flux_pipeline, FLUX, CALL),
    "qwen_image": (tiny.qwen_image_pipeline, QWEN_IMAGE, {"height": 128, "width": 192}),
    "sd3": (tiny.sd3_pipeline, SD3, {**CALL, "guidance_scale": 1.0}),
}
DECIDED = ("transformer", "latents", "timestep", "packs", "shared", "guidance", "stacks")
"""Fields of an adapter that a pipeline shows."""


@pytest.mark.parametrize("family", PIPELINES)
def test_a_shipped_adapter_is_what_is_found_of_its_pipeline(family):
    build, shipped, call = PIPELINES[family]
    found, convention = of_pipeline(build(), call)
    made = adapter_of(found, family, convention)
    for name in DECIDED:
        assert getattr(made, name) == getattr(shipped, name), name


@pytest.mark.parametrize("name", available_adapters())
def test_a_shipped_adapter_is_what_is_found_of_its_class(name):
    shipped = load_adapter(name)
    transformer, call = small(getattr(diffusers, shipped.transformer))
    found = find(transformer, call)
    assert tuple(found.stacks) == tuple(_of_defaults(stack, transformer) for stack in shipped.stacks)
    assert (found.latents, found.timestep) == (shipped.latents, shipped.timestep)


def _of_defaults(stack, transformer):
    """By the defaults of their classes, SD3 has no norm of queries, and AuraFlow's has no weights."""
    modules = dict(stack.blocks(transformer)[0].named_modules())
    query = (path for path in stack.text_query if path in modules and list(modules[path].parameters()))
    return replace(stack, text_query=tuple(query))


@pytest.mark.parametrize("family", ("aura_flow", "flux2", "z_image", "wan"))
def test_other_families_are_found_as_written_by_hand(family):
    by_hand, (build, call) = load_adapter(family), strangers.STRANGERS[family]
    found, _ = of_pipeline(build(), {**call, "max_sequence_length": 19})
    assert (found.latents, found.timestep) == (by_hand.latents, by_hand.timestep)
    for mine, own in zip(found.stacks, by_hand.stacks, strict=True):
        for name in ("path", "depth_key", "index_keys", "image", "text", "returns"):
            assert getattr(mine, name) == getattr(own, name), name


def test_what_surgery_refuses_is_left_out_and_said():
    found = find(*small(diffusers.AuraFlowTransformer2DModel))
    assert [stack.ffn for stack in found.stacks] == [{}, {}]
    said = found.notes["joint_transformer_blocks"]
    assert said[0].startswith("ffn: ff stays as it is: AuraFlowJointTransformerBlock cannot become")
    assert "a linear map would delete the attention" in said[0]
    assert found.stacks[0].joint_attention == "attn"


def test_stacks_that_share_a_depth_are_left_out_and_said():
    found = find(*small(diffusers.Lumina2Transformer2DModel))
    assert [stack.path for stack in found.stacks] == ["layers"]
    assert found.notes["noise_refiner"] == ["left out: num_refiner_layers is the depth of context_refiner, too"]


def test_depths_are_found_by_changing_them():
    transformer = tiny.flux_transformer(3, 3)
    assert depth_keys(transformer) == {
        "num_layers": ["transformer_blocks"],
        "num_single_layers": ["single_transformer_blocks"],
    }
    assert index_keys(tiny.sd3_transformer(), "transformer_blocks") == ("dual_attention_layers",)
    assert index_keys(transformer, "transformer_blocks") == ()


def test_weights_that_depend_on_the_depth_ask_for_a_remap():
    """SD3's last block has no text output; with a block more, it has."""
    found = find(tiny.sd3_transformer(), tiny.sd3_inputs())
    (said,) = found.notes["transformer_blocks"]
    assert said.startswith(
        "DECIDE: `remap`: where this stack has another depth, so are transformer_blocks.3.attn.to_add_out"
    )
    assert find(tiny.flux_transformer(), tiny.flux_inputs()).notes == {}


def test_rows_of_a_table_are_those_of_the_blocks_that_read_them(tmp_path, monkeypatch):
    """Chroma: one table of modulation for all blocks. In a table of one row each, it may be read from its end."""
    found, shipped = find(*small(diffusers.ChromaTransformer2DModel)), load_adapter("chroma")
    assert found.tables == shipped.tables
    assert not {stack.path for stack in found.stacks} & found.notes.keys()
    (tmp_path / "written_chroma.py").write_text(write(found, "chroma", "a class", None))
    monkeypatch.syspath_prepend(tmp_path)
    assert load_adapter("written_chroma:ADAPTER").tables == shipped.tables
    for kind in ("table", "buffer"):
        assert find(odd.runner(kind).transformer, odd.call()).tables == {"table": TableRows((("blocks", 1),))}


def test_rows_that_stay_are_those_of_the_blocks_that_do():
    """By hand, of six rows of two blocks, four of two others, and one of none."""
    rows = TableRows((("a", 3), ("b", 2), (None, 1)))
    assert rows({"a": [0, 1], "b": [0, 1]}, {"a": 2, "b": 2}) == [*range(11)]
    assert rows({"a": [1], "b": [0]}, {"a": 2, "b": 2}) == [3, 4, 5, 6, 7, 10]


def test_a_forward_that_goes_by_block_numbers_is_said():
    """Rows of a table that two blocks read each are nobody's."""
    found = find(odd.runner("window").transformer, odd.call())
    assert found.tables == {}
    assert found.notes["blocks"][0].startswith("DECIDE: each block is given captions of its own, by its number")


def test_what_is_written_is_an_adapter(tmp_path, monkeypatch):
    found, convention = of_pipeline(tiny.flux_pipeline(), CALL)
    (tmp_path / "written_flux.py").write_text(write(found, "flux", "a pipeline", convention))
    monkeypatch.syspath_prepend(tmp_path)
    made = load_adapter("written_flux:ADAPTER")
    assert made == adapter_of(found, "flux", convention)
    optional = {"models", "others", "decoding", "example", "noised", "dtype"}
    assert all(getattr(made, f.name) == getattr(FLUX, f.name) for f in fields(Adapter) if f.name not in optional)
    undecided = write(found, "flux", "a class", None)
    assert undecided.count("# DECIDE:") == 2


def test_as_many_tokens_of_text_as_of_image_cannot_be_told_apart():
    transformer, inputs = tiny.flux_transformer(), tiny.flux_inputs(image_tokens=9, text_tokens=9)
    with pytest.raises(PpclError, match="image and text have 9 tokens each in transformer_blocks: take another size"):
        find(transformer, inputs)


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["ppcl", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capsys.readouterr()


def test_the_command_writes_a_file_for_a_folder_and_for_a_class(tmp_path, monkeypatch, capsys):
    tiny.flux_pipeline(2, 2).save_pretrained(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    calls = [word for name, value in CALL.items() for word in ("--call", f"{name}={value}")]
    code, out, _ = run(monkeypatch, capsys, "adapters", "new", "teacher", "--out", "mine.py", *calls)
    assert code == 0
    assert (
        out.splitlines()[-1] == "mine.py: adapter: mine:ADAPTER in a recipe beside it; test_mine.py tries what it says"
    )
    assert runpy.run_path("mine.py")["ADAPTER"].stacks == FLUX.stacks
    code, out, _ = run(monkeypatch, capsys, "adapters", "new", "QwenImageTransformer2DModel")
    assert code == 0
    assert "DECIDE: whether the pipeline packs latents" in out
    assert "DECIDE: `shared`: what the pipeline passes without a batch dimension; not passed here: " in out
    assert runpy.run_path("qwen_image.py")["ADAPTER"].stacks == QWEN_IMAGE.stacks
    code, _, err = run(monkeypatch, capsys, "adapters", "new", "QwenImageTransformer2DModel")
    assert (code, err) == (1, "error: qwen_image.py exists already; name another file with --out\n")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("NoSuchModel", "transformer 'NoSuchModel': diffusers has no such class"),
        (
            "AutoencoderKL",
            "AutoencoderKL: no stack of blocks was found: encoder.mid_block.resnets: left out: other blo",
        ),
        ("OmniGenTransformer2DModel", "OmniGenTransformer2DModel cannot be made of its defaults; give the folder of a"),
        (
            "CosmosTransformer3DModel",
            "no small CosmosTransformer3DModel and call .* furthest ended with .*; give the folder of a pipeline",
        ),
    ],
)
def test_what_is_no_transformer_is_one_sentence(source, said):
    with pytest.raises(PpclError, match=said):
        new(source, {})


def test_only_what_is_not_the_default_is_written():
    text = write(find(tiny.flux_transformer(), tiny.flux_inputs()), "flux", "a class", None)
    assert "image=" not in text and "attention_text=" not in text
    assert text.count("returns=") == 0 and text.count("depth_key=") == 2
