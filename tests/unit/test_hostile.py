"""What is kept, numbered or changed where an adapter does not look is found before anything is recorded."""

from dataclasses import replace

import hostile
import pytest
import tiny
import torch
from families import FLUX, QWEN_IMAGE, SD3

from ppcl_toolkit.checking.alone import check_mask
from ppcl_toolkit.checking.dead import check_networks
from ppcl_toolkit.checking.dropped import check_dropped
from ppcl_toolkit.checking.forward import check_forward
from ppcl_toolkit.checking.steps import check_steps
from ppcl_toolkit.checking.witness import witnessed
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.images import run_pipeline
from ppcl_toolkit.running.noising import noising_of, observed
from ppcl_toolkit.running.schedule import Runner

_NUMBERED = r"blocks\[2\], whose %s was .* and is .*, computes something else: it depends on the numbers of blocks"
SAID = {
    "late": r"blocks\[3\], run after .* is called with another hidden_states",
    "list": _NUMBERED % "gains",
    "private": _NUMBERED % "_gain",
    "object": _NUMBERED % "processor",
    "tensor": _NUMBERED % "gain",
    "buffer": _NUMBERED % "gain",
    "config": _NUMBERED % "gain",
    "attribute": r"blocks\[\d\], run after another call of the transformer, returns another image .* reads something",
    "counts": "two calls with the same arguments make another velocity",
    "dropout": "two calls with the same arguments make another velocity .*is it in training mode",
    "half": r"blocks\[4\].* is called with another hidden_states",
    "in_place": r"blocks\[0\] changes what it is given in place \(there is another hidden_states",
    "asserts": r"with blocks\[0,1\] one block: Hostile cannot be made with fewer blocks \(AssertionError: one gain for",
    "conditioned": r"blocks\[1\].* is called with another temb",
    "tap": r"with blocks\[4,5\] one block that answers as all of them did, the transformer makes another velocity",
    "scale": r"with blocks\[0,1\] one block that answers .* the transformer makes another velocity",
}
SWAPPED = {
    "returns of blocks: its blocks return the streams in the other order": {"returns": ("image", "text")},
    "image of blocks: 'encoder_hidden_states' does not change with the latents, and 'hidden_states', its text, does": {
        "image": "encoder_hidden_states",
        "text": "hidden_states",
        "returns": ("image", "text"),
    },
}
CALL = {"height": 8, "width": 8, "num_inference_steps": 3, "max_sequence_length": 8}


def checked(runner, call):
    check_dropped(runner, check_forward(runner, call))


@pytest.mark.parametrize("kind", SAID)
def test_what_is_hidden_is_found(kind):
    with pytest.raises(PpclError, match=f"^adapter hostile_{kind}: .*{SAID[kind]}") as caught:
        checked(hostile.runner(kind), hostile.call())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ("plain", "kwargs"))
def test_nothing_is_said_of_what_is_sound(kind):
    """Arguments of any name are arguments too."""
    checked(hostile.runner(kind), hostile.call())
    checked(hostile.pairs(), hostile.pair_call())


@pytest.mark.parametrize("said", SWAPPED)
def test_streams_of_one_shape_are_told_apart(said):
    with pytest.raises(PpclError, match=said):
        checked(hostile.pairs(**SWAPPED[said]), hostile.pair_call())


@pytest.mark.parametrize("kind", ("list", "private", "object", "tensor", "buffer"))
def test_a_shorter_model_of_what_is_hidden_is_another_one(kind):
    """What the check is for: the stock class of fewer blocks, with the weights of those that are left."""
    teacher, short = hostile.runner(kind).transformer, hostile.Hostile(num_layers=5, kind=kind)
    del teacher.blocks[1]
    short.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        assert not torch.allclose(teacher(**hostile.call())[0], short(**hostile.call())[0], atol=1e-3)


