"""Every field of an adapter that can be looked up: one wrong at a time is one sentence that names it."""

from dataclasses import replace

import pytest
import tiny
from families import FLUX, QWEN_IMAGE, SD3, TRANSFORMERS
from torch import nn

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.artifacts import pipeline as opening
from ppcl_toolkit.artifacts.pipeline import load_teacher
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.recipe import Recipe
from ppcl_toolkit.running.capture import run_block, stack_calls
from ppcl_toolkit.running.fields import check_fields
from ppcl_toolkit.running.record import denoised

DUAL, SINGLE = FLUX.stacks
WRONG = [
    ({"path": "transformer_block"}, "path: FluxTransformer2DModel has no module 'transformer_block', did you mean "),
    ({"path": "x"}, "path: .* no module 'x'; lists of modules: transformer_blocks, single_transformer_blocks"),
    (
        {"path": "time_text_embed"},
        r"path: time_text_embed is a CombinedTimestepGuidanceTextProjEmbeddings, not an nn.ModuleList; lists of "
        r"modules of FluxTransformer2DModel: transformer_blocks \(4 of FluxTransformerBlock\), single_transformer_",
    ),
    ({"depth_key": "layers"}, "depth_key: the config has no 'layers', did you mean 'num_layers'?.*; 4, the blocks of "),
    ({"depth_key": "blocks"}, "depth_key: the config has no 'blocks'; keys: patch_size.* is what .*num_layers say"),
    (
        {"depth_key": "patch_size"},
        "depth_key: patch_size is 1, and transformer_blocks has 4 blocks; .*num_layers say",
    ),
    ({"index_keys": ("dual_layers",)}, "index_keys: the config has no 'dual_layers'"),
    ({"index_keys": ("num_layers",)}, "index_keys: num_layers is 4, not a list of block numbers"),
    ({"image": "hidden"}, "image of transformer_blocks: the forward of FluxTransformerBlock has no argument 'hidden'"),
    ({"image": "hidden_state"}, "'hidden_state', did you mean 'hidden_states'"),
    ({"text": "context"}, "text of transformer_blocks: .* no argument 'context'; arguments: hidden_states, encoder_h"),
    ({"text": None}, "returns of transformer_blocks: 'text' is none of its streams, image"),
    ({"text_mask": "mask"}, "text_mask: the forward of FluxTransformer2DModel has no argument 'mask'"),
    (
        {"returns": ("image", "text")},
        r"returns of .*: \('image', 'text'\), and the forward of FluxTransformerBlock ",
    ),
    ({"returns": ("image",)}, "returns of .* returns encoder_hidden_states, hidden_states$"),
    ({"returns": ("text", "picture")}, "returns of transformer_blocks: 'picture' is none of its streams, image, text"),
    ({"returns": ("text", "text")}, "returns of .* must have the image, and no stream twice"),
    ({"ffn": {"image": "ffn"}}, "ffn of .*: FluxTransformerBlock has no module 'ffn'"),
    ({"ffn": {"image": "ff_contxt"}}, "'ff_contxt', did you mean 'ff_context'"),
    ({"ffn": {"picture": "ff"}}, "ffn of transformer_blocks: 'picture' is none of its streams, image, text"),
    ({"joint_attention": "attention"}, "joint_attention of .*: FluxTransformerBlock has no module 'attention'"),
    (
        {"joint_attention": "ff"},
        "attention_text of .*: the forward of ff, a FeedForward, has no argument 'encoder_",
    ),
    ({"attention_text": "text"}, "attention_text of .*: the forward of attn, a FluxAttention, has no argument 'text'"),
    ({"text_query": ("attn.to_add_q",)}, "text_query of .* has no module 'attn.to_add_q', did you mean 'attn.to_"),
    ({"text_query": ("add_q_proj",)}, "text_query of .* no module 'add_q_proj', did you mean 'attn.add_q_proj'"),
    ({"text_out": ("attn.out",)}, "text_out of .* has no module 'attn.out'"),
    ({"modulation": ("norm1.lin",)}, "modulation of .* no module 'norm1.lin', did you mean 'norm1.linear'"),
    ({"modulation": ("norm1",)}, "modulation of transformer_blocks: norm1 is a AdaLayerNormZero, not an nn.Linear"),
]
WHOLE = [
    (
        {"latents": "latents"},
        "latents: the forward of FluxTransformer2DModel has no argument 'latents'; arguments",
    ),
    ({"timestep": "timesteps"}, "timestep: .* no argument 'timesteps', did you mean 'timestep'"),
    ({"shared": ("img_ids", "text_ids")}, "shared: .* no argument 'text_ids', did you mean 'txt_ids'"),
    ({"tables": {"mod_proj": sorted}}, "tables: FluxTransformer2DModel has no buffer 'mod_proj'; buffers: none"),
    ({"stacks": ()}, r"stacks is empty; lists of modules of FluxTransformer2DModel: transformer_blocks \(4 of Flux"),
    ({"stacks": (DUAL, DUAL)}, "two stacks have the path 'transformer_blocks'; its blocks are those of one stack"),
    (
        {"stacks": (DUAL, replace(SINGLE, depth_key="num_layers"))},
        "two stacks have the depth_key 'num_layers'; its blocks change together: name one of the stacks",
    ),
]


