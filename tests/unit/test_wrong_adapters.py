"""Adapters that name the wrong thing, pipelines that call once more: one sentence each, before anything is recorded."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import strangers
import tiny
import torch
from diffusers import LayerSkipConfig, SkipLayerGuidance
from families import FLUX, QWEN_IMAGE, SD3
from PIL import Image

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.checking.forward import check_forward
from ppcl_toolkit.checking.steps import check_run, check_steps
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Plan
from ppcl_toolkit.running.capture import predict
from ppcl_toolkit.running.fields import check_fields
from ppcl_toolkit.running.images import run_pipeline
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.noising import observed
from ppcl_toolkit.running.record import denoised
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.stages.check import check, check_call
from ppcl_toolkit.surgery.assemble import reshape

MODELS = {
    "flux": (tiny.flux_transformer, FLUX, tiny.flux_inputs()),
    # As many tokens of text as of image.
    "square": (tiny.flux_transformer, FLUX, tiny.flux_inputs(image_tokens=9, text_tokens=9)),
    "sd3": (tiny.sd3_transformer, SD3, tiny.sd3_inputs()),
    "qwen": (tiny.qwen_image_transformer, QWEN_IMAGE, tiny.qwen_image_inputs()),
    "wan": (lambda: strangers.wan_pipeline().transformer, load_adapter("wan"), None),
}
FORGOTTEN = "neither text_query nor text_out names that: read by nobody, it would stay"
STACKS = [
    ("flux", {"text_out": ()}, f"its own text with 'attn.to_add_out', and {FORGOTTEN}"),
    ("sd3", {"text_query": ("attn.norm_added_q",)}, f"its own text with 'attn.add_q_proj', and {FORGOTTEN}"),
    ("qwen", {"text_query": ("attn.add_q_proj",)}, f"its own text with 'attn.norm_added_q', and {FORGOTTEN}"),
    ("flux", {"joint_attention": None}, "is None, and 'attn.add_q_proj' is to go with the text's queries"),
    ("flux", {"attention_text": "hidden_states"}, r"attn is given \[2, 9, 32\] as attention_text 'hidden_states'"),
    ("flux", {"attention_text": "image_rotary_emb"}, "attn is given tuple as attention_text"),
    ("sd3", {"attention_text": "attention_mask"}, "attn is given NoneType as attention_text"),
    ("square", {"attention_text": "hidden_states"}, "another attention_text 'hidden_states' with another image"),
    (
        "flux",
        {"joint_attention": "norm1_context", "attention_text": "x"},
        "norm1_context is given nothing of the image: image and text do not meet there",
    ),
    ("wan", {"text": "encoder_hidden_states", "joint_attention": "attn2"}, "its blocks return no text"),
    ("wan", {"ffn": {"image": "attn2"}}, "attn2 is a WanAttention with 4 linear layers, and no feed-forward network"),
    ("wan", {"ffn": {"image": "norm2"}}, "norm2 is a FP32LayerNorm with 0 linear layers, and no feed-forward network"),
    ("flux", {"ffn": {"image": "attn.to_out.0"}}, "attn.to_out.0 is a Linear in attn with 1 linear layers"),
    ("flux", {"ffn": {"image": "ff_context"}}, "names 'ff_context' for the image, and without it .* another text"),
    ("sd3", {"modulation": ("attn.to_q",)}, "modulation: transformer_blocks.2.attn.to_q is fed .*, modulation is one"),
    ("flux", {"text_mask": "joint_attention_kwargs"}, r"takes no mask of the text, \[2, 5\], or none, as 'joint_at"),
    ("flux", {"text": "temb", "returns": ("image",)}, "returns of transformer_blocks"),
    (
        "flux",
        {"image": "encoder_hidden_states"},
        r"does not run as the adapter tells \(KeyError 'encoder_hidden_states",
    ),
    ("flux", {"text": "image_rotary_emb"}, r"does not run as the adapter tells \(\w+Error "),
    ("wan", {"text": "rotary_emb"}, r"does not run as the adapter tells \(\w+Error "),
    ("wan", {"image": "temb"}, r"does not run as the adapter tells \(\w+Error "),
    ("qwen", {"text": None, "returns": ("image",)}, "text_mask of transformer_blocks: its blocks have no text stream"),
    (
        "flux",
        {"image": "encoder_hidden_states", "text": "hidden_states", "returns": ("image", "text")},
        "does not change",
    ),
]


def all_checks(transformer, adapter, call):
    check_fields(adapter, transformer)
    check_call(Runner(transformer.requires_grad_(False), adapter), call, SimpleNamespace(progress=lambda *_: None))


@pytest.mark.parametrize(("model", "stack", "said"), STACKS)
def test_a_stack_that_names_the_wrong_thing_is_one_sentence(model, stack, said):
    make, adapter, call = MODELS[model]
    wrong = replace(adapter, stacks=(replace(adapter.stacks[0], **stack), *adapter.stacks[1:]))
    with pytest.raises(PpclError, match=said):
        all_checks(make(), wrong, call)


def test_a_stream_has_tokens():
    """Lumina's conditioning is handed to every block, and is no stream."""
    adapter = load_adapter("lumina2")
    wrong = replace(adapter, stacks=(replace(adapter.stacks[0], text="temb"),))
    transformer, call = watched(strangers.STRANGERS["lumina2"], wrong)
    with pytest.raises(PpclError, match=r"layers is given \[1, 24\] as a stream, 'hidden_states' or 'temb'"):
        check_forward(Runner(transformer, wrong), call)