@pytest.mark.parametrize(
    ("ffn", "said"),
    (
        (
            {"image": "ff_context", "text": "ff"},
            "'ff_context' for the image, and without it block 1 has another text$",
        ),
        (
            {"image": "attn.add_k_proj"},
            "'attn.add_k_proj' for the image, and without it .* text and another image",
        ),
    ),
)
def test_a_network_is_that_of_its_stream(ffn, said):
    runner = Runner(
        tiny.flux_transformer(2, 2).requires_grad_(False),
        replace(FLUX, stacks=(replace(FLUX.stacks[0], ffn=ffn), FLUX.stacks[1])),
    )
    with pytest.raises(PpclError, match=f"^adapter flux: ffn of transformer_blocks names {said}"):
        check_networks(runner, witnessed(runner, tiny.flux_inputs()))


def test_a_remap_that_leaves_other_weights_is_one_sentence():
    """Without `index_keys`, SD3's second attentions are those of other blocks."""
    wrong = replace(SD3, stacks=(replace(SD3.stacks[0], index_keys=()),))
    runner = Runner(tiny.sd3_transformer().requires_grad_(False), wrong)
    with pytest.raises(PpclError, match=r"^adapter sd3: with transformer_blocks\[0,1\] one block: .*remap.* leaves"):
        check_dropped(runner, witnessed(runner, tiny.sd3_inputs()))


def test_a_mask_of_the_padding_is_no_mask_of_the_text():
    transformer = tiny.qwen_image_transformer().requires_grad_(False)
    runner = Runner(transformer, QWEN_IMAGE)
    call = tiny.qwen_image_inputs(2)
    check_mask(runner, call)
    own = transformer.forward

    def inverted(hidden_states, encoder_hidden_states, encoder_hidden_states_mask=None, **others):
        mask = None if encoder_hidden_states_mask is None else ~encoder_hidden_states_mask.bool()
        return own(hidden_states, encoder_hidden_states, encoder_hidden_states_mask=mask, **others)

    transformer.forward = inverted
    with pytest.raises(PpclError, match="text_mask: where 'encoder_hidden_states_mask' is 0 for a token"):
        check_mask(runner, call)


@pytest.fixture(scope="module")
def seen():
    pipeline = tiny.flux_pipeline(2, 2)
    steps = observed(pipeline, FLUX, lambda: run_pipeline(pipeline, ["a"], None, CALL, "latent"))
    (other,) = observed(pipeline, FLUX, lambda: run_pipeline(pipeline, ["two b"], None, CALL, "latent"), 1)
    return pipeline, steps, other


def test_steps_of_a_sound_pipeline_agree(seen):
    _, steps, other = seen
    check_steps(steps, other, FLUX)


def test_a_second_level_of_noise_is_no_condition(seen):
    """Mean flows are told two: the one that the adapter does not name would stay as it was at the first step."""
    _, steps, other = seen
    told = [replace(step, call={**step.call, "timestep_r": step.call["timestep"] * 0.5}) for step in steps]
    with pytest.raises(PpclError, match="the pipeline passes another timestep_r .* at a later step: samples keep what"):
        check_steps(told, other, FLUX)


def test_what_belongs_to_a_prompt_is_not_shared(seen):
    _, steps, other = seen
    wrong = replace(FLUX, shared=(*FLUX.shared, "pooled_projections"))
    with pytest.raises(PpclError, match="shared names 'pooled_projections', and two prompts have different ones"):
        check_steps(steps, other, wrong)


def test_what_has_no_rows_is_named_before_samples_are(seen):
    _, steps, other = seen
    with pytest.raises(PpclError, match="passes 8 of txt_ids for 1 samples: name it in the adapter's `shared`"):
        check_steps(steps, other, replace(FLUX, shared=("img_ids",)))


def test_a_first_call_that_has_nothing_of_its_prompt_is_the_negatives(seen):
    _, steps, other = seen
    same = replace(other, call={**steps[0].call, "hidden_states": other.call["hidden_states"]})
    with pytest.raises(PpclError, match="the first call of a step is the same for two prompts .* negative prompt"):
        check_steps(steps, same, FLUX)


def test_tokens_that_are_counted_wrongly_are_said(seen):
    pipeline, steps, _ = seen
    with pytest.raises(PpclError, match="noised counts 3 tokens of a call, and the scheduler steps 16 of them"):
        noising_of(pipeline.scheduler, replace(FLUX, noised=lambda _: 3), steps)