@pytest.fixture(scope="module")
def transformer():
    return tiny.flux_transformer(4, 3)


def changed(change) -> Adapter:
    whole = {"latents", "timestep", "shared", "tables", "stacks"}
    return replace(FLUX, **change) if change.keys() & whole else with_stack(change)


def with_stack(change) -> Adapter:
    return replace(FLUX, stacks=(replace(DUAL, **change), SINGLE))


@pytest.mark.parametrize(("change", "said"), [*WRONG, *WHOLE], ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_one_sentence(transformer, change, said):
    with pytest.raises(PpclError, match=f"^adapter 'flux': .*{said}") as caught:
        check_fields(changed(change), transformer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_shipped_adapters_are_right(family):
    transformer, adapter, _ = TRANSFORMERS[family]()
    check_fields(adapter, transformer)


def test_a_stack_whose_blocks_differ_is_looked_up_in_all_of_them():
    """SD3's first block has a second attention here, its last one no text FFN."""
    transformer = tiny.sd3_transformer()
    (stack,) = SD3.stacks
    check_fields(replace(SD3, stacks=(replace(stack, modulation=("norm1.linear", "attn2.to_q")),)), transformer)
    transformer.transformer_blocks[0], transformer.transformer_blocks[3] = (
        transformer.transformer_blocks[3],
        transformer.transformer_blocks[0],
    )
    check_fields(SD3, transformer)


def test_a_teacher_is_looked_up_before_anything_else(tmp_path, monkeypatch):
    tiny.flux_pipeline(1, 1).save_pretrained(tmp_path)
    asked = {"teacher": {"path": str(tmp_path)}, "targets": [{"name": "a", "params": "50%"}]}
    wrong = with_stack({"depth_key": "layers"})
    monkeypatch.setattr(opening, "adapter_for", lambda *_: wrong)
    with pytest.raises(PpclError, match="adapter 'flux': depth_key: the config has no 'layers'"):
        load_teacher(Recipe.model_validate(asked))


class Elsewhere(nn.Module):
    """Returns what no reader of its source can tell."""

    def forward(self, hidden_states, encoder_hidden_states):
        outputs = [encoder_hidden_states, hidden_states, None]
        return tuple(outputs)


def test_what_cannot_be_read_is_found_when_a_block_runs():
    transformer, adapter, inputs = TRANSFORMERS["qwenimage"]()
    (stack,) = QWEN_IMAGE.stacks
    calls = stack_calls(transformer, adapter, stack.path, inputs)
    with pytest.raises(PpclError, match="returns of transformer_blocks: .* its blocks return Tensor, Tensor, NoneType"):
        run_block(Elsewhere(), stack, {}, calls.streams)


def test_a_missing_shared_is_named_when_the_pipeline_is_recorded():
    pipeline = tiny.flux_pipeline(1, 1)
    call = {"height": 8, "width": 8, "num_inference_steps": 1, "max_sequence_length": 8}
    said = "the pipeline passes 8 of txt_ids for 1 samples: name it in the adapter's `shared` where"
    with pytest.raises(PpclError, match=said):
        denoised(pipeline, replace(FLUX, shared=("img_ids",)), ["a"], call, 0)


def test_a_norm_that_a_config_does_without_is_no_mistake():
    """SD3 medium, unlike SD3.5, normalises no queries."""
    transformer = tiny.sd3_transformer()
    for block in transformer.transformer_blocks:
        block.attn.norm_added_q = None
    check_fields(SD3, transformer)