def watched(stranger, adapter):
    """A pipeline's transformer, and one call of it."""
    build, asked = stranger
    pipeline = build()
    steps = observed(pipeline, adapter, lambda: run_pipeline(pipeline, ["a"], None, asked, "latent"), 1)
    return pipeline.transformer.requires_grad_(False), {**steps[-1].call, "return_dict": False}


def test_a_remap_that_changes_the_image_is_refused():
    """SD3's text modulation with scale and shift the wrong way round: every shorter model would be another one."""

    def remap(config, state, kept):
        SD3.remap(config, state, kept)
        for kind in ("weight", "bias"):
            name = f"transformer_blocks.{config['num_layers'] - 1}.norm1_context.linear.{kind}"
            scale, shift = state[name].chunk(2)
            state[name] = torch.cat([shift, scale])

    with pytest.raises(PpclError, match="whose weights `remap` changes, computes another image"):
        all_checks(tiny.sd3_transformer(), replace(SD3, remap=remap), tiny.sd3_inputs())


def test_what_would_take_an_attention_along_is_no_network():
    """Wan's second norm leads to its attention to the text: a linear map behind it would be in place of both."""
    adapter = load_adapter("wan")
    wrong = replace(adapter, stacks=(replace(adapter.stacks[0], ffn={"image": "norm2"}),))
    transformer, call = watched(strangers.STRANGERS["wan"], adapter)
    plan = Plan(family="wan", depths=adapter.depths(transformer))
    plan = plan.with_operations([FfnSwap(stack="blocks", block=0, streams=("image",))])
    with pytest.raises(PpclError, match="norm2 is followed by an attention before it is added"):
        reshape(transformer, wrong, plan, call)


SMALL = {"height": 8, "width": 8, "max_sequence_length": 9, "num_inference_steps": 4}
SKIPPED = {"guidance_scale": 3.0, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9}


def steps_of(pipeline, adapter, call):
    runs = [partial(run_pipeline, pipeline, [text], None, call, "latent") for text in ("a red one", "two b")]
    return observed(pipeline, adapter, runs[0]), observed(pipeline, adapter, runs[1], 1)[0]


@pytest.mark.parametrize("start", (0.01, 0.5))
def test_layers_skipped_for_guidance_are_refused(start):
    """SD3's own: they begin within the steps that are looked at, or behind them, when the first picture is recorded."""
    pipeline, call = tiny.sd3_pipeline(), {**SMALL, **SKIPPED, "skip_layer_guidance_start": start}
    if start < 0.5:
        with pytest.raises(
            PpclError, match="2 times in a step, once for prompt and negative prompt together; known are"
        ):
            check_steps(*steps_of(pipeline, SD3, call), SD3)
    with pytest.raises(PpclError, match="transformer 2 times at timestep .*, and less often at the first step"):
        denoised(pipeline, SD3, ["a"], call, 0)


