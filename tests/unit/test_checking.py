"""An adapter that would make another model than its user believes is found before anything is recorded."""

import dataclasses
import re

import odd
import parts
import pictures
import pytest
import tiny
import torch
from diffusers import BriaFiboTransformer2DModel, HiDreamImageTransformer2DModel
from families import FLUX, QWEN_IMAGE, SD3
from runs import DUAL
from strangers import STRANGERS

from ppcl_toolkit.adapter import Adapter, Stack, load_adapter
from ppcl_toolkit.checking.dead import check_dead
from ppcl_toolkit.checking.dropped import check_dropped, intervals
from ppcl_toolkit.checking.forward import check_forward
from ppcl_toolkit.checking.in_place import called_in_place
from ppcl_toolkit.checking.steps import check_steps
from ppcl_toolkit.checking.witness import difference, witnessed
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, Plan, TextRun
from ppcl_toolkit.running.images import run_pipeline
from ppcl_toolkit.running.noising import noising_of, observed
from ppcl_toolkit.running.placement import HOST, Placement
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.surgery.assemble import drop_blocks, reshape
from ppcl_toolkit.surgery.copies import sharing_copy

CHROMA = load_adapter("chroma")
(CHROMA_ROWS,) = CHROMA.tables.values()
SAID = {
    "skip": r"blocks\[3\].* is called with another skip.*between the blocks",
    "changed": r"blocks\[1\].*is called with another hidden_states",
    "gain": r"blocks\[2\].*is called with another hidden_states",
    "tap": r"with blocks\[0,1\] one block that answers as all of them did, the transformer makes another velocity",
    "table": r"table is \[5\] and \[4\] in Odd: it depends on the numbers of blocks",
    **dict.fromkeys(("buffer", "window"), r"table is \[5\] and \[4\] in Odd"),
    "numbered": r"blocks\[2\],.* whose number was 2 and is 1, computes something else",
    "captions": r"captions\.4\.bias",
    "sides": r"calls right\[0\] where the adapter has left\[1\]",
    "refiners": r"blocks\[0\].*is called with another hidden_states.*side by side",
    "memory": r"blocks\[\d\], run after another call of the transformer, returns .* reads something beside",
    "sequence": r"is given a tensor \[3, 2, 8\] as a stream, 'hidden_states': .*\[B, N, D\], here of 2 rows",
    "twice": r"calls blocks\[2\] where the adapter has blocks\[3\]: every block of every stack is to be called once",
}


def checked(runner, call):
    with torch.no_grad():
        witness = check_forward(runner, call)
        check_dead(runner, witness)
        check_dropped(runner, witness)


def test_nothing_is_said_of_a_plain_transformer():
    checked(odd.runner("plain"), odd.call())


@pytest.mark.parametrize("streamed", (False, True))
@pytest.mark.parametrize("family", ("flux", "sd3", "qwen_image"))
def test_nothing_is_said_of_the_shipped_families(family, streamed):
    makes = {
        "flux": (tiny.flux_transformer, FLUX, tiny.flux_inputs()),
        "sd3": (tiny.sd3_transformer, SD3, tiny.sd3_inputs()),
        "qwen_image": (tiny.qwen_image_transformer, QWEN_IMAGE, tiny.qwen_image_inputs(2)),
    }
    make, adapter, call = makes[family]
    checked(Runner(make().requires_grad_(False), adapter, Placement(streamed=streamed)), call)


@pytest.mark.parametrize("kind", [kind for kind in odd.KINDS if kind != "plain"])
def test_what_an_adapter_cannot_tell_is_found(kind):
    with pytest.raises(PpclError, match=SAID[kind]):
        checked(odd.runner(kind), odd.call())


def test_every_kind_is_wrong_without_a_check():
    """What the check is for: one block after another, each of these ends in another velocity than its own."""
    for kind in ("skip", "changed", "gain", "refiners"):
        run = odd.runner(kind)
        with torch.no_grad():
            whole, x = run.velocity(odd.call()), odd.call()["hidden_states"]
            temb = run.transformer.time(odd.call()["timestep"][:, None])
            for block in run.transformer.blocks:
                x = block(x, temb)
            assert not torch.allclose(run.transformer.out(x), whole, atol=1e-2), kind


@pytest.mark.parametrize("path", ("attn.add_k_proj", "attn.to_q", "norm1_context"))
@pytest.mark.parametrize("field", ("text_query", "text_out"))
def test_what_is_alive_is_not_taken_for_dead(field, path):
    wrong = dataclasses.replace(FLUX, stacks=(dataclasses.replace(DUAL, **{field: (path,)}), *FLUX.stacks[1:]))
    run = Runner(tiny.flux_transformer().requires_grad_(False), wrong)
    with pytest.raises(PpclError, match=rf"{field} of transformer_blocks names '{path}'"):
        check_dead(run, witnessed(run, tiny.flux_inputs()))


