"""Narrow blocks against an oracle of hooks on the stock block, over three families of real classes."""

import copy
import pickle

import pytest
import torch
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowJointTransformerBlock
from diffusers.models.transformers.transformer_cogview4 import CogView4TransformerBlock
from families import FAMILIES, block_call
from tiny import randomize
from torch import nn

from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Form
from ppcl_toolkit.running.capture import Streams, joint_text, run_block
from ppcl_toolkit.surgery.narrow import NarrowBlock, bypass, copy_weights, narrow

FORMS = [
    {"ffn": ("image",)},
    {"ffn": ("image", "text")},
    {"text": "tap"},
    {"text": "tap", "ffn": ("image", "text")},
    {"text": "inside", "reference": (0, 0)},
    {"text": "end", "reference": (0, 0)},
    {"text": "inside", "reference": (0, 0), "ffn": ("image",)},
    {"text": "end", "reference": (0, 0), "ffn": ("image",)},
]
CASES = [(family, form) for family in FAMILIES for form in FORMS]


def dual_blocks(family):
    """Blocks whose streams have weights of their own, with the calls they get."""
    return [entry for entry in FAMILIES[family]() if entry[0].joint_attention]


def returns_text(block):
    return not getattr(block, "context_pre_only", False)


def form_of(stack, first=1, **fields):
    return Form(stack.path, first, first, **fields)


def narrowed(block, stack, form, arguments, streams):
    """A narrow copy of `block` with its weights and random linear maps."""
    narrow_block = copy.deepcopy(block)
    narrow(narrow_block, stack, form, arguments, streams)
    if isinstance(narrow_block, NarrowBlock):
        copy_weights(block, narrow_block)
        for name, width in narrow_block.blueprint.added:
            torch.manual_seed(width + len(name))
            linear = narrow_block.get_submodule(name)
            nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.normal_(linear.bias)
    return narrow_block


def joined(streams, z):
    return Streams(streams.image, torch.cat([streams.text, z], dim=1))


def oracle(block, stack, form, arguments, streams, narrow_block, z):
    """What `form` must compute, by hooks on the stock block and the linear maps of `narrow_block`."""
    linear = dict(narrow_block.named_children())
    handles = []

    def give(_, args, kwargs):
        return args, {**kwargs, stack.attention_text: z + linear["linear_text_z"](z)}

    if form.narrow_text:
        attention = block.get_submodule(stack.joint_attention)
        handles.append(attention.register_forward_pre_hook(give, with_kwargs=True))
    with joint_text(block, stack) as entered:
        plain = run_block(block, stack, arguments, streams)
    found = {}
    for stream in ("image", "text"):
        found[stream] = getattr(plain, stream)
        if stream in form.ffn and found[stream] is not None:
            # The output of a silenced FFN leaves g, as every family adds gate * FFN(...).
            silence = block.get_submodule(stack.ffn[stream]).register_forward_hook(
                lambda *call: torch.zeros_like(call[2])
            )
            g = getattr(run_block(block, stack, arguments, streams), stream)
            silence.remove()
            found[stream] = g + linear[f"linear_ffn_{stream}"](g)
    for handle in handles:
        handle.remove()
    if form.text == "tap":
        found["text"] = torch.cat([found["text"], entered[0]], dim=1)
    elif form.narrow_text and found["text"] is not None:
        end = streams.text + linear["linear_text_h"](streams.text) if form.text == "end" else None
        found["text"] = torch.cat([streams.text, z], dim=1) if end is None else end
    return Streams(**found)


@pytest.mark.parametrize(("family", "fields"), CASES)
@torch.no_grad()
def test_narrow_block_equals_hook_oracle(family, fields):
    for stack, block, arguments, streams in dual_blocks(family):
        if not returns_text(block) and ("text" in fields.get("ffn", ()) or fields.get("text") == "tap"):
            continue
        form = form_of(stack, **fields)
        narrow_block = narrowed(block, stack, form, arguments, streams)
        z = torch.randn(streams.text.shape, generator=torch.Generator().manual_seed(2))
        given = joined(streams, z) if form.narrow_text else streams
        found = run_block(narrow_block, stack, arguments, given)
        expected = oracle(block, stack, form, arguments, streams, narrow_block, z)
        for one, other in zip(found, expected, strict=True):
            assert one is other or torch.allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fresh_linear_ffn_returns_the_post_attention_residual(family):
    stack, block, arguments, streams = dual_blocks(family)[1]
    fresh = copy.deepcopy(block)
    narrow(fresh, stack, form_of(stack, ffn=("image", "text")), arguments, streams)
    handles = [
        block.get_submodule(path).register_forward_hook(lambda *call: torch.zeros_like(call[2]))
        for path in stack.ffn.values()
    ]
    expected = run_block(block, stack, arguments, streams)
    assert all(map(torch.allclose, run_block(fresh, stack, arguments, streams), expected))
    assert len(handles) == 2