@pytest.mark.parametrize(
    ("scale", "said"), [(3.0, "3 times in a step; known are"), (1.0, "2 times at step 2, and less")]
)
def test_a_third_call_of_a_step_is_refused(scale, said):
    """As guiders of diffusers make them: with classifier-free guidance, and without."""
    adapter, (build, asked) = load_adapter("hunyuan_image"), strangers.STRANGERS["hunyuan_image"]
    pipeline = build()
    pipeline.guider = SkipLayerGuidance(
        guidance_scale=scale,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig(indices=[1], fqn="transformer_blocks"),
    )
    with pytest.raises(PpclError, match=said):
        check_steps(*steps_of(pipeline, adapter, {**asked, "num_inference_steps": 4}), adapter)


def test_a_second_call_with_the_prompt_is_no_negative_one():
    pipeline = tiny.flux_pipeline()
    steps, other = steps_of(pipeline, FLUX, {**SMALL, "true_cfg_scale": 3.0, "negative_prompt": ""})
    check_steps(steps, other, FLUX)
    again = [replace(step, others=(step.call,)) for step in steps]
    with pytest.raises(PpclError, match=r"second call of a step has the prompt \(.*encoder_hidden_states.*\) again"):
        check_steps(again, other, FLUX)


def test_what_every_sample_has_is_not_shared():
    """Texts of two lengths, values that two prompts have in common, and the mask of the text."""
    z_image, call = load_adapter("z_image"), strangers.STRANGERS["z_image"][1]
    wrong = replace(z_image, shared=("cap_feats",))
    with pytest.raises(PpclError, match="shared names 'cap_feats', and two prompts have different ones"):
        check_steps(*steps_of(strangers.z_image_pipeline(), wrong, {**call, "num_inference_steps": 4}), wrong)
    guided = replace(FLUX, shared=(*FLUX.shared, "guidance"))
    with pytest.raises(PpclError, match="shared names 'guidance', of which the pipeline passes one for each sample"):
        denoised(tiny.flux_pipeline(), guided, ["a", "b"], SMALL, 0)
    # As many samples as an argument has tokens, by chance.
    by_chance = denoised(tiny.flux_pipeline(), FLUX, ["a"] * SMALL["max_sequence_length"], SMALL, 0)
    assert len(by_chance[0].arguments["txt_ids"]) == len(by_chance) == SMALL["max_sequence_length"]
    masked = replace(QWEN_IMAGE, shared=("encoder_hidden_states_mask",))
    with pytest.raises(PpclError, match="shared names 'encoder_hidden_states_mask', the text_mask: there is one for"):
        check_fields(masked, tiny.qwen_image_transformer())


def test_stacks_in_the_wrong_order_are_refused():
    with pytest.raises(PpclError, match=r"calls transformer_blocks\[0\] where the adapter has single_transformer"):
        all_checks(tiny.flux_transformer(), replace(FLUX, stacks=FLUX.stacks[::-1]), tiny.flux_inputs())


def runner_of(pipeline, call):
    def run(prompt=None, **changed):
        run_pipeline(pipeline, [prompt or "a"], [torch.Generator().manual_seed(0)], {**call, **changed}, "latent")

    return run


@pytest.mark.parametrize(
    ("pipeline", "adapter", "call"),
    [
        (tiny.flux_pipeline(), FLUX, {"true_cfg_scale": 3.0, "negative_prompt": ""}),
        (tiny.sd3_pipeline(), SD3, {"guidance_scale": 3.0}),
    ],
    ids=["in two calls", "in one"],
)
def test_guidance_is_what_makes_a_pipeline_run_pictures_twice(pipeline, adapter, call):
    run = runner_of(pipeline, {**SMALL, **call})
    noising, own = check_run(pipeline, adapter, run)
    assert noising.kind == "flow" and own["return_dict"] is False
    # FLUX is told its distilled guidance beside, Stable Diffusion that of skipped layers.
    other = "guidance_scale" if adapter is FLUX else "skip_layer_guidance_scale"
    with pytest.raises(PpclError, match=f"guidance names '{other}', and where that is 1, .* runs every picture twice"):
        check_run(pipeline, replace(adapter, guidance=other), run)
    with pytest.raises(PpclError, match="guidance names 'cfg', and .*Pipeline takes no such argument, though it runs"):
        check_run(pipeline, replace(adapter, guidance="cfg"), run)
    with pytest.raises(PpclError, match=f"'{adapter.guidance}', unguided at 0, and where it is 0.5, .*twice, either"):
        check_run(pipeline, replace(adapter, unguided=0.0), run)
    # Where nothing is run twice, there are no negatives to count.
    plain = {**SMALL, **call, adapter.guidance: 1.0}
    check_run(pipeline, replace(adapter, guidance="cfg"), runner_of(pipeline, plain))


