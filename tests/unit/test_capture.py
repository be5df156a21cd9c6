"""Block calls: run block by block, a transformer computes what it computes whole."""

from dataclasses import replace

import pytest
import tiny
import torch
from families import TRANSFORMERS

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.running.capture import joint_text, run_block, stack_calls, text_is_read

FLUX = load_adapter("flux")


def walk(transformer, kwargs):
    """Streams at the end of the last stack, block by block."""
    streams = None
    for stack in FLUX.stacks:
        calls = stack_calls(transformer, FLUX, stack.path, kwargs, streams)
        streams = calls.streams
        for arguments, block in zip(calls.arguments, stack.blocks(transformer), strict=True):
            streams = run_block(block, stack, arguments, streams)
    return streams


@torch.no_grad()
def test_block_by_block_is_bit_identical_to_the_whole():
    transformer, kwargs = tiny.flux_transformer(), tiny.flux_inputs()
    seen = []
    handle = transformer.norm_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    transformer(**kwargs)
    handle.remove()
    assert torch.equal(walk(transformer, kwargs).image, seen[0])


@torch.no_grad()
def test_recording_runs_no_block_and_leaves_no_trace():
    transformer, kwargs = tiny.flux_transformer(), tiny.flux_inputs()
    before = transformer(**kwargs)[0]
    ran = []
    for block in transformer.transformer_blocks:
        block.attn.register_forward_hook(lambda *_: ran.append(1))
    stack_calls(transformer, FLUX, "transformer_blocks", kwargs)
    assert not ran
    assert all("forward" not in vars(block) for block in transformer.transformer_blocks)
    assert torch.equal(transformer(**kwargs)[0], before)


def test_positional_calls_under_checkpointing_bind_alike():
    transformer, kwargs = tiny.flux_transformer(), tiny.flux_inputs()
    plain = stack_calls(transformer, FLUX, "transformer_blocks", kwargs)
    transformer.enable_gradient_checkpointing()
    transformer.train()
    positional = stack_calls(transformer, FLUX, "transformer_blocks", kwargs)
    assert plain.arguments[1].keys() == positional.arguments[1].keys()
    assert torch.equal(plain.streams.text, positional.streams.text)


@torch.no_grad()
def test_z_is_what_the_joint_attention_is_given():
    transformer, stack = tiny.flux_transformer(), FLUX.stacks[0]
    calls = stack_calls(transformer, FLUX, stack.path, tiny.flux_inputs())
    block = transformer.transformer_blocks[0]
    with joint_text(block, stack) as seen:
        run_block(block, stack, calls.arguments[0], calls.streams)
    expected = block.norm1_context(calls.streams.text, emb=calls.arguments[0]["temb"])[0]
    assert torch.equal(seen[0], expected)


def rewritten(block, position):
    """Let a block's output at `position` be something else."""

    def other(_module, _args, output):
        return tuple(value + 1 if index == position else value for index, value in enumerate(output))

    return block.register_forward_hook(other)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_text_behind_the_last_block_is_read_where_another_text_gives_another_velocity(family):
    transformer, adapter, batch = TRANSFORMERS[family]()
    ends = [replace(adapter, stacks=adapter.stacks[:count]) for count in range(1, len(adapter.stacks) + 1)]
    answers = []
    for upto in ends:
        stack = upto.stacks[-1]
        last = stack.blocks(transformer)[-1]
        answers.append(text_is_read(transformer, upto, batch))
        assert all("forward" not in vars(block) for block in stack.blocks(transformer))
        with torch.no_grad():
            before = transformer(**batch)[0]
            # SD3's last block returns None for its text: there is nothing to rewrite.
            handle = rewritten(last, stack.returns.index("text")) if family != "sd3" else None
            assert torch.equal(transformer(**batch)[0], before) != answers[-1]
        if handle is not None:
            handle.remove()
    # FLUX's dual blocks hand their text on to the single ones.
    assert answers == ([True, False] if family == "flux" else [False])


@pytest.mark.parametrize("stack", FLUX.stacks, ids=lambda stack: stack.path)
def test_the_adapter_names_what_the_blocks_have(stack):
    block = stack.blocks(tiny.flux_transformer())[0]
    paths = [*stack.ffn.values(), *stack.text_query, *stack.text_out]
    modules = dict(block.named_modules())
    assert all(path in modules for path in paths)
