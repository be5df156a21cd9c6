"""Pipelines of other make: what is recorded of them is what their transformers are given, and may be noised and run."""

import functools

import pytest
import torch
from strangers import STRANGERS

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.running.capture import answer, predict, run_block, stack_calls
from ppcl_toolkit.running.fields import check_fields
from ppcl_toolkit.running.images import Exam, generate_images, image_path, pixels, run_pipeline
from ppcl_toolkit.running.noise import Batches
from ppcl_toolkit.running.noising import noising_of, observed
from ppcl_toolkit.running.record import denoised

TEXTS = ("a red circle", "another one")
SILENT = ("longcat_image", "pixart")


@functools.cache
def world(name):
    """A pipeline, its adapter, what it is asked, and its samples, two rows at a time."""
    build, asked = STRANGERS[name]
    call = {**asked, "num_inference_steps": 2}
    pipeline, adapter = build(), load_adapter(name)
    return pipeline, adapter, call, denoised(pipeline, adapter, TEXTS, call, 0)


@pytest.fixture(params=STRANGERS)
def stranger(request):
    return world(request.param)


def rows(value):
    """A batch of latents as rows, whether it is a tensor or a list of samples."""
    return torch.stack(value) if isinstance(value, list) else value


def test_clean_latents_are_those_that_went_round(stranger):
    """By the pipeline's own callback: after the last step, before anything is unpacked or scaled.

    Two pipelines have none, and hand such latents out.
    """
    pipeline, adapter, call, samples = stranger
    latest, given = [], []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(args[0] if args else kwargs[adapter.latents]), with_kwargs=True
    )
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    asked = {"prompt": list(TEXTS), "generator": generators, "output_type": "latent", **call}
    if adapter.family in SILENT:
        latest.append(pipeline(**asked)[0])
    else:
        pipeline(callback_on_step_end=lambda *given: latest.append(given[-1]["latents"].clone()) or {}, **asked)
    handle.remove()
    assert len(samples) == 2
    for index, sample in enumerate(samples):
        assert torch.equal(sample.latents.flatten(), latest[-1][index].flatten())
        assert sample.latents.shape[1:] == rows(given[0]).shape[1:]
        assert sample.reference is None and not sample.negative
        assert sample.listed == isinstance(given[0], list)


def test_a_batch_of_samples_is_a_call_of_the_transformer(stranger):
    """Rows of a batch of two come out as each does alone."""
    pipeline, adapter, _, samples = stranger
    both = Batches(samples=samples, adapter=adapter, size=2, seed=3)[0]
    velocity = predict(pipeline.transformer, adapter, both)
    # PixArt predicts a variance behind the noise.
    batch, channels, *rest = rows(both[adapter.latents]).shape
    assert velocity.shape == (batch, channels * (2 if adapter.family == "pixart" else 1), *rest)
    assert velocity.isfinite().all()
    calls = [Batches(samples=samples[:1], adapter=adapter, size=size, seed=3)[0] for size in (1, 2)]
    for size, call in enumerate(calls, start=1):
        call[adapter.timestep] = torch.full((size,), 0.3)
        latents = samples[0].latents.expand(size, *samples[0].latents.shape[1:])
        call[adapter.latents] = [*latents] if samples[0].listed else latents
    single, pair = (answer(pipeline.transformer, call) for call in calls)
    assert torch.allclose(pair, single.expand(pair.shape), atol=1e-5)


@torch.no_grad()
def test_blocks_one_by_one_are_the_transformer(stranger):
    """Where nothing lies between the stacks but what `stack_calls` takes along."""
    pipeline, adapter, _, samples = stranger
    transformer = pipeline.transformer
    check_fields(adapter, transformer)
    batch = Batches(samples=samples, adapter=adapter, size=1, seed=3)[0]
    seen, handles, streams = {}, [], None
    for stack in adapter.stacks:
        last = stack.blocks(transformer)[-1]
        handles.append(last.register_forward_hook(lambda _, __, out, path=stack.path: seen.update({path: out})))
    answer(transformer, batch)
    for handle in handles:
        handle.remove()
    for stack in adapter.stacks:
        calls = stack_calls(transformer, adapter, stack.path, batch, streams)
        streams = calls.streams
        for block, arguments in zip(stack.blocks(transformer), calls.arguments, strict=True):
            streams = run_block(block, stack, arguments, streams)
        expected = seen[stack.path] if isinstance(seen[stack.path], tuple) else (seen[stack.path],)
        for name, value in zip(stack.returns, expected, strict=True):
            assert torch.equal(getattr(streams, name), value)


@pytest.mark.parametrize("name", ["z_image", "wan"])
def test_pictures_and_videos_are_drawn_and_timed(name, tmp_path):
    pipeline, _, call, _ = world(name)
    exam = Exam(prompts=TEXTS, scored=False, batch=2, call=call)
    generate_images(pipeline, exam, tmp_path, lambda *_, **__: None)
    frames = call.get("num_frames", 1)
    for index in range(2):
        assert pixels(image_path(tmp_path, 0, index)).shape == (call["height"], frames * call["width"], 3)


def test_a_timestep_for_every_token_is_one_for_all():
    """Wan 2.2's 5B is told its level token by token; training tells it once, which is the same."""
    build, asked = STRANGERS["wan"]
    pipeline, adapter = build(), load_adapter("wan")
    pipeline.register_to_config(expand_timesteps=True)
    call = {**asked, "num_inference_steps": 3}
    steps = observed(pipeline, adapter, lambda: run_pipeline(pipeline, ["a"], None, call, "latent"))
    noising = noising_of(pipeline.scheduler, adapter, steps)
    assert (noising.offset, noising.scale) == (0.0, 1000.0)
    told = steps[1].call["timestep"]
    assert told.ndim == 2 and told.shape[1] > 1
    once = {**steps[1].call, "timestep": told[:, 0]}
    each, alone = (answer(pipeline.transformer, {**c, "return_dict": False}) for c in (steps[1].call, once))
    assert torch.allclose(each, alone, atol=1e-5)
    samples = denoised(pipeline, adapter, TEXTS, call, 0)
    batch = Batches(samples=samples, adapter=adapter, size=2, seed=3, noising=noising)[0]
    assert predict(pipeline.transformer, adapter, batch).isfinite().all()