def test_a_later_stack_that_has_image_and_text_the_wrong_way_round():
    """Its blocks take both together: nothing of what they return tells which is which."""
    first, single = FLUX.stacks
    swapped = replace(
        single, image="encoder_hidden_states", text="hidden_states", returns=("image", "text"), ffn=single.ffn
    )
    with pytest.raises(PpclError, match=r"image, 'encoder_hidden_states', is what the stack before it has as text"):
        all_checks(tiny.flux_transformer(), replace(FLUX, stacks=(first, swapped)), tiny.flux_inputs())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_run_of_few_steps_does_not_hide_what_a_transformer_is_told(steps):
    """Any two levels lie on a line."""
    pipeline = tiny.sd3_pipeline()

    def squared(_, args, kwargs):
        return args, {**kwargs, "timestep": 1000 * (kwargs["timestep"] / 1000) ** 2}

    run = runner_of(pipeline, {**SMALL, "num_inference_steps": steps})
    check_run(pipeline, SD3, run)
    pipeline.transformer.register_forward_pre_hook(squared, with_kwargs=True)
    with pytest.raises(PpclError, match="what the transformer is told is no affine map of the level of noise"):
        check_run(pipeline, SD3, run)


def test_a_layer_that_runs_twice_with_other_vectors_is_no_modulation():
    transformer = tiny.flux_transformer()

    def again(layer, *_):
        layer(torch.ones(2, layer.in_features))

    for block in transformer.transformer_blocks:
        block.norm2.register_forward_hook(partial(again, block.norm1.linear))
    with pytest.raises(PpclError, match=r"modulation: .*norm1.linear is run twice in a block, with other vectors"):
        all_checks(transformer, FLUX, tiny.flux_inputs())


def test_words_that_change_after_many_steps_are_found_when_they_are_recorded():
    """The check looks at three steps."""
    pipeline, seen = tiny.sd3_pipeline(), []

    def changed(_, args, kwargs):
        seen.append(0)
        return args, {**kwargs, "pooled_projections": kwargs["pooled_projections"] + (len(seen) > 5)}

    pipeline.transformer.register_forward_pre_hook(changed, with_kwargs=True)
    assert len(denoised(pipeline, SD3, ["a"], {**SMALL, "num_inference_steps": 5}, 0)) == 2
    seen.clear()
    with pytest.raises(PpclError, match="passes another pooled_projections at a later step than at the first"):
        denoised(pipeline, SD3, ["a"], {**SMALL, "num_inference_steps": 6}, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modulation": "norm1.linear"}, r"modulation is 'norm1.linear', and has to be a tuple"),
        ({"ffn": "ff"}, "ffn is 'ff', and has to be a mapping"),
        ({"returns": None}, "returns is None, and has to be a tuple"),
        ({"depth_key": None}, "Stack 'transformer_blocks': depth_key is None, and has to be a name"),
    ],
)
def test_fields_of_another_kind_are_named_where_they_are_written(change, said):
    with pytest.raises(PpclError, match=said):
        replace(FLUX.stacks[0], **change)
    with pytest.raises(PpclError, match=r"Adapter 'flux': stacks is Stack.*\.\.\., and has to be a tuple"):
        replace(FLUX, stacks=FLUX.stacks[0])


def test_guidance_is_told_by_one_number():
    samples = denoised(tiny.flux_pipeline(), FLUX, ["a"], SMALL, 0)
    wrong = replace(FLUX, distilled="pooled_projections")
    with pytest.raises(
        PpclError, match=r"'pooled_projections', the adapter's `distilled`, is \[1, \d+\], and guidance"
    ):
        Batches(samples=samples, adapter=wrong, size=1, seed=0, guidance=(1.0, 7.0))[0]


def test_errors_of_functions_of_an_adapter_are_its_own():
    pipeline = tiny.sd3_pipeline()
    run = runner_of(pipeline, {**SMALL, "guidance_scale": 3.0})
    wrong = replace(SD3, noised=lambda arguments: arguments["nope"])
    runner = Runner(pipeline.transformer.requires_grad_(False), wrong)
    desk = SimpleNamespace(progress=lambda *_: None)
    with pytest.raises(PpclError, match=r"does not run as the adapter tells \(KeyError 'nope'\).*`noised`"):
        check(runner, pipeline, run, desk)


