"""What is recorded is what the pipeline does, and running the blocks as the adapter says is running the transformer."""

import contextlib
import copy

import torch

from ppcl_toolkit.running.capture import passing, predict, rerouted, run_block, stack_calls
from ppcl_toolkit.running.noising import Noising


def first_calls(world, chunk):
    """The calls of the transformer in the first step of one run of the pipeline, and the latents at its end."""
    pipeline, seen = world.teacher.pipeline, []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(copy.deepcopy(kwargs)), with_kwargs=True
    )
    latents = pipeline(**world.asked(chunk)).images
    handle.remove()
    return seen[: len(seen) // world.call["num_inference_steps"]], latents


def test_how_a_family_is_told_its_noise_is_seen(world):
    """What its pipeline does, read in its source: SD3 passes the scheduler's thousandths, the others a share."""
    assert world.noising == Noising(scale=1000.0 if world.name == "sd3" else 1.0)


def test_samples_are_what_the_pipeline_passes_and_makes(world):
    adapter, samples = world.adapter, iter(world.samples)
    for chunk in world.chunks:
        calls, latents = first_calls(world, chunk)
        for call in calls:
            tokens = call.pop(adapter.latents)
            assert call.pop(adapter.timestep).eq(world.noising.scale).all()
            call.pop("return_dict")
            for row in range(len(tokens)):
                sample = next(samples)
                assert torch.equal(sample.latents[0], latents[row % len(chunk)])
                first = call is calls[0]
                # SD3 has the negatives in front, Qwen-Image in a call of their own.
                guided = row < len(chunk) if len(tokens) > len(chunk) else not first
                assert sample.negative == guided
                assert (sample.reference is not None) == world.edits
                if sample.reference is not None:
                    assert torch.equal(tokens[row : row + 1, latents.shape[1] :], sample.reference)
                assert sample.arguments.keys() == call.keys()
                for name, value in call.items():
                    per_row = isinstance(value, torch.Tensor | list) and name not in adapter.shared
                    assert same(sample.arguments[name], value[row : row + 1] if per_row else value), name
    assert next(samples, None) is None


def same(found, expected):
    return torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected


def test_padded_text_is_masked(worlds):
    """Qwen-Image passes a mask only where a batch has texts of several lengths."""
    masks = [sample.arguments["encoder_hidden_states_mask"] for sample in worlds["qwen_image"].samples]
    assert all(mask is not None for mask in masks[:2])
    assert not masks[0].all()
    assert masks[1].all()


def test_noise_covers_the_latents_alone(world):
    """Without noise a batch is the samples, whole; with nothing but noise their references are still there."""
    adapter = world.adapter
    clean, noise = (world.batches(sigma_mean=mean, sigma_std=1e-6) for mean in (-60.0, 60.0))
    for number in range(4):
        quiet, loud = clean[number], noise[number]
        count = world.samples[0].latents.shape[1]
        assert adapter.noised is None or adapter.noised(quiet) == count
        assert quiet[adapter.timestep].max() < 1e-6 * world.noising.scale
        assert loud[adapter.timestep].eq(world.noising.scale).all()
        tokens, lost = quiet[adapter.latents], loud[adapter.latents]
        for row in range(2):
            assert any(is_row(sample, quiet, tokens, row) for sample in world.samples)
        assert torch.equal(tokens[:, count:], lost[:, count:])
        assert 0.5 < lost[:, :count].std() < 1.5
        velocity = predict(world.teacher.transformer, adapter, loud)
        assert velocity.shape == tokens[:, :count].shape
        assert velocity.isfinite().all()


def is_row(sample, batch, tokens, row):
    whole = sample.latents if sample.reference is None else torch.cat([sample.latents, sample.reference], dim=1)
    texts = [of["encoder_hidden_states"][at] for of, at in ((sample.arguments, 0), (batch, row))]
    masks = [of.get("encoder_hidden_states_mask") for of in (sample.arguments, batch)]
    own = [t if m is None else t[m[at].bool()] for t, m, at in zip(texts, masks, (0, row), strict=True)]
    return torch.equal(whole[0], tokens[row]) and own[0].shape == own[1].shape and torch.equal(*own)


@torch.no_grad()
def test_blocks_one_by_one_are_the_transformer(world):
    """Streams, their order and every argument of every block, by execution: not a bit may differ."""
    transformer, adapter, batch = world.teacher.transformer, world.adapter, world.batches()[1]
    streams = None
    for stack in adapter.stacks:
        calls = stack_calls(transformer, adapter, stack.path, batch, streams)
        streams = calls.streams
        for block, arguments in zip(stack.blocks(transformer), calls.arguments, strict=True):
            streams = run_block(block, stack, arguments, streams)
    with contextlib.ExitStack() as patches:
        for stack in adapter.stacks:
            for block in stack.blocks(transformer):
                last = block is adapter.stacks[-1].blocks(transformer)[-1]
                patches.enter_context(rerouted(block, passing(block, stack, streams if last else None)))
        rebuilt = transformer(**batch)[0]
    assert torch.equal(rebuilt, transformer(**batch)[0])
    assert not torch.equal(rebuilt, torch.zeros_like(rebuilt))