def test_stock_form_changes_nothing():
    stack, block, arguments, streams = dual_blocks("flux")[0]
    before = {name: value.clone() for name, value in block.state_dict().items()}
    kind = type(block)
    narrow(block, stack, Form(stack.path, 0, 2), arguments, streams)
    assert type(block) is kind
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["inside", "end"])
def test_exactly_what_is_dead_is_dropped(family, text):
    """Autograd agrees with the surgery: what goes has no influence once z is given, and what stays has."""
    stack, block, arguments, streams = dual_blocks(family)[1]
    narrow_block = narrowed(block, stack, form_of(stack, text=text, reference=(0, 0)), arguments, streams)
    z = torch.randn(streams.text.shape)
    handle = block.get_submodule(stack.joint_attention).register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, stack.attention_text: z}), with_kwargs=True
    )
    run_block(block, stack, arguments, streams).image.square().sum().backward()
    handle.remove()
    alive = {name for name, p in block.named_parameters() if p.grad is not None and p.grad.any()}
    kept = {name for name, _ in narrow_block.named_parameters() if not name.startswith("linear_text")}
    assert alive == kept
    for path in (*stack.text_query, *stack.text_out):
        parent, _, name = path.rpartition(".")
        assert vars(narrow_block.get_submodule(parent))[name].func is bypass


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_shrunk_modulation_is_alive(family):
    stack, block, arguments, streams = dual_blocks(family)[1]
    narrow_block = narrowed(block, stack, form_of(stack, ffn=("image", "text")), arguments, streams)
    assert narrow_block.blueprint.shrunk
    output = run_block(narrow_block, stack, arguments, streams)
    (output.image.square().sum() + output.text.square().sum()).backward()
    for path, chunks, parts in narrow_block.blueprint.shrunk:
        linear, stock = narrow_block.get_submodule(path), block.get_submodule(path)
        assert linear.out_features * parts == stock.out_features * len(chunks)
        assert (linear.weight.grad.abs().sum(1) > 0).all()


@torch.no_grad()
def test_affine_teacher_is_reproduced_exactly():
    """A block whose z, h and FFN are affine in those of the reference has a narrow twin that equals it."""
    (stack, reference, arguments, streams), (_, block, *_), *_ = dual_blocks("flux")
    width = streams.image.shape[-1]
    for one in (reference, block):
        one.norm1_context.linear.weight.zero_()
        one.norm1_context.linear.bias[2 * width : 3 * width] = 0  # The gates of text attention and text FFN:
        one.norm1_context.linear.bias[5 * width :] = 0  # h stays what it was.
    block.norm1.linear.weight[5 * width :] = 0
    block.ff.net[2].weight.zero_()
    narrow_block = narrowed(
        block, stack, form_of(stack, text="end", reference=(0, 0), ffn=("image",)), arguments, streams
    )
    shifts = [one.norm1_context.linear.bias[:width] for one in (reference, block)]
    scales = [1 + one.norm1_context.linear.bias[width : 2 * width] for one in (reference, block)]
    ratio = scales[1] / scales[0]
    narrow_block.linear_text_z.weight.copy_(torch.diag(ratio - 1))
    narrow_block.linear_text_z.bias.copy_(shifts[1] - ratio * shifts[0])
    for linear in (narrow_block.linear_text_h, narrow_block.linear_ffn_image):
        linear.weight.zero_()
        linear.bias.zero_()
    narrow_block.linear_ffn_image.bias.copy_(block.norm1.linear.bias[5 * width :] * block.ff.net[2].bias)
    tap = narrowed(reference, stack, form_of(stack, 0, text="tap"), arguments, streams)
    expected = run_block(block, stack, arguments, run_block(reference, stack, arguments, streams))
    found = run_block(narrow_block, stack, arguments, run_block(tap, stack, arguments, streams))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_weights_of_a_wider_form_carry_over(family):
    stack, block, arguments, streams = dual_blocks(family)[1]
    text = narrowed(block, stack, form_of(stack, text="end", reference=(0, 0)), arguments, streams)
    form = form_of(stack, text="end", reference=(0, 0), ffn=("image",))
    direct = narrowed(block, stack, form, arguments, streams)
    chained = copy.deepcopy(block)
    randomize(chained, seed=7)
    narrow(chained, stack, form, arguments, streams)
    copy_weights(text, chained)
    for name, value in chained.state_dict().items():
        if name.startswith("linear_ffn"):
            assert not value.any()
        else:
            assert torch.equal(value, {**direct.state_dict(), **linear_text(text)}[name])
    with pytest.raises(PpclError, match="lacks weights"):
        copy_weights(chained, text)