def test_intervals_reach_every_part_of_a_stack():
    found = [(i.first, i.last) for i in intervals({"a": 7})]
    assert found == [(0, 1), (2, 4), (5, 6)]
    assert [(i.first, i.last) for i in intervals({"a": 2})] == [(0, 1)]
    assert not list(intervals({"a": 1}))


@pytest.mark.parametrize("operations", ("depth", "narrow"))
@pytest.mark.parametrize("family", ("flux", "sd3"))
def test_in_place_is_the_student_where_numbers_do_not_matter(family, operations):
    """Of a sound family the blocks at their old places, and the shorter model, are the same."""
    make, adapter, call = {
        "flux": (lambda: tiny.flux_transformer(6, 3), FLUX, tiny.flux_inputs()),
        "sd3": (lambda: tiny.sd3_transformer(6), SD3, tiny.sd3_inputs()),
    }[family]
    teacher, student = make(), make()
    path = adapter.stacks[0].path
    wanted = [Interval(stack=path, first=1, last=2)]
    if operations == "narrow":
        wanted = [Interval(stack=path, first=0, last=1), FfnSwap(stack=path, block=2, streams=("image", "text"))]
        wanted.append(TextRun(stack=path, reference=2, last=4))
    plan = Plan(family=family, depths=adapter.depths(teacher)).with_operations(wanted)
    reshape(student, adapter, plan, call)
    tiny.randomize(student, seed=9)
    with torch.no_grad():
        assert torch.equal(called_in_place(teacher, adapter, plan, student, call, HOST), student(**call)[0])


def test_in_place_is_what_was_trained_where_numbers_matter():
    """The shorter model is another one; at their places, the blocks are as they learned: by hand, in a loop."""
    run = odd.runner("gain")
    plan = Plan(family="odd_gain", depths={"blocks": 5}, operations=(Interval(stack="blocks", first=1, last=3),))
    student = sharing_copy(run.transformer)
    drop_blocks(student, run.adapter, plan)
    found = called_in_place(run.transformer, run.adapter, plan, student, odd.call(), HOST)
    blocks, x = run.transformer.blocks, odd.call()["hidden_states"]
    temb = run.transformer.time(odd.call()["timestep"][:, None])
    with torch.no_grad():
        for i in range(5):
            x = (x if i in (2, 3) else blocks[i](x, temb)) * (1 + i)
        assert torch.allclose(found, run.transformer.out(x), atol=1e-5)
        assert not torch.allclose(found, student(**odd.call())[0], atol=1e-1)


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    (
        ({"a": 1}, {"a": 1, "b": 2}, r"arguments \['a'\] for \['a', 'b'\]"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, r"a a tensor \[2\] for a tensor \[3\]"),
        ({"a": [1, (torch.ones(2),)]}, {"a": [1, (torch.zeros(2),)]}, r"another a \[1\] \[0\]"),
        ({"a": torch.tensor([1])}, {"a": torch.tensor([2])}, "other a"),
        (None, torch.zeros(1), "None for a tensor"),
    ),
)
def test_differences_are_named(found, expected, said):
    assert re.match(said, difference(found, expected)), difference(found, expected)
    assert not difference(expected, expected)


def test_rounding_is_no_difference():
    x = torch.randn(100)
    assert not difference(x * (1 + 1e-7), x, "x")
    assert difference(x * 1.001, x, "x")


def test_a_check_leaves_the_teacher_as_it_was():
    run = odd.runner("plain")
    before = {name: value.clone() for name, value in run.transformer.state_dict().items()}
    checked(run, odd.call())
    assert len(run.transformer.blocks) == 5 and all("forward" not in vars(b) for b in run.transformer.blocks)
    assert all(torch.equal(value, before[name]) for name, value in run.transformer.state_dict().items())


THOUSANDS = ("wan", "cogview4", "sana", "ltx_video", "hunyuan_video", "hunyuan_image", "bria")
TOLD = {
    **dict.fromkeys(THOUSANDS, (0.0, 1000.0)),
    **dict.fromkeys(("z_image", "lumina2"), (1.0, -1.0)),
    "mochi": (1000.0, -1000.0),
}
"""Offset and scale; of others, the level itself."""