def test_guidance_may_be_off_at_another_value():
    """Z-Image's pipeline adds guidance to the prompt's velocity: at 1, pictures are run twice."""
    adapter, (build, call) = load_adapter("z_image"), strangers.STRANGERS["z_image"]
    pipeline = build()
    run = runner_of(pipeline, {**call, "num_inference_steps": 4, "guidance_scale": 3.0})
    check_run(pipeline, adapter, run)
    with pytest.raises(PpclError, match="and where that is 1, ZImagePipeline runs every picture twice as before"):
        check_run(pipeline, replace(adapter, unguided=1.0), run)
    assert adapter.scale({"guidance_scale": 3.0}) == 4.0 and adapter.scale({"guidance_scale": 0.0}) == 1.0
    assert SD3.scale({"guidance_scale": 3.0}) == 3.0 and SD3.scale({}) is None


def test_tokens_of_references_are_counted():
    """FLUX Kontext's pipeline throws their velocity away: an adapter that does not would train on it."""
    pipeline = tiny.flux_kontext_pipeline()
    run = runner_of(
        pipeline, {**SMALL, "image": Image.new("RGB", (8, 8), "red"), "_auto_resize": False, "max_area": 64}
    )
    check_run(pipeline, FLUX, run)
    with pytest.raises(PpclError, match=r"noised is None, and the transformer makes \d+ tokens where the scheduler st"):
        check_run(pipeline, replace(FLUX, noised=None), run)


QWEN_IMAGE21, (build_21, asked_21) = load_adapter("qwen_image21"), strangers.STRANGERS["qwen_image21"]


@pytest.mark.parametrize("edits", (False, True))
def test_of_one_stream_the_noised_tokens_are_those_that_the_scheduler_steps(edits):
    """Qwen-Image 2.1 makes text and references, too, before them."""
    pipeline = build_21()
    edit = {"image": Image.new("RGB", (64, 64), "red"), "output_resolution": 64} if edits else {}
    run = runner_of(pipeline, {**asked_21, **edit, "num_inference_steps": 4})
    noising, call = check_run(pipeline, QWEN_IMAGE21, run)
    assert (noising.offset, noising.scale) == (0, 1) and call["hidden_states"].shape[1] == (40 if edits else 24)
    all_checks(pipeline.transformer, QWEN_IMAGE21, call)
    # With references, those would be in the place of the latents.
    said = (
        r"\[1, 40, 4\] are not the latents" if edits else "noised_last is False, and of the .* tokens that the transf"
    )
    with pytest.raises(PpclError, match=said):
        check_run(pipeline, replace(QWEN_IMAGE21, noised_last=False), run)
    with pytest.raises(PpclError, match="noised is None, and the transformer makes .* where the scheduler steps 24"):
        check_run(pipeline, replace(QWEN_IMAGE21, noised=None), run)


def test_references_stay_before_tokens_that_are_last():
    pipeline = build_21()
    edit = {"image": Image.new("RGB", (64, 64), "red"), "output_resolution": 64, "num_inference_steps": 2}
    (sample,) = denoised(pipeline, QWEN_IMAGE21, ["a"], {**asked_21, **edit}, 0)
    assert sample.reference.shape == (1, 16, 4) and sample.latents.shape == (1, 24, 4)
    batch = Batches(samples=[sample], adapter=QWEN_IMAGE21, size=1, seed=0)[0]
    given = batch["hidden_states"]
    assert torch.equal(given[:, :16], sample.reference) and given.shape[1] == 40
    with torch.no_grad():
        assert torch.equal(
            predict(pipeline.transformer, QWEN_IMAGE21, batch), pipeline.transformer(**batch)[0][:, -24:]
        )


def test_what_a_pipeline_keeps_from_its_first_step_cannot_be_recorded():
    pipeline = build_21()
    run = runner_of(pipeline, {**asked_21, "use_kv_cache": True, "num_inference_steps": 4})
    with pytest.raises(PpclError, match="passes kv_cache_mode .* at a later step: .*; what turns that off belongs in"):
        check_run(pipeline, QWEN_IMAGE21, run)


def test_packing_needs_a_pipeline_that_packs():
    with pytest.raises(PpclError, match="packs is True, and StableDiffusion3Pipeline has no _pack_latents"):
        check_run(tiny.sd3_pipeline(), replace(SD3, packs=True), runner_of(tiny.sd3_pipeline(), SMALL))