def linear_text(block):
    return {name: value for name, value in block.state_dict().items() if name.startswith("linear_text")}


def test_copies_pickles_and_shared_code():
    entries = dual_blocks("flux")
    form = {"text": "inside", "reference": (0, 0)}
    one, other = (narrowed(block, s, form_of(s, **form), a, x) for s, block, a, x in entries[:2])
    assert type(one) is type(other)
    assert type(one).__name__ == type(entries[0][1]).__name__
    assert isinstance(one, type(entries[0][1]))
    stack, _, arguments, streams = entries[0]
    given = joined(streams, torch.randn(streams.text.shape))
    expected = run_block(one, stack, arguments, given)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert type(twin) is type(one)
        assert all(map(torch.equal, run_block(twin, stack, arguments, given), expected))


@pytest.mark.parametrize("fields", [{"text": "tap", "ffn": ("image",)}, {"text": "end", "reference": (0, 0)}])
def test_checkpointing_gives_the_same_gradients(fields):
    stack, block, arguments, streams = dual_blocks("flux")[1]
    narrow_block = narrowed(block, stack, form_of(stack, **fields), arguments, streams)
    given = streams if fields["text"] == "tap" else joined(streams, torch.randn(streams.text.shape))
    call = block_call(stack, arguments, given)
    positions = list(call.values())[-2:] + list(call.values())[:-2]  # Streams come first in the signature.

    def gradients(run):
        narrow_block.zero_grad()
        sum(output.square().sum() for output in run()).backward()
        return [parameter.grad.clone() for parameter in narrow_block.parameters()]

    plain = gradients(lambda: narrow_block(**call))
    again = gradients(lambda: torch.utils.checkpoint.checkpoint(narrow_block, *positions, use_reentrant=False))
    assert all(map(torch.equal, plain, again))


@torch.no_grad()
def test_bfloat16():
    stack, block, arguments, streams = dual_blocks("flux")[1]
    block = block.to(torch.bfloat16)
    narrow(
        block, stack, form_of(stack, ffn=("image",)), {**arguments, "temb": arguments["temb"].bfloat16()}, cast(streams)
    )
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}
    output = run_block(block, stack, {**arguments, "temb": arguments["temb"].bfloat16()}, cast(streams))
    assert output.image.dtype == torch.bfloat16


def cast(streams, dtype=torch.bfloat16):
    return Streams(*(value.to(dtype) for value in streams))


def test_float16_is_refused_where_the_block_clips():
    stack, block, arguments, streams = dual_blocks("flux")[1]
    half = {**arguments, "temb": arguments["temb"].half()}
    with pytest.raises(PpclError, match="path of its own in torch.float16"):
        narrow(block.half(), stack, form_of(stack, ffn=("image",)), half, cast(streams, torch.float16))


def test_traps_are_refused():
    streams = Streams(torch.randn(2, 9, 32), torch.randn(2, 5, 32))
    parallel = Stack(path="joint", depth_key="n", ffn={"image": "ff"}, joint_attention="attn")
    block = randomize(AuraFlowJointTransformerBlock(32, 2, 16))
    with pytest.raises(PpclError, match="cannot become joint.1-1.ffn_image: ff runs in parallel"):
        narrow(block, parallel, form_of(parallel, ffn=("image",)), {"temb": torch.randn(2, 32)}, streams)
    shared = Stack(path="s", depth_key="n", returns=("image", "text"), ffn={"image": "ff"}, joint_attention="attn1")
    block = randomize(CogView4TransformerBlock(32, 2, 16, 8))
    with pytest.raises(PpclError, match="called 2 times"):
        narrow(block, shared, form_of(shared, ffn=("image",)), {"temb": torch.randn(2, 8)}, streams)
    with pytest.raises(PpclError, match="its streams share their weights"):
        narrow(block, shared, form_of(shared, text="end", reference=(0, 0)), {"temb": torch.randn(2, 8)}, streams)
    with pytest.raises(PpclError, match="names no text FFN"):
        narrow(block, shared, form_of(shared, ffn=("text",)), {"temb": torch.randn(2, 8)}, streams)
    assert type(block) is CogView4TransformerBlock
    single = next(entry for entry in FAMILIES["flux"]() if not entry[0].joint_attention)
    with pytest.raises(PpclError, match="no attention with a text stream"):
        narrow(single[1], single[0], form_of(single[0], text="tap"), *single[2:])