@pytest.mark.parametrize("name", STRANGERS)
def test_nothing_is_said_of_pipelines_of_other_make(name):
    """Z-Image's blocks know their number, and make no use of it."""
    build, asked = STRANGERS[name]
    adapter, pipeline = load_adapter(name), build()
    call = {**asked, "num_inference_steps": 3}
    steps = observed(pipeline, adapter, lambda: run_pipeline(pipeline, ["a"], None, call, "latent"))
    (other,) = observed(pipeline, adapter, lambda: run_pipeline(pipeline, ["two b"], None, call, "latent"), 1)
    check_steps(steps, other, adapter)
    found = noising_of(pipeline.scheduler, adapter, steps)
    assert (found.offset, found.scale) == TOLD.get(name, (0.0, 1.0))
    assert found.kind == ("diffusion" if name in ("pixart", "cogvideox") else "flow")
    checked(Runner(pipeline.transformer, adapter), {**steps[-1].call, "return_dict": False})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, r"mod_proj is \[.*it depends on the numbers of blocks"),
        ({"time_text_embed.mod_proj": lambda kept, _: range(3 * len(kept[CHROMA.stacks[1].path]))}, r"mod_proj is \["),
        (
            {"time_text_embed.mod_proj": lambda kept, depths: range(len(CHROMA_ROWS(kept, depths)))},
            r"with transformer_blocks\[0,1\] one block, transformer_blocks\[0\] is called with another \[0\] temb",
        ),
    ],
)
def test_a_table_by_block_numbers_is_refused_unless_its_rows_are_those_of_the_blocks(tables, message):
    """Chroma's has a shape that depends on the depth, and values that depend on the numbers."""
    call = {k: v for k, v in tiny.flux_inputs().items() if k not in ("pooled_projections", "guidance")}
    checked(Runner(pictures.chroma_transformer(), CHROMA), call)
    with pytest.raises(PpclError, match=message):
        checked(Runner(pictures.chroma_transformer(), dataclasses.replace(CHROMA, tables=tables)), call)


@pytest.mark.parametrize("kind", ("table", "buffer"))
def test_rows_of_a_table_go_with_their_blocks(kind):
    run = odd.runner(kind)
    adapter = dataclasses.replace(run.adapter, tables={"table": lambda kept, _: kept["blocks"]})
    checked(Runner(run.transformer, adapter), odd.call())
    wrong = dataclasses.replace(run.adapter, tables={"table": lambda kept, _: range(len(kept["blocks"]))})
    with pytest.raises(PpclError, match=r"blocks\[2\] is called with another \[0\] captions"):
        checked(Runner(run.transformer, wrong), odd.call())


def test_texts_that_blocks_are_given_anew_are_refused():
    """HiDream puts another layer of its language model behind the text of every block."""
    torch.manual_seed(0)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[32, 16],
        text_emb_dim=32,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1, 2, 3, 3, 3],
    )
    dual = Stack(path="double_stream_blocks", depth_key="num_layers", returns=("image", "text"))
    single = Stack(path="single_stream_blocks", depth_key="num_single_layers", text=None, returns=("image",))
    adapter = Adapter(
        family="hidream",
        transformer="HiDreamImageTransformer2DModel",
        timestep="timesteps",
        stacks=(dual, single),
    )
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timesteps": torch.full((2,), 300.0),
        "encoder_hidden_states_t5": torch.randn(2, 5, 32),
        "encoder_hidden_states_llama3": torch.randn(4, 2, 5, 16),
        "pooled_embeds": torch.randn(2, 32),
        "return_dict": False,
    }
    run = Runner(parts.randomize(transformer).requires_grad_(False), adapter)
    with pytest.raises(PpclError, match=r"double_stream_blocks\[1\].* is called with another encoder_hidden_s"):
        checked(run, call)


def test_texts_that_are_changed_between_blocks_are_refused():
    """FIBO writes a layer of its language model over half of the features of every block's text."""
    torch.manual_seed(0)
    transformer = BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        text_encoder_dim=8,
        axes_dims_rope=[0, 4, 4],
    )
    own = dataclasses.replace(FLUX.stacks[0], modulation=())
    single = Stack(path="single_transformer_blocks", depth_key="num_single_layers", text=None, returns=("image",))
    adapter = Adapter(
        family="fibo",
        transformer="BriaFiboTransformer2DModel",
        shared=("img_ids", "txt_ids"),
        stacks=(own, single),
    )
    call = {
        "hidden_states": torch.randn(2, 6, 4),
        "timestep": torch.full((2,), 300.0),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "text_encoder_layers": [torch.randn(2, 5, 8) for _ in range(6)],
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }
    run = Runner(parts.randomize(transformer).requires_grad_(False), adapter)
    with pytest.raises(PpclError, match=r"transformer_blocks\[1\].* is called with another encoder_hidden_states"):
        checked(run, call)


def test_what_changes_from_step_to_step_is_refused():
    """A distilled HunyuanImage is told the next level, too: of one recorded call that is another one."""
    pipeline, adapter = pictures.hunyuan_image(use_meanflow=True), load_adapter("hunyuan_image")
    _, asked = STRANGERS["hunyuan_image"]
    call = {**asked, "num_inference_steps": 3}
    steps = observed(pipeline, adapter, lambda: run_pipeline(pipeline, ["a"], None, call, "latent"))
    with pytest.raises(PpclError, match="the pipeline passes another timestep_r"):
        check_steps(steps, steps[0], adapter)
